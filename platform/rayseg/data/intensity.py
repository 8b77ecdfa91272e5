"""Intensity: from the values of a volume to those that a network sees, the same for all of its slices."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rayseg.data.histogram import Histogram
from rayseg.dicom.reading import Slice

_OF_FOREGROUND = (0.5, 99.5)  # percentiles that CT is clipped at


@dataclass(frozen=True)
class Levels:
    """A linear map of values, in units of the rescaled ones (HU for CT): (clip(value, low, high) - centre) / width."""

    low: float  # infinite: nothing is clipped
    high: float
    centre: float
    width: float

    def apply(self, slice: Slice) -> np.ndarray:
        """A slice's values as float32 (rows, columns)."""
        slope, intercept = slice.rescale_slope / self.width, (slice.rescale_intercept - self.centre) / self.width
        if slice.stored.dtype.itemsize > 2:  # float32 holds 24 bits of an integer
            mapped = (slice.stored * np.float64(slope) + intercept).astype(np.float32)
        else:
            mapped = slice.stored.astype(np.float32)
            mapped *= np.float32(slope)
            mapped += np.float32(intercept)
        if np.isfinite(self.low):
            ends = (self.low - self.centre) / self.width, (self.high - self.centre) / self.width
            np.clip(mapped, *map(np.float32, ends), out=mapped)
        return mapped


@dataclass(frozen=True)
class Intensity:
    """What becomes of a volume's values. Each volume has its own statistics, but for `ct`.

    `ct` is nnU-Net's for CT (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z): the percentiles 0.5 and 99.5, mean
    and standard deviation of the foreground of the training set, in HU.
    """

    # z_score: the volume's mean becomes 0, its standard deviation 1. percentiles: those of the volume become -1 and 1,
    # what lies beyond is clipped. ct: clipped to `low` and `high`, less `mean`, over `deviation`
    kind: Literal["z_score", "percentiles", "ct"] = "z_score"
    percentiles: tuple[float, float] = (0.5, 99.5)  # of the volume's values, for `percentiles`
    low: float | None = None  # HU, for `ct`: these four are measured by prepare on the training set's foreground
    high: float | None = None  # HU
    mean: float | None = None  # HU
    deviation: float | None = None  # HU, standard deviation

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"intensity.percentiles: 0 <= low < high <= 100 expected, got {self.percentiles}")
        measured = (self.low, self.high, self.mean, self.deviation)
        if self.kind != "ct" and measured != (None,) * 4:
            raise ValueError(f"intensity: low, high, mean and deviation are of the kind ct, not of {self.kind}")
        if None in measured and measured != (None,) * 4:
            raise ValueError("intensity: give all of low, high, mean and deviation, or none of them")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"intensity.low: at most high expected, got {self.low} and {self.high}")
        if self.deviation is not None and not self.deviation > 0:
            raise ValueError(f"intensity.deviation: a positive number expected, got {self.deviation}")

    @property
    def is_measured(self) -> bool:
        """Whether `levels` needs no volume: of `ct` that knows its foreground."""
        return self.kind == "ct" and self.deviation is not None

    def levels(self, volume: Histogram | None = None) -> Levels:
        """The map of a volume's values; a volume of one value becomes 0.

        Args:
            volume: its values; not needed where `is_measured`.
        """
        if self.kind == "ct":
            assert self.low is not None, "the foreground was measured, see of_foreground"
            assert self.high is not None
            assert self.mean is not None
            assert self.deviation is not None
            return Levels(self.low, self.high, self.mean, self.deviation)
        assert volume is not None
        if self.kind == "z_score":
            return Levels(-np.inf, np.inf, volume.mean, volume.deviation or 1.0)
        low, high = volume.percentiles(self.percentiles)
        return Levels(low, high, (low + high) / 2, (high - low) / 2 or 1.0)

    def of_foreground(self, values: Histogram) -> "Intensity":
        """The same of kind `ct`, with what the values (HU) in the training set's foreground measure.

        Raises:
            ValueError: there are none.
        """
        if not values.count:
            raise ValueError("prepare.volume.intensity: kind ct needs foreground in the training split; there is none")
        low, high = values.percentiles(_OF_FOREGROUND)
        return replace(self, kind="ct", low=low, high=high, mean=values.mean, deviation=values.deviation or 1.0)
