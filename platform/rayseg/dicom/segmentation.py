"""Masks of a series to one DICOM Segmentation object and back.

Equal sources, masks and model give equal bytes and UIDs: UIDs are hashes, dates come from the source.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import highdicom
import numpy as np
import pydicom
from highdicom.seg import SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.valuerep import format_number_as_ds

from rayseg.dicom import patient, unplaced
from rayseg.dicom.frames import fill_pixels
from rayseg.dicom.parsing import silence_libraries
from rayseg.dicom.reading import slice_uid
from rayseg.dicom.sources import (
    PLAIN_CLASS,
    Source,
    are_placed,
    attributes,
    most_lossy,
    name_sources,
    parsed,
    take_lossy,
)
from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.records import QualityFlag, Reason, Reject

Kind = Literal["BINARY", "LABELMAP", "FRACTIONAL"]

_ROUNDING = 2.001 * planes.SAME_DIRECTION  # any two of the slices that a series' verdict keeps together
_SHARED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns")
_NO_DATE, _NO_TIME = "19700101", "000000"  # of a source without dates; the attributes are mandatory

_ALTERED = Code("49755003", "SCT", "Morphologically Altered Structure")
_LESION = Code("52988006", "SCT", "Lesion")
_PROPERTY_TYPES = {  # SNOMED CT, PS3.16 CID 7151 and its included groups
    "lesion": _LESION,
    "hemorrhage": Code("50960005", "SCT", "Hemorrhage"),
    "infarct": Code("55641003", "SCT", "Infarct"),
    "ischemia": Code("52674009", "SCT", "Ischemia"),
    "edema": Code("79654002", "SCT", "Edema"),
    "tumor": Code("108369006", "SCT", "Neoplasm"),
}


def encode(
    sources: Sequence[bytes | Dataset],
    masks: Sequence[np.ndarray],
    labels: tuple[str, ...],
    model_name: str,
    model_version: str,
    digest: str,
    kind: Kind = "BINARY",
    frames: Sequence[int | None] | None = None,
    probabilities: Sequence[np.ndarray] | None = None,
    settings: str = "",
    engine: str = "",
    flags: Mapping[QualityFlag, str] | None = None,
) -> bytes | Reject:
    """Encodes the masks of one series, in any order, as one DICOM Segmentation object.

    Every slice gets its frames, empty ones too. Frames lie on their source's own plane, so tilted stacks, gaps and
    uneven steps are as good as others; images that lie nowhere in a patient (CR, DX, MG) have frames without a plane.
    BINARY is uncompressed, one frame a slice and label; LABELMAP is RLE compressed, one frame a slice. FRACTIONAL
    holds probabilities, RLE compressed, one frame a slice and label.

    Args:
        sources: the slices, as bytes or data sets (their pixel data is not needed).
        masks: one uint8 label map (rows, columns) a slice: 0 background, 1 the first of `labels`, ... Each is taken
            once at a time, so that a sequence may make them when it is asked.
        labels: the segments' names.
        model_name, model_version: the registered model.
        digest: of the model.
        probabilities: of FRACTIONAL, one uint8 (rows, columns, labels) a slice: 255 is certain.
        frames: for each slice which frame of its source it is, from 0; None where the source is one image, as by
            default. A multi-frame source is given once a frame, best as the same data set.
        settings: digest of what else decides about a mask; other settings give other UIDs.
        engine: that ran the network, as a parameter of the algorithm.
        flags: what of the series is worth a look, and why: told in ImageComments (PS3.3 C.7.6.1).

    Returns:
        The object's bytes; or a Reject where a source lacks a part of its place in the patient or another needed
        attribute, or one of the patient cannot be read (MISSING_ATTRIBUTE), is no data set (CORRUPT), differs from the
        others in size, series, patient, frame of reference or orientation (SERIES_MIXED), or cannot be expressed as a
        segmentation (WRITE_FAILED).

    Raises:
        ValueError: masks that do not belong to the sources, or values without label.
    """
    if not sources or len(sources) != len(masks):
        raise ValueError(f"{len(masks)} masks for {len(sources)} slices: give one a slice, and at least one")
    silence_libraries()
    frames = frames or [None] * len(sources)
    assert (kind == "FRACTIONAL") <= (probabilities is not None)
    slices, wholes = [], []
    for place, (source, frame, mask) in enumerate(zip(sources, frames, masks, strict=True)):
        whole = parsed(source)
        dataset = whole if isinstance(whole, Reject) else attributes(whole, frame)
        if isinstance(whole, Reject) or isinstance(dataset, Reject):
            return whole if isinstance(whole, Reject) else dataset
        if mask.dtype != np.uint8 or mask.shape != (dataset.Rows, dataset.Columns):
            raise ValueError(f"mask {mask.dtype} {mask.shape}: expected uint8 {(dataset.Rows, dataset.Columns)}")
        if mask.max() > len(labels):
            raise ValueError(f"mask holds {mask.max()}, labels name 1 to {len(labels)}")
        slices.append(Source(dataset, place, str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), frame))
        wholes.append(whole)
    datasets = [one.dataset for one in slices]
    subject = patient.of_series(wholes)
    if isinstance(subject, Reject):
        return subject
    if subject.character_set is None and not "".join([*labels, model_name, model_version]).isascii():
        return Reject(Reason.MISSING_ATTRIBUTE, "SpecificCharacterSet, of names that are not in ASCII")
    placed = are_placed(datasets)
    if isinstance(placed, Reject):
        return placed
    if len({tuple(dataset.get(keyword) for keyword in _SHARED) for dataset in datasets}) > 1:
        return Reject(Reason.SERIES_MIXED, "slices of several series, frames of reference or sizes")
    slices.sort(key=lambda one: (_along_normal_mm(one.dataset), one.sop_instance_uid, one.frame or 0))
    datasets = [one.dataset for one in slices]
    known = unplaced.known(datasets)
    distance_mm = None
    if not placed:
        unplaced.stand_in(datasets)
    elif not planes.are_parallel([dataset.ImageOrientationPatient for dataset in datasets], _ROUNDING):
        return Reject(Reason.SERIES_MIXED, "ImageOrientationPatient differs within the series by more than rounding")
    else:
        down_mm, across_mm = map(float, datasets[0].PixelSpacing)
        tolerance_mm = planes.tolerance_mm(Geometry(1, 1, (down_mm, across_mm)))
        distance_mm = planes.distance_mm([*map(_along_normal_mm, datasets)], tolerance_mm)
    for dataset in datasets:
        dataset.ImageOrientationPatient = datasets[0].ImageOrientationPatient  # the frames share it
    if "SliceThickness" not in datasets[0]:
        datasets[0].SliceThickness = _nominal_thickness(datasets)
    take_lossy(datasets[0], most_lossy(datasets))
    name, version = long_string(model_name), long_string(model_version)
    named = sorted(slice_uid(one.sop_instance_uid, one.frame) for one in slices)
    identity = [named, model_name, model_version, digest, kind, settings]
    content_date, content_time = _content_time(datasets)
    for one in slices:
        # highdicom wants all pixels at once and makes several copies of them: it gets one of each slice.
        one.dataset.Rows = one.dataset.Columns = 1
        one.dataset.SOPClassUID = PLAIN_CLASS
        for keyword in patient.TYPE_2:
            setattr(one.dataset, keyword, "")
        if one.frame is not None:
            one.dataset.SOPInstanceUID = hashed_uid("frame", [one.sop_instance_uid, one.frame])
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=datasets,
            pixel_array=_stand_in(len(slices), len(labels), kind),
            segmentation_type=kind,
            segment_descriptions=_descriptions(labels, name, version, {"digest": digest, "engine": engine}),
            series_instance_uid=hashed_uid("series", identity),
            series_number=9001,
            sop_instance_uid=hashed_uid("instance", identity),
            instance_number=1,
            manufacturer="rayseg",
            manufacturer_model_name=name,
            software_versions=version,
            device_serial_number=long_string(digest),
            content_label="SEGMENTATION",
            content_description=f"Made by a research model, not for diagnosis{'; see Image Comments' if flags else ''}",
            content_date=content_date,
            content_time=content_time,
            series_description=long_string(f"{model_name} v{model_version} segmentation"),
            specific_character_set="ISO_IR 192",
            omit_empty_frames=False,
            max_fractional_value=255,
        )
        if flags:
            comments = "; ".join(f"{flag} ({detail})" for flag, detail in flags.items())
            segmentation.ImageComments = f"Check: {comments}"
        pixels = probabilities if kind == "FRACTIONAL" and probabilities is not None else masks
        by_name = {str(one.dataset.SOPInstanceUID): one.place for one in slices}
        fill_pixels(segmentation, by_name, pixels)
        name_sources(segmentation, slices)
        _tell_distance(segmentation, distance_mm)
        if not placed:
            unplaced.take_out(segmentation, known)
        patient.write(subject, segmentation)
        return _fixed_bytes(segmentation, identity)
    except Exception as error:  # highdicom refuses what it cannot express by many types; its text may identify
        return Reject(Reason.WRITE_FAILED, f"the segmentation cannot be made: {type(error).__name__}")


def _stand_in(slices: int, labels: int, kind: Kind) -> np.ndarray:
    """One pixel a slice: a label map, or the probabilities of all labels."""
    return np.zeros((slices, 1, 1, labels), np.float32) if kind == "FRACTIONAL" else np.zeros((slices, 1, 1), np.uint8)


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a segmentation says. Slices are named by `Header.slice_uid` of their source (`#frame` of a multi-frame)."""

    masks: dict[str, np.ndarray]  # uint8 label maps (rows, columns); where segments overlap the later one wins
    geometries: dict[str, Geometry]  # of the same slices
    labels: dict[int, str]  # SegmentLabel by SegmentNumber


