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
from pydicom.multival import MultiValue
from pydicom.valuerep import validate_value

from rayseg.dicom import patient
from rayseg.dicom.parsing import sequence_item
from rayseg.records import Reason, Reject

_NEEDED = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Rows",
    "Columns",
)
PLACE = ("FrameOfReferenceUID", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient")
_SERIES = (
    "Modality",
    "SeriesDate",
    "SeriesTime",
    "SliceThickness",
    "PositionReferenceIndicator",
    "StudyDate",
    "StudyTime",
)
# What was lost, and by which steps (PS3.3 C.7.6.1.1.5): a segmentation says so where its sources do (C.8.20-2).
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
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
    *PLACE,
    *_SERIES,
    *_LOSSY,
    "PatientOrientation",
    *patient.PATIENT,
    *patient.STUDY,
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


def parsed(source: bytes | Dataset) -> Dataset | Reject:
    """The source as a data set, without pixels where it comes as bytes; CORRUPT where it is none."""
    if not isinstance(source, bytes):
        return source
    try:
        return pydicom.dcmread(BytesIO(source), stop_before_pixels=True, force=True)
    except Exception as error:
        return Reject(Reason.CORRUPT, type(error).__name__)


def attributes(source: Dataset, frame: int | None) -> Dataset | Reject:
    """What the segmentation needs of a slice and nothing else, each value well formed; nothing of its patient."""
    if frame is None and int(_value(source, "NumberOfFrames") or 1) > 1:
        return Reject(Reason.UNSUPPORTED_MULTIFRAME, "NumberOfFrames")
    clean = Dataset()
    for keyword in (*_NEEDED, *PLACE, *_SERIES):
        value = _of_frame(source, keyword, frame) if keyword in _GROUPS else _value(source, keyword)
        if value is not None:
            setattr(clean, keyword, value)
        elif keyword in _NEEDED:
            return Reject(Reason.MISSING_ATTRIBUTE, keyword)
    clean.PatientOrientation = _texts(source, "PatientOrientation")
    flag, ratios, methods = (_texts(source, keyword) for keyword in _LOSSY)
    if flag == ["01"] or (not flag and (ratios or methods)):
        clean.LossyImageCompression = "01"
        if ratios and all(_is_ratio(ratio) for ratio in ratios):
            clean.LossyImageCompressionRatio = ratios
        if methods:
            clean.LossyImageCompressionMethod = methods
    return clean


def are_placed(datasets: Iterable[Container[str]]) -> bool | Reject:
    """Whether the slices lie in a patient; MISSING_ATTRIBUTE, naming it, where they have positions but not all of that.

    Radiographs do not say so at all (CR, DX, MG: PS3.3 A.2, A.26, A.27), nor do secondary captures and ultrasound. An
    orientation without any position does not, either.

    Args:
        datasets: of the slices, or the keywords of what these have.
    """
    datasets = list(datasets)
    if not any("ImagePositionPatient" in dataset for dataset in datasets):
        return False
    lacking = (keyword for dataset in datasets for keyword in PLACE if keyword not in dataset)
    missing = next(lacking, None)
    return True if missing is None else Reject(Reason.MISSING_ATTRIBUTE, missing)


def most_lossy(datasets: Sequence[Dataset]) -> Dataset:
    """The one of all slices that has lost most by its ratios: of it a segmentation tells the steps and their ratios."""

    def lost(dataset: Dataset) -> tuple[bool, float, int]:
        flag, ratios, methods = (_texts(dataset, keyword) for keyword in _LOSSY)
        return bool(flag), math.prod(map(float, ratios)), len(methods)

    return max(datasets, key=lost)


def take_lossy(dataset: Dataset, source: Dataset) -> None:
    """Makes the one say of lossy compression what the other says."""
    for keyword in _LOSSY:
        if keyword in source:
            dataset[keyword] = source[keyword]
        else:
            dataset.pop(keyword, None)


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
        if isinstance(value, MultiValue):  # none of the others has several
            return None
        if vr in ("US", "UI"):
            return value
        text = str(value)
        validate_value(vr, text, pydicom.config.RAISE)
        return text
    except Exception:
        return None


def _texts(dataset: Dataset, keyword: str) -> list[str]:
    """All values of an attribute that may have several; none where it is absent or malformed."""
    try:
        value = dataset.get(keyword)
        texts = [str(one) for one in (value if isinstance(value, MultiValue) else [value]) if one is not None]
        for text in texts:
            validate_value(dictionary_VR(keyword), text, pydicom.config.RAISE)
    except Exception:
        return []
    return texts if any(texts) else []


def _is_ratio(text: str) -> bool:
    return bool(text) and math.isfinite(float(text)) and float(text) > 0


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
