"""A request's body to the slices of one series, in order. Nothing here raises on any bytes.

A body is one object (DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG or TIFF), a zip of objects, or a form
(multipart/form-data) whose `file` parts are objects or zips. Names of files are not looked at, so none can lead
anywhere; what belongs together, and in which order, the objects say themselves, as they do for the bulk job.
"""

import dataclasses
import io
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from python_multipart import multipart
from python_multipart.exceptions import FormParserError

from rayseg.dicom import image_files, volumes
from rayseg.dicom.reading import Header, Slice, Source, read_headers
from rayseg.dicom.series import verdict
from rayseg.dicom.splitting import split
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject

# It tells of each wrong byte and bad form, and what a client sends is no log's business.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

FORM, ZIP = "multipart/form-data", "application/zip"
_FIELD = b"file"
_ZIP_MAGIC, _ZIP_ENTRY = b"PK\x03\x04", b"PK\x01\x02"
_ENCRYPTED = 1  # of an entry's flags
_STEP = 1 << 20
_SHOWN_STACKS = 5  # of a series of several


@dataclass(frozen=True)
class Limits:
    """Of what a body may become."""

    objects: int = 4096  # files of a form, entries of its zips
    inflated_bytes: int = 2**30  # of all entries, or of a volume
    slices: int = 4096
    pixels: int = 2**29  # of all slices: a mask has a byte for each


@dataclass(frozen=True, eq=False)
class Series:
    """The slices of one series in order, not decoded yet.

    Slice i is image `places[i][1]` (a frame, or None: its only one) of `objects[places[i][0]]`.
    """

    objects: Sequence[bytes] = field(repr=False)
    places: Sequence[tuple[int, int | None]]
    headers: Sequence[Header] | None = field(repr=False)  # of each slice; None where it is no DICOM
    geometries: Sequence[Geometry | None]  # of each slice
    left_out: Mapping[str, int]  # objects, and slices of others, that are not segmented, by reason
    detail: str = ""  # what the verdict found: gaps, tilt, slices left out

    def slices(self, color: bool) -> Iterator[Slice | Reject]:
        """Decodes one after the other, each when it is asked for; an object is parsed once."""
        last = {index: number for number, (index, _) in enumerate(self.places)}
        sources: dict[int, Source] = {}
        for number, (index, frame) in enumerate(self.places):
            if index not in sources:
                sources[index] = Source(self.objects[index], color)
            yield sources[index].slice(frame)
            if last[index] == number:
                del sources[index]

    def around(self, number: int, neighbours: int) -> tuple["Series", int]:
        """Slice `number` with its neighbours only, and its number among these."""
        first = max(number - neighbours, 0)
        some = slice(first, number + neighbours + 1)
        headers = None if self.headers is None else self.headers[some]
        near = dataclasses.replace(self, places=self.places[some], headers=headers, geometries=self.geometries[some])
        return near, number - first


def is_several(body: bytes, content_type: str) -> bool:
    """Whether the body is for sure more than one image: a zip, a form or a volume."""
    return content_type in (FORM, ZIP) or body.startswith(_ZIP_MAGIC) or volumes.is_volume(body)


def read(body: bytes, content_type: str, limits: Limits) -> Series | Reject:
    """The series of a body, or why there is none that is sure to be meant."""
    objects = _objects(body, content_type, limits)
    return objects if isinstance(objects, Reject) else arrange(objects, limits)


def arrange(objects: Sequence[bytes], limits: Limits) -> Series | Reject:
    """The one series that the objects hold: DICOM instances in any order, or a single volume or image file."""
    left_out: Counter[str] = Counter()
    first: Reject | None = None
    of_series: dict[str, list[tuple[int, Header]]] = {}
    others: list[int] = []
    for index, data in enumerate(objects):
        if volumes.is_volume(data) or image_files.is_image(data):
            others.append(index)
            continue
        headers = read_headers(data, len(data))
        if isinstance(headers, Reject):
            first = first or headers
            left_out[headers.reason] += 1
            continue
        for header in headers:
            of_series.setdefault(header.series_instance_uid, []).append((index, header))
    if others and not of_series:
        return _other(objects, others, left_out, limits)
    if others:
        left_out[Reason.NOT_DICOM] += len(others)
    for series_uid, slices in list(of_series.items()):
        if len(of_series) > 1 and all(header.localizer for _, header in slices):
            left_out[Reason.LOCALIZER] += len(slices)
            del of_series[series_uid]
    if not of_series:
        return first or Reject(Reason.EMPTY_OBJECT, "no object in the upload")
    if len(of_series) > 1:
        counts = ", ".join(str(len(slices)) for slices in of_series.values())
        return Reject(Reason.SERIES_MIXED, f"{len(of_series)} series, of {counts} slices: send one at a time")
    (slices,) = of_series.values()
    stacks = split([header for _, header in slices])
    if len(stacks.parts) > 1:
        shown = [str(part.name) for part in stacks.parts[:_SHOWN_STACKS]]
        names = "; ".join(shown if len(shown) == len(stacks.parts) else [*shown, "..."])
        reason = verdict([header for _, header in slices]).reason or Reason.SERIES_DUPLICATES
        return Reject(reason, f"{len(stacks.parts)} stacks ({names}): send one at a time")
    left_out.update(stacks.rest.values())
    slices = [slices[number] for number in stacks.parts[0].indices]
    judged = verdict([header for _, header in slices])
    if judged.verdict == "rejected":
        assert judged.reason is not None
        return Reject(judged.reason, judged.detail)
    kept = [slices[number] for number in judged.order]
    uids = {header.slice_uid for _, header in kept}
    for number in set(range(len(slices))) - set(judged.order):
        header = slices[number][1]
        reason = Reason.SERIES_DUPLICATES if header.slice_uid in uids else Reason.SERIES_MIXED
        left_out[Reason.LOCALIZER if header.localizer else reason] += 1
    return _within(
        limits,
        Series(
            objects,
            [(index, header.frame) for index, header in kept],
            [header for _, header in kept],
            [header.geometry for _, header in kept],
            dict(sorted(left_out.items())),
            judged.detail,
        ),
    )


