"""The rows of a manifest: what the beginning of an object says, under pseudonyms, and what its series makes of it."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayseg import storage
from rayseg.dicom import image_files, series, splitting, volumes
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Header, read_headers
from rayseg.dicom.voxels import Volume
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject
from rayseg.retry import CredentialsError

MAX_OBJECT_BYTES = 2**31  # larger objects are refused unread
_STACK, _STACK_DIGITS = "-", 10  # between a series' key and what stands for its stack's name; of that
_OF_NO_STACK = {
    Reason.LOCALIZER: "a localizer",
    Reason.SERIES_MIXED: "of another size, spacing or plane than the stacks of the series",
    Reason.SERIES_DUPLICATES: "a slice where one of a stack lies, and no stack by itself",
}
MORE_BYTES = 2**22  # read where the beginning does not hold the header: it then has functional groups or an icon


@dataclass(frozen=True)
class Item:
    """An object of a source as the listing and the layout give it."""

    uri: str
    path: str  # below the layout's image folder, where it has one
    bytes: int | None  # None where the listing does not tell: then the object is read whole
    masks: list[dict[str, Any]]  # rows of `records.MASK_FILES`
    group: str | None  # the patient, where the layout names one


def rows(
    item: Item, beginning: bytes | OSError, pseudonyms: Pseudonyms, volume: int | None = None
) -> list[dict[str, Any]]:
    """The manifest rows of one object, one a frame, without a series verdict; raises CredentialsError alone.

    Args:
        item: the object.
        beginning: its first bytes, or all of them; the object is read whole where they do not suffice.
        pseudonyms: for the identities.
        volume: which one of a file of several volumes is meant, see `layouts.Layout`.
    """
    base: dict[str, Any] = {"uri": item.uri, "bytes": item.bytes, "masks": item.masks}
    if item.bytes is None and isinstance(beginning, bytes):
        item = dataclasses.replace(item, bytes=len(beginning))
        base |= {"bytes": item.bytes, "etag": hashlib.sha256(beginning).hexdigest()}
    try:
        found = _describe(item, beginning, pseudonyms, volume)
    except OSError as error:
        found = read_failure(error)
    except CredentialsError:
        raise
    except Exception as error:  # a defect of ours must cost this row only
        found = Reject(Reason.INTERNAL, type(error).__name__)
    if isinstance(found, Reject):
        return [refused(base, found)]
    return [{**base, "verdict": "ok", **one} for one in found]


def refused(values: dict[str, Any], reject: Reject) -> dict[str, Any]:
    """The row with a reject's verdict."""
    return {**values, "verdict": "rejected", "reason": reject.reason.value, "detail": reject.detail}


def read_failure(error: OSError, what: str = "object") -> Reject:
    """The reject of an object that could not be read."""
    reason = Reason.NOT_FOUND if isinstance(error, FileNotFoundError) else Reason.READ_FAILED
    return Reject(reason, f"{what}: {type(error).__name__}")


