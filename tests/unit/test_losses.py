"""The loss has hand-computed values, and splitting a batch over ranks does not change it."""

import math

import numpy as np
import pytest
from keras import ops

from rayseg.models.losses import batch_share, bce_dice, ce_dice


def loss(mask: object, probability: object) -> list[float]:
    """Of images given without the channel axis."""
    return ops.convert_to_numpy(
        bce_dice(np.array(mask, np.uint8), np.array(probability, np.float32)[..., np.newaxis])
    ).tolist()


def test_hand_computed() -> None:
    # Cross-entropy: pixels (1, 0.9), (0, 0.2), (0, 0.1), (1, 0.6): -(ln .9 + ln .8 + ln .9 + ln .6) / 4 = 0.2361725.
    # Dice: both 0.9 + 0.6, sizes 2 and 1.8: 1 - (2 * 1.5 + 1) / (3.8 + 1) = 0.1666667.
    [value] = loss([[[1, 0], [0, 1]]], [[[0.9, 0.2], [0.1, 0.6]]])
    assert value == pytest.approx(0.2361725 + 0.1666667, abs=1e-6)


def test_nothing_found_where_nothing_is_costs_nothing_and_a_perfect_mask_neither() -> None:
    assert loss([[[0, 0]], [[1, 0]]], [[[0, 0]], [[1, 0]]]) == pytest.approx([0, 0], abs=1e-5)


def test_half_certain_everywhere() -> None:
    # Cross-entropy ln 2; Dice of 2 of 4 pixels: 1 - (2 * 1 + 1) / (2 + 2 + 1) = 0.4.
    assert loss([[[1, 1], [0, 0]]], [[[0.5, 0.5], [0.5, 0.5]]]) == pytest.approx([math.log(2) + 0.4], abs=1e-6)


def test_any_class_index_but_0_is_foreground() -> None:
    probability = [[[0.7, 0.2]]]
    assert loss([[[2, 0]]], probability) == loss([[[1, 0]]], probability)


def test_it_stays_finite_where_the_network_is_certain_and_wrong() -> None:
    assert np.isfinite(loss([[[1, 0]]], [[[0, 1]]])).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shares_of_the_ranks_add_up_to_the_batch_without_its_padding(ranks: int) -> None:
    loss_N = np.array([1, 2, 3, 5, 7, 11, 13, 99], np.float32)
    weight_N = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    shares = [
        float(batch_share(of_rank, weights, global_batch=8))
        for of_rank, weights in zip(np.split(loss_N, ranks), np.split(weight_N, ranks), strict=True)
    ]
    assert sum(shares) == pytest.approx(42 / 8)


def test_several_classes_hand_computed() -> None:
    # Pixels of class 1 (0.1, 0.7, 0.2) and background (0.8, 0.1, 0.1). Cross-entropy -(ln .7 + ln .8) / 2 = 0.2899092.
    # Dice of class 1: 1 - (2 * 0.7 + 1) / (1 + 0.8 + 1) = 0.1428571; of class 2, which is nowhere: 1 - 1 / 1.3.
    probability = np.array([[[[0.1, 0.7, 0.2], [0.8, 0.1, 0.1]]]], np.float32)
    [value] = ops.convert_to_numpy(ce_dice(np.array([[[1, 0]]], np.uint8), probability)).tolist()
    assert value == pytest.approx(0.2899092 + (0.1428571 + 0.2307692) / 2, abs=1e-6)


def test_several_classes_perfect_or_absent_cost_nothing_and_samples_stand_alone() -> None:
    mask = np.array([[[1, 2, 0]], [[0, 0, 0]]], np.uint8)
    perfect = np.eye(3, dtype=np.float32)[mask]
    assert ops.convert_to_numpy(ce_dice(mask, perfect)).tolist() == pytest.approx([0, 0], abs=1e-5)
    random = np.random.default_rng(1).dirichlet(np.ones(3), (2, 1, 3)).astype(np.float32)
    together = ops.convert_to_numpy(ce_dice(mask, random))
    for sample in range(2):
        alone = ops.convert_to_numpy(ce_dice(mask[sample : sample + 1], random[sample : sample + 1]))
        assert alone[0] == pytest.approx(together[sample], abs=1e-6)
    assert np.isfinite(ops.convert_to_numpy(ce_dice(mask, np.roll(perfect, 1, axis=-1)))).all()
