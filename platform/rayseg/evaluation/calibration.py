"""How far probabilities can be believed, and how well they rank: sums over pixels, on the slices' own grid. numpy only.

Probabilities are those of one class against all else, also where a network tells several classes apart.
"""

from dataclasses import dataclass

import numpy as np

from rayseg.models import histograms

BINS = 10  # of the reliability picture and of ECE: [0, 0.1), [0.1, 0.2), ..., [0.9, 1]


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Sums over pixels; those of several slices add up.

    negative, positive: int64 (histograms.BINS,), pixels that are not of the class and that are, by probability.
    reliability: float64 (BINS, 3), by probability: pixels, the sum of their probabilities, how many are of the class.
    squares: the sum of squared differences of probability and truth.
    """

    negative: np.ndarray
    positive: np.ndarray
    reliability: np.ndarray
    squares: float

    @classmethod
    def of(cls, probability: np.ndarray, truth: np.ndarray) -> "Probabilities":
        """Of float32 probabilities and a bool mask, both (rows, columns)."""
        wide = np.clip(probability.ravel(), 0.0, 1.0).astype(np.float64)
        places = np.minimum((wide * BINS).astype(np.int64), BINS - 1)
        sums = [np.bincount(places, values, BINS) for values in (None, wide, truth.ravel())]
        negative, positive = histograms.histograms(probability, truth)
        return cls(negative, positive, np.stack(sums, axis=1), float(np.square(wide - truth.ravel()).sum()))

    @classmethod
    def nothing(cls) -> "Probabilities":
        """Of no pixels."""
        none = np.zeros(histograms.BINS, np.int64)
        return cls(none, none, np.zeros((BINS, 3)), 0.0)

    def __add__(self, other: "Probabilities") -> "Probabilities":
        return Probabilities(
            self.negative + other.negative,
            self.positive + other.positive,
            self.reliability + other.reliability,
            self.squares + other.squares,
        )

    @property
    def average_precision(self) -> float | None:
        """See `models.histograms`; None where there is nothing to find."""
        found = float(histograms.average_precision(self.negative, self.positive))
        return None if np.isnan(found) else found

    @property
    def brier(self) -> float | None:
        """The mean squared difference of probability and truth (Brier 1950); None without pixels."""
        pixels = self.reliability[:, 0].sum()
        return float(self.squares / pixels) if pixels else None

    @property
    def ece(self) -> float | None:
        """See `ece`; None without pixels."""
        found = float(ece(self.reliability))
        return None if np.isnan(found) else found


def ece(reliability: np.ndarray) -> np.ndarray:
    """The expected calibration error (Naeini et al. 2015), (...), of sums (..., BINS, 3) as in `Probabilities`.

    The mean over all pixels of the difference between their bin's mean probability and its share of pixels that are of
    the class. Background, which most pixels are and most networks are sure of, makes it small.
    """
    pixels, probability, truth = np.moveaxis(reliability, -1, 0)
    with np.errstate(invalid="ignore"):
        return np.abs(probability - truth).sum(-1) / pixels.sum(-1)
