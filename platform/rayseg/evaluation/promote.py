"""Promote: moves the alias that is served to a model that has earned it, and back again."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rayseg import __version__, storage
from rayseg.evaluation import checks, evaluated
from rayseg.evaluation.checks import Check, Demand
from rayseg.evaluation.evaluated import Evaluated
from rayseg.tracking import aliases, registry, runs
from rayseg.tracking.registry import ModelVersion

logger = logging.getLogger(__name__)

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class PromoteConfig:
    """The challenger and what it must show against the model that bears the alias, the champion."""

    model_uri: str  # models:/NAME/VERSION or models:/NAME@ALIAS
    tracking_uri: str  # URI of the MLflow server or database, such as sqlite:///work/mlflow.db
    metric: str = "test/dice_pooled"  # SPLIT/NAME or SPLIT/NAME/CLASS, as the evaluate job logs it
    alias: str = "champion"  # the alias that the version is to get
    margin: float = 0.02  # how much worse than the champion the model may be, in the metric's unit
    better: bool = False  # the model must be better, not only no worse
    level: float = 0.95  # level of the interval of the difference
    min_patients: int = checks.MIN_PATIENTS  # patients who must have a value of the metric
    # A version that the challenger may be worse than by no more than the margin, too, whoever is the champion; by
    # default the first one that bore the alias.
    reference: str | None = None
    max_latency_s: float | None = None  # greatest time of one slice, the bundle's example, in a clean process
    max_memory_mb: float | None = None  # greatest memory of that process
    rollback: bool = False  # gives the alias back to the version before; nothing else is looked at

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ValueError(f"promote.margin: 0 or more expected, got {self.margin}")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"promote.level: a level from 0.5 to below 1 expected, got {self.level}")
        if self.min_patients < 2:
            raise ValueError(f"promote.min_patients: at least 2 expected, got {self.min_patients}")
        for key in ("max_latency_s", "max_memory_mb"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"promote.{key}: a positive number or null expected, got {getattr(self, key)}")
        split, slash, name = self.metric.partition("/")
        if not slash or not name or split not in _SPLITS:
            raise ValueError(f"promote.metric: SPLIT/NAME expected, as test/dice_pooled, got {self.metric}")
        checks.check_metric(self.demand)

    @property
    def demand(self) -> Demand:
        """What is asked of the metric."""
        metric = self.metric.partition("/")[2]
        return Demand(metric, self.margin, self.better, self.level, min_patients=self.min_patients)


@dataclass(frozen=True)
class PromoteResult:
    """The decision. `champion` is the version that bore the alias before, None where none did.

    metric, champion_metric: the two models' values; None where a model has none.
    difference, low, high: challenger minus champion, and its interval; None where nothing was compared.
    checks: each demand, as `checks.Check`.
    evidence: URI of all of it as JSON in the challenger's run; None for a rollback, and where nothing was decided.
    history: the moves of the alias, the oldest first.
    """

    model_uri: str
    alias: str
    promoted: bool
    reason: str
    champion: str | None
    metric: float | None
    champion_metric: float | None
    difference: float | None
    low: float | None
    high: float | None
    latency_s: float | None
    memory_mb: float | None
    checks: list[dict[str, Any]]
    evidence: str | None
    history: list[dict[str, Any]]


def promote(config: PromoteConfig) -> PromoteResult:
    """Gives the challenger the alias where every check passes; tells what was decided and why, either way.

    Checked are: that it runs in a clean process and gives the recorded masks, within the limits of time and memory;
    that it was evaluated, on patients whom it was not trained on; where another model bears the alias, that it is no
    worse than that one on the same cases, or better; and that it is no worse than the reference.

    Raises:
        ValueError: there is no such model or reference, or nothing to roll back to.
    """
    candidate = registry.resolve(config.tracking_uri, config.model_uri)
    champion = registry.champion(config.tracking_uri, candidate.name, config.alias)
    if config.rollback:
        return _roll_back(config, candidate.name)
    if champion is not None and champion.version == candidate.version:
        return _result(config, candidate, champion, True, f"is the {config.alias} already", [], None)
    made = _checks(config, candidate, champion)
    failed = [one.detail for one in made if not one.passed]
    compared = [one.detail for one in made if one.name in ("superiority", "non-inferiority", "reference")]
    reason = "; ".join(failed or compared or [f"the first {config.alias}, {_own(made)}"])
    if failed:
        evidence = _tell(config, candidate, champion, made, False, reason)
        return _result(config, candidate, champion, False, reason, made, evidence)
    with aliases.moving(config.tracking_uri, candidate.name, config.alias) as check:
        if registry.champion(config.tracking_uri, candidate.name, config.alias) == champion:
            evidence = _tell(config, candidate, champion, made, True, reason)
            check()
            aliases.move(config.tracking_uri, candidate.name, config.alias, candidate.version, "promoted")
            return _result(config, candidate, champion, True, reason, made, evidence)
    logger.warning("promote: %s was moved meanwhile: compares anew", config.alias)
    return promote(config)


def _checks(config: PromoteConfig, candidate: ModelVersion, champion: ModelVersion | None) -> list[Check]:
    uri, split, demand = config.tracking_uri, config.metric.partition("/")[0], config.demand
    made = checks.clean_process(uri, candidate, config.max_latency_s, config.max_memory_mb)
    tested: list[Evaluated] = []
    for model in (candidate, champion):
        if model is not None:
            try:
                tested.append(evaluated.read(uri, model.uri, split))
            except ValueError as error:
                return [*made, Check("evaluated", False, str(error), {})]
    own = checks.value(demand, tested[0])
    told = f"{config.metric} {own:.4f}" if own is not None else f"{config.metric} is undefined"
    given = {"value": own, "set": tested[0].digest, "patients": len(tested[0].patients)}
    patients = {patient for one in tested for patient in one.patients}
    made += [Check("evaluated", own is not None, told, given), checks.no_leak(uri, candidate, patients)]
    if len(tested) > 1:
        made.append(checks.not_worse(demand, *tested))
    return [*made, *_against_reference(config, tested[0], candidate, champion)]


def _against_reference(
    config: PromoteConfig, tested: Evaluated, candidate: ModelVersion, champion: ModelVersion | None
) -> list[Check]:
    """The check against the reference; none where that is the candidate or, which is compared anyway, the champion."""
    uri, split = config.tracking_uri, config.metric.partition("/")[0]
    first = aliases.first(aliases.history(uri, candidate.name, config.alias))
    wanted = config.reference or (first and f"models:/{candidate.name}/{first}")
    if wanted is None:
        return []
    try:
        reference = registry.resolve(uri, wanted)
        if reference.uri in {candidate.uri, champion and champion.uri}:
            return []
        return [checks.reference_kept(config.demand, tested, evaluated.read(uri, reference.uri, split))]
    except ValueError as error:
        if config.reference:
            raise ValueError(f"promote.reference: {error}") from error
        told = f"{error}; it is the first that was {config.alias}: name another version by promote.reference"
        return [Check("reference", False, told, {"reference": wanted})]


def _roll_back(config: PromoteConfig, name: str) -> PromoteResult:
    uri, alias = config.tracking_uri, config.alias
    with aliases.moving(uri, name, alias) as check:
        champion = registry.champion(uri, name, alias)
        version = aliases.earlier(aliases.history(uri, name, alias), None if champion is None else champion.version)
        if version is None:
            raise ValueError(f"promote.rollback: {alias} of {name} has no earlier version to go back to")
        before = registry.resolve(uri, f"models:/{name}/{version}")
        check()
        aliases.move(uri, name, alias, version, "rolled back")
    reason = f"rolled back from {'nothing' if champion is None else champion.uri}"
    return _result(config, before, champion, True, reason, [], None)


def _tell(
    config: PromoteConfig,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    made: list[Check],
    promoted: bool,
    reason: str,
) -> str:
    """The decision as JSON in the challenger's run, whose URI it returns, and as tags of the version."""
    uri, client = config.tracking_uri, runs.client(config.tracking_uri)
    at = datetime.now(UTC)
    path = f"promotion/{config.alias}-{at:%Y%m%dT%H%M%S.%fZ}.json"
    decision = {
        "at": at.isoformat(timespec="seconds"),
        "model": candidate.uri,
        "digest": candidate.digest,
        "alias": config.alias,
        "champion": None if champion is None else champion.uri,
        "promoted": promoted,
        "reason": reason,
        "checks": [dataclasses.asdict(one) for one in made],
        "config": dataclasses.asdict(config),
        "rayseg": __version__,
    }
    runs.log_bytes(uri, candidate.run_id, path, json.dumps(decision, indent=2).encode())
    tags = {
        "decision": "promoted" if promoted else "refused",
        "reason": reason,
        "at": decision["at"],
        "champion": decision["champion"] or "none",
        "evidence": path,
        **{one.name.replace(" ", "_"): f"{'passed' if one.passed else 'failed'}: {one.detail}" for one in made},
    }
    for name, text in tags.items():
        client.set_model_version_tag(candidate.name, candidate.version, f"rayseg.{config.alias}.{name}", str(text))
    return storage.join(client.get_run(candidate.run_id).info.artifact_uri, path)


def _result(
    config: PromoteConfig,
    model: ModelVersion,
    champion: ModelVersion | None,
    promoted: bool,
    reason: str,
    made: list[Check],
    evidence: str | None,
) -> PromoteResult:
    found = {one.name: one.evidence for one in made}
    compared = found.get("superiority") or found.get("non-inferiority") or {}
    return PromoteResult(
        model_uri=model.uri,
        alias=config.alias,
        promoted=promoted,
        reason=reason,
        champion=None if champion is None else champion.uri,
        metric=found.get("evaluated", {}).get("value"),
        champion_metric=compared.get("champion"),
        difference=compared.get("difference"),
        low=compared.get("low"),
        high=compared.get("high"),
        latency_s=found.get("latency", {}).get("measured"),
        memory_mb=found.get("memory", {}).get("measured"),
        checks=[dataclasses.asdict(one) for one in made],
        evidence=evidence,
        history=[dataclasses.asdict(one) for one in aliases.history(config.tracking_uri, model.name, config.alias)],
    )


def _own(made: list[Check]) -> str:
    return next(one.detail for one in made if one.name == "evaluated")
