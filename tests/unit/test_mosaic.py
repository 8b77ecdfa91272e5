"""Mosaics are refused by name wherever they say what they are; slices that only keep the word are not."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from rayseg.data import manifest
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Slice, read_headers, read_slice
from rayseg.records import Reason, Reject
from tests.unit.mr_images import SIEMENS, image

TILES = (SIEMENS, 0x0A, "US", 30)  # NumberOfImagesInMosaic


@pytest.mark.parametrize(
    "image_type",
    [
        ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"],
        ["ORIGINAL", "PRIMARY", "MOSAIC"],
        ["DERIVED", "PRIMARY", "DIFFUSION", "FA", "ND", "NORM", "MOSAIC"],
        ["DERIVED", "SECONDARY", "DIFFUSION", "TRACEW", "MOSAIC", "FILTERED"],
        ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE", "ND", "MOSAIC", "MFSPLIT"],
        ["ORIGINAL", "PRIMARY", "VFRAME"],
        ["DERIVED", "PRIMARY", "EPI", "VFRAME"],
    ],
    ids="/".join,
)
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_the_word_from_the_third_value_on(image_type: list[str], syntax: str) -> None:
    data = image(ImageType=image_type, syntax=syntax, Manufacturer=None)
    for read in (read_headers(data), read_headers(data[:-40]), read_slice(data)):
        assert isinstance(read, Reject)
        assert read.reason == Reason.MOSAIC
        assert "ImageType" in read.detail


@pytest.mark.parametrize(
    "image_type",
    [
        ["MOSAIC", "PRIMARY", "M"],
        ["ORIGINAL", "MOSAIC", "M"],
        ["ORIGINAL", "PRIMARY", "M", "MOSAICS"],
        ["ORIGINAL", "PRIMARY", "AXIAL"],
        None,
    ],
)
def test_no_such_word(image_type: list[str] | None) -> None:
    data = image(ImageType=image_type)
    assert isinstance(read_headers(data), list)
    assert isinstance(read_slice(data), Slice)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_the_number_of_tiles_says_it_too(syntax: str) -> None:
    """Whatever a later program made of ImageType; another maker's element of that number says nothing."""
    without = {"ImageType": ["DERIVED", "SECONDARY"], "syntax": syntax}
    assert isinstance(read_headers(image(private=[TILES], **without)), Reject)
    assert isinstance(read_headers(image(private=[(SIEMENS, 0x0A, "US", 1)], **without)), list)
    assert isinstance(read_headers(image(private=[((0x19, "GEMS_ACQU_01"), 0x0A, "US", 30)], **without)), list)


def enhanced_mr(enhanced: Callable[..., Dataset], image_type: Sequence[str], frames: int, legacy: bool) -> Dataset:
    dataset = enhanced(
        np.zeros((frames, 8, 8), np.uint16),
        SOPClassUID=uid.LegacyConvertedEnhancedMRImageStorage if legacy else uid.EnhancedMRImageStorage,
        Modality="MR",
        ImageType=list(image_type),
    )
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        item = Dataset()
        item.FrameType = list(image_type)
        groups.MRImageFrameTypeSequence = [item]
    return dataset


@pytest.mark.parametrize(
    ("frames", "legacy", "accepted"), [(4, False, True), (2, False, True), (4, True, False), (1, False, False)]
)
def test_frames_that_are_slices_may_keep_the_word(
    enhanced: Callable[..., Dataset], as_file: Callable[..., bytes], frames: int, legacy: bool, accepted: bool
) -> None:
    """Siemens took the mosaic apart and left the word (dcm2niix#553); converted single images are what they were."""
    image_type = ("ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC")
    read = read_headers(as_file(enhanced_mr(enhanced, image_type, frames, legacy)))
    assert isinstance(read, list) == accepted
    if not accepted:
        assert isinstance(read, Reject)
        assert read.reason == Reason.MOSAIC


def test_the_catalog_tells_from_the_beginning_of_an_object() -> None:
    data = image(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], Rows=384, Columns=384, private=[TILES])
    item = manifest.Item("mosaic.dcm", "mosaic.dcm", len(data), [], None)
    (row,) = manifest.rows(item, data, Pseudonyms(b"key"))
    assert (row["verdict"], row["reason"]) == ("rejected", "mosaic")
