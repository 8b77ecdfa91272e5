"""Calibration and average precision against scikit-learn, and values worked out by hand."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score

from rayseg.evaluation.calibration import BINS, Probabilities
from rayseg.models import histograms


@pytest.fixture
def pixels() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(4)
    truth = random.random((60, 50)) < 0.2
    logit = random.normal(2.0 * truth - 2.5, 1.5)  # too sure of the background
    return (1 / (1 + np.exp(-logit))).astype(np.float32), truth


def test_brier_reliability_and_average_precision_are_those_of_scikit_learn(
    pixels: tuple[np.ndarray, np.ndarray],
) -> None:
    probability, truth = pixels
    halves = [Probabilities.of(probability[part], truth[part]) for part in (slice(0, 25), slice(25, None))]
    found = halves[0] + halves[1] + Probabilities.nothing()
    wide = probability.ravel().astype(np.float64)
    assert found.brier == pytest.approx(brier_score_loss(truth.ravel(), wide), abs=1e-9)
    fraction, mean = calibration_curve(truth.ravel(), wide, n_bins=BINS)
    pixels_N, sums, positives = found.reliability.T
    assert positives / pixels_N == pytest.approx(fraction, abs=1e-9)
    assert sums / pixels_N == pytest.approx(mean, abs=1e-9)
    assert found.ece == pytest.approx(np.average(np.abs(fraction - mean), weights=pixels_N), abs=1e-9)
    assert found.average_precision == pytest.approx(average_precision_score(truth.ravel(), wide), abs=2e-3)
    # Of probabilities in the middle of bins it is exact.
    step = 2 * 16.64 / histograms.BINS
    middle = (np.floor(np.log(wide / (1 - wide)) / step) + 0.5) * step
    middle = (1 / (1 + np.exp(-middle))).astype(np.float32)
    expected = average_precision_score(truth.ravel(), middle)
    assert Probabilities.of(middle, truth.ravel()).average_precision == pytest.approx(expected, abs=1e-6)


def test_worked_out_by_hand() -> None:
    found = Probabilities.of(np.array([[0.0, 0.1, 0.25, 1.0]], np.float32), np.array([[False, True, False, True]]))
    assert found.reliability[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]  # edges belong to the bin above
    assert found.brier == pytest.approx((0 + 0.81 + 0.0625 + 0) / 4)
    assert found.ece == pytest.approx((0 + 0.9 + 0.25 + 0) / 4)
    # 1.0 first (precision 1), then 0.25 wrong, then 0.1 (2 of 3): half the recall each.
    assert found.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_of_nothing_and_without_anything_to_find() -> None:
    none = Probabilities.nothing()
    assert (none.brier, none.ece, none.average_precision) == (None, None, None)
    healthy = Probabilities.of(np.full((2, 2), 0.5, np.float32), np.zeros((2, 2), bool))
    assert (healthy.brier, healthy.ece, healthy.average_precision) == (0.25, 0.5, None)


def test_the_best_threshold_is_the_one_that_trying_all_finds(pixels: tuple[np.ndarray, np.ndarray]) -> None:
    probability, truth = pixels
    found = histograms.best_threshold(*histograms.histograms(probability, truth))
    assert found is not None
    threshold, dice, *counts = found
    taken = probability >= threshold
    assert counts == [(taken & truth).sum(), (taken & ~truth).sum(), (~taken & truth).sum()]
    assert f1_score(truth.ravel(), probability.ravel() >= threshold) == pytest.approx(dice, abs=1e-9)
    tried = [f1_score(truth.ravel(), probability.ravel() >= one) for one in np.linspace(0.01, 0.99, 197)]
    assert dice >= max(tried) - 2e-3  # edges of bins are no value of `tried`
    assert dice > tried[98] + 0.01  # that of a half


def test_the_best_threshold_by_hand_of_equally_good_ones_the_middle() -> None:
    # Below 0.2 nothing, from 0.3 on two of three: Dice of a threshold between is 2 * 3 / (4 + 3), of one above 0.3
    # 2 * 2 / (2 + 3) at 0.6, where 2 of 3 are found and nothing is wrong.
    probability = np.array([0.2, 0.3, 0.3, 0.9, 0.9], np.float32)
    truth = np.array([False, False, True, True, True])
    threshold, dice, *_ = histograms.best_threshold(*histograms.histograms(probability, truth)) or (0, 0)
    assert dice == pytest.approx(2 * 3 / (4 + 3))
    assert 0.29 < threshold < 0.3  # from 0.2 to 0.3 all are equal: the nearest to a half
    apart = np.array([0.01, 0.02, 0.97], np.float32)
    assert histograms.best_threshold(*histograms.histograms(apart, apart > 0.5)) == (0.5, 1.0, 1, 0, 0)
    assert histograms.best_threshold(*histograms.histograms(apart, apart > 1)) is None