def decode(data: bytes) -> dict[str, np.ndarray]:
    """The `masks` that `read` gives; raises ValueError likewise."""
    return read(data).masks


def read(data: bytes) -> Decoded:
    """Decodes a BINARY or LABELMAP segmentation whose frames each name one source slice.

    Raises:
        ValueError: not such an object.
    """
    silence_libraries()
    try:
        return _decoded(pydicom.dcmread(BytesIO(data), force=True))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"not a readable DICOM segmentation ({type(error).__name__})") from None


def _decoded(dataset: Dataset) -> Decoded:
    if dataset.get("SegmentationType") not in ("BINARY", "LABELMAP"):
        raise ValueError("SegmentationType: not a DICOM segmentation of type BINARY or LABELMAP")
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    masks: dict[str, np.ndarray] = {}
    geometries: dict[str, Geometry] = {}
    for frame, groups in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        derivation = groups.get("DerivationImageSequence") or shared.get("DerivationImageSequence")
        if not derivation or not derivation[0].get("SourceImageSequence"):
            raise ValueError("DerivationImageSequence: a frame names no source image")
        source = derivation[0].SourceImageSequence[0]
        number = source.get("ReferencedFrameNumber")  # from 1
        name = slice_uid(str(source.ReferencedSOPInstanceUID), None if number is None else int(number) - 1)
        if name not in masks:
            masks[name] = np.zeros(frame.shape, np.uint8)
            geometries[name] = _geometry(dataset, groups, shared)
        if dataset.SegmentationType == "LABELMAP":
            masks[name][:] = frame
        else:
            segment = (groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence)[0]
            masks[name][frame > 0] = segment.ReferencedSegmentNumber
    numbered = {int(segment.SegmentNumber): str(segment.SegmentLabel) for segment in dataset.SegmentSequence}
    labels = {number: label for number, label in numbered.items() if number > 0}  # 0: the background of a label map
    return Decoded(masks, geometries, labels)


