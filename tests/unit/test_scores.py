"""Scores against scikit-learn and against values counted by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score, precision_score, recall_score

from rayseg.evaluation.scores import Counts, counts

masks = arrays(np.uint8, (2, 5, 7), elements=st.integers(0, 3))


@settings(max_examples=40, deadline=None)  # scikit-learn takes 10 ms a call
@given(masks, masks)
def test_counts_and_scores_agree_with_scikit_learn(prediction: np.ndarray, truth: np.ndarray) -> None:
    found = counts(prediction, truth)
    flat_truth, flat_prediction = (truth > 0).ravel(), (prediction > 0).ravel()
    tn, fp, fn, tp = confusion_matrix(flat_truth, flat_prediction, labels=[False, True]).ravel()
    assert (found.tp, found.fp, found.fn, found.tn) == (tp, fp, fn, tn)
    for ours, theirs in ((found.dice, f1_score), (found.precision, precision_score), (found.recall, recall_score)):
        expected = theirs(flat_truth, flat_prediction, zero_division=np.nan)
        assert expected == pytest.approx(np.nan if ours is None else ours, nan_ok=True)
    assert found.accuracy == pytest.approx(accuracy_score(flat_truth, flat_prediction))
    assert jaccard_score(flat_truth, flat_prediction, zero_division=0) == pytest.approx(found.iou or 0)
    assert (found.iou is None) == (found.dice is None)


@given(masks, masks)
def test_counts_of_parts_add_up_to_counts_of_the_whole(prediction: np.ndarray, truth: np.ndarray) -> None:
    parts = [counts(prediction[k], truth[k]) for k in range(2)]
    assert sum(parts, Counts()) == counts(prediction, truth)


def test_scores_counted_by_hand() -> None:
    truth = np.array([[1, 1, 1, 0], [0, 0, 0, 0]])
    prediction = np.array([[0, 2, 2, 2], [2, 0, 0, 0]])
    found = counts(prediction, truth)
    assert found == Counts(tp=2, fp=2, fn=1, tn=3)
    assert (found.dice, found.iou, found.precision, found.recall) == (4 / 7, 2 / 5, 1 / 2, 2 / 3)


def test_scores_of_nothing_are_undefined_and_not_zero_or_one() -> None:
    nothing = Counts(tn=9)
    assert (nothing.dice, nothing.iou, nothing.precision, nothing.recall) == (None, None, None, None)
    assert nothing.accuracy == 1
    assert Counts().accuracy is None
    missed = Counts(fn=4, tn=5)
    assert (missed.dice, missed.iou, missed.precision, missed.recall) == (0.0, 0.0, None, 0.0)
    false_alarm = Counts(fp=4, tn=5)
    assert (false_alarm.dice, false_alarm.iou, false_alarm.precision, false_alarm.recall) == (0.0, 0.0, 0.0, None)


def test_masks_of_different_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(4, 5\)"):
        counts(np.zeros((4, 4)), np.zeros((4, 5)))
