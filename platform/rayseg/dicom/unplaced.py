"""Segmentations of images that lie nowhere in a patient (CR, DX, MG): frames are known by the image that they are of.

highdicom makes one of a single such image. So that there may be several, it gets places that stand in for those that
the images lack, and these are taken out of what it makes (PS3.3 A.51.4, A.51.5: neither frame of reference nor plane
where frames are derived from images without).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class Known:
    """What the images say of where they are, each attribute where all of them say the same."""

    frame_of_reference_uid: str | None
    spacing_mm: list[float] | None  # PixelSpacing
    thickness_mm: float | None
    patient_orientation: list[str]


def known(datasets: Sequence[Dataset]) -> Known:
    """Of the images, before `stand_in`."""

    def same(keyword: str) -> Any | None:
        values = [dataset.get(keyword) for dataset in datasets]
        return values[0] if all(value == values[0] for value in values) else None

    return Known(
        same("FrameOfReferenceUID"), same("PixelSpacing"), same("SliceThickness"), same("PatientOrientation") or []
    )


def take_out(segmentation: Dataset, images: Known) -> None:
    """Removes the stand-ins from a segmentation whose frames are in order of the places that `stand_in` gave."""
    segmentation.PatientOrientation = images.patient_orientation  # of type 2C where there is no plane (PS3.3 C.7.6.1)
    if images.frame_of_reference_uid is None:
        del segmentation.FrameOfReferenceUID
        segmentation.pop("PositionReferenceIndicator", None)
    else:
        segmentation.FrameOfReferenceUID = images.frame_of_reference_uid
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    del shared.PlaneOrientationSequence
    del shared.PixelMeasuresSequence
    # Without thickness it would be half a measure: highdicom reads none, and as empty the attribute is an error.
    if images.spacing_mm is not None and images.thickness_mm is not None:
        measures = Dataset()
        measures.PixelSpacing = images.spacing_mm
        measures.SliceThickness = images.thickness_mm
        shared.PixelMeasuresSequence = [measures]
    (position,) = (
        number
        for number, index in enumerate(segmentation.DimensionIndexSequence)
        if index.DimensionIndexPointer == _POSITION
    )
    index = segmentation.DimensionIndexSequence[position]
    index.DimensionIndexPointer = Tag(tag_for_keyword("FrameLabel") or 0)
    index.FunctionalGroupPointer = Tag(tag_for_keyword("FrameContentSequence") or 0)
    index.DimensionDescriptionLabel = "Image"
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        del groups.PlanePositionSequence
        groups.FrameContentSequence[0].FrameLabel = str(_number(groups, position))


def _number(groups: Dataset, position: int) -> int:
    """Which image a frame is of, from 1."""
    return int(np.atleast_1d(groups.FrameContentSequence[0].DimensionIndexValues)[position])
