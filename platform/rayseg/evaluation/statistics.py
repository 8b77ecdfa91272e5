"""Intervals by the bootstrap over patients: slices of one patient are no independent observations, patients are.

Percentile bootstrap (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13) by scipy.stats.bootstrap:
patients are drawn with replacement, as many as there are, and the statistic is computed of each draw. A statistic is a
function of indices of patients, int (..., patients) to float (...), so that the same function serves differences of two
models too: it takes both models' values of the patients that are drawn (a paired bootstrap).
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

Statistic = Callable[[np.ndarray], np.ndarray]

_INDICES_A_BATCH = 2_000_000  # 16 MB of them, and as much again for each array that a statistic makes
_LEAST_DEFINED = 0.95


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


def interval(
    statistic: Statistic, patients: int, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """The percentile bootstrap interval of a statistic.

    Args:
        statistic: int indices (resamples, patients) to float (resamples,), NaN where a draw leaves it undefined.
        patients: how many there are; indices are below.
        level: of confidence.
        resamples: number of draws.
        seed: of the draws: those of equal seeds and numbers of patients are equal.

    Returns:
        None for fewer than two patients, or where the statistic is undefined in more than 5 % of the draws; the others
        are left out.
    """
    if patients < 2:
        return None
    with warnings.catch_warnings():
        # Its own interval is NaN, and it says so, where a single draw is.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (np.arange(patients),),
            lambda indices, axis: np.asarray(statistic(indices), np.float64),
            n_resamples=resamples,
            batch=min(resamples, max(1, _INDICES_A_BATCH // patients)),
            vectorized=True,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    drawn = np.asarray(result.bootstrap_distribution)
    defined = drawn[np.isfinite(drawn)]
    if defined.size < _LEAST_DEFINED * drawn.size:
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def weights(indices: np.ndarray, patients: int) -> np.ndarray:
    """How often each patient is in each draw, float64 (..., patients), of int indices (..., drawn).

    Sums over the drawn patients are then products with the patients' values.
    """
    rows = indices.reshape(-1, indices.shape[-1])
    places = rows + patients * np.arange(len(rows))[:, np.newaxis]
    counted = np.bincount(places.ravel(), minlength=patients * len(rows))
    return counted.reshape(*indices.shape[:-1], patients).astype(np.float64)
