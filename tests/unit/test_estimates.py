"""Metrics of sets of cases, worked out by hand: pooled and per case, what is undefined, intervals, groups."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayseg.evaluation.calibration import Probabilities
from rayseg.evaluation.cases import CASES
from rayseg.evaluation.metrics import METRICS, background_dice, columns_of, estimates, value_of
from rayseg.evaluation.scores import Counts
from rayseg.evaluation.subgroups import groups

SCORES = ("dice", "iou", "precision", "recall", "accuracy")
OPTIONS = {"resamples": 500, "min_patients": 5}
# Found in part, healthy, false alarm, missed, healthy.
FIVE = [Counts(tp=6, fp=1, fn=3, tn=90), Counts(tn=100), Counts(fp=1, tn=99), Counts(fn=5, tn=95), Counts(tn=100)]


def row(patient: int, found: Counts, name: str = "a", **more: Any) -> dict[str, Any]:
    scores = {key: getattr(found, key) for key in SCORES}
    lesions = {f"lesions_{kind}": 0 for kind in ("true", "found", "predicted", "false")}
    return {"patient_key": f"{patient:03d}", "class": name, **vars(found), **scores, "brier": 0.0, **lesions, **more}


def columns(cases: list[Counts], more: list[dict[str, Any]] | None = None, name: str = "a") -> dict[str, np.ndarray]:
    rows = [row(patient, one, name, **(more or [{}] * len(cases))[patient]) for patient, one in enumerate(cases)]
    nothing = Probabilities.nothing()
    sums = {key: np.stack([getattr(nothing, key)] * len(cases)) for key in ("negative", "positive", "reliability")}
    return {**columns_of(pa.Table.from_pylist(rows, schema=CASES), name), **sums}


def values(*classes: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: one.value for name, one in estimates(list(classes), **OPTIONS).items()}


def test_the_per_case_mean_leaves_out_empty_empty_and_keeps_false_alarms_and_misses() -> None:
    found = values(columns(FIVE))
    assert found["dice_per_case"] == pytest.approx((12 / 16 + 0 + 0) / 3)
    assert found["iou_per_case"] == pytest.approx((6 / 10 + 0 + 0) / 3)
    assert found["precision_per_case"] == pytest.approx((6 / 7 + 0) / 2)  # of the two with a prediction
    assert found["recall_per_case"] == pytest.approx((6 / 9 + 0) / 2)  # of the two with a truth
    assert found["accuracy_per_case"] == pytest.approx((0.96 + 1 + 0.99 + 0.95 + 1) / 5)
    assert [found[f"cases_{kind}"] for kind in ("scored", "missed", "false_alarms", "true_negative")] == [3, 1, 1, 2]
    # Pooled over the same cases, the large one decides: TP 6, FP 2, FN 8.
    assert found["dice_pooled"] == found["f1_pooled"] == pytest.approx(12 / 22)
    assert found["iou_pooled"] == pytest.approx(6 / 16)
    assert (found["precision_pooled"], found["recall_pooled"]) == (pytest.approx(6 / 8), pytest.approx(6 / 14))
    assert found["accuracy_pooled"] == pytest.approx(490 / 500)


def test_the_mean_over_images_weighs_patients_by_their_images_and_older_tables_have_none() -> None:
    of_images = [{"dice_per_image": 0.5, "images_scored": 3}, {"dice_per_image": 0.9, "images_scored": 1}]
    empty = {"dice_per_image": None, "images_scored": 0}
    found = values(columns([Counts(tp=1, tn=9)] * 3, [*of_images, empty]))
    assert found["dice_per_image"] == pytest.approx((3 * 0.5 + 0.9) / 4)
    assert "dice_per_image" not in values(columns(FIVE))


def test_of_healthy_cases_only_what_needs_foreground_is_not_told() -> None:
    healthy = columns([Counts(tn=4), Counts(tn=4)])
    found = values(healthy)
    assert not {name for name in found if name.startswith(("dice", "iou", "precision", "recall", "average"))}
    assert (found["accuracy_pooled"], found["cases_true_negative"], found["cases_scored"]) == (1, 2, 0)
    assert background_dice([healthy]) is None
    assert background_dice([columns(FIVE)]) == 0.0


def test_several_classes_are_means_of_what_is_defined_and_sums_of_cases() -> None:
    first = columns([Counts(tp=6, fp=2, fn=2, tn=90), Counts(tn=100)])
    second = columns([Counts(fn=5, tn=95), Counts(fp=1, tn=99)])
    never = columns([Counts(tn=100), Counts(tn=100)])
    together = values(first, second, never)
    assert together["dice_pooled"] == pytest.approx((0.75 + 0) / 2)
    assert together["precision_pooled"] == pytest.approx((0.75 + 0) / 2)
    assert [together[f"cases_{kind}"] for kind in ("scored", "missed", "false_alarms", "true_negative")] == [3, 1, 1, 3]


def test_volumes_agree_as_bland_and_altman_have_it_and_empty_cases_have_what_is_found_in_them() -> None:
    volumes = [(10.0, 12.0), (20.0, 19.0), (0.0, 0.5), (0.0, 0.0), (4.0, 9.0)]
    told = [{"truth_ml": true, "predicted_ml": predicted} for true, predicted in volumes]
    counts = [Counts(tp=1), Counts(tp=1), Counts(fp=1), Counts(tn=1), Counts(tp=1)]
    found = values(columns(counts, told))
    differences = np.array([2.0, -1.0, 0.5, 0.0, 5.0])
    assert found["volume_bias_ml"] == pytest.approx(1.3)
    spread = 1.96 * differences.std(ddof=1)
    assert found["volume_lower_limit_ml"] == pytest.approx(1.3 - spread)
    assert found["volume_upper_limit_ml"] == pytest.approx(1.3 + spread)
    assert found["false_positive_ml_per_empty_case"] == pytest.approx(0.25)  # of the two empty ones
    assert not {name for name in found if name.endswith("_px")}
    # Without any volume it is pixels: predicted minus true are FP minus FN.
    found = values(columns(FIVE))
    assert found["volume_bias_px"] == pytest.approx((-2 + 0 + 1 - 5 + 0) / 5)
    assert found["false_positive_px_per_empty_case"] == pytest.approx(1 / 3)
    assert not {name for name in found if name.endswith("_ml")}


@pytest.mark.parametrize(
    ("patients", "measured", "unit"), [(30, 1, "px"), (30, 14, "px"), (30, 15, "ml"), (2, 1, "ml")]
)
def test_a_few_patients_with_positions_do_not_answer_for_all(patients: int, measured: int, unit: str) -> None:
    """By hand: whoever has a volume is 2 mL off; in pixels all are 1 off."""
    counts = [Counts(tp=1, fp=1, tn=9)] * patients
    told = [{"truth_ml": 5.0, "predicted_ml": 7.0} if number < measured else {} for number in range(patients)]
    found = values(columns(counts, told))
    assert found[f"volume_bias_{unit}"] == pytest.approx({"ml": 2.0, "px": 1.0}[unit])
    assert found["volume_cases"] == {"ml": measured, "px": patients}[unit]
    other = {"ml": "px", "px": "ml"}[unit]
    assert not {name for name in found if f"_{other}" in name and name.startswith(("volume", "false"))}


def test_lesions_are_counted_over_all_cases_and_averaged_over_those_that_have_any() -> None:
    numbers = [
        {"lesions_true": 3, "lesions_found": 2, "lesions_predicted": 4, "lesions_false": 1, "lesion_f1": 4 / 6},
        {"lesions_true": 0, "lesions_found": 0, "lesions_predicted": 1, "lesions_false": 1, "lesion_f1": 0.0},
        {"lesions_true": 0, "lesions_found": 0, "lesions_predicted": 0, "lesions_false": 0, "lesion_f1": None},
    ]
    found = values(columns([Counts(tp=1)] * 3, numbers))
    assert found["lesion_recall"] == pytest.approx(2 / 3)
    assert found["lesion_precision"] == pytest.approx(3 / 5)
    assert found["lesion_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert found["lesion_f1_per_case"] == pytest.approx((4 / 6 + 0) / 2)
    assert found["lesions_false_per_case"] == pytest.approx(2 / 3)
    assert (found["lesions_true"], found["lesions_found"], found["lesions_false"]) == (3, 2, 2)


def test_pooled_calibration_and_average_precision_are_those_of_all_pixels() -> None:
    random = np.random.default_rng(2)
    truths = random.random((6, 10, 10)) < 0.3
    guesses = random.random((6, 10, 10)).astype(np.float32)
    single = [Probabilities.of(guess, truth) for guess, truth in zip(guesses, truths, strict=True)]
    of = columns(
        [Counts(tp=100)] * 6, [{"brier": one.brier, "average_precision": 0.1 * k} for k, one in enumerate(single)]
    )
    of |= {key: np.stack([getattr(one, key) for one in single]) for key in ("negative", "positive", "reliability")}
    whole = sum(single, Probabilities.nothing())
    found = values(of)
    assert found["brier"] == pytest.approx(whole.brier)
    assert found["ece"] == pytest.approx(whole.ece)
    assert found["average_precision"] == pytest.approx(whole.average_precision)
    assert found["average_precision_per_case"] == pytest.approx(0.25)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_draw_is_worth_what_a_set_with_its_patients_is(name: str) -> None:
    """Of a patient that is drawn twice, two alike."""
    random = np.random.default_rng(6)
    single = [Probabilities.of(random.random((5, 5)).astype(np.float32), random.random((5, 5)) < 0.4) for _ in range(7)]
    cases = [Counts(*random.integers(0, 9, 4).tolist()) for _ in range(6)] + [Counts(fp=3, tn=9)]
    told: list[dict[str, Any]] = []
    for _ in cases:
        names = [key for key in CASES.names if CASES.field(key).type == pa.float64() and key not in SCORES]
        lesions = {key: int(random.integers(1, 9)) for key in CASES.names if key.startswith("lesions_")}
        told.append({key: float(random.random()) for key in names} | lesions)
    of = columns(cases, told)
    of |= {key: np.stack([getattr(one, key) for one in single]) for key in ("negative", "positive", "reliability")}
    indices = random.integers(0, 7, (5, 7))
    drawn = value_of(METRICS[name], [of], indices)
    for value, chosen in zip(drawn, indices, strict=True):
        expected = value_of(METRICS[name], [{key: column[chosen] for key, column in of.items()}])
        assert value == pytest.approx(float(expected), nan_ok=True)


def test_intervals_hold_the_value_and_need_patients() -> None:
    random = np.random.default_rng(1)
    cases = [Counts(int(tp), 5, 5, 100) for tp in random.integers(1, 60, 40)]
    found = estimates([columns(cases)], **OPTIONS)
    for name in ("dice_pooled", "dice_per_case", "recall_pooled", "accuracy_per_case", "volume_bias_px"):
        one = found[name]
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.value <= one.high
        assert math.isfinite(one.value)
    assert found["cases_scored"].low is None
    few = estimates([columns(cases[:4])], **OPTIONS)
    assert few["dice_pooled"].low is None


def test_groups_by_size_modality_scanner_and_spacing() -> None:
    truths = [10, 20, 30, 40, 50, 60]
    rows = [row(7, Counts(tn=9), truth_ml=0.0, predicted_ml=0.0, pixel_spacing_mm=0.9)]
    for number, true in enumerate(truths):
        told = {"truth_ml": float(true), "modality": "CT" if number % 2 else "MR", "pixel_spacing_mm": 0.4}
        told["scanner"] = "A 1" if number < 4 else "B 2"
        rows.append(row(number, Counts(tp=true, tn=9), predicted_ml=1.0, lesions_true=2, lesions_found=1, **told))
    table = pa.Table.from_pylist(rows, schema=CASES)
    found = {(one.by, one.group): one for one in groups(table, ["a"], resamples=200, min_patients=3)}
    assert {key: one.patients for key, one in found.items()} == {
        ("size", "nothing to find"): 1,
        ("size", "below 26.7 mL"): 2,
        ("size", "26.7 to 43.3 mL"): 2,
        ("size", "43.3 mL and more"): 2,
        ("modality", "CT"): 3,
        ("modality", "MR"): 3,
        ("scanner", "A 1"): 4,
        ("scanner", "B 2"): 2,
        ("pixel spacing", "below 0.5 mm"): 6,
        ("pixel spacing", "0.5 to 1 mm"): 1,
    }
    assert found["modality", "CT"].metrics["dice_pooled"].low == 1.0
    assert found["size", "below 26.7 mL"].metrics["dice_pooled"].low is None
    assert found["modality", "MR"].metrics["lesion_recall"].value == 0.5
    assert found["size", "nothing to find"].metrics == {}
