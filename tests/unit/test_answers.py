"""What the service says of masks."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from rayseg.data.preprocess import Preprocess
from rayseg.data.range import Range
from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import Stack, stack
from rayseg.inference import exports
from rayseg.inference.quality import Look
from serving import answers, findings
from serving.messages import ModelInfo, Segmented
from serving.upload import Series


def test_each_class_has_its_pixels_and_its_area() -> None:
    known = Range(modalities=("CT",))
    model = ModelInfo("m", "3", None, "d", "r", ("edema", "core", "blood"), Preprocess(), 0.5, range=known)
    mask = np.zeros((6, 8), np.uint8)
    mask[1, :5], mask[2:4, 2] = 1, 3
    look = Look("MR", None, None, 100.0, 10.0, 0.0, 7, 1 / 48).of(mask)
    told = answers.measure(Segmented(mask, look, Geometry(6, 8, pixel_spacing_mm=(0.5, 2.0)), model, 1, 1.0), {})
    assert [(label.value, label.name, label.pixels, label.area_mm2) for label in told.labels] == [
        (1, "edema", 5, 5.0),
        (2, "core", 0, 0.0),
        (3, "blood", 2, 2.0),
    ]
    assert (told.foreground_pixels, told.area_mm2) == (7, 7.0)
    assert (told.quality.flags, told.quality.detail) == (["modality"], "modality: MR, not CT")


def test_a_lesions_diameter_is_that_of_its_surface() -> None:
    """As the structured report has it, of the mesh; in a tilted stack with uneven steps, too."""
    places_mm = [(0.0, 0.3 * z, z) for z in (0.0, 2.0, 4.0, 9.0, 11.0)]
    geometries = [Geometry(40, 50, (0.5, 0.7), 2.0, place, (1, 0, 0, 0, 1, 0)) for place in places_mm]
    planes, rows, columns = np.mgrid[:5, :40, :50]
    masks = ((planes - 2) ** 2 / 4 + (rows - 20) ** 2 / 90 + (columns - 30) ** 2 / 30 < 1).astype(np.uint8)
    masks[4, 3, 3] = 1
    model = ModelInfo("m", "3", None, "d", "r", ("lesion",), Preprocess(), 0.5)
    looks = [Look(None, None, None, 0.0, 0.0, 0.0, 0, 1.0)] * 5
    series = Series([], [(0, None)] * 5, None, geometries, {})
    told = findings.measure(findings.Found(series, model, None, list(range(5)), list(masks), looks, {}), {})
    place = stack(list(masks), geometries)
    assert isinstance(place, Stack)
    (mesh,) = exports.surfaces(place, ("lesion",)).values()
    large, small = told.lesions
    body = max(mesh.split(only_watertight=False), key=lambda one: one.volume)
    assert large.max_diameter_mm == pytest.approx(pdist(body.vertices).max(), abs=0.006)
    assert (large.slices, small.slices) == ((1, 3), (4, 4))
    assert (small.pixels, small.area_mm2) == (1, 0.35)
    assert small.max_diameter_mm == pytest.approx(np.hypot(0.6, 2.0), abs=0.006)  # a step of the stack
    assert large.volume_ml is not None
    assert small.volume_ml is not None
    assert told.volume_ml == pytest.approx(large.volume_ml + small.volume_ml, abs=2e-4)
    assert told.lesion_count == 2