def in_series(rows: list[dict[str, Any]], wanted: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows with the verdict of their series, which stands together in the order of its slices.

    A series stands where its first row stood, and behind it those of its rows that were rejected before. Where it has
    several stacks they stand one after the other, each a series with a key of its own, made of the series' key and the
    stack's name. Rows of a rejected series, and those
    that a salvaged one leaves out, are rejected with the series' reason, those of stacks that no pattern in `wanted`
    matches as STACK_NOT_WANTED; without patterns all are taken.
    """
    members: dict[str, list[dict[str, Any]]] = {}
    for values in rows:
        if values["kind"] == "dicom" and values["series_key"] is not None:
            members.setdefault(values["series_key"], []).append(values)
    ordered: list[dict[str, Any]] = []
    for values in rows:
        if values["kind"] != "dicom" or values["series_key"] is None:
            ordered.append(values)
        elif of_series := members.pop(values["series_key"], None):  # else it stands already
            accepted = [row for row in of_series if row["verdict"] == "ok"]
            ordered += _split(accepted, wanted) if accepted else []
            ordered += [row for row in of_series if row["verdict"] != "ok"]
    assert len(ordered) == len(rows)
    return ordered


def whole_series(keys: pa.Array) -> pa.Array:
    """The keys of the series that stacks are of, by `series_key`."""
    return pc.replace_substring_regex(keys, f"{_STACK}.*", "")


def unjudged(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `in_series` as it was before."""
    if row["kind"] == "dicom" and row["series_verdict"] is not None:  # only accepted rows are judged
        row |= {"verdict": "ok", "reason": None, "detail": None, "series_verdict": None, "series_detail": None}
        if row["stack"] is not None:
            row |= {"series_key": row["series_key"].partition(_STACK)[0], "stack": None}
    return row


def _split(rows: list[dict[str, Any]], wanted: Sequence[str] | None) -> list[dict[str, Any]]:
    """The rows of one series, a stack after the other; what is of none stands behind the first, under its key."""
    split = splitting.split([_header(values) for values in rows])
    judged: list[dict[str, Any]] = []
    for part in split.parts:
        stack: dict[str, Any] = {}
        if part.name is not None:
            key = f"{rows[0]['series_key']}{_STACK}{hashlib.sha256(part.name.encode()).hexdigest()[:_STACK_DIGITS]}"
            stack = {"series_key": key, "stack": part.name}
        of_stack = [rows[index] | stack for index in part.indices]
        if part.name is None or wanted is None or any(fnmatchcase(part.name, pattern) for pattern in wanted):
            judged += _judged(of_stack)
        else:
            told = {"series_verdict": "rejected", "series_detail": "stack not wanted"}
            reject = Reject(Reason.STACK_NOT_WANTED, "catalog.stacks")
            judged += [refused(values | told, reject) for values in of_stack]
        if part is split.parts[0]:
            stack |= {name: judged[-1][name] for name in ("series_verdict", "series_detail")}
            for index, reason in split.rest.items():
                judged.append(refused(rows[index] | stack, Reject(reason, _OF_NO_STACK[reason])))
    return judged


def _judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    verdict = series.verdict([_header(values) for values in rows])
    told = {"series_verdict": verdict.verdict, "series_detail": verdict.detail}
    kept = {_slice_key(rows[index]) for index in verdict.order}
    judged = [rows[index] | told for index in verdict.order]
    for index in sorted(set(range(len(rows))) - set(verdict.order)):
        copy = _slice_key(rows[index]) in kept
        reason = verdict.reason or (Reason.SERIES_DUPLICATES if copy else Reason.SERIES_MIXED)
        if rows[index]["localizer"]:
            reason = Reason.LOCALIZER
        judged.append(refused(rows[index] | told, Reject(reason, verdict.detail)))
    return judged


def _slice_key(values: dict[str, Any]) -> tuple[str, int | None]:
    return values["instance_key"], values["frame"]


def _describe(
    item: Item, beginning: bytes | OSError, pseudonyms: Pseudonyms, number: int | None
) -> list[dict[str, Any]] | Reject:
    if item.bytes is not None and item.bytes > MAX_OBJECT_BYTES:
        return Reject(Reason.TOO_LARGE, "bytes of the object")
    if isinstance(beginning, OSError):
        return read_failure(beginning)
    assert item.bytes is not None
    complete = len(beginning) >= item.bytes
    if image_files.is_image(beginning):
        size = image_files.size(beginning)
        if size is None and not complete:
            size = image_files.size(storage.read(item.uri))
        return Reject(Reason.NOT_AN_IMAGE) if size is None else [_of_image(item, size, pseudonyms)]
    if volumes.is_volume(beginning):
        volume = volumes.read_volume(beginning, number)
        if isinstance(volume, Reject) and volume.reason == Reason.TRUNCATED and not complete:
            volume = volumes.read_volume(storage.read(item.uri, MORE_BYTES), number)
        return volume if isinstance(volume, Reject) else _of_volume(item, volume, pseudonyms, number)
    headers = read_headers(beginning, item.bytes)
    for length in (MORE_BYTES, item.bytes):
        provisional = isinstance(headers, Reject) and headers.reason != Reason.NOT_DICOM
        if provisional and len(beginning) < min(length, item.bytes):
            beginning = storage.read(item.uri, length)
            headers = read_headers(beginning, item.bytes)
    return headers if isinstance(headers, Reject) else [_of_dicom(item, header, pseudonyms) for header in headers]


def _of_image(item: Item, size: tuple[int, int], pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Image files carry no identity: the CSV's group stands for patient and series, else the folders do."""
    folder, _, _ = item.path.rpartition("/")
    return {
        "kind": "image",
        "frame": None,
        "patient_key": pseudonyms.key("patient", item.group or folder.partition("/")[0]),
        "series_key": pseudonyms.key("series", item.group or folder),
        "instance_key": pseudonyms.key("instance", item.path),
        "rows": size[0],
        "columns": size[1],
        "series_verdict": "ok",
    }


def _of_volume(item: Item, volume: Volume, pseudonyms: Pseudonyms, number: int | None) -> list[dict[str, Any]]:
    """One row a slice. Without the layout's patient each volume is one, and each file where it has several."""
    path = f"{item.path}#{number}" if volume.count > 1 else item.path
    keys = {
        "kind": "image",
        "patient_key": pseudonyms.key("patient", item.group or item.path),
        "series_key": pseudonyms.key("series", path),
        "instance_key": pseudonyms.key("instance", item.path),
        "series_verdict": "ok",
    }
    first = (number or 0) * volume.slices
    return [{**keys, "frame": first + index, **volume.place(index)} for index in range(volume.slices)]


def _of_dicom(item: Item, header: Header, pseudonyms: Pseudonyms) -> dict[str, Any]:
    geometry = header.geometry
    return {
        "kind": "dicom",
        "frame": header.frame,
        "patient_key": _patient_key(item, header, pseudonyms),
        "study_key": pseudonyms.key("study", header.study_instance_uid),
        "series_key": pseudonyms.key("series", header.series_instance_uid),
        "instance_key": pseudonyms.key("instance", header.sop_instance_uid),
        "frame_of_reference_key": header.frame_of_reference_uid
        and pseudonyms.key("frame_of_reference", header.frame_of_reference_uid),
        "localizer": header.localizer,
        "traits": header.traits,
        "modality": header.modality,
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "rows": geometry.rows,
        "columns": geometry.columns,
        "instance_number": header.instance_number,
        "pixel_spacing_mm": geometry.pixel_spacing_mm,
        "slice_thickness_mm": geometry.slice_thickness_mm,
        "image_position_mm": geometry.image_position_mm,
        "image_orientation": geometry.image_orientation,
    }


def _patient_key(item: Item, header: Header, pseudonyms: Pseudonyms) -> str:
    if item.group or not header.patient_id:
        # Without a PatientID the study is the narrowest thing that surely is of one patient.
        return pseudonyms.key("patient", item.group or header.study_instance_uid)
    return pseudonyms.patient(header.patient_id, header.issuer_of_patient_id)


def _header(values: dict[str, Any]) -> Header:
    """The header of a row again, with pseudonyms in the place of identities: enough to judge a series."""

    def numbers(name: str) -> Any:
        return None if values[name] is None else tuple(values[name])

    return Header(
        sop_class_uid="",
        sop_instance_uid=values["instance_key"],
        series_instance_uid=values["series_key"],
        study_instance_uid=values["study_key"],
        patient_id=values["patient_key"],
        frame_of_reference_uid=values["frame_of_reference_key"],
        modality=values["modality"],
        transfer_syntax_uid=values["transfer_syntax_uid"],
        instance_number=values["instance_number"],
        geometry=Geometry(
            rows=values["rows"],
            columns=values["columns"],
            pixel_spacing_mm=numbers("pixel_spacing_mm"),
            slice_thickness_mm=values["slice_thickness_mm"],
            image_position_mm=numbers("image_position_mm"),
            image_orientation=numbers("image_orientation"),
        ),
        frame=values["frame"],
        localizer=values["localizer"],
        traits=values["traits"],
    )
