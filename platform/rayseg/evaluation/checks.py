"""What a model must show before an alias is moved to it, each as a check that passed or did not, with its evidence."""

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rayseg.evaluation.evaluated import Evaluated, check_same_set
from rayseg.evaluation.metrics import METRICS, value_of
from rayseg.evaluation.paired import COMPARED, LOWER_IS_BETTER, difference
from rayseg.tracking import registry, runs
from rayseg.tracking.registry import ModelVersion

_REPEATS = 5
_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """One demand on a model. `evidence` is plain data: what was measured, and against what."""

    name: str
    passed: bool
    detail: str
    evidence: dict[str, Any]


def clean_process(
    tracking_uri: str, version: ModelVersion, max_latency_s: float | None, max_memory_mb: float | None
) -> list[Check]:
    """That it loads in a new process, gives the recorded masks there, and what that takes."""
    try:
        taken = registry.verify(tracking_uri, version, _REPEATS)
    except (RuntimeError, ValueError) as error:
        return [Check("clean process", False, f"it does not run in a clean process: {error}", {})]
    checks = [Check("clean process", True, "loads, and gives the recorded masks", {})]
    for name, measured, limit, unit in (
        ("latency", taken.latency_s, max_latency_s, "s"),
        ("memory", taken.memory_mb, max_memory_mb, "MB"),
    ):
        evidence = {"measured": measured, "limit": limit, "unit": unit}
        if measured is None:
            detail = f"{name} is not known: the model's code is of before it was measured"
            checks.append(Check(name, limit is None, detail, evidence))
        else:
            passed = limit is None or measured <= limit
            beyond = "" if limit is None else f", {'within' if passed else 'over'} the limit of {limit:g} {unit}"
            checks.append(Check(name, passed, f"{name} {measured:.3g} {unit}{beyond}", evidence))
    return checks


def no_leak(tracking_uri: str, version: ModelVersion, patients: Collection[str]) -> Check:
    """That it was trained or validated on none of the patients who test it; nor the models that it started from."""
    test = set(patients)
    trained: dict[str, str] = {}  # by patient: the model
    held_out: set[str] = set()
    ancestor: ModelVersion | None = version
    seen: set[str] = set()
    while ancestor is not None and ancestor.uri not in seen:
        seen.add(ancestor.uri)
        try:
            table = runs.read_bytes(tracking_uri, ancestor.run_id, "split.csv").decode()
        except ValueError:
            detail = f"it cannot be told whom {ancestor.uri} was trained on: its run has no split.csv"
            return Check("no leak", False, detail, {"test_patients": len(test)})
        for row in csv.DictReader(io.StringIO(table)):
            if row["split"] == "test":
                held_out.add(row["patient_key"])
            else:
                trained.setdefault(row["patient_key"], ancestor.uri)
        origin = runs.client(tracking_uri).get_run(ancestor.run_id).data.tags.get(registry.INITIAL_TAG)
        ancestor = None if origin is None else registry.resolve(tracking_uri, origin)
    leaked = sorted(test & trained.keys())
    evidence = {
        "test_patients": len(test),
        "trained_patients": len(trained),
        "leaked_patients": len(leaked),
        "unknown_patients": len(test - trained.keys() - held_out),
        "models": sorted(seen),
    }
    if leaked:
        shown = ", ".join(f"{patient[:10]} ({trained[patient]})" for patient in leaked[:_SHOWN])
        detail = f"{len(leaked)} of {len(test)} test patients were trained or validated on: {shown}"
        return Check("no leak", False, detail, evidence)
    return Check("no leak", True, f"none of {len(test)} test patients was trained or validated on", evidence)


@dataclass(frozen=True)
class Demand:
    """How good a challenger must be; see `promote.PromoteConfig`."""

    metric: str  # NAME or NAME/CLASS
    margin: float
    better: bool
    level: float
    resamples: int

    @property
    def name(self) -> str:
        """The metric's name without the class."""
        return self.metric.partition("/")[0]

    def labels(self, model: Evaluated) -> list[str]:
        """The classes that it is of; raises ValueError where the model has no such class."""
        label = self.metric.partition("/")[2]
        if label and label not in model.labels:
            raise ValueError(f"promote.metric: {model.name} has no class {label}; it has {', '.join(model.labels)}")
        return [label] if label else model.labels


def value(demand: Demand, model: Evaluated) -> float | None:
    """The model's own value of the metric, None where it is undefined."""
    found = float(value_of(METRICS[demand.name], model.classes(demand.labels(model))))
    return found if found == found else None


def not_worse(demand: Demand, challenger: Evaluated, champion: Evaluated) -> Check:
    """That the interval of the difference, by patient, lies above minus the margin, or above 0 with `better`."""
    name, aim = ("superiority", 0.0) if demand.better else ("non-inferiority", -demand.margin)
    evidence: dict[str, Any] = {"metric": demand.metric, "margin": demand.margin, "level": demand.level}
    try:
        check_same_set([champion, challenger])
    except ValueError as error:
        return Check(name, False, str(error), evidence)
    labels = demand.labels(challenger)
    found = difference(
        demand.name,
        challenger.classes(labels),
        champion.classes(labels),
        level=demand.level,
        resamples=demand.resamples,
    )
    patients = len(challenger.patients)
    if found is None or found.low is None or found.high is None:
        detail = f"{demand.metric} has no interval over {patients} patients: too few of them, or too few with a value"
        return Check(name, False, detail, evidence | {"patients": patients})
    lower = demand.name in LOWER_IS_BETTER
    worst = -found.high if lower else found.low
    passed = worst > 0 if demand.better else worst >= aim
    told = f"{demand.metric} {found.challenger:.4f} against {found.baseline:.4f} of {champion.name}: difference "
    told += f"{found.difference:+.4f}, {demand.level:.0%} interval {found.low:+.4f} to {found.high:+.4f} by patient"
    if demand.better:
        told += "; all of it better" if passed else "; not all of it is better"
    else:
        told += f"; {'within' if passed else 'reaches beyond'} the margin of {demand.margin:g}"
        told += " (lower is better)" if lower else ""
    evidence |= {
        "patients": patients,
        "challenger": found.challenger,
        "champion": found.baseline,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
    }
    return Check(name, passed, told, evidence)


def check_metric(demand: Demand) -> None:
    """Raises ValueError where the metric cannot be compared."""
    if demand.name not in COMPARED:
        raise ValueError(f"promote.metric: {demand.name} cannot be compared; one of {', '.join(COMPARED)} can")
