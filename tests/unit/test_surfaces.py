"""Distances between surfaces against SimpleITK and MedPy, and against values measured by hand."""

from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from medpy.metric import binary

from rayseg.evaluation.surfaces import Distances, Grid, distances, surface

SPACING = (5.0, 0.7, 0.4)
volumes = arrays(bool, (4, 6, 7), elements=st.booleans())


def grid(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0), slices: int = 9) -> Grid:
    origins = np.outer(np.arange(slices) * spacing[0], [0, 0, 1])
    return Grid(origins, np.array([0, spacing[1], 0]), np.array([spacing[2], 0, 0]), "mm")


def between(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Any:
    return distances(prediction, truth, grid(spacing, len(truth)))


def plane(*pixels: tuple[int, int], shape: tuple[int, int] = (8, 8)) -> np.ndarray:
    mask = np.zeros((1, *shape), bool)
    for row, column in pixels:
        mask[0, row, column] = True
    return mask


def itk_distances(of: np.ndarray, to: np.ndarray) -> np.ndarray:
    """As in SimpleITK's notebook on the evaluation of segmentations: a distance map read at the other's contour."""
    contours = []
    for mask in (of, to):
        image = SimpleITK.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))  # it takes nothing to be beyond the image
        image.SetSpacing(SPACING[::-1])
        contours.append(SimpleITK.LabelContour(image, fullyConnected=False))
    away = SimpleITK.SignedMaurerDistanceMap(contours[1], squaredDistance=False, useImageSpacing=True)
    return np.abs(SimpleITK.GetArrayFromImage(away))[SimpleITK.GetArrayFromImage(contours[0]) > 0]


@settings(max_examples=25, deadline=None)
@given(volumes, volumes)
def test_distances_are_those_of_simpleitk_and_medpy_in_anisotropic_volumes(a: np.ndarray, b: np.ndarray) -> None:
    if not a.any() or not b.any():
        assert between(a, b, SPACING) is None
        return
    found = between(a, b, SPACING)
    to_truth, to_prediction = itk_distances(a, b), itk_distances(b, a)
    assert np.sort(found.to_truth) == pytest.approx(np.sort(to_truth), abs=1e-6)
    assert np.sort(found.to_prediction) == pytest.approx(np.sort(to_prediction), abs=1e-6)
    assert found.hd95 == pytest.approx(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)), abs=1e-6)
    assert found.to_truth.mean() == pytest.approx(binary.asd(a, b, SPACING), abs=1e-6)
    assert found.to_prediction.mean() == pytest.approx(binary.asd(b, a, SPACING), abs=1e-6)
    both = np.concatenate([found.to_truth, found.to_prediction])
    assert both.max() == pytest.approx(binary.hd(a, b, SPACING), abs=1e-6)
    assert np.percentile(both, 95) == pytest.approx(binary.hd95(a, b, SPACING), abs=1e-6)
    assert found.assd == pytest.approx(both.mean(), abs=1e-6)
    for tolerance in (0.55, 2.0):
        within = np.concatenate([to_truth, to_prediction]) <= tolerance + 1e-6
        assert found.nsd(tolerance) == pytest.approx(within.mean(), abs=1e-6)


def test_one_pixel_each_three_down_and_four_across() -> None:
    found = between(plane((0, 0)), plane((3, 4)))
    assert (found.hd95, found.assd) == (5.0, 5.0)
    assert (found.nsd(4.9), found.nsd(5.0)) == (0.0, 1.0)
    # 3 rows of 2 mm and 4 columns of 0.5 mm.
    assert between(plane((0, 0)), plane((3, 4)), (1.0, 2.0, 0.5)).assd == pytest.approx(np.hypot(6, 2))


def test_the_same_mask_is_no_distance_away_also_at_the_border_of_the_image() -> None:
    whole = np.ones((1, 4, 4), bool)
    found = between(whole, whole)
    assert (found.hd95, found.assd, found.nsd(0.0)) == (0.0, 0.0, 1.0)
    assert len(surface(whole)) == 12  # the frame of 16 pixels: what is beyond the image is not of the mask
    assert len(surface(np.ones((3, 4, 4), bool))) == 48 - 4  # the middle slice has an inside of 2 x 2


def test_a_plane_has_an_outline_and_no_top_and_bottom() -> None:
    square = plane(*((row, column) for row in range(2, 6) for column in range(2, 6)))
    assert len(surface(square)) == 12
    # Against one without its outermost row: the row itself is one pixel away, corners of the other too.
    smaller = plane(*((row, column) for row in range(3, 6) for column in range(2, 6)))
    found = between(square, smaller)
    assert sorted(found.to_truth) == [0.0] * 8 + [1.0] * 4
    # Pixels (3, 3) and (3, 4) are on the outline of the smaller one alone.
    assert sorted(found.to_prediction) == [0.0] * 8 + [1.0] * 2
    assert found.assd == pytest.approx(6 / 22)
    assert found.nsd(0.5) == pytest.approx(16 / 22)
    assert found.hd95 == 1.0


def test_percentiles_are_interpolated_and_the_worse_way_counts() -> None:
    found = Distances(np.arange(21.0), np.zeros(5))
    assert found.hd95 == pytest.approx(19.0)
    assert found.assd == pytest.approx(210 / 26)


def test_slices_may_lie_at_any_distance_and_be_shifted() -> None:
    """A gap of 10 mm, and a gantry tilt that shifts the last slice by 3 mm across."""
    origins = np.array([[0.0, 0, 0], [0, 0, 2], [3, 0, 12]])
    tilted = Grid(origins, np.array([0, 1.0, 0]), np.array([1.0, 0, 0]), "mm")
    a, b = np.zeros((3, 4, 4), bool), np.zeros((3, 4, 4), bool)
    a[1, 1, 1], b[2, 1, 1] = True, True
    found = distances(a, b, tilted)
    assert found is not None
    assert found.assd == pytest.approx(np.hypot(3, 10))


def test_nothing_has_no_surface() -> None:
    assert between(plane(), plane((1, 1))) is None
    assert between(plane((1, 1)), plane()) is None
    assert between(plane(), plane()) is None
