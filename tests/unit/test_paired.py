"""Two models on the same patients: worked out by hand, and against a plain bootstrap in a loop."""

import math
import random

import numpy as np
import pytest

from rayseg.evaluation.metrics import Columns, columns_of
from rayseg.evaluation.paired import COMPARED, Difference, difference, differences, of_patients
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
    assert between("hd95_mm_per_case", classes(counted, hd95_mm=[1.0] * 4), theirs).better == "challenger"


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


def test_the_interval_is_of_the_same_patients_drawn_for_both() -> None:
    """Against a bootstrap in a loop of Python's own random numbers, on cases of unequal size."""
    sizes = np.random.default_rng(0)
    ours = [Counts(tp=int(tp), fp=int(fp), fn=30, tn=500) for tp, fp in sizes.integers(10, 200, (25, 2))]
    theirs = [
        Counts(tp=max(one.tp - int(less), 1), fp=one.fp, fn=40, tn=500)
        for one, less in zip(ours, sizes.integers(0, 40, 25), strict=True)
    ]
    found = between("dice_pooled", classes(ours), classes(theirs), level=0.9)

    def pooled(cases: list[Counts]) -> float:
        tp, wrong = sum(one.tp for one in cases), sum(one.fp + one.fn for one in cases)
        return 2 * tp / (2 * tp + wrong)

    draw = random.Random(1)
    drawn = []
    for _ in range(4000):
        chosen = [draw.randrange(25) for _ in range(25)]
        drawn.append(pooled([ours[at] for at in chosen]) - pooled([theirs[at] for at in chosen]))
    drawn.sort()
    assert found.difference == pytest.approx(pooled(ours) - pooled(theirs))
    assert (found.low, found.high) == pytest.approx((drawn[200], drawn[3799]), abs=0.002)
    # Unpaired draws would vary with how hard the patients are, which is the same for both.
    assert found.high - found.low < 0.05  # type: ignore[operator]
    assert (found.p_value, found.wins) == (None, None), "a pooled value is nobody's own"


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
