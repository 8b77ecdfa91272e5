"""What a DICOM Segmentation takes of its sources, slices and frames alike, and how it names them."""

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pydicom
from pydicom import uid
from pydicom.datadict import dictionary_VM, dictionary_VR
from pydicom.dataset import Dataset
from pydicom.valuerep import validate_value

from rayseg.dicom.parsing import sequence_item
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
PLACE = ("FrameOfReferenceUID", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient")
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
# All that `attributes` looks at, for reading no more of a source.
KEYWORDS = (
    *_NEEDED,
    *_TYPE_2,
    *_TYPE_3,
    *_SERIES,
    "SpecificCharacterSet",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


PLAIN_CLASS = str(uid.CTImageStorage)  # of a stand-in


@dataclass(frozen=True, eq=False)
class Source:
    """A slice to encode. To highdicom a frame is an object of its own, of a class of single images.

    So one segmentation can be of some frames only, of several multi-frame objects, and of objects of both kinds.
    `name_sources` puts the names right in the end.
    """

    dataset: Dataset  # what `attributes` gives, under the stand-in's names
    place: int  # among the slices as they were given
    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None


def attributes(source: bytes | Dataset, frame: int | None) -> Dataset | Reject:
    """What the segmentation needs of a slice and nothing else, each value well formed."""
    if isinstance(source, bytes):
        try:
            source = pydicom.dcmread(BytesIO(source), stop_before_pixels=True, force=True)
        except Exception as error:
            return Reject(Reason.CORRUPT, type(error).__name__)
    if frame is None and int(_value(source, "NumberOfFrames") or 1) > 1:
        return Reject(Reason.UNSUPPORTED_MULTIFRAME, "NumberOfFrames")
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


def are_placed(datasets: Iterable[Container[str]]) -> bool | Reject:
    """Whether the slices lie in a patient; MISSING_ATTRIBUTE, naming it, where only a part says where.

    Radiographs do not say so at all (CR, DX, MG: PS3.3 A.2, A.26, A.27), nor do secondary captures and ultrasound.

    Args:
        datasets: of the slices, or the keywords of what these have.
    """
    datasets = list(datasets)
    if not any(keyword in dataset for dataset in datasets for keyword in PLACE[2:]):
        return False
    lacking = (keyword for dataset in datasets for keyword in PLACE if keyword not in dataset)
    missing = next(lacking, None)
    return True if missing is None else Reject(Reason.MISSING_ATTRIBUTE, missing)


def _of_frame(dataset: Dataset, keyword: str, frame: int | None) -> Any | None:
    """An attribute of a frame by its functional groups, the frame's own before the shared ones, else the object's."""
    places = (("PerFrameFunctionalGroupsSequence", frame or 0), ("SharedFunctionalGroupsSequence", 0))
    for sequence, place in places:
        for groups in sequence_item(dataset, sequence, place):
            for item in sequence_item(groups, _GROUPS[keyword]):
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


def name_sources(segmentation: Dataset, sources: Sequence[Source]) -> None:
    """Replaces the names that stand for sources by their own ones, with the numbers of frames."""
    by_name = {source.dataset.SOPInstanceUID: source for source in sources}
    groups = [*segmentation.SharedFunctionalGroupsSequence, *segmentation.PerFrameFunctionalGroupsSequence]
    for derivation in (item for group in groups for item in group.get("DerivationImageSequence", [])):
        for item in derivation.SourceImageSequence:
            source = by_name.get(item.ReferencedSOPInstanceUID)
            if source is not None:  # else done already: the frames of several segments share their items
                item.update(_reference(source, [source.frame]))
    objects: dict[str, list[Source]] = {}
    for one in sources:
        objects.setdefault(one.sop_instance_uid, []).append(one)
    for series in segmentation.ReferencedSeriesSequence:
        series.ReferencedInstanceSequence = [_reference(found[0], []) for found in objects.values()]
    if "SourceImageSequence" in segmentation:
        segmentation.SourceImageSequence = [
            _reference(found[0], [source.frame for source in found]) for found in objects.values()
        ]


def _reference(source: Source, frames: Sequence[int | None]) -> Dataset:
    """A reference to the source's object, or to frames of it, which are counted from 1."""
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.sop_class_uid
    reference.ReferencedSOPInstanceUID = source.sop_instance_uid
    numbers = sorted(frame + 1 for frame in frames if frame is not None)
    if numbers:
        reference.ReferencedFrameNumber = numbers if len(numbers) > 1 else numbers[0]
    return reference
