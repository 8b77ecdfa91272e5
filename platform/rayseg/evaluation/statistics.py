"""Intervals over patients: slices of one patient are no independent observations, patients are.

`interval` is of one model's metric, for reports: the percentile bootstrap (Efron and Tibshirani 1993, An Introduction
to the Bootstrap, chapter 13) by scipy.stats.bootstrap. Patients are drawn with replacement, as many as there are, and
the statistic, a function of indices of patients, int (..., patients) to float (...), is computed of each draw. Of few
patients it is too narrow.

`jackknife` is of a difference on which a decision hangs, and keeps its level with few patients. The standard error is
that of the delete-one jackknife (Efron and Tibshirani, chapter 11), the quantile Student's t, with Satterthwaite's
degrees of freedom (1946, doi:10.2307/3002019) where weights are unequal: in a pooled ratio a patient with a large
lesion weighs more. Where the patients' differences are skewed, as when a model fails in a few, t is too short on that
side: each end is the farther one of t and of Hall's transformation, which takes skewness away (1992,
doi:10.1111/j.2517-6161.1992.tb01876.x).
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

Statistic = Callable[[np.ndarray], np.ndarray]

_INDICES_A_BATCH = 2_000_000  # 16 MB of them, and as much again for each array that a statistic makes
_LEAST_DEFINED = 0.95
_NO_SKEWNESS = 1e-6  # below it the transformation is rounding, and changes nothing


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


def jackknife(value: float, left_out: np.ndarray, shares: np.ndarray, *, level: float = 0.95) -> Interval | None:
    """The interval of a smooth statistic of independent patients, see the module.

    Args:
        value: the statistic of all patients.
        left_out: the statistic without each patient, float (patients,).
        shares: what part of the statistic each patient makes, float (patients,), in all 1; equal ones of a mean. Who
            has none is not counted.
        level: of confidence.

    Returns:
        None where fewer than two patients have a share, or the statistic is undefined without one of them.
    """
    influences, shares = (value - left_out)[shares > 0], shares[shares > 0]
    patients = len(shares)
    if patients < 2 or not np.isfinite(influences).all():
        return None
    influences = influences - influences.mean()
    squares = float((influences**2).sum())
    error = np.sqrt((patients - 1) / patients * squares)
    # Of a sum of squares that weigh as much as squared shares: n - 1 where these are equal.
    freedom = (patients - 1) / patients * float((shares**2).sum()) ** 2 / float((shares**4).sum())
    far = float(stats.t.ppf((1 + level) / 2, freedom))
    skewness = float((influences**3).mean()) / (squares / patients) ** 1.5 if error > 0 else 0.0
    above, below = (max(far, _unskewed(quantile, skewness, patients)) for quantile in (far, -far))
    return Interval(value - float(error) * above, value + float(error) * below)


def _unskewed(quantile: float, skewness: float, patients: int) -> float:
    """How far, in standard errors, the end for a quantile lies from the value by Hall's transformation (his g_1)."""
    slope = skewness / np.sqrt(patients)
    if abs(slope) < _NO_SKEWNESS:
        return abs(quantile)
    return abs(float(3 / slope * (np.cbrt(1 + slope * (quantile - slope / 6)) - 1)))


def weights(indices: np.ndarray, patients: int) -> np.ndarray:
    """How often each patient is in each draw, float64 (..., patients), of int indices (..., drawn).

    Sums over the drawn patients are then products with the patients' values.
    """
    rows = indices.reshape(-1, indices.shape[-1])
    places = rows + patients * np.arange(len(rows))[:, np.newaxis]
    counted = np.bincount(places.ravel(), minlength=patients * len(rows))
    return counted.reshape(*indices.shape[:-1], patients).astype(np.float64)
