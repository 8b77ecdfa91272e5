"""What segmentations tell of lossy compression in their sources (PS3.3 table C.8.20-2, section C.7.6.1.1.5)."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from rayseg.dicom import segmentation
from tests.unit.test_segmentation import LABELS, as_bytes, assert_valid, source

J2K, JPEG, JPEG_LS = "ISO_15444_1", "ISO_10918_1", "ISO_14495_1"


def told(*sources: dict[str, Any], path: Path) -> tuple[Any, Any, Any]:
    """Flag, ratios and methods of the segmentation of slices that say so."""
    datasets = []
    for number, one in enumerate(sources):
        values = {f"LossyImageCompression{name}": value for name, value in one.items()}
        datasets.append(source(number, [0, 0, 5 * number], **values))
    return told_of(datasets, [None] * len(datasets), path)


def told_of(datasets: list[Dataset], frames: list[int | None], path: Path) -> tuple[Any, Any, Any]:
    masks = [np.zeros((12, 10), np.uint8)] * len(frames)
    data = segmentation.encode([*map(as_bytes, datasets)], masks, LABELS, "m", "1", "d", frames=frames)
    assert isinstance(data, bytes), data
    assert_valid(data, path / "seg.dcm")
    made = pydicom.dcmread(BytesIO(data))
    return tuple(made.get(f"LossyImageCompression{name}") for name in ("", "Ratio", "Method"))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, ("00", None, None)),
        ({"": "00"}, ("00", None, None)),
        ({"": "01"}, ("01", None, None)),
        ({"": "01", "Ratio": "12.5"}, ("01", 12.5, None)),
        ({"": "01", "Method": J2K}, ("01", None, J2K)),
        ({"": "01", "Ratio": "8", "Method": JPEG_LS}, ("01", 8, JPEG_LS)),
        ({"": "01", "Ratio": ["4", "2.5", "3"], "Method": [JPEG, JPEG, J2K]}, ("01", [4, 2.5, 3], [JPEG, JPEG, J2K])),
        ({"Ratio": "20", "Method": JPEG}, ("01", 20, JPEG)),  # whoever names a method has used it
        ({"": "01", "Ratio": "0", "Method": JPEG}, ("01", None, JPEG)),
    ],
)
def test_flag_ratios_and_methods_are_those_of_the_source(
    said: dict[str, Any], expected: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    assert told(said, said, path=tmp_path) == expected


def test_of_slices_that_differ_the_one_that_lost_most_is_told(tmp_path: Path) -> None:
    once = {"": "01", "Ratio": "10", "Method": JPEG}
    twice = {"": "01", "Ratio": ["6", "3"], "Method": [JPEG, J2K]}  # 18 times
    assert told({}, once, twice, once, path=tmp_path) == ("01", [6, 3], [JPEG, J2K])
    assert told(twice, {"": "01"}, {"": "00"}, path=tmp_path) == ("01", [6, 3], [JPEG, J2K])
    assert told({"": "00"}, {"": "01"}, path=tmp_path) == ("01", None, None)


def test_frames_of_a_lossy_object_are_lossy(enhanced: Any, as_file: Any, tmp_path: Path) -> None:
    dataset = enhanced(np.zeros((3, 12, 10), np.uint16), [(0, 0, 5 * number) for number in range(3)])
    dataset.LossyImageCompression = "01"
    dataset.LossyImageCompressionRatio = ["7", "2"]
    dataset.LossyImageCompressionMethod = [JPEG, J2K]
    whole = pydicom.dcmread(BytesIO(as_file(dataset)))
    assert told_of([whole] * 3, [2, 0, 1], tmp_path) == ("01", [7, 2], [JPEG, J2K])
