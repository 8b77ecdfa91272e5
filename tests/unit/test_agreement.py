"""Agreement of several masks: by hand, and against scikit-learn."""

from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from rayseg.data.agreement import Agreement


def test_three_members_by_hand() -> None:
    """4 and 2 pixels share 2, 4 and 3 share 1, 2 and 3 share 0: (4 / 6 + 2 / 7 + 0) / 3."""
    masks = [np.zeros((2, 5), np.uint8) for _ in range(3)]
    masks[0][0, :4] = masks[1][0, :2] = masks[2][0, 3:] = masks[2][1, 0] = 1
    assert Agreement.of(masks, 1).dice == pytest.approx((4 / 6 + 2 / 7 + 0) / 3)


def test_two_empty_masks_agree_and_an_empty_one_and_another_do_not() -> None:
    empty, found = np.zeros((3, 3), np.uint8), np.eye(3, dtype=np.uint8)
    assert Agreement.of([empty, empty], 1).dice == 1
    assert Agreement.of([empty, found], 1).dice == 0
    assert Agreement.of([empty, empty, found], 1).dice == pytest.approx(1 / 3)
    assert Agreement.of([found, found], 2).dice == 1, "nobody found the second class"


def test_a_series_has_the_dice_of_its_volumes_by_class() -> None:
    rng = np.random.default_rng(0)
    volumes = rng.integers(0, 3, (4, 5, 8, 9), np.uint8)  # members, slices, rows, columns
    slices = [Agreement.of(list(volumes[:, number]), 2) for number in range(5)]
    expected = [
        f1_score(one.ravel() == value, other.ravel() == value)
        for one, other in combinations(volumes, 2)
        for value in (1, 2)
    ]
    assert sum(slices[1:], slices[0]).dice == pytest.approx(np.mean(expected))