def _geometry(dataset: Dataset, groups: Dataset, shared: Dataset) -> Geometry:
    """Of a frame, by its functional groups or those of all (PS3.3 C.7.6.16.2); what they lack is None."""

    def numbers(sequence: str, keyword: str) -> Any:
        items = groups.get(sequence) or shared.get(sequence)
        value = items[0].get(keyword) if items else None
        return None if value is None else tuple(map(float, np.atleast_1d(value)))

    thickness = numbers("PixelMeasuresSequence", "SliceThickness")
    return Geometry(
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        pixel_spacing_mm=numbers("PixelMeasuresSequence", "PixelSpacing"),
        slice_thickness_mm=thickness[0] if thickness else None,
        image_position_mm=numbers("PlanePositionSequence", "ImagePositionPatient"),
        image_orientation=numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
    )


def _tell_distance(segmentation: Dataset, distance_mm: float | None) -> None:
    """SpacingBetweenSlices, along the normal (PS3.3 C.7.6.16.2.1): readers that make volumes take it for the step.

    Without it they take SliceThickness. Absent where slices do not have one distance: no number would be true.
    """
    measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.pop("SpacingBetweenSlices", None)
    if distance_mm is not None:
        measures.SpacingBetweenSlices = format_number_as_ds(distance_mm)


