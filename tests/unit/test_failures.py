"""Risk and coverage: areas by hand and by brute force over all orders of ties, and coverage of intervals by hand."""

from itertools import pairwise, permutations, product

import numpy as np
import pytest

from rayseg.data.conformal import VolumeErrors
from rayseg.data.range import Known, Range
from rayseg.evaluation import failures as found_failures
from rayseg.evaluation.failures import Covered, curve, failures
from rayseg.evaluation.metrics import columns_of
from rayseg.evaluation.scores import Counts
from rayseg.records import QualityFlag
from tests.unit.evaluated_models import found_of, table

OPTIONS = {"resamples": 200, "min_patients": 4}


def brute(suspicion: list[float], risk: list[float]) -> float:
    """The area as it is defined (El-Yaniv and Wiener 2010; Geifman 2019): for each threshold that accepts k patients
    their mean risk, and the mean over k; of equally suspect patients the mean over all orders."""
    areas = []
    for order in permutations(range(len(risk))):
        if all(suspicion[one] <= suspicion[other] for one, other in pairwise(order)):
            selective = [sum(risk[one] for one in order[:k]) / k for k in range(1, len(order) + 1)]
            areas.append(sum(selective) / len(selective))
    return sum(areas) / len(areas)


def test_an_area_by_hand() -> None:
    """Risks 0.1, 0.5, 0.2 in this order: means 0.1, 0.3 and 0.8 / 3; best possible 0.1, 0.15 and 0.8 / 3."""
    risk = np.array([0.1, 0.5, 0.2])
    assert curve(np.array([1.0, 2.0, 3.0]), risk) == pytest.approx([0.1, 0.3, 0.8 / 3])
    assert curve(risk, risk) == pytest.approx([0.1, 0.15, 0.8 / 3])
    assert curve(np.zeros(3), risk) == pytest.approx([0.8 / 3] * 3), "at random"


def test_areas_are_those_of_the_definition_with_ties_and_in_draws() -> None:
    rng = np.random.default_rng(1)
    for suspicion in product([0.0, 1.0, 2.0], repeat=5):
        risk = rng.random(5).round(1)
        assert curve(np.array(suspicion), risk).mean() == pytest.approx(brute(list(suspicion), risk.tolist()))
    suspicion, risk = rng.integers(0, 3, 6).astype(float), rng.random(6)
    indices = rng.integers(0, 6, (4, 6))
    for row, found in zip(indices, curve(suspicion, risk, indices), strict=True):
        assert found.mean() == pytest.approx(brute(suspicion[row].tolist(), risk[row].tolist()))


def test_flags_are_ranked_by_how_well_they_find_failures() -> None:
    """Ten patients; one flag knows the Dice, one its opposite, one nothing; one is not known of everybody."""
    hits = [95, 90, 85, 80, 70, 60, 50, 40, 20, 0]
    cases = table(
        {"a": [*found_of(hits), Counts(tn=100)]},
        suspicion_pairwise_dice=[*(100.0 - hit for hit in hits), -1.0],
        suspicion_entropy=[*(float(hit) for hit in hits), 101.0],
        suspicion_area=[1.0] * 11,
        suspicion_spacing=[None, *[1.0] * 10],
    )
    told = failures(cases, {"a": columns_of(cases, "a")}, VolumeErrors(), **OPTIONS)
    assert set(told.detectors) == {QualityFlag.PAIRWISE_DICE, QualityFlag.ENTROPY, QualityFlag.AREA}
    risk = [*(1 - hit / 100 for hit in hits), 0.0]  # nothing to find and nothing found is no failure
    assert told.at_random == pytest.approx(np.mean(risk))
    oracle = np.mean(np.cumsum(sorted(risk)) / np.arange(1, 12))
    assert told.optimum == pytest.approx(oracle)
    best, worst = told.detectors[QualityFlag.PAIRWISE_DICE], told.detectors[QualityFlag.ENTROPY]
    assert (best.aurc.value, best.excess.value) == (pytest.approx(oracle), pytest.approx(0))
    assert (best.excess.low, best.excess.high) == (pytest.approx(0), pytest.approx(0))
    assert worst.aurc.value == pytest.approx(np.mean(np.cumsum(sorted(risk, reverse=True)) / np.arange(1, 12)))
    assert told.detectors[QualityFlag.AREA].aurc.value == pytest.approx(told.at_random)
    assert best.aurc.low is not None
    assert best.aurc.high is not None
    assert best.aurc.low < best.aurc.value < best.aurc.high
    few = failures(cases, {"a": columns_of(cases, "a")}, VolumeErrors(), resamples=200, min_patients=12)
    assert few.detectors[QualityFlag.AREA].aurc.low is None


def test_a_patients_risk_is_the_mean_over_the_classes_that_have_a_dice() -> None:
    cases = table({"a": [*found_of([80, 60]), Counts(tn=9)], "b": [*found_of([40]), Counts(tn=9), Counts(tn=9)]})
    classes = [columns_of(cases, name) for name in ("a", "b")]
    assert found_failures.risks(classes) == pytest.approx([0.4, 0.4, 0.0])


def test_patients_are_counted_whose_volume_lies_within_the_interval() -> None:
    cases = table(
        {"a": found_of([80, 60, 50]), "b": found_of([1, 2, 3])},
        volume_error_mm=[1.0, 2.0, None],
        foreground_error_mm=[0.5, 3.0, 2.5],
    )
    classes = {name: columns_of(cases, name) for name in ("a", "b")}
    told = failures(cases, classes, VolumeErrors((1.5, None, 2.5), (30, 18, 30)), **OPTIONS)
    assert told.covered == {"a": Covered(1, 2), "foreground": Covered(2, 3)}
    assert failures(cases, classes, VolumeErrors(), **OPTIONS).covered == {}


def test_several_models_are_judged_by_what_validation_was_like_for_them() -> None:
    """Of 20 patients one has nothing found: a crumb of one member, and no entropy to speak of."""
    hits = [*range(50, 69), 0]
    cases = table(
        {"a": [*found_of(hits[:-1]), Counts(tn=100)]},
        suspicion_fragments=[*(float(hit) for hit in hits[:-1]), 99.0],
        suspicion_entropy=[*(hit / 100 for hit in hits[:-1]), 0.0],
        suspicion_pairwise_dice=[*(1 - hit / 100 for hit in hits[:-1]), 1.0],
        volume_error_mm=[*(float(hit) for hit in hits[:-1]), None],
        foreground_error_mm=[*(float(hit) for hit in hits[:-1]), None],
    )
    classes = {"a": columns_of(cases, "a")}
    trained = Range(modalities=("CT",), pieces=1, entropy_bits=0.1)
    measured = Range(modalities=("CT",), pieces=68, entropy_bits=0.68, pairwise_dice=0.5)
    known = found_failures.known_of(cases, classes, trained, volumes=True)
    assert known == Known(measured, VolumeErrors((68.0, 68.0), (19, 19)))
    assert found_failures.known_of(cases, classes, trained, volumes=False) == Known(measured)
