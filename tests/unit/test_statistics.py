"""Bootstrap intervals: against the normal theory where that holds, and properties."""

import numpy as np
import pytest

from rayseg.evaluation.statistics import interval, weights


def test_the_interval_of_a_mean_is_that_of_normal_theory() -> None:
    values = np.random.default_rng(3).normal(10, 2, 200)
    found = interval(lambda indices: values[indices].mean(axis=-1), 200, resamples=4000)
    assert found is not None
    half = 1.96 * values.std() / np.sqrt(200)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    narrower = interval(lambda indices: values[indices].mean(axis=-1), 200, level=0.5)
    assert narrower is not None
    assert found.low < narrower.low < values.mean() < narrower.high < found.high


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(8)
    covered = 0
    for trial in range(200):
        values = random.exponential(1.0, 60)
        found = interval(lambda indices, values=values: values[indices].mean(-1), 60, resamples=400, seed=trial)
        assert found is not None
        covered += found.low <= 1.0 <= found.high
    assert 0.87 <= covered / 200 <= 0.98


def test_a_paired_difference_is_known_better_than_the_difference_of_two_intervals() -> None:
    random = np.random.default_rng(5)
    a = random.normal(0.7, 0.2, 100)
    b = a + 0.05 + random.normal(0, 0.01, 100)
    found = interval(lambda indices: (b[indices] - a[indices]).mean(axis=-1), 100)
    alone = interval(lambda indices: a[indices].mean(axis=-1), 100)
    assert found is not None
    assert alone is not None
    assert 0.045 < found.low < found.high < 0.055
    assert alone.high - alone.low > 10 * (found.high - found.low)


def test_draws_are_repeatable_and_the_same_whatever_the_statistic() -> None:
    values = np.random.default_rng(1).random(30)

    def mean(indices: np.ndarray) -> np.ndarray:
        return values[indices].mean(axis=-1)

    assert interval(mean, 30) == interval(mean, 30)
    assert interval(mean, 30) != interval(mean, 30, seed=1)
    drawn = []
    for factor in (1, 2):
        interval(lambda indices, factor=factor: drawn.append(indices.copy()) or factor * mean(indices), 30)
    assert np.array_equal(drawn[0], drawn[1])


def test_what_is_rarely_defined_has_no_interval_and_a_few_undefined_draws_are_left_out() -> None:
    one_of_ten = np.array([1.0] + [np.nan] * 9)  # missing in 35 % of the draws

    def defined_mean(values: np.ndarray) -> object:
        def statistic(indices: np.ndarray) -> np.ndarray:
            drawn = values[indices]
            with np.errstate(invalid="ignore"):
                return np.nansum(drawn, axis=-1) / np.count_nonzero(np.isfinite(drawn), axis=-1)

        return statistic

    assert interval(defined_mean(one_of_ten), 10) is None  # type: ignore[arg-type]
    half = np.array([0.0, 1.0] * 5 + [np.nan] * 10)
    found = interval(defined_mean(half), 20)  # type: ignore[arg-type]
    assert found is not None
    assert 0 <= found.low < 0.5 < found.high <= 1
    assert interval(lambda indices: indices[..., 0] * 1.0, 1) is None
    assert interval(lambda indices: np.full(len(indices), 0.25), 7) == (0.25, 0.25)


def test_weights_are_how_often_each_is_drawn() -> None:
    found = weights(np.array([[0, 0, 2], [1, 2, 2]]), 3)
    assert found.tolist() == [[2, 0, 1], [0, 1, 2]]
    assert weights(np.arange(4), 4).tolist() == [1, 1, 1, 1]