def _along_normal_mm(dataset: Dataset) -> float:
    if "ImagePositionPatient" not in dataset:
        return 0.0
    return float(planes.along_mm([dataset.ImagePositionPatient], dataset.ImageOrientationPatient)[0])


def _nominal_thickness(datasets: Sequence[Dataset]) -> str:
    """In place of a missing SliceThickness, without which readers refuse a segmentation: the median slice distance.

    A lone slice counts as thick as its rows are apart. As a decimal string of at most 16 characters.
    """
    steps_mm = np.diff([_along_normal_mm(dataset) for dataset in datasets])
    steps_mm = steps_mm[steps_mm > 0]
    return f"{float(np.median(steps_mm)) if len(steps_mm) else float(datasets[0].PixelSpacing[0]):.6g}"


def _content_time(datasets: Sequence[Dataset]) -> tuple[str, str]:
    """The latest time of the source series, else of its study, that comes with a date."""
    for prefix in ("Series", "Study"):
        times = [(d.get(f"{prefix}Date") or "", d.get(f"{prefix}Time") or _NO_TIME) for d in datasets]
        if max(times)[0]:
            return max(times)
    return _NO_DATE, _NO_TIME


def _descriptions(
    labels: tuple[str, ...], name: str, version: str, parameters: dict[str, str]
) -> list[SegmentDescription]:
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=name,
        family=codes.cid7162.ArtificialIntelligence,
        version=version,
        parameters={key: value for key, value in parameters.items() if value},
    )
    return [
        SegmentDescription(
            segment_number=number,
            segment_label=long_string(label),
            segmented_property_category=_ALTERED,
            segmented_property_type=finding(label),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, label in enumerate(labels, start=1)
    ]


def finding(label: str) -> Code:
    """The standard's code for what a label names; a lesion where it knows none."""
    return _PROPERTY_TYPES.get(label.lower(), _LESION)


def long_string(text: str) -> str:
    """As a value of VR LO: one line, at most 64 characters, no backslash (it separates values)."""
    return " ".join(text.replace("\\", "/").split())[:64] or "unnamed"


def hashed_uid(purpose: str, identity: list[Any]) -> str:
    """A UID of the form 2.25.<UUID as integer> (PS3.5 B.2) whose UUID is a hash."""
    hashed = hashlib.sha256(json.dumps([purpose, *identity]).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=hashed[:16], version=5).int}"


def _fixed_bytes(segmentation: Dataset, identity: list[Any]) -> bytes:
    """Replaces what highdicom takes from the clock and from chance, and encodes."""
    if "ContentCreatorName" not in segmentation:
        segmentation.ContentCreatorName = ""  # of type 2 (PS3.3 table 10-12), which highdicom leaves out
    segmentation.InstanceCreationDate = segmentation.ContentDate
    segmentation.InstanceCreationTime = segmentation.ContentTime
    for item in segmentation.ContributingEquipmentSequence:
        item.ContributionDateTime = f"{segmentation.ContentDate}{segmentation.ContentTime}"
    organization_uid = hashed_uid("dimensions", identity)
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization_uid
    stream = BytesIO()
    segmentation.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
