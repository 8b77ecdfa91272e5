"""Two models on the same patients: differences of metrics with intervals, a signed-rank test, who wins how often.

numpy, scipy and pyarrow only. The interval of a difference is the jackknife of `statistics`, which leaves the same
patient out of both models' values, so that what makes a patient hard for both cancels out. Comparing and promoting have
the same. Of metrics per case the patients' own values are compared too: by Wilcoxon's signed-rank test (Wilcoxon 1945,
doi:10.2307/3001968; two-sided, equal values left out) and by counting on how many patients either model is the better
one. Both look at the patients for whom both models have a value. P-values are of single comparisons: nothing is
corrected for looking at several metrics or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rayseg.evaluation.metrics import METRICS, Columns, Ratio, value_of
from rayseg.evaluation.statistics import jackknife

_EQUAL = 1e-6  # values of a patient that differ by less are a tie
_NEEDS_PROBABILITIES = {"average_precision", "ece"}  # of all pixels, which a table of cases does not hold
_NO_SIDE = {f"volume_{name}_{unit}" for name in ("bias", "lower_limit", "upper_limit") for unit in ("ml", "px")}
_FALSE = {f"false_positive_{unit}_per_empty_case" for unit in ("ml", "px")}
_DISTANCES = {f"{name}_{unit}_per_case" for name in ("hd95", "assd") for unit in ("mm", "px")}

LOWER_IS_BETTER = frozenset({"brier", "lesions_false_per_case", *_FALSE, *_DISTANCES})
COMPARED = tuple(name for name in METRICS if name not in _NEEDS_PROBABILITIES | _NO_SIDE)
PER_CASE = tuple(name for name in COMPARED if name.endswith(("_per_case", "_per_empty_case")))
# A case in which a model finds nothing has no value of these, or a good one: who finds less can look as good or better.
LEAVES_MISSES_OUT = frozenset(
    {"precision_pooled", "precision_per_case", "lesion_precision", "lesions_false_per_case", *_FALSE, *_DISTANCES}
    | {"accuracy_pooled", "accuracy_per_case", "brier"}  # of all pixels, most of which are background
)


@dataclass(frozen=True)
class Difference:
    """Challenger against baseline in one metric.

    difference: challenger minus baseline, of the values that each has by itself.
    low, high: ends of its interval; None where there are too few patients, or too few who have a value.
    better: whether the interval says so: `challenger`, `baseline`, or neither.
    p_value: of the signed-rank test; None for pooled metrics and where fewer than one patient differs.
    wins, ties, losses: of the challenger, over the patients for whom both have a value; None for pooled metrics.
    one_sided: patients for whom only one of the two has a value, as where a model finds nothing and has no distance.
    patients: who have a value of either model, alone or as a part of a pooled one; the interval is over these.
    """

    challenger: float
    baseline: float
    difference: float
    low: float | None = None
    high: float | None = None
    better: str | None = None
    p_value: float | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    one_sided: int | None = None
    patients: int = 0


def differences(challenger: Sequence[Columns], baseline: Sequence[Columns], *, level: float) -> dict[str, Difference]:
    """All of `COMPARED` that both models have.

    Args:
        challenger: of each class, `metrics.columns_of` its cases.
        baseline: the same of the other model: the same patients in the same order, the same classes.
        level: of confidence.
    """
    found = {name: difference(name, challenger, baseline, level=level) for name in COMPARED}
    return {name: one for name, one in found.items() if one is not None}


def difference(
    name: str, challenger: Sequence[Columns], baseline: Sequence[Columns], *, level: float
) -> Difference | None:
    """One metric of `COMPARED`; None where a model has no value of it. Arguments as of `differences`."""
    metric = METRICS[name]
    ours, theirs = float(value_of(metric, challenger)), float(value_of(metric, baseline))
    if not np.isfinite([ours, theirs]).all():
        return None
    assert isinstance(metric, Ratio), "each of COMPARED is one"
    (our_left_out, our_shares), (their_left_out, their_shares) = (_parts(metric, of) for of in (challenger, baseline))
    shares = (our_shares + their_shares) / 2
    ends = jackknife(ours - theirs, our_left_out - their_left_out, shares, level=level)
    low, high = (None, None) if ends is None else ends
    sign = -1 if name in LOWER_IS_BETTER else 1
    better = None
    if low is not None and high is not None and low * high > 0:
        better = "challenger" if sign * low > 0 else "baseline"
    p_value = wins = ties = losses = one_sided = None
    if name in PER_CASE:
        first, second = of_patients(name, challenger), of_patients(name, baseline)
        both = np.isfinite(first) & np.isfinite(second)
        gains = sign * (first - second)[both]
        gains[np.abs(gains) < _EQUAL] = 0
        wins, ties, losses = (int(np.count_nonzero(chosen)) for chosen in (gains > 0, gains == 0, gains < 0))
        one_sided = int(np.count_nonzero(np.isfinite(first) != np.isfinite(second)))
        if wins + losses:
            p_value = float(stats.wilcoxon(gains, zero_method="wilcox").pvalue)
    patients = int(np.count_nonzero(shares))
    return Difference(ours, theirs, ours - theirs, low, high, better, p_value, wins, ties, losses, one_sided, patients)


def _parts(metric: Ratio, classes: Sequence[Columns]) -> tuple[np.ndarray, np.ndarray]:
    """The metric without each patient, and what part of it each makes: float64 (patients,)."""
    left_out, shares = [], []
    for columns in classes:
        part, whole = metric.terms(columns)
        if whole.sum() > 0:
            rest = whole.sum() - whole
            with np.errstate(invalid="ignore", divide="ignore"):
                left_out.append(np.where(rest > 0, (part.sum() - part) / rest, np.nan))
            shares.append(whole / whole.sum())
    values = np.stack(left_out)
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=0) / defined.sum(axis=0), np.mean(shares, axis=0)


def measured_by_both(
    name: str, challenger: Sequence[Columns], baseline: Sequence[Columns]
) -> tuple[list[Columns], list[Columns]]:
    """The same, without what only one of the models has of a case in which there is something to find.

    Of a metric that leaves misses out, see LEAVES_MISSES_OUT: two models that miss different patients are else compared
    on different ones.
    """
    column = _column(name)
    pairs = [
        ((ours, theirs), np.isfinite(ours[column]) == np.isfinite(theirs[column]) if column in ours else None)
        for ours, theirs in zip(challenger, baseline, strict=True)
    ]
    kept = [
        [of if same is None else {**of, column: np.where(same | ~_something(of), of[column], np.nan)} for of in pair]
        for pair, same in pairs
    ]
    return [pair[0] for pair in kept], [pair[1] for pair in kept]


def missed(name: str, classes: Sequence[Columns], other: Sequence[Columns]) -> int:
    """How many cases, over all classes, with something to find a metric leaves out of the first model's value.

    Those are where it finds nothing, or has no value though the other model has one.
    """
    column, number = _column(name), 0
    for of, beside in zip(classes, other, strict=True):
        nothing = of["tp"] + of["fp"] == 0
        if column in of:
            nothing = nothing | (~np.isfinite(of[column]) & np.isfinite(beside[column]))
        number += int(np.count_nonzero(_something(of) & nothing))
    return number


def _something(of: Columns) -> np.ndarray:
    """Whether there is anything to find, bool (patients,)."""
    return of["tp"] + of["fn"] > 0


def _column(name: str) -> str:
    """That has a metric per case of each patient."""
    return name.removesuffix("_per_case").removesuffix("_per_empty_case")


def of_patients(name: str, classes: Sequence[Columns]) -> np.ndarray:
    """A metric per case of each patient, float (patients,): the mean over the classes that have one, NaN without any.

    Raises:
        ValueError: the metric is none of `PER_CASE`.
    """
    if name not in PER_CASE:
        raise ValueError(f"{name} is no metric of single patients; those are {', '.join(PER_CASE)}")
    column = _column(name)
    values = np.stack([of_class[column] for of_class in classes])
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined.any(axis=0), np.nansum(values, axis=0) / defined.sum(axis=0), np.nan)
