"""Two models on the same patients: worked out by hand, and against a plain bootstrap in a loop."""

import math

import numpy as np
import pytest

from rayseg.evaluation.metrics import Columns, columns_of
from rayseg.evaluation.paired import (
    COMPARED,
    Difference,
    difference,
    differences,
    measured_by_both,
    missed,
    of_patients,
)
from rayseg.evaluation.scores import Counts
from tests.unit.evaluated_models import found_of, table

OPTIONS = {"level": 0.95}


def classes(*by_class: list[Counts], **more: list[object]) -> list[Columns]:
    made = table({str(number): found for number, found in enumerate(by_class)}, **more)
    return [columns_of(made, str(number)) for number in range(len(by_class))]


def between(name: str, challenger: list[Columns], baseline: list[Columns], **options: float) -> Difference:
    found = difference(name, challenger, baseline, **{**OPTIONS, **options})  # type: ignore[arg-type]
    assert found is not None
    return found


def test_six_wins_a_tie_and_nothing_else() -> None:
    ours, theirs = classes(found_of([51, 62, 73, 84, 95, 66, 70])), classes(found_of([50, 60, 70, 80, 90, 60, 70]))
    found = between("dice_per_case", ours, theirs)
    assert (found.wins, found.ties, found.losses, found.one_sided) == (6, 1, 0, 0)
    assert found.difference == pytest.approx((1 + 2 + 3 + 4 + 5 + 6 + 0) / 700)
    # All six signs equal: 2 of the 2^6 ways to sign the ranks are as far out.
    assert found.p_value == pytest.approx(2 / 64)
    assert found.better == "challenger"
    back = between("dice_per_case", theirs, ours)
    assert (back.wins, back.ties, back.losses, back.better) == (0, 1, 6, "baseline")
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))  # type: ignore[operator]


def test_distances_are_better_when_lower_and_only_compared_where_both_have_one() -> None:
    counted = found_of([50, 50, 50, 50])
    ours = classes(counted, hd95_mm=[1.0, 2.0, 9.0, None])
    theirs = classes(counted, hd95_mm=[2.0, 4.0, 8.5, 4.0])
    found = between("hd95_mm_per_case", ours, theirs)
    assert (found.wins, found.ties, found.losses, found.one_sided) == (2, 0, 1, 1)
    assert (found.challenger, found.baseline) == (pytest.approx(4), pytest.approx(18.5 / 4))
    # Only the least of three differences has the other sign: 2 of the 2^3 ways are as far out, on either side.
    assert found.p_value == pytest.approx(4 / 8)
    several = classes(counted * 3, hd95_mm=[2.0, 4.0, 8.5, 4.0] * 3)
    assert between("hd95_mm_per_case", classes(counted * 3, hd95_mm=[1.0] * 12), several).better == "challenger"


def test_equal_models_differ_in_nothing() -> None:
    same = classes(found_of([10, 50, 90]))
    for name, found in differences(same, same, **OPTIONS).items():  # type: ignore[arg-type]
        assert (found.difference, found.low, found.high, found.better) == (0, 0, 0, None), name
        assert found.p_value is None
        assert found.wins in (0, None)


def test_what_differs_by_rounding_is_a_tie() -> None:
    counted = found_of([50, 60])
    found = between("dice_per_case", classes(counted, dice=[0.5 + 1e-9, 0.6]), classes(counted, dice=[0.5, 0.6 + 1e-9]))
    assert (found.wins, found.ties, found.losses, found.p_value) == (0, 2, 0, None)


