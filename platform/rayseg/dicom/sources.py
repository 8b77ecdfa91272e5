"""What a DICOM Segmentation takes of its sources, slices and frames alike, and how it names them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VM, dictionary_VR
from pydicom.dataset import Dataset
from pydicom.valuerep import validate_value

from rayseg.records import Reason, Reject

_NEEDED = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)
# Patient and study attributes that the segmentation takes over: those of type 2, empty where the source lacks them or
# holds a malformed value, and those of type 3, then left out (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2).
_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_TYPE_3 = ("StudyDescription", "PatientAge", "PatientSize", "PatientWeight", "IssuerOfPatientID")
_SERIES = (
    "Modality",
    "SeriesDate",
    "SeriesTime",
    "SliceThickness",
    "PositionReferenceIndicator",
    "LossyImageCompression",
    "LossyImageCompressionMethod",
)
# Where an enhanced object says it of its frames (PS3.3 C.7.6.16.2).
_GROUPS = {
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A slice to encode. To highdicom a frame is an object of its own, under a UID that `name_frames` replaces.

    So one segmentation can be of some frames only, of several multi-frame objects, and of objects of both kinds.
    """

    dataset: Dataset
    mask: np.ndarray
    instance_uid: str
    frame: int | None


def attributes(source: bytes | Dataset, frame: int | None) -> Dataset | Reject:
    """What the segmentation needs of a slice and nothing else, each value well formed."""
    if isinstance(source, bytes):
        try:
            source = pydicom.dcmread(BytesIO(source), stop_before_pixels=True, force=True)
        except Exception as error:
            return Reject(Reason.CORRUPT, type(error).__name__)
    clean = Dataset()
    for keyword in (*_NEEDED, *_TYPE_2, *_TYPE_3, *_SERIES):
        value = _of_frame(source, keyword, frame) if keyword in _GROUPS else _value(source, keyword)
        if value is not None:
            setattr(clean, keyword, value)
        elif keyword in _NEEDED:
            return Reject(Reason.MISSING_ATTRIBUTE, keyword)
        elif keyword in _TYPE_2:
            setattr(clean, keyword, "")
    if clean.PatientSex not in ("M", "F", "O", ""):
        clean.PatientSex = ""
    return clean


def _of_frame(dataset: Dataset, keyword: str, frame: int | None) -> Any | None:
    """An attribute of a frame by its functional groups, the frame's own before the shared ones, else the object's."""
    places = (("PerFrameFunctionalGroupsSequence", frame or 0), ("SharedFunctionalGroupsSequence", 0))
    for sequence, place in places:
        groups = dataset.get(sequence) or []
        for item in (groups[place].get(_GROUPS[keyword]) or []) if place < len(groups) else []:
            value = _value(item, keyword)
            if value is not None:
                return value
    return _value(dataset, keyword) if frame is None else None


def _value(dataset: Dataset, keyword: str) -> Any | None:
    """The attribute's value; None where it is absent, empty or malformed. Text comes as `str`, whatever its charset."""
    try:
        value = dataset.get(keyword)
        if value is None or value == "" or value == []:
            return None
        vr = dictionary_VR(keyword)
        if vr == "DS":
            numbers = [float(number) for number in (value if isinstance(value, Sequence) else [value])]
            usable = len(numbers) == int(dictionary_VM(keyword)) and all(map(math.isfinite, numbers))
            return value if usable and (len(numbers) > 1 or numbers[0] > 0) else None
        if vr in ("US", "UI"):
            return value
        text = str(value)
        validate_value(vr, text, pydicom.config.RAISE)
        return text
    except Exception:
        return None


def name_frames(segmentation: Dataset, slices: Sequence[Source]) -> None:
    """Replaces the UIDs that stand for frames by the objects' own ones and the frames' numbers."""
    frames = {one.dataset.SOPInstanceUID: one for one in slices if one.frame is not None}
    if not frames:
        return
    groups = [*segmentation.SharedFunctionalGroupsSequence, *segmentation.PerFrameFunctionalGroupsSequence]
    derivations = [item for group in groups for item in group.get("DerivationImageSequence", [])]
    sources = [item for derivation in derivations for item in derivation.SourceImageSequence]
    listed = [series.ReferencedInstanceSequence for series in segmentation.ReferencedSeriesSequence]
    if "SourceImageSequence" in segmentation:
        listed.append(segmentation.SourceImageSequence)
    for item in [*sources, *(item for items in listed for item in items)]:
        one = frames.get(item.ReferencedSOPInstanceUID)
        if one is not None:
            item.ReferencedSOPInstanceUID = one.instance_uid
            item.ReferencedFrameNumber = (one.frame or 0) + 1
    for items in listed:  # each object once, with all of its frames
        numbers: dict[str, list[int]] = {}
        kept: dict[str, Dataset] = {}
        for item in items:
            kept.setdefault(item.ReferencedSOPInstanceUID, item)
            if "ReferencedFrameNumber" in item:
                numbers.setdefault(item.ReferencedSOPInstanceUID, []).append(int(item.ReferencedFrameNumber))
        items[:] = kept.values()
        for item in items:
            if "ReferencedFrameNumber" in item:
                item.ReferencedFrameNumber = sorted(numbers[item.ReferencedSOPInstanceUID])