def _other(
    objects: Sequence[bytes], others: Sequence[int], left_out: Mapping[str, int], limits: Limits
) -> Series | Reject:
    """A volume, or one image file: nothing says how several belong together."""
    if len(others) > 1:
        return Reject(Reason.SERIES_MIXED, f"{len(others)} image files or volumes: send one at a time, or DICOM")
    (index,) = others
    data, reasons = objects[index], dict(left_out)
    if not volumes.is_volume(data):
        return Series([data], [(0, None)], None, [None], reasons)
    volume = volumes.read_volume(data)
    if isinstance(volume, Reject):
        return volume
    if volume.inflated_bytes > limits.inflated_bytes:
        return Reject(Reason.TOO_LARGE, f"{volume.kind}: the size of the volume")
    count = volume.slices
    geometries = [Geometry(**volume.place(number)) for number in range(count)] if count <= limits.slices else []
    return _within(limits, Series([data], [(0, number) for number in range(count)], None, geometries, reasons))


def _within(limits: Limits, series: Series) -> Series | Reject:
    if len(series.places) > limits.slices:
        return Reject(Reason.TOO_LARGE, f"{len(series.places)} slices, of {limits.slices} at most")
    if sum(one.rows * one.columns for one in series.geometries if one) > limits.pixels:
        return Reject(Reason.TOO_LARGE, "Rows, Columns and the number of slices")
    return series


def _objects(body: bytes, content_type: str, limits: Limits) -> list[bytes] | Reject:
    """The files of the body, those of zips among them."""
    media_type = content_type.partition(";")[0].strip().lower()
    parts = _parts(body, content_type, limits) if media_type == FORM else [body]
    if isinstance(parts, Reject):
        return parts
    if media_type == ZIP and not body.startswith(_ZIP_MAGIC):
        return Reject(Reason.CORRUPT, "not a zip with any entry")
    objects: list[bytes] = []
    left = limits.inflated_bytes
    for part in parts:
        if not part.startswith(_ZIP_MAGIC):
            objects.append(part)
            continue
        inflated = _unzipped(part, left, limits.objects - len(objects))
        if isinstance(inflated, Reject):
            return inflated
        left -= sum(map(len, inflated))
        objects += inflated
    return objects


def _unzipped(data: bytes, most_bytes: int, most_entries: int) -> list[bytes] | Reject:
    """The entries of a zip, never more of them than allowed: what they say of their size is not believed."""
    # Before zipfile makes an object of some kB out of each entry of the directory.
    if data.count(_ZIP_ENTRY) > most_entries:
        return Reject(Reason.TOO_LARGE, "entries of the zip")
    contents: list[bytes] = []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("/"):  # a folder; `is_dir` stumbles over an entry without a name
                    continue
                if entry.flag_bits & _ENCRYPTED:
                    return Reject(Reason.CORRUPT, "zip: encrypted entries")
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    return Reject(Reason.CORRUPT, "zip: entries stored or deflated expected")
                content = bytearray()
                with archive.open(entry) as stream:
                    while chunk := stream.read(min(_STEP, most_bytes + 1)):
                        content += chunk
                        if len(content) > most_bytes:
                            return Reject(Reason.TOO_LARGE, "inflated bytes of the zip")
                most_bytes -= len(content)
                contents.append(bytes(content))
    # What zipfile raises on spoiled directories and on kinds of entries that it does not read; nothing else is in here.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        return Reject(Reason.CORRUPT, f"zip: {type(error).__name__}")
    return contents


class _Form:
    """The `file` parts of a form, as its parser tells of them."""

    def __init__(self, most: int) -> None:
        self.files: list[bytes] = []
        self.whole = False
        self.too_many = False
        self._most = most
        self._name, self._value, self._part = bytearray(), bytearray(), bytearray()
        self._wanted = False

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": lambda data, start, end: self._part.extend(data[start:end]) if self._wanted else None,
            "on_part_end": self._end,
            "on_end": self._close,
        }

    def _begin(self) -> None:
        self._part, self._wanted = bytearray(), False

    def _header(self) -> None:
        if self._name.lower() == b"content-disposition":
            _, options = multipart.parse_options_header(bytes(self._value))
            self._wanted = options.get(b"name") == _FIELD
        self._name, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        if self._wanted:
            self.too_many = self.too_many or len(self.files) == self._most
            if not self.too_many:
                self.files.append(bytes(self._part))
        self._part = bytearray()

    def _close(self) -> None:
        self.whole = True


def _parts(body: bytes, content_type: str, limits: Limits) -> list[bytes] | Reject:
    _, options = multipart.parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        return Reject(Reason.CORRUPT, "multipart/form-data without a boundary")
    form = _Form(limits.objects)
    try:
        parser = multipart.MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError:
        return Reject(Reason.CORRUPT, "multipart/form-data that cannot be parsed")
    if form.too_many:
        return Reject(Reason.TOO_LARGE, "files of the form")
    if not form.whole:
        return Reject(Reason.TRUNCATED, "multipart/form-data without its end")
    if not form.files:
        return Reject(Reason.EMPTY_OBJECT, "the form has no part named file")
    return form.files