def test_what_is_hard_for_both_cancels_out() -> None:
    """Sizes and scores of patients vary far more than the models do between each other."""
    sizes = np.random.default_rng(0)
    ours = [Counts(tp=int(tp), fp=int(fp), fn=30, tn=500) for tp, fp in sizes.integers(10, 200, (25, 2))]
    theirs = [
        Counts(tp=max(one.tp - int(less), 1), fp=one.fp, fn=30 + min(int(less), one.tp - 1), tn=500)
        for one, less in zip(ours, sizes.integers(0, 40, 25), strict=True)
    ]
    found = between("dice_pooled", classes(ours), classes(theirs), level=0.9)
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < found.difference < found.high < found.low + 0.05
    wider = between("dice_pooled", classes(ours), classes(theirs), level=0.99)
    assert wider.low < found.low < found.high < wider.high  # type: ignore[operator]
    assert (found.p_value, found.wins, found.patients) == (None, None, 25), "a pooled value is nobody's own"


def test_patients_with_nothing_in_them_do_not_count() -> None:
    """They have no Dice: a mean of three is one of three, however many healthy ones stand beside."""
    healthy = [Counts(tn=1000)] * 20
    ours, theirs = ([*found_of(hits), *healthy] for hits in ([51, 62, 73], [50, 60, 70]))
    for name in ("dice_per_case", "dice_pooled"):
        alone = between(name, classes(ours[:3]), classes(theirs[:3]))
        found = between(name, classes(ours), classes(theirs))
        assert (found.patients, found.low, found.high) == (3, alone.low, alone.high)
    assert between("accuracy_per_case", classes(ours), classes(theirs)).patients == 23


def test_of_metrics_that_leave_misses_out_both_models_are_asked_about_the_same_patients() -> None:
    counted, missed_one = found_of([50] * 4), [*found_of([50] * 3), Counts(fn=100, tn=9)]
    ours, theirs = (classes(counted, hd95_mm=values) for values in ([1.0, 2.0, 9.0, None], [2.0, None, 8.0, 4.0]))
    first, second = measured_by_both("hd95_mm_per_case", ours, theirs)
    assert [[value if value == value else None for value in of[0]["hd95_mm"]] for of in (first, second)] == [
        [1.0, None, 9.0, None],
        [2.0, None, 8.0, None],
    ]
    assert (missed("hd95_mm_per_case", ours, theirs), missed("hd95_mm_per_case", theirs, ours)) == (1, 1)
    assert (missed("precision_pooled", classes(missed_one), classes(counted)), missed("brier", ours, theirs)) == (1, 0)
    # Where nothing is to be found, what a model finds there stays in: precision 0, which the other one does not have.
    alarm, none = classes([Counts(fp=9, tn=9)]), classes([Counts(tn=18)])
    first, _ = measured_by_both("precision_per_case", alarm, none)
    assert first[0]["precision"].tolist() == [0.0]
    assert missed("precision_per_case", none, alarm) == 0


def test_several_classes_are_told_as_their_mean() -> None:
    ours, theirs = classes(found_of([60, 80]), found_of([40, 40])), classes(found_of([50, 80]), found_of([40, 60]))
    assert of_patients("dice_per_case", ours).tolist() == pytest.approx([0.5, 0.6])
    found = between("dice_per_case", ours, theirs)
    assert (found.wins, found.ties, found.losses) == (1, 0, 1)
    # A class that a patient does not have leaves the others.
    healthy = [Counts(tn=10)] * 2
    assert of_patients("dice_per_case", classes(found_of([60, 80]), healthy)).tolist() == pytest.approx([0.6, 0.8])
    assert all(math.isnan(value) for value in of_patients("dice_per_case", classes(healthy)))


def test_what_is_not_defined_is_not_compared() -> None:
    one = classes(found_of([50, 60]))
    found = differences(one, one, **OPTIONS)  # type: ignore[arg-type]
    assert {"dice_pooled", "dice_per_case", "brier"} <= set(found)
    assert not [name for name in found if "mm" in name or "ml" in name]
    assert not {"ece", "average_precision", "volume_bias_ml"} & set(COMPARED)
    single = between("dice_per_case", classes(found_of([50])), classes(found_of([40])))
    assert (single.low, single.high, single.better) == (None, None, None)
    with pytest.raises(ValueError, match="dice_pooled is no metric of single patients; those are dice_per_case"):
        of_patients("dice_pooled", one)
