"""What a model must show before an alias is moved to it, each as a check that passed or did not, with its evidence."""

import csv
import dataclasses
import io
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from typing import Any

from rayseg.evaluation.evaluated import Evaluated, check_same_set
from rayseg.evaluation.metrics import METRICS, value_of
from rayseg.evaluation.paired import (
    COMPARED,
    LEAVES_MISSES_OUT,
    LOWER_IS_BETTER,
    Difference,
    difference,
    measured_by_both,
    missed,
)
from rayseg.tracking import registry, runs
from rayseg.tracking.registry import ModelVersion

MIN_PATIENTS = (
    12  # a dozen, below which a few failures are likely to be missed: docs/explanation/promotion.md has the figures
)
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


def no_leak(
    tracking_uri: str, version: ModelVersion, patients: Collection[str], held_out_by: Collection[str] = ("test",)
) -> Check:
    """That it was trained or validated on none of the patients who test it; nor the models that it started from.

    `held_out_by` names the splits whose patients may test: `val`, too, for what validation is to tell.
    """
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
            if row["split"] in held_out_by:
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
    detail = f"none of {len(test)} test patients was trained or validated on"
    if evidence["unknown_patients"]:
        detail += f"; {evidence['unknown_patients']} of them no split.csv knows: of other data, or of another key"
    return Check("no leak", True, detail, evidence)


@dataclass(frozen=True)
class Demand:
    """How good a challenger must be; see `promote.PromoteConfig`."""

    metric: str  # NAME or NAME/CLASS
    margin: float
    better: bool
    level: float
    _: KW_ONLY
    min_patients: int = MIN_PATIENTS

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
    """That the interval of the difference, by patient, lies above minus the margin, or above 0 with `better`.

    And that as many patients stand behind it as are asked for. A metric that leaves misses out is compared where both
    models find something, and the challenger must not find nothing in more cases than the champion.
    """
    name = "superiority" if demand.better else "non-inferiority"
    evidence: dict[str, Any] = {"metric": demand.metric, "margin": demand.margin, "level": demand.level}
    try:
        check_same_set([champion, challenger])
    except ValueError as error:
        return Check(name, False, str(error), evidence)
    labels = demand.labels(challenger)
    ours, theirs = challenger.classes(labels), champion.classes(labels)
    more_missed = ""
    if demand.name in LEAVES_MISSES_OUT:
        misses = {"missed": missed(demand.name, ours, theirs), "champion_missed": missed(demand.name, theirs, ours)}
        evidence |= misses
        if misses["missed"] > misses["champion_missed"]:
            more_missed = (
                f"it finds nothing in {misses['missed']} cases that have something to find, {champion.name} in "
                f"{misses['champion_missed']}, and {demand.metric} leaves those out"
            )
        ours, theirs = measured_by_both(demand.name, ours, theirs)
    found = difference(demand.name, ours, theirs, level=demand.level)
    patients = 0 if found is None else found.patients
    evidence |= {"patients": patients, "min_patients": demand.min_patients}
    if patients < demand.min_patients:
        detail = f"promote.min_patients: {patients} patients have a value of {demand.metric}, and at least "
        detail += f"{demand.min_patients} are asked for; evaluate both models on a set with more, or lower it"
        return Check(name, False, "; ".join(filter(None, (detail, more_missed))), evidence)
    if found is None or found.low is None or found.high is None:
        detail = f"{demand.metric} has no interval over {patients} patients: without one of them it is undefined"
        return Check(name, False, detail, evidence)
    passed, told = _judged(demand, found, champion.name)
    evidence |= {
        "challenger": found.challenger,
        "champion": found.baseline,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
    }
    return Check(name, passed and not more_missed, "; ".join(filter(None, (told, more_missed))), evidence)


def reference_kept(demand: Demand, challenger: Evaluated, reference: Evaluated) -> Check:
    """As `not_worse`, of a model that stays the same over promotions: many small steps down are else never seen."""
    found = not_worse(dataclasses.replace(demand, better=False), challenger, reference)
    return dataclasses.replace(found, name="reference", evidence=found.evidence | {"reference": reference.name})


def _judged(demand: Demand, found: Difference, against: str) -> tuple[bool, str]:
    """Whether an interval is good enough, and that in words."""
    assert found.low is not None, "is looked at before"
    assert found.high is not None, "is looked at before"
    lower = demand.name in LOWER_IS_BETTER
    worst = -found.high if lower else found.low
    told = f"{demand.metric} {found.challenger:.4f} against {found.baseline:.4f} of {against}: difference "
    told += f"{found.difference:+.4f}, {demand.level:.0%} interval {found.low:+.4f} to {found.high:+.4f} by patient"
    if demand.better:
        passed = worst > 0
        told += "; all of it better" if passed else "; not all of it is better"
    else:
        passed = worst >= -demand.margin
        told += f"; {'within' if passed else 'reaches beyond'} the margin of {demand.margin:g}"
        told += " (lower is better)" if lower else ""
    return passed, told


def check_metric(demand: Demand) -> None:
    """Raises ValueError where the metric cannot be compared."""
    if demand.name not in COMPARED:
        raise ValueError(f"promote.metric: {demand.name} cannot be compared; one of {', '.join(COMPARED)} can")
