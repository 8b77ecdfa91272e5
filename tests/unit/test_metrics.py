"""Counts of pixels and the Dice from them."""

import numpy as np
import pytest
from keras import ops
from sklearn.metrics import f1_score

from rayseg.models.metrics import confusion, confusion_by_class, mean_of_defined, pooled_dice


def counts(mask: np.ndarray, probability: np.ndarray, weight: list[float], threshold: float = 0.5) -> list[int]:
    return ops.convert_to_numpy(
        confusion(mask, probability[..., np.newaxis], np.array(weight, np.float32), threshold)
    ).tolist()


def test_hand_counted_with_padding_and_the_threshold_itself() -> None:
    mask = np.array([[[1, 0, 1, 0]], [[1, 1, 1, 1]]], np.uint8)
    probability = np.array([[[0.5, 0.5, 0.49, 0.1]], [[0.9, 0.9, 0.9, 0.9]]], np.float32)
    assert counts(mask, probability, [1, 0]) == [1, 1, 1]
    assert counts(mask, probability, [1, 1]) == [5, 1, 1]
    assert counts(mask, probability, [1, 0], threshold=0.3) == [2, 1, 0]


def test_pooled_dice_of_summed_counts_is_the_f1_of_all_pixels() -> None:
    random = np.random.default_rng(5)
    mask = (random.random((6, 9, 7)) > 0.7).astype(np.uint8)
    probability = (0.6 * random.random((6, 9, 7)) + 0.3 * mask).astype(np.float32)
    halves = [counts(mask[part], probability[part], [1] * 3) for part in (slice(0, 3), slice(3, 6))]
    assert pooled_dice(*np.sum(halves, axis=0).tolist()) == pytest.approx(
        f1_score(mask.ravel(), probability.ravel() >= 0.5), abs=1e-12
    )


def test_dice_at_the_ends() -> None:
    assert pooled_dice(0, 0, 0) is None
    assert pooled_dice(3, 0, 0) == 1
    assert pooled_dice(0, 2, 0) == 0
    assert pooled_dice(0, 0, 2) == 0
    assert pooled_dice(1, 1, 2) == pytest.approx(2 / 5)


def test_each_class_is_counted_by_the_most_probable_one_without_padding() -> None:
    random = np.random.default_rng(6)
    mask = random.integers(0, 4, (5, 8, 9)).astype(np.uint8)
    probability = random.dirichlet(np.ones(4), (5, 8, 9)).astype(np.float32)
    probability[np.arange(4)[None, None, None] == mask[..., None]] += np.float32(0.2)
    weight = np.array([1, 1, 1, 1, 0], np.float32)
    counted = ops.convert_to_numpy(confusion_by_class(mask, probability, weight))
    assert counted.shape == (3, 3)
    found = probability.argmax(axis=-1)
    for index in (1, 2, 3):
        expected = f1_score(mask[:4].ravel() == index, found[:4].ravel() == index)
        assert pooled_dice(*counted[index - 1].tolist()) == pytest.approx(expected, abs=1e-12)


def test_a_class_without_a_value_is_left_out_of_the_mean() -> None:
    assert mean_of_defined([0.25, None, 0.75]) == 0.5
    assert mean_of_defined([None, None]) is None
