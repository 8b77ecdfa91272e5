"""Masks of a series to one DICOM Segmentation object and back.

Equal sources, masks and model give equal bytes and UIDs: UIDs are hashes, dates come from the source.
"""

import hashlib
import json
import uuid
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Literal

import highdicom
import numpy as np
import pydicom
from highdicom.seg import SegmentDescription
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from rayseg.dicom.parsing import silence_libraries
from rayseg.dicom.reading import slice_uid
from rayseg.dicom.series import SAME_DIRECTION
from rayseg.dicom.sources import PLAIN_CLASS, Source, attributes, name_sources
from rayseg.records import Reason, Reject

Kind = Literal["BINARY", "LABELMAP", "FRACTIONAL"]

_ROUNDING = 2.001 * SAME_DIRECTION  # any two of the slices that a series' verdict keeps together
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
) -> bytes | Reject:
    """Encodes the masks of one series, in any order, as one DICOM Segmentation object.

    Every slice gets its frames, empty ones too. Frames lie on their source's own plane, so tilted stacks, gaps and
    uneven steps are as good as others. BINARY is uncompressed, one frame a slice and label; LABELMAP is RLE
    compressed, one frame a slice. FRACTIONAL holds probabilities, RLE compressed, one frame a slice and label.

    Args:
        sources: the slices, as bytes or data sets (their pixel data is not needed).
        masks: one uint8 label map (rows, columns) a slice: 0 background, 1 the first of `labels`, ...
        labels: the segments' names.
        model_name, model_version: the registered model.
        digest: of the model and all settings that decide about a mask.
        probabilities: of FRACTIONAL, one uint8 (rows, columns, labels) a slice: 255 is certain.
        frames: for each slice which frame of its source it is, from 0; None where the source is one image, as by
            default. A multi-frame source is given once a frame, best as the same data set.

    Returns:
        The object's bytes; or a Reject where a source lacks a place in the patient or another needed attribute
        (MISSING_ATTRIBUTE), is no data set (CORRUPT), differs from the others in size, series, frame of reference or
        orientation (SERIES_MIXED), or cannot be expressed as a segmentation (WRITE_FAILED).

    Raises:
        ValueError: masks that do not belong to the sources, or values without label.
    """
    if not sources or len(sources) != len(masks):
        raise ValueError(f"{len(masks)} masks for {len(sources)} slices: give one a slice, and at least one")
    silence_libraries()
    frames = frames or [None] * len(sources)
    assert (kind == "FRACTIONAL") <= (probabilities is not None)
    slices = []
    encoded = probabilities if kind == "FRACTIONAL" and probabilities is not None else masks
    for source, frame, mask, pixels in zip(sources, frames, masks, encoded, strict=True):
        dataset = attributes(source, frame)
        if isinstance(dataset, Reject):
            return dataset
        if mask.dtype != np.uint8 or mask.shape != (dataset.Rows, dataset.Columns):
            raise ValueError(f"mask {mask.dtype} {mask.shape}: expected uint8 {(dataset.Rows, dataset.Columns)}")
        if mask.max() > len(labels):
            raise ValueError(f"mask holds {mask.max()}, labels name 1 to {len(labels)}")
        slices.append(Source(dataset, pixels, str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), frame))
    datasets = [one.dataset for one in slices]
    if len({(s.StudyInstanceUID, s.SeriesInstanceUID, s.FrameOfReferenceUID, s.Rows, s.Columns) for s in datasets}) > 1:
        return Reject(Reason.SERIES_MIXED, "slices of several series, frames of reference or sizes")
    slices.sort(key=lambda one: (_along_normal_mm(one.dataset), one.sop_instance_uid, one.frame or 0))
    datasets = [one.dataset for one in slices]
    orientations = np.array([dataset.ImageOrientationPatient for dataset in datasets], float)
    if np.abs(orientations - orientations[0]).max() > _ROUNDING:
        return Reject(Reason.SERIES_MIXED, "ImageOrientationPatient differs within the series by more than rounding")
    for dataset in datasets:
        dataset.ImageOrientationPatient = datasets[0].ImageOrientationPatient  # the frames share it
    if "SliceThickness" not in datasets[0]:
        datasets[0].SliceThickness = _nominal_thickness(datasets)
    name, version = long_string(model_name), long_string(model_version)
    named = sorted(slice_uid(one.sop_instance_uid, one.frame) for one in slices)
    identity = [named, model_name, model_version, digest, kind]
    content_date, content_time = _content_time(datasets)
    for one in slices:
        one.dataset.SOPClassUID = PLAIN_CLASS
        if one.frame is not None:
            one.dataset.SOPInstanceUID = hashed_uid("frame", [one.sop_instance_uid, one.frame])
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=datasets,
            pixel_array=_pixels(slices, kind),
            segmentation_type=kind,
            segment_descriptions=_descriptions(labels, name, version, digest),
            series_instance_uid=hashed_uid("series", identity),
            series_number=9001,
            sop_instance_uid=hashed_uid("instance", identity),
            instance_number=1,
            manufacturer="rayseg",
            manufacturer_model_name=name,
            software_versions=version,
            device_serial_number=long_string(digest),
            content_label="SEGMENTATION",
            content_description="Made by a research model, not for diagnosis",
            content_date=content_date,
            content_time=content_time,
            series_description=long_string(f"{model_name} v{model_version} segmentation"),
            specific_character_set="ISO_IR 192",
            omit_empty_frames=False,
            transfer_syntax_uid=uid.ExplicitVRLittleEndian if kind == "BINARY" else uid.RLELossless,
            max_fractional_value=255,
        )
        name_sources(segmentation, slices)
        return _fixed_bytes(segmentation, identity)
    except Exception as error:  # highdicom refuses what it cannot express by many types; its text may identify
        return Reject(Reason.WRITE_FAILED, f"the segmentation cannot be made: {type(error).__name__}")


