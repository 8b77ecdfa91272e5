"""What the service says of a mask of several classes."""

import numpy as np

from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Geometry
from serving import answers
from serving.replica import ModelInfo, Segmented


def test_each_class_has_its_pixels_and_its_area() -> None:
    model = ModelInfo("m", "3", None, "d", "r", ("edema", "core", "blood"), Preprocess(), 0.5)
    mask = np.zeros((6, 8), np.uint8)
    mask[1, :5], mask[2:4, 2] = 1, 3
    told = answers.measure(Segmented(mask, Geometry(6, 8, pixel_spacing_mm=(0.5, 2.0)), model, 1, 1.0), {})
    assert [(label.value, label.name, label.pixels, label.area_mm2) for label in told.labels] == [
        (1, "edema", 5, 5.0),
        (2, "core", 0, 0.0),
        (3, "blood", 2, 2.0),
    ]
    assert (told.foreground_pixels, told.area_mm2) == (7, 7.0)
