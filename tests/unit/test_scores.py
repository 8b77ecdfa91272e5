"""Scores against scikit-learn and against values counted by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score, precision_score, recall_score

from rayseg.evaluation.scores import Counts, counts, counts_by_class, over_classes, per_case, scores

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
    assert found.background == Counts(tp=0, fp=0, fn=3, tn=5)
    assert found.background.dice == 0.0


def test_scores_of_nothing_are_undefined_and_not_zero_or_one() -> None:
    nothing = Counts(tn=9)
    assert (nothing.dice, nothing.iou, nothing.precision, nothing.recall) == (None, None, None, None)
    assert nothing.accuracy == 1
    assert Counts().accuracy is None
    missed = Counts(fn=4, tn=5)
    assert (missed.dice, missed.iou, missed.precision, missed.recall) == (0.0, 0.0, None, 0.0)
    false_alarm = Counts(fp=4, tn=5)
    assert (false_alarm.dice, false_alarm.iou, false_alarm.precision, false_alarm.recall) == (0.0, 0.0, 0.0, None)


def test_the_per_case_mean_leaves_out_empty_empty_and_keeps_false_alarms_and_misses() -> None:
    cases = [Counts(tp=6, fp=1, fn=3, tn=90), Counts(tn=100), Counts(fp=1, tn=99), Counts(fn=5, tn=95), Counts(tn=100)]
    found = per_case(cases)
    assert found.dice == pytest.approx((0.75 + 0 + 0) / 3)
    assert (found.scored, found.missed, found.false_alarms, found.true_negative) == (3, 1, 1, 2)
    assert found.iou == pytest.approx((0.6 + 0 + 0) / 3)
    assert found.precision == pytest.approx((6 / 7 + 0) / 2)  # of the two with a prediction
    assert found.recall == pytest.approx((6 / 9 + 0) / 2)  # of the two with a truth
    assert found.accuracy == pytest.approx((0.96 + 1 + 0.99 + 0.95 + 1) / 5)
    # Pooled over the same cases, the large one decides: 12 / (12 + 2 + 8).
    assert sum(cases, Counts()).dice == pytest.approx(12 / 22)


def test_the_per_case_mean_of_healthy_cases_only_is_undefined() -> None:
    found = per_case([Counts(tn=4), Counts(tn=4)])
    assert found.dice is found.iou is found.precision is found.recall is None
    assert found.accuracy == 1
    assert (found.scored, found.true_negative) == (0, 2)
    assert per_case([]).dice is per_case([]).accuracy is None


def test_scores_take_each_value_from_its_place() -> None:
    cases = [Counts(tp=6, fp=2, fn=1, tn=91), Counts(tp=1, fp=3, fn=5, tn=21)]
    found, pooled, single = scores(cases), sum(cases, Counts()), per_case(cases)
    for name in ("dice", "iou", "precision", "recall", "accuracy"):
        assert getattr(found, f"{name}_pooled") == getattr(pooled, name)
        assert getattr(found, f"{name}_per_case") == getattr(single, name)


def test_masks_of_different_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(4, 5\)"):
        counts(np.zeros((4, 4)), np.zeros((4, 5)))


@settings(max_examples=20, deadline=None)
@given(masks, masks)
def test_counts_of_each_class_agree_with_scikit_learn(prediction: np.ndarray, truth: np.ndarray) -> None:
    found = counts_by_class(prediction, truth, 3)
    matrix = confusion_matrix(truth.ravel(), prediction.ravel(), labels=[0, 1, 2, 3])
    for index in (1, 2, 3):
        tp = matrix[index, index]
        expected = Counts(tp, matrix[:, index].sum() - tp, matrix[index].sum() - tp)
        assert found[index - 1] == Counts(expected.tp, expected.fp, expected.fn, truth.size - sum(
            (expected.tp, expected.fp, expected.fn)))  # fmt: skip


def test_over_classes_scores_are_means_of_what_is_defined_and_cases_sums() -> None:
    first = scores([Counts(tp=6, fp=2, fn=2, tn=90), Counts(tn=100)])
    second = scores([Counts(fn=5, tn=95), Counts(fp=1, tn=99)])
    never = scores([Counts(tn=100), Counts(tn=100)])
    together = over_classes([first, second, never])
    assert together.dice_pooled == pytest.approx((0.75 + 0) / 2)
    assert together.precision_pooled == pytest.approx((0.75 + 0) / 2)
    assert (together.cases_scored, together.cases_missed, together.cases_false_alarms) == (1 + 2, 1, 1)
    assert together.cases_true_negative == 1 + 2
    assert over_classes([first]) == first
    assert over_classes([never]).dice_pooled is None
