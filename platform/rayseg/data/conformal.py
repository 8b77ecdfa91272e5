"""Intervals of volumes by split conformal prediction (Vovk et al. 2005; Lei et al. 2018, arXiv:1604.04173).

Patients of validation tell how far predicted and true volumes lie apart. Where a new patient is exchangeable with them,
the interval holds the truth with a probability of at least 95 %, whatever the errors' distribution: that is over all
patients, not over those with small lesions, and a model that is used on other scanners has no such promise.

The distance is that between radii of balls of these volumes. A mask's errors lie at its surface, so the error of a
volume grows with the surface, and that of the radius hardly at all: an absolute error of millilitres would give small
lesions the intervals of large ones, a relative one is not defined where nothing is found. It needs no constant that
somebody has to choose, no second network, and no volume becomes negative.

A patient is one draw, of the greatest distance among the patient's series: slices and series of one patient are not
exchangeable with those of others.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PERCENT = 95
_UNIT_ML = 4 / 3 * math.pi / 1000  # of a ball of radius 1 mm
_DIGITS = 1e4


@dataclass(frozen=True)
class Interval:
    """Millilitres."""

    low_ml: float
    high_ml: float

    def holds(self, volume_ml: float) -> bool:
        """Whether a volume lies within, ends included."""
        return self.low_ml <= volume_ml <= self.high_ml


@dataclass(frozen=True)
class VolumeErrors:
    """How far volumes of a model, by its threshold, are off in 95 % of the patients of validation.

    radius_mm: of each class in order, then of all foreground together; None where too few patients have one.
    patients: of each of these, how many have both volumes.
    """

    radius_mm: tuple[float | None, ...] = ()
    patients: tuple[int, ...] = ()
    percent: int = PERCENT

    def of_class(self, value: int, volume_ml: float | None) -> Interval | None:
        """The interval around a series' volume of the class of this value in label maps."""
        assert value > 0, "the background has none"
        return self._around(value - 1, volume_ml)

    def of_foreground(self, volume_ml: float | None) -> Interval | None:
        """The interval around a series' volume of all classes together."""
        return self._around(-1, volume_ml)

    def _around(self, place: int, volume_ml: float | None) -> Interval | None:
        radius_mm = self.radius_mm[place] if self.radius_mm else None
        if radius_mm is None or volume_ml is None:
            return None
        found_mm = ball_radius_mm(volume_ml)
        low_ml, high_ml = _ball_ml(max(found_mm - radius_mm, 0.0)), _ball_ml(found_mm + radius_mm)
        return Interval(min(low_ml, volume_ml), max(high_ml, volume_ml))  # rounding may not leave it out


def ball_radius_mm(volume_ml: float) -> float:
    """The radius of a ball of this volume."""
    return math.cbrt(volume_ml / _UNIT_ML)


def apart_mm(predicted_ml: float, true_ml: float) -> float:
    """How far two volumes lie apart: the difference of the radii of balls of theirs."""
    return abs(ball_radius_mm(predicted_ml) - ball_radius_mm(true_ml))


def farthest_mm(volumes_ml: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Of a patient's series, each predicted and true, the greatest distance; None where any volume is not known."""
    apart = [None if None in pair else apart_mm(*pair) for pair in volumes_ml]  # type: ignore[arg-type]
    known = [one for one in apart if one is not None]
    return max(known) if known and len(known) == len(apart) else None


def total_ml(of_classes: Iterable[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    """Predicted and true volume of all foreground of a series, by those of its classes."""
    predicted, true = zip(*of_classes, strict=True)
    return (None if None in predicted else sum(predicted)), (None if None in true else sum(true))


def quantile(distances: Sequence[float], percent: int = PERCENT) -> float | None:
    """The distance that a new draw, exchangeable with these, exceeds with a probability of at most 1 - `percent` %.

    It is the ceil((n + 1) `percent` / 100)-th smallest of n, rounded up to 0.0001; None where n is too small to have
    one, which for 95 % is below 19.
    """
    rank = -(-(len(distances) + 1) * percent // 100)  # in whole numbers: 0.95 has no exact float
    if rank > len(distances):
        return None
    return math.ceil(float(np.sort(np.asarray(distances, np.float64))[rank - 1]) * _DIGITS) / _DIGITS


def least_patients(percent: int = PERCENT) -> int:
    """How many patients an interval needs."""
    return -(-percent // (100 - percent))


def errors(distances: Sequence[Sequence[float]]) -> VolumeErrors:
    """What distances come to, those of each class in order, then those of all foreground: one a patient."""
    return VolumeErrors(tuple(quantile(of) for of in distances), tuple(len(of) for of in distances))


def _ball_ml(radius_mm: float) -> float:
    return _UNIT_ML * radius_mm**3
