"""Metrics of a set of cases, with intervals, for all cases and for groups of them. numpy, scipy and pyarrow only.

Two averages, which differ and are never mixed:

- pooled: the pixels (lesions) of all cases are counted together; large lesions weigh most, empty cases add only false
  positives;
- per case: each case is scored by itself and the scores are averaged; every patient weighs the same.

Cases with nothing in them, by definition here: an empty prediction for an empty truth has no Dice (0/0) and is left out
of the per-case mean; it is counted as a true negative case. Any prediction for an empty truth scores 0 and stays in, as
does an empty prediction where there is a truth. The other per-case scores are means over the cases that have them, too:
precision over those with a prediction, recall over those with a truth, accuracy over all.

Each metric is a function of a `Draw`, so that one formula gives the value, its bootstrap interval and, of two tables
with the same patients, the interval of a difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayseg.evaluation.calibration import ece
from rayseg.evaluation.statistics import interval, weights
from rayseg.models import histograms

Columns = Mapping[str, np.ndarray]

_ROWS_AT_A_TIME = 64  # of histograms of draws: 8 MB
_LIMITS = 1.96  # standard deviations of the limits of agreement
_LEAST_MEASURED = 0.5  # of the patients must have volumes for mL: those of a few say nothing of all


@dataclass(frozen=True, eq=False)
class Draw:
    """The cases of one class, each weighted by how often its patient is drawn.

    columns: of each patient, float (patients,) or (patients, ...), NaN where undefined; see `columns_of`.
    weights: float (..., patients).
    """

    columns: Columns
    weights: np.ndarray

    def total(self, name: str) -> np.ndarray:
        """The sum over the patients for whom it is defined, (...)."""
        return self.weights @ np.nan_to_num(self.columns[name])

    def known(self, name: str) -> np.ndarray:
        """The number of patients for whom it is defined."""
        return self.weights @ np.isfinite(self.columns[name])

    def mean(self, name: str) -> np.ndarray:
        """The mean over the patients for whom it is defined."""
        return _ratio(self.total(name), self.known(name))


Metric = Callable[[Draw], np.ndarray]


@dataclass(frozen=True)
class Ratio:
    """A metric that is a sum over the patients divided by another one: a pooled ratio, or a mean of those who have one.

    terms: of columns, what each patient adds to either sum: two arrays of float64 (patients,).
    """

    terms: Callable[[Columns], tuple[np.ndarray, np.ndarray]]

    def __call__(self, draw: Draw) -> np.ndarray:
        """The metric of a draw."""
        part, whole = self.terms(draw.columns)
        return _ratio(draw.weights @ part, draw.weights @ whole)


def _pooled(part: Mapping[str, int], whole: Mapping[str, int]) -> Ratio:
    """The ratio of two weighted sums of columns."""

    def sums(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        above, below = (
            np.asarray(sum(times * np.nan_to_num(columns[name]) for name, times in of.items()), np.float64)
            for of in (part, whole)
        )
        return above, below

    return Ratio(sums)


def _per_case(name: str) -> Ratio:
    return Ratio(lambda columns: (np.nan_to_num(columns[name]), np.isfinite(columns[name]).astype(np.float64)))


def _per_image(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Sums over images, and how many; unknown where the table is of before they were counted."""
    images = np.nan_to_num(columns["images_scored"])
    return np.nan_to_num(columns["dice_per_image"]) * images, images


