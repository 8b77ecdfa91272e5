"""Overlap scores of masks, as sums of counts that are divided once. numpy only.

Two averages, which differ and are never mixed:

- pooled: the pixels of all cases are counted together; large lesions weigh most, empty cases add only false positives;
- per case: each case is scored by itself and the scores are averaged; every patient weighs the same.

Cases with nothing in them, by definition here: an empty prediction for an empty truth has no Dice (0/0) and is left out
of the per-case mean; it is counted as a true negative case. Any prediction for an empty truth scores 0 and stays in, as
does an empty prediction where there is a truth. The other per-case scores are means over the cases that have them, too:
precision over those with a prediction, recall over those with a truth, accuracy over all.

Average precision needs probabilities, which predictions on the native grid no longer have: `models.metrics` counts it
in validation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

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

    @property
    def background(self) -> "Counts":
        """The counts that the prediction "everything is background" would have for the same truth: the baseline."""
        return Counts(fn=self.tp + self.fn, tn=self.tn + self.fp)


@dataclass(frozen=True)
class Scores:
    """What is told of one class, or of several together; None where it is undefined.

    Of several classes the scores are means over those that have one, and the numbers of cases sums over all.
    """

    dice_pooled: float | None
    dice_per_case: float | None
    iou_pooled: float | None
    iou_per_case: float | None
    precision_pooled: float | None
    precision_per_case: float | None
    recall_pooled: float | None
    recall_per_case: float | None
    accuracy_pooled: float | None
    accuracy_per_case: float | None
    background_dice: float | None  # pooled Dice of "everything is background": 0 unless there is nothing to find
    cases_scored: int
    cases_missed: int
    cases_false_alarms: int
    cases_true_negative: int


@dataclass(frozen=True)
class PerCase:
    """Cases by kind, and the means of their scores. `scored + true_negative` is the number of cases."""

    dice: float | None  # mean over the scored cases; None without any
    iou: float | None  # the same
    precision: float | None  # mean over the cases with a prediction
    recall: float | None  # mean over the cases with a truth
    accuracy: float | None  # mean over all cases
    scored: int  # cases with a truth, a prediction or both
    missed: int  # of them: a truth and an empty prediction, Dice 0
    false_alarms: int  # of them: a prediction and an empty truth, Dice 0
    true_negative: int  # neither truth nor prediction: not in the mean


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


def counts_by_class(prediction: np.ndarray, truth: np.ndarray, classes: int) -> list[Counts]:
    """`counts` of each foreground class 1..`classes` of two label maps."""
    return [counts(prediction == index, truth == index) for index in range(1, classes + 1)]


def scores(cases: Iterable[Counts]) -> Scores:
    """The scores of one class over its cases."""
    found = list(cases)
    pooled, single = sum(found, Counts()), per_case(found)
    return Scores(
        dice_pooled=pooled.dice,
        dice_per_case=single.dice,
        iou_pooled=pooled.iou,
        iou_per_case=single.iou,
        precision_pooled=pooled.precision,
        precision_per_case=single.precision,
        recall_pooled=pooled.recall,
        recall_per_case=single.recall,
        accuracy_pooled=pooled.accuracy,
        accuracy_per_case=single.accuracy,
        background_dice=pooled.background.dice,
        cases_scored=single.scored,
        cases_missed=single.missed,
        cases_false_alarms=single.false_alarms,
        cases_true_negative=single.true_negative,
    )


def over_classes(by_class: Sequence[Scores]) -> Scores:
    """The scores of several classes as one; those of a single class as they are."""
    if len(by_class) == 1:
        return by_class[0]
    values: dict[str, Any] = {}
    for field in fields(Scores):
        of_class = [getattr(one, field.name) for one in by_class]
        values[field.name] = sum(of_class) if field.type is int else _mean(of_class)
    return Scores(**values)


def per_case(cases: Iterable[Counts]) -> PerCase:
    """Sums up cases, one Counts each (a patient's slices added)."""
    found = list(cases)
    scored = sum(case.dice is not None for case in found)
    return PerCase(
        dice=_mean(case.dice for case in found),
        iou=_mean(case.iou for case in found),
        precision=_mean(case.precision for case in found),
        recall=_mean(case.recall for case in found),
        accuracy=_mean(case.accuracy for case in found),
        scored=scored,
        missed=sum(case.tp + case.fp == 0 and case.fn > 0 for case in found),
        false_alarms=sum(case.tp + case.fn == 0 and case.fp > 0 for case in found),
        true_negative=len(found) - scored,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Over those that are defined."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
