"""Segmentations of images that lie nowhere in a patient (CR, DX, MG): frames are known by the image that they are of.

highdicom makes one of a single such image. So that there may be several, it gets places that stand in for those that
the images lack, and these are taken out of what it makes (PS3.3 A.51.4, A.51.5: neither frame of reference nor plane
where frames are derived from images without).
"""

from collections.abc import Sequence

from pydicom import uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import Tag

_POSITION = Tag(tag_for_keyword("ImagePositionPatient") or 0)


def stand_in(datasets: Sequence[Dataset]) -> None:
    """Gives each image a place, one behind the other."""
    for number, dataset in enumerate(datasets):
        dataset.FrameOfReferenceUID = uid.CTImageStorage  # any UID: it does not stay
        dataset.ImagePositionPatient = [0, 0, number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [1, 1]
        dataset.SliceThickness = 1


def take_out(segmentation: Dataset, spacing_mm: Sequence[object] | None, frame_of_reference_uid: str | None) -> None:
    """Removes the stand-ins.

    Args:
        segmentation: whose frames are in order of the places that `stand_in` gave.
        spacing_mm: PixelSpacing, where all images say the same.
        frame_of_reference_uid: where all images name one, though no place in it.
    """
    if frame_of_reference_uid is None:
        del segmentation.FrameOfReferenceUID
        segmentation.pop("PositionReferenceIndicator", None)
    else:
        segmentation.FrameOfReferenceUID = frame_of_reference_uid
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    del shared.PlaneOrientationSequence
    del shared.PixelMeasuresSequence
    if spacing_mm is not None:
        measures = Dataset()
        measures.PixelSpacing = list(spacing_mm)
        shared.PixelMeasuresSequence = [measures]
    (place,) = (
        number
        for number, index in enumerate(segmentation.DimensionIndexSequence)
        if index.DimensionIndexPointer == _POSITION
    )
    index = segmentation.DimensionIndexSequence[place]
    index.DimensionIndexPointer = Tag(tag_for_keyword("FrameLabel") or 0)
    index.FunctionalGroupPointer = Tag(tag_for_keyword("FrameContentSequence") or 0)
    index.DimensionDescriptionLabel = "Image"
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        del groups.PlanePositionSequence
        content = groups.FrameContentSequence[0]
        values = content.DimensionIndexValues
        content.FrameLabel = str(values[place] if isinstance(values, list) or hasattr(values, "__len__") else values)
