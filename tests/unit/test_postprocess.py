"""Small lesions, holes and all but the largest, by hand and against scikit-image."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.morphology import remove_small_objects

from rayseg.inference.postprocess import Postprocess


def test_nothing_is_done_by_default() -> None:
    masks = np.random.default_rng(0).integers(0, 3, (3, 8, 8), np.uint8)
    assert np.array_equal(Postprocess().apply(masks, None), masks)


def test_lesions_smaller_than_the_limit_are_left_out() -> None:
    masks = np.zeros((3, 8, 8), np.uint8)
    masks[0, 0, 0] = 1  # a voxel of the first slice and one of the second, joined by a corner
    masks[1, 1, 1] = 1
    masks[2, 6, 6] = 1  # one of the third slice, which is thick
    masks[0, 4, 4:6] = 2
    made = np.stack(Postprocess(min_lesion_mm3=5.0).apply(masks, np.array([2.0, 2.0, 5.0])))
    assert np.argwhere(made).tolist() == [[2, 6, 6]]
    kept = np.stack(Postprocess(min_lesion_mm3=4.0).apply(masks, np.array([2.0, 2.0, 5.0])))
    assert np.array_equal(kept, masks)


def test_the_largest_of_each_class_is_kept() -> None:
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, 0, :3], masks[0, 4, :2], masks[1, 4, :2], masks[1, 7, 7] = 1, 1, 1, 2
    made = np.stack(Postprocess(largest_only=True).apply(masks, None))
    assert made[:, 4, :2].tolist() == [[1, 1], [1, 1]]
    assert made[1, 7, 7] == 2
    assert not made[0, 0].any()


def test_holes_are_filled_within_a_slice_and_other_classes_stay() -> None:
    masks = np.zeros((1, 9, 9), np.uint8)
    masks[0, 1:6, 1:6] = 1
    masks[0, 3, 3] = 0
    masks[0, 2, 2] = 2
    made = np.stack(Postprocess(fill_holes=True).apply(masks, None))
    expected = np.zeros((1, 9, 9), np.uint8)
    expected[0, 1:6, 1:6] = 1
    expected[0, 2, 2] = 2
    assert np.array_equal(made, expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), least=st.integers(1, 12))
def test_small_lesions_go_as_scikit_image_has_it(seed: int, least: int) -> None:
    masks = (np.random.default_rng(seed).random((3, 9, 9)) < 0.2).astype(np.uint8)
    made = np.stack(Postprocess(min_lesion_mm3=float(least)).apply(masks, np.ones(3)))
    expected = remove_small_objects(masks > 0, max_size=least - 1, connectivity=3)
    assert np.array_equal(made > 0, expected)


def test_volumes_that_are_not_known_are_no_limit_for_lesions() -> None:
    with pytest.raises(ValueError, match="min_lesion_mm3"):
        Postprocess(min_lesion_mm3=1.0).apply(np.zeros((1, 4, 4), np.uint8), None)
    with pytest.raises(ValueError, match="min_lesion_mm3"):
        Postprocess(min_lesion_mm3=-1.0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    steps=st.sampled_from([{"fill_holes": True}, {"largest_only": True}, {"min_lesion_mm3": 6.0}]),
)
def test_what_lies_around_changes_nothing(seed: int, steps: dict[str, Any]) -> None:
    """Only the box around the foreground is looked at: a margin of background is as good as none."""
    inside = (np.random.default_rng(seed).random((3, 7, 7)) < 0.4).astype(np.uint8)
    padded = np.pad(inside, ((1, 2), (0, 3), (2, 1)))
    voxels_mm3 = np.array([9.0, 1.0, 2.0, 3.0, 9.0, 9.0])
    made = np.stack(Postprocess(**steps).apply(padded, voxels_mm3))
    assert np.array_equal(made[1:4, :7, 2:9], np.stack(Postprocess(**steps).apply(inside, voxels_mm3[1:4])))
    assert np.count_nonzero(made) == np.count_nonzero(made[1:4, :7, 2:9])


def test_nothing_found_stays_nothing() -> None:
    assert not np.stack(Postprocess(largest_only=True).apply(np.zeros((2, 4, 4), np.uint8), None)).any()
