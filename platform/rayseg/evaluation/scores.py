"""Overlap of masks as counts of pixels, which add up and are divided once. numpy only."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Counts:
    """Pixels by prediction and truth; counts of several slices, cases or workers add up."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def dice(self) -> float | None:
        """2 TP / (2 TP + FP + FN), which is also F1; None where both prediction and truth are empty."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float | None:
        """TP / (TP + FP + FN), the Jaccard index; None where both prediction and truth are empty."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float | None:
        """TP / (TP + FP); None where nothing is predicted."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN), the sensitivity; None where there is nothing to find."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def accuracy(self) -> float | None:
        """(TP + TN) / all pixels; None without pixels."""
        return _ratio(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)


def counts(prediction: np.ndarray, truth: np.ndarray) -> Counts:
    """Counts of two masks of one shape; whatever is not 0 is foreground.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"scores: prediction is {prediction.shape} and truth {truth.shape}; compare on one grid")
    predicted, true = prediction != 0, truth != 0
    tp = int(np.count_nonzero(predicted & true))
    fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(true)) - tp
    return Counts(tp, fp, fn, truth.size - tp - fp - fn)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