def _average_precision(draw: Draw) -> np.ndarray:
    rows = draw.weights.reshape(-1, draw.weights.shape[-1])
    found = [
        histograms.average_precision(part @ draw.columns["negative"], part @ draw.columns["positive"])
        for part in np.array_split(rows, -(-len(rows) // _ROWS_AT_A_TIME))
    ]
    return np.concatenate(found).reshape(draw.weights.shape[:-1])


def _ece(draw: Draw) -> np.ndarray:
    sums = draw.columns["reliability"]
    together = draw.weights @ sums.reshape(len(sums), -1)
    return ece(together.reshape(*together.shape[:-1], *sums.shape[1:]))


def _limit(name: str, side: int) -> Metric:
    """The bias plus `side` times 1.96 standard deviations (ddof 1) of a column of differences."""

    def metric(draw: Draw) -> np.ndarray:
        squares = draw.weights @ np.nan_to_num(draw.columns[name]) ** 2
        known, mean = draw.known(name), draw.mean(name)
        variance = _ratio(squares - known * mean**2, known - 1)
        return mean + side * _LIMITS * np.sqrt(np.maximum(variance, 0))

    return metric


def _agreement(unit: str) -> dict[str, Metric]:
    """Bland and Altman 1986 (doi:10.1016/S0140-6736(86)90837-8), and what is found where nothing is."""
    return {
        f"volume_bias_{unit}": _per_case(f"volume_difference_{unit}"),
        f"volume_lower_limit_{unit}": _limit(f"volume_difference_{unit}", -1),
        f"volume_upper_limit_{unit}": _limit(f"volume_difference_{unit}", 1),
        f"false_positive_{unit}_per_empty_case": _per_case(f"false_positive_{unit}"),
    }


_PIXELS = {"tp": 1, "fp": 1, "fn": 1, "tn": 1}
_DICE = _pooled({"tp": 2}, {"tp": 2, "fp": 1, "fn": 1})
_SURFACES = [f"{name}_{unit}" for name in ("hd95", "assd", "nsd") for unit in ("mm", "px")]

# docs/reference/metrics.md has the definitions. All but `average_precision` and `ece` need no more than the table of
# cases. Of several classes a metric is the mean over those that have a value.
METRICS: dict[str, Metric] = {
    "dice_pooled": _DICE,
    "dice_per_case": _per_case("dice"),
    "dice_per_image": Ratio(_per_image),
    "iou_pooled": _pooled({"tp": 1}, {"tp": 1, "fp": 1, "fn": 1}),
    "iou_per_case": _per_case("iou"),
    "precision_pooled": _pooled({"tp": 1}, {"tp": 1, "fp": 1}),
    "precision_per_case": _per_case("precision"),
    "recall_pooled": _pooled({"tp": 1}, {"tp": 1, "fn": 1}),
    "recall_per_case": _per_case("recall"),
    "f1_pooled": _DICE,
    "accuracy_pooled": _pooled({"tp": 1, "tn": 1}, _PIXELS),
    "accuracy_per_case": _per_case("accuracy"),
    "average_precision": _average_precision,
    "average_precision_per_case": _per_case("average_precision"),
    **{f"{name}_per_case": _per_case(name) for name in _SURFACES},
    "lesion_precision": _pooled({"lesions_predicted": 1, "lesions_false": -1}, {"lesions_predicted": 1}),
    "lesion_recall": _pooled({"lesions_found": 1}, {"lesions_true": 1}),
    "lesion_f1": _pooled({"lesions_found": 2}, {"lesions_found": 1, "lesions_false": 1, "lesions_true": 1}),
    "lesion_f1_per_case": _per_case("lesion_f1"),
    "lesions_false_per_case": _per_case("lesions_false"),
    **_agreement("ml"),
    **_agreement("px"),
    "brier": _pooled({"squares": 1}, _PIXELS),
    "ece": _ece,
}
# Numbers, without intervals; of several classes their sums.
COUNTS: dict[str, Callable[[Columns], int]] = {
    "cases_scored": lambda of: int((of["tp"] + of["fp"] + of["fn"] > 0).sum()),
    "cases_missed": lambda of: int(((of["tp"] + of["fp"] == 0) & (of["fn"] > 0)).sum()),
    "cases_false_alarms": lambda of: int(((of["tp"] + of["fn"] == 0) & (of["fp"] > 0)).sum()),
    "cases_true_negative": lambda of: int((of["tp"] + of["fp"] + of["fn"] == 0).sum()),
    # That biases and limits of agreement are of.
    "volume_cases": lambda of: int(np.isfinite(of["volume_difference_ml"]).sum() or len(of["volume_difference_px"])),
    **{
        name: lambda of, name=name: int(of[name].sum())  # type: ignore[misc]
        for name in ("lesions_true", "lesions_found", "lesions_predicted", "lesions_false")
    },
}


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, None where there are too few patients for one."""

    value: float
    low: float | None = None
    high: float | None = None


def columns_of(cases: pa.Table, name: str) -> dict[str, np.ndarray]:
    """The numbers of a class, by patient in the table's order: float64, NaN for null.

    Beside those of `cases.CASES`: `volume_difference_ml` and `_px` (predicted minus true), and `false_positive_ml` and
    `_px`, known only where nothing is to be found. Pixels, of all cases, stand in where less than half have a volume.
    """
    rows = cases.filter(pc.field("class") == name)
    columns = {
        field.name: rows[field.name].cast(pa.float64()).to_numpy(zero_copy_only=False)
        for field in cases.schema
        if not pa.types.is_string(field.type)
    }
    empty = columns["tp"] + columns["fn"] == 0
    nothing = np.full(len(empty), np.nan)
    difference_ml = columns["predicted_ml"] - columns["truth_ml"]
    measured = len(empty) > 0 and np.isfinite(difference_ml).mean() >= _LEAST_MEASURED
    columns["volume_difference_ml"] = difference_ml if measured else nothing
    columns["false_positive_ml"] = np.where(empty, columns["predicted_ml"], np.nan) if measured else nothing
    columns["volume_difference_px"] = nothing if measured else columns["fp"] - columns["fn"]
    columns["false_positive_px"] = nothing if measured else np.where(empty, columns["fp"], np.nan)
    columns["squares"] = columns["brier"] * sum(columns[name] for name in _PIXELS)
    return columns


def value_of(metric: Metric, classes: Sequence[Columns], indices: np.ndarray | None = None) -> np.ndarray:
    """The mean of a metric over the classes that have a value, of patients drawn by `indices` (..., drawn), or of all.

    NaN where no class has one.
    """
    patients = len(classes[0]["tp"])
    drawn = np.ones(patients) if indices is None else weights(indices, patients)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.stack([np.asarray(metric(Draw(columns, drawn)), np.float64) for columns in classes])
        return _ratio(np.nansum(values, axis=0), np.isfinite(values).sum(axis=0))


def estimate(metric: Metric, classes: Sequence[Columns], *, resamples: int, min_patients: int) -> Estimate | None:
    """The value with its interval over patients; None where it is undefined."""
    value = float(value_of(metric, classes))
    if not np.isfinite(value):
        return None
    patients = len(classes[0]["tp"])
    found = None
    if patients >= min_patients:
        found = interval(lambda indices: value_of(metric, classes, indices), patients, resamples=resamples)
    return Estimate(value) if found is None else Estimate(value, found.low, found.high)


def estimates(classes: Sequence[Columns], *, resamples: int, min_patients: int) -> dict[str, Estimate]:
    """All metrics that are defined, then the counts."""
    found = {
        name: estimate(metric, classes, resamples=resamples, min_patients=min_patients)
        for name, metric in METRICS.items()
    }
    counted = {name: Estimate(sum(count(columns) for columns in classes)) for name, count in COUNTS.items()}
    return {name: one for name, one in found.items() if one is not None} | counted


def background_dice(classes: Sequence[Columns]) -> float | None:
    """The pooled Dice of "everything is background": 0 unless there is nothing to find, then undefined."""
    return 0.0 if any((columns["tp"] + columns["fn"]).any() for columns in classes) else None


def subset(columns: Columns, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The patients for whom the bool array is true."""
    return {name: values[chosen] for name, values in columns.items()}


def _ratio(part: Any, whole: Any) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, np.divide(part, whole), np.nan)
