"""Conformal intervals of volumes: the quantile by hand, and the coverage by simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from rayseg import config
from rayseg.data import conformal
from rayseg.data.conformal import VolumeErrors

DRAWS = 1000


@pytest.mark.parametrize(
    ("patients", "rank"), [(18, None), (19, 19), (20, 20), (38, 38), (39, 38), (59, 57), (60, 58), (99, 95), (199, 190)]
)
def test_the_quantile_is_the_smallest_rank_that_has_room_for_one_more(patients: int, rank: int | None) -> None:
    """By hand: 0.95 x 20 = 19, x 21 = 19.95, x 39 = 37.05, x 40 = 38, x 60 = 57, x 61 = 57.95, x 100 = 95."""
    distances = np.random.default_rng(0).permutation(np.arange(1.0, patients + 1))
    found = conformal.quantile(distances.tolist())
    assert found == rank
    assert conformal.least_patients() == 19
    assert conformal.quantile([0.1] * 8, 90) is None
    assert conformal.quantile([0.1] * 9, 90) == 0.1


def test_a_distance_is_that_of_the_balls_radii() -> None:
    """A ball of 10 mm has 4.18879 mL, one of 12 mm 7.23823 mL."""
    assert conformal.apart_mm(4.18879, 7.23823) == pytest.approx(2, abs=1e-5)
    assert conformal.apart_mm(0, 4.18879) == pytest.approx(10, abs=1e-5)
    errors = conformal.errors([[2.0] * 19, [3.0] * 18, [10.5] * 30])
    assert errors == VolumeErrors((2.0, None, 10.5), (19, 18, 30))
    around = errors.of_class(1, 7.23823)
    assert around is not None
    assert around.low_ml == pytest.approx(4.18879, abs=1e-5)
    assert around.high_ml == pytest.approx(4 / 3 * math.pi * 14**3 / 1000, abs=1e-5)
    assert errors.of_class(2, 7.23823) is None
    assert errors.of_class(1, None) is None
    low = errors.of_foreground(4.18879)
    assert low is not None
    assert low.low_ml == 0, "no volume is negative"
    nothing = errors.of_foreground(0.0)
    assert nothing is not None
    assert (nothing.low_ml, nothing.high_ml) == (0, pytest.approx(4 / 3 * math.pi * 10.5**3 / 1000))
    exact = conformal.errors([[0.0] * 19]).of_class(1, 0.1)
    assert exact is not None
    assert exact.holds(0.1)
    assert VolumeErrors().of_foreground(1.0) is None
    assert config.build(VolumeErrors, config.plain(errors)) == errors


def test_a_patient_is_the_worst_of_its_series() -> None:
    assert conformal.farthest_mm([(0.0, 0.0), (4.18879, 0.0)]) == pytest.approx(10, abs=1e-5)
    assert conformal.farthest_mm([(0.0, 0.0), (4.18879, None)]) is None
    assert conformal.farthest_mm([]) is None


def _surface(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Balls whose radius is found with an error that is the same for all sizes."""
    radius = rng.lognormal(2, 0.6, size)
    return radius**3, np.maximum(radius + rng.normal(0, 1, size), 0) ** 3


def _heavy(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of a factor whose logarithm has no mean (Cauchy)."""
    true = rng.lognormal(1, 1, size)
    return true, true * np.exp(np.clip(rng.standard_cauchy(size), -50, 50))


def _often_nothing(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Half have nothing; of the others a fifth is missed, and in a tenth of the healthy something is found."""
    ill = rng.random(size) < 0.5
    true = np.where(ill, rng.lognormal(1, 1, size), 0)
    seen = np.where(ill, rng.random(size) < 0.8, rng.random(size) < 0.1)
    return true, np.where(seen, np.where(ill, true * rng.lognormal(0, 0.3, size), rng.exponential(1, size)), 0)


def _several_series(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Patients of one to four series whose errors are alike: (size, 4), NaN where there is none."""
    count = rng.integers(1, 5, size)[:, np.newaxis]
    true = np.broadcast_to(rng.lognormal(1, 1, (size, 1)), (size, 4))
    found = true * np.exp(rng.normal(0, 0.5, (size, 1)) + rng.normal(0, 0.1, (size, 4)))
    absent = np.arange(4) >= count
    return np.where(absent, np.nan, true), np.where(absent, np.nan, found)


@pytest.mark.parametrize("patients", [19, 25, 60])
@pytest.mark.parametrize("kind", [_surface, _heavy, _often_nothing, _several_series])
def test_a_new_patient_lies_within_in_95_percent_of_draws(
    kind: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]], patients: int
) -> None:
    """Each draw is a validation split and one more patient. Of no ties at most 1 / (n + 1) more are covered."""
    rng = np.random.default_rng(patients)
    covered = 0
    for _ in range(DRAWS):
        true, found = kind(rng, patients + 1)
        pairs = [
            [(float(p), float(t)) for p, t in zip(np.atleast_1d(ps), np.atleast_1d(ts), strict=True) if t == t]
            for ps, ts in zip(found, true, strict=True)
        ]
        distances = [conformal.farthest_mm(series) for series in pairs[1:]]
        errors = conformal.errors([[one for one in distances if one is not None]])
        covered += all(interval.holds(t) for p, t in pairs[0] if (interval := errors.of_class(1, p)))
        assert errors.radius_mm[0] is not None
    # Of a probability of 0.95 fewer come in one of 10,000 such tests.
    assert covered >= stats.binom.ppf(1e-4, DRAWS, 0.95), covered / DRAWS
    if kind is not _often_nothing:  # whose distances of 0 are ties, which cover more
        assert covered <= stats.binom.ppf(1 - 1e-4, DRAWS, 0.95 + 1 / (patients + 1)), covered / DRAWS
