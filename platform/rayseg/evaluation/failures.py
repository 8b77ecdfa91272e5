"""Whether quality's numbers find the patients whose segmentation has failed, and intervals of volumes hold the truth.

Area under the risk-coverage curve (Geifman et al. 2019, arXiv:1805.08206): patients are accepted from the least to the
most suspect, and the risk of those accepted so far is averaged over all numbers of them. A patient's risk is 1 minus
the Dice, the mean over the classes that have one; who has nothing to find and nothing was found has none. Patients and
not series, as series of one are no independent observations. Of equally suspect patients any order is as likely as any
other, so each counts with their mean. Lower is better: an order at random has the mean risk, and no order is better
than that of the risk itself; the excess is what lies above that one (e-AURC).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from rayseg.data import conformal
from rayseg.data.conformal import VolumeErrors
from rayseg.data.range import Known, Range
from rayseg.evaluation.cases import SUSPICION
from rayseg.evaluation.metrics import Columns, Estimate
from rayseg.evaluation.statistics import Statistic, interval
from rayseg.records import QualityFlag


@dataclass(frozen=True, eq=False)
class Detector:
    """How well a flag's number tells failures.

    risks: float64 (patients,), the mean risk of the least suspect one, two, ... patients.
    """

    aurc: Estimate
    excess: Estimate
    risks: np.ndarray


@dataclass(frozen=True)
class Covered:
    """How many patients' true volumes lie within the interval, of those who have one and whose volumes are known."""

    covered: int
    patients: int


@dataclass(frozen=True)
class Failures:
    """What an evaluation says of the quality numbers.

    at_random, optimum: areas; None without patients.
    detectors: by flag, of those whose number is known of every patient.
    covered: by class, and `foreground` of several together; those without an interval are left out.
    """

    patients: int = 0
    at_random: float | None = None
    optimum: float | None = None
    oracle: np.ndarray = field(default_factory=lambda: np.zeros(0), compare=False)
    detectors: Mapping[QualityFlag, Detector] = field(default_factory=dict)
    covered: Mapping[str, Covered] = field(default_factory=dict)


def failures(
    table: pa.Table, classes: Mapping[str, Columns], errors: VolumeErrors, *, resamples: int, min_patients: int
) -> Failures:
    """What the cases come to.

    Args:
        table: of the schema `cases.CASES`.
        classes: of each class `metrics.columns_of`, in the order of label maps' values.
        errors: of the model that was evaluated.
        resamples, min_patients: of intervals, see `metrics.estimate`.
    """
    risk = risks(list(classes.values()))
    if not len(risk):
        return Failures()
    columns = next(iter(classes.values()))
    detectors = {}
    for flag in QualityFlag:
        name = f"{SUSPICION}{flag}"
        if name in table.column_names and np.isfinite(columns[name]).all():
            detectors[flag] = _detector(columns[name], risk, resamples if len(risk) >= min_patients else 0)
    oracle = curve(risk, risk)
    return Failures(
        len(risk),
        float(risk.mean()),
        float(oracle.mean()),
        oracle,
        detectors,
        _covered(classes, errors),
    )


def risks(classes: Sequence[Columns]) -> np.ndarray:
    """Of each patient, float64 (patients,), see the module."""
    dice = np.stack([columns["dice"] for columns in classes])
    known = np.isfinite(dice)
    lacking: np.ndarray = np.where(known, 1 - dice, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return lacking


def curve(suspicion: np.ndarray, risk: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
    """The mean risk of the least suspect one, two, ... of the patients, (..., drawn); its mean is the area.

    Args:
        suspicion: float64 (patients,).
        risk: the same.
        indices: int (..., drawn), patients that are drawn; by default each once.
    """
    indices = np.arange(len(risk)) if indices is None else indices
    ranks = np.unique(suspicion, return_inverse=True)[1].reshape(-1)
    drawn = indices.reshape(-1, indices.shape[-1])
    places = ranks[drawn] + len(risk) * np.arange(len(drawn))[:, np.newaxis]
    sums, counts = (np.bincount(places.ravel(), of, len(risk) * len(drawn)) for of in (risk[drawn].ravel(), None))
    with np.errstate(invalid="ignore"):
        means = sums / counts  # of those who are equally suspect
    accepted = np.cumsum(means[np.sort(places, axis=-1)], axis=-1)
    return (accepted / np.arange(1, drawn.shape[-1] + 1)).reshape(indices.shape)


def known_of(table: pa.Table, classes: Mapping[str, Columns], trained: Range | None, *, volumes: bool) -> Known:
    """What a predictor that was evaluated on validation is to be judged by.

    Args:
        table, classes: as `failures` has them.
        trained: what the models were trained on, which an evaluation does not tell.
        volumes: whether series are whole, so that volumes are those of the patients.
    """
    columns = next(iter(classes.values()))
    something = sum(one["tp"] + one["fp"] for one in classes.values()) > 0

    def of_flag(flag: QualityFlag) -> np.ndarray:
        values: np.ndarray = columns[f"{SUSPICION}{flag}"][something]
        return values[np.isfinite(values)]

    pieces, bits, disagreed = (
        of_flag(flag) for flag in (QualityFlag.FRAGMENTS, QualityFlag.ENTROPY, QualityFlag.PAIRWISE_DICE)
    )
    measured = replace(
        trained or Range(),
        pieces=int(pieces.max(initial=0)),
        entropy_bits=round(float(bits.max()), 4) if len(bits) else None,
        pairwise_dice=round(1 - float(disagreed.max()), 4) if len(disagreed) else None,
    )
    if not volumes:
        return Known(measured)
    apart_mm = [*(one["volume_error_mm"] for one in classes.values()), columns["foreground_error_mm"]]
    return Known(measured, conformal.errors([one[np.isfinite(one)].tolist() for one in apart_mm]))


def _detector(suspicion: np.ndarray, risk: np.ndarray, resamples: int) -> Detector:
    def area(indices: np.ndarray) -> np.ndarray:
        return curve(suspicion, risk, indices).mean(axis=-1)

    def excess(indices: np.ndarray) -> np.ndarray:
        return area(indices) - curve(risk, risk, indices).mean(axis=-1)

    def estimate(statistic: Statistic) -> Estimate:
        ends = interval(statistic, len(risk), resamples=resamples) if resamples else None
        value = float(statistic(np.arange(len(risk))))
        return Estimate(value) if ends is None else Estimate(value, ends.low, ends.high)

    return Detector(estimate(area), estimate(excess), curve(suspicion, risk))


def _covered(classes: Mapping[str, Columns], errors: VolumeErrors) -> dict[str, Covered]:
    names = [*classes, "foreground"] if len(classes) > 1 else list(classes)
    first = next(iter(classes.values()))
    covered = {}
    for index, name in enumerate(names):
        radius_mm = errors.radius_mm[index] if errors.radius_mm else None
        apart_mm = classes[name]["volume_error_mm"] if name in classes else first["foreground_error_mm"]
        apart_mm = apart_mm[np.isfinite(apart_mm)]
        if radius_mm is not None and len(apart_mm):
            covered[name] = Covered(int((apart_mm <= radius_mm).sum()), len(apart_mm))
    return covered
