"""Segmentations of images that lie nowhere in a patient: CR, DX, MG, as highdicom writes and reads them."""

from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from rayseg.dicom import segmentation
from rayseg.dicom.segmentation import Kind
from rayseg.records import Reason, Reject
from tests.unit.test_segmentation import KINDS, LABELS, as_bytes, assert_valid, source

NOWHERE = dict.fromkeys(("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"))
CLASSES = {
    "CR": (uid.ComputedRadiographyImageStorage, {}),
    "DX": (uid.DigitalXRayImageStorageForPresentation, {"PixelSpacing": None, "ImagerPixelSpacing": ["0.14", "0.14"]}),
    "MG": (
        uid.DigitalMammographyXRayImageStorageForPresentation,
        {"PixelSpacing": None, "ImagerPixelSpacing": ["0.07", "0.07"]},
    ),
}


def radiograph(modality: str, number: int, **changes: Any) -> Dataset:
    sop_class_uid, lacks = CLASSES[modality]
    values = {
        "Modality": modality,
        "SOPClassUID": sop_class_uid,
        "PatientOrientation": ["L", "F"],
        **NOWHERE,
        **lacks,
        **changes,
    }
    return source(number, [0, 0, 0], **values)


def masks(count: int) -> list[np.ndarray]:
    chance = np.random.default_rng(count)
    return [chance.integers(0, 3, (12, 10)).astype(np.uint8) for _ in range(count)]


def encoded(datasets: list[Dataset], kind: Kind) -> bytes:
    made = segmentation.encode([*map(as_bytes, datasets)], masks(len(datasets)), LABELS, "m", "1", "d", kind)
    assert isinstance(made, bytes), made
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("modality", CLASSES)
def test_masks_come_back_by_the_image_they_are_of(modality: str, count: int, kind: Kind, tmp_path: Path) -> None:
    datasets = [radiograph(modality, number) for number in range(count)]
    data = encoded(datasets, kind)
    assert_valid(data, tmp_path / "seg.dcm")
    own = segmentation.decode(data)
    made = highdicom.seg.segread(BytesIO(data))
    uids = [dataset.SOPInstanceUID for dataset in datasets]
    read = made.get_pixels_by_source_instance(uids, combine_segments=True)
    for number, (mask, name) in enumerate(zip(masks(count), uids, strict=True)):
        np.testing.assert_array_equal(own[name], mask)
        np.testing.assert_array_equal(read[number], mask)
    assert "FrameOfReferenceUID" not in made
    assert made.PatientOrientation == ["L", "F"]
    shared, first = made.SharedFunctionalGroupsSequence[0], made.PerFrameFunctionalGroupsSequence[0]
    for keyword in ("PlaneOrientationSequence", "PlanePositionSequence"):
        assert keyword not in shared
        assert keyword not in first
    # Its spacing is said of a slice with a thickness only, and never is the imager's, which is that of the detector.
    assert "PixelMeasuresSequence" not in shared


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_is_said_as_highdicom_says_it(kind: Kind) -> None:
    """But for how frames are told apart: by an image's number, for which it has no word where there is one image."""
    dataset = radiograph("DX", 1)
    ours = pydicom.dcmread(BytesIO(encoded([dataset], kind)))
    pixels = masks(1)[0][np.newaxis]
    theirs = highdicom.seg.Segmentation(
        source_images=[dataset],
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=[
            highdicom.seg.SegmentDescription.from_dataset(segment)
            for segment in ours.SegmentSequence
            if segment.SegmentNumber > 0
        ],
        series_instance_uid="1.2.3.4.5",
        series_number=1,
        sop_instance_uid="1.2.3.4.5.6",
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
    )
    named = {element.keyword for element in theirs} ^ {element.keyword for element in ours}
    # The last two are of type 2 and 2C, and highdicom leaves them out.
    assert named <= {"SeriesDescription", "ContentCreatorName", "PatientOrientation"}
    for one, other in zip(ours.PerFrameFunctionalGroupsSequence, theirs.PerFrameFunctionalGroupsSequence, strict=True):
        assert one.dir() == other.dir()
    assert ours.SharedFunctionalGroupsSequence[0].dir() == theirs.SharedFunctionalGroupsSequence[0].dir()


def test_images_that_look_from_elsewhere_say_no_orientation() -> None:
    datasets = [radiograph("MG", number, PatientOrientation=way) for number, way in enumerate((["A", "F"], ["P", "F"]))]
    assert pydicom.dcmread(BytesIO(encoded(datasets, "BINARY"))).PatientOrientation in ("", None, [])


def test_a_frame_of_reference_without_a_place_is_kept(tmp_path: Path) -> None:
    data = encoded(
        [radiograph("CR", number, FrameOfReferenceUID="1.2.3.5", SliceThickness=1) for number in range(2)], "BINARY"
    )
    assert_valid(data, tmp_path / "seg.dcm")
    made = highdicom.seg.segread(BytesIO(data))
    assert made.FrameOfReferenceUID == "1.2.3.5"
    measures = made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (measures.PixelSpacing, measures.SliceThickness) == ([0.5, 0.75], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_orientation_without_a_position_is_no_place(kind: Kind, tmp_path: Path) -> None:
    """As some secondary captures have it: each image its own, or one has none."""
    ways = [["1", "0", "0", "0", "0", "-1"], ["0", "1", "0", "0", "0", "-1"], None]
    datasets = [
        radiograph("CR", number, FrameOfReferenceUID="1.2.3.5", ImageOrientationPatient=way)
        for number, way in enumerate(ways)
    ]
    data = encoded(datasets, kind)
    assert_valid(data, tmp_path / "seg.dcm")
    made = highdicom.seg.segread(BytesIO(data))
    uids = [dataset.SOPInstanceUID for dataset in datasets]
    np.testing.assert_array_equal(made.get_pixels_by_source_instance(uids, combine_segments=True), masks(3))
    assert not [element for element in made.iterall() if element.keyword == "ImageOrientationPatient"]
    datasets[0].ImagePositionPatient = ["0", "0", "0"]
    refused = segmentation.encode(datasets, masks(3), LABELS, "m", "1", "d", kind)
    assert isinstance(refused, Reject)
    assert refused.reason == Reason.MISSING_ATTRIBUTE


def test_images_of_several_sizes_are_refused() -> None:
    datasets = [radiograph("DX", 1), radiograph("DX", 2, Columns=11)]
    made = segmentation.encode(
        datasets, [np.zeros((12, 10), np.uint8), np.zeros((12, 11), np.uint8)], LABELS, "m", "1", "d"
    )
    assert isinstance(made, Reject)
    assert made.reason == Reason.SERIES_MIXED
