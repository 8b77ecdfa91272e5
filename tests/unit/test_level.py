"""How often a challenger that is worse by exactly the margin passes: simulated promotions with fixed seeds."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from rayseg.evaluation.metrics import Columns
from rayseg.evaluation.paired import Difference, difference

TRIALS, LEVEL, MARGIN, SPREAD = 400, 0.95, 0.02, 0.04
NUMBERS = (5, 8, 12, 20, 40)
METRICS = ("dice_per_case", "dice_pooled")


def normal(random: np.random.Generator, patients: int) -> np.ndarray:
    """Differences of patients: their mean is 0, their spread 1."""
    return random.normal(0, 1, patients)


def a_few_fail(random: np.random.Generator, patients: int) -> np.ndarray:
    """Skewed as far as gamma of shape 4 is, with the tail on the challenger's bad side."""
    return (4 - random.gamma(4, 1, patients)) / 2


def compared(metric: str, random: np.random.Generator, dice: np.ndarray, gain: np.ndarray) -> Difference:
    """A challenger with `gain` more Dice in each patient; sizes of lesions differ thirtyfold and more in a set."""
    size = random.lognormal(np.log(5000), 1, len(dice))

    def model(values: np.ndarray) -> list[Columns]:
        return [{"tp": values * size, "fp": (1 - values) * size, "fn": (1 - values) * size, "dice": values}]

    found = difference(metric, model(dice + gain), model(dice), level=LEVEL)
    assert found is not None
    return found


def passes(metric: str, patients: int, drawn: Callable[..., np.ndarray], mean: float, trials: int = TRIALS) -> int:
    """How many of the trials end with an interval above minus the margin."""
    random, passed = np.random.default_rng([patients, METRICS.index(metric)]), 0
    for _ in range(trials):
        dice = random.normal(0.75, 0.08, patients)
        found = compared(metric, random, dice, mean + SPREAD * drawn(random, patients))
        passed += found.low is not None and found.low >= -MARGIN
    return passed


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("patients", NUMBERS)
def test_what_is_worse_by_the_margin_passes_no_more_often_than_the_level_says(metric: str, patients: int) -> None:
    passed = passes(metric, patients, normal, -MARGIN)
    # At 2.5 % no more than one in a thousand such counts is larger.
    assert passed <= stats.binom.ppf(0.999, TRIALS, (1 - LEVEL) / 2), f"{passed / TRIALS:.1%}"


@pytest.mark.parametrize("metric", METRICS)
def test_failures_in_a_few_patients_are_not_overlooked(metric: str) -> None:
    passed = sum(passes(metric, patients, a_few_fail, -MARGIN) for patients in NUMBERS)
    # A quantile of draws lets 9 %, Student's t alone 5 to 7 % of these pass.
    assert passed / (TRIALS * len(NUMBERS)) < 0.045


def test_an_equal_model_passes_where_there_are_patients_enough() -> None:
    assert passes("dice_per_case", 40, normal, 0.0, 100) > 75
    assert passes("dice_pooled", 60, normal, 0.0, 100) > 45


def test_the_interval_of_a_mean_is_students() -> None:
    random = np.random.default_rng(4)
    gain = np.tile([-0.03, 0.05, -0.01, 0.03], 5)  # symmetric, so that no skewness counts
    dice = random.uniform(0.5, 0.7, 20)
    found = compared("dice_per_case", random, dice, gain)
    expected = stats.t.interval(LEVEL, 19, gain.mean(), stats.sem(gain))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.patients == 20


def test_each_patient_is_left_out_of_both_models() -> None:
    """Against the jackknife in a loop, of a pooled ratio, whose error the interval must have; two classes."""
    random = np.random.default_rng(6)
    counts = random.integers(5, 400, (2, 2, 3, 15)).astype(float)  # model, class, count, patient

    def pooled(of: np.ndarray) -> float:
        return float(np.mean([2 * tp.sum() / (2 * tp + fp + fn).sum() for tp, fp, fn in of]))

    def apart(chosen: np.ndarray) -> float:
        return pooled(counts[0][..., chosen]) - pooled(counts[1][..., chosen])

    left_out = np.array([apart(np.arange(15) != patient) for patient in range(15)])
    error = np.sqrt(14 / 15 * ((left_out - left_out.mean()) ** 2).sum())
    models = [[dict(zip(("tp", "fp", "fn"), of, strict=True)) for of in model] for model in counts]
    found = difference("dice_pooled", *models, level=LEVEL)  # type: ignore[arg-type]
    assert found is not None
    assert found.difference == pytest.approx(apart(np.arange(15)))
    low, high = found.low, found.high
    assert low is not None
    assert high is not None
    # No nearer than with equal weights, and with weights so alike not much farther.
    assert stats.t.ppf(0.975, 14) * error * 0.999 <= min(found.difference - low, high - found.difference)
    assert max(found.difference - low, high - found.difference) < 1.4 * stats.t.ppf(0.975, 14) * error