def _pixels(slices: Sequence[Source], kind: Kind) -> np.ndarray:
    """The slices' masks together, or their probabilities as float32 fractions."""
    stacked = np.stack([one.mask for one in slices])
    return stacked.astype(np.float32) / 255 if kind == "FRACTIONAL" else stacked


def decode(data: bytes) -> dict[str, np.ndarray]:
    """Decodes a BINARY or LABELMAP segmentation whose frames each name one source slice.

    Returns:
        `Header.slice_uid` of a source slice (SOPInstanceUID, with `#frame` of a multi-frame object) -> uint8 label map
        (rows, columns); where segments overlap the later one wins.

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


def _decoded(dataset: Dataset) -> dict[str, np.ndarray]:
    if dataset.get("SegmentationType") not in ("BINARY", "LABELMAP"):
        raise ValueError("SegmentationType: not a DICOM segmentation of type BINARY or LABELMAP")
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    masks: dict[str, np.ndarray] = {}
    for frame, groups in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        derivation = groups.get("DerivationImageSequence") or shared.get("DerivationImageSequence")
        if not derivation or not derivation[0].get("SourceImageSequence"):
            raise ValueError("DerivationImageSequence: a frame names no source image")
        source = derivation[0].SourceImageSequence[0]
        number = source.get("ReferencedFrameNumber")  # from 1
        name = slice_uid(str(source.ReferencedSOPInstanceUID), None if number is None else int(number) - 1)
        mask = masks.setdefault(name, np.zeros(frame.shape, np.uint8))
        if dataset.SegmentationType == "LABELMAP":
            mask[:] = frame
        else:
            segment = (groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence)[0]
            mask[frame > 0] = segment.ReferencedSegmentNumber
    return masks


def _along_normal_mm(dataset: Dataset) -> float:
    row, column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    return float(np.cross(row, column) @ np.array(dataset.ImagePositionPatient, float))


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


def _descriptions(labels: tuple[str, ...], name: str, version: str, digest: str) -> list[SegmentDescription]:
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=name,
        family=codes.cid7162.ArtificialIntelligence,
        version=version,
        parameters={"digest": digest},
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
