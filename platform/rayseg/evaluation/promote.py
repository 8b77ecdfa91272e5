"""Promote: moves the alias that is served to a model that has earned it."""

from dataclasses import dataclass

from rayseg.evaluation.publish import set_tag
from rayseg.tracking import registry, runs


@dataclass(frozen=True)
class PromoteConfig:
    """The candidate and what it must show."""

    model_uri: str  # models:/NAME/VERSION or models:/NAME@ALIAS
    tracking_uri: str
    metric: str = "test/dice_pooled"  # SPLIT/NAME as the evaluate job logs it; higher is better
    alias: str = "champion"
    margin: float = 0.0  # how much lower than the champion's the metric may be

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ValueError(f"promote.margin: 0 or more expected, got {self.margin}")


@dataclass(frozen=True)
class PromoteResult:
    """The decision. `champion_metric` is that of the model which bore the alias before, None where none did."""

    model_uri: str
    alias: str
    promoted: bool
    reason: str
    metric: float | None
    champion_metric: float | None


def promote(config: PromoteConfig) -> PromoteResult:
    """Gives the candidate the alias unless its metric is missing, not comparable or worse than the champion's.

    Raises:
        ValueError: there is no such model.
    """
    candidate = registry.resolve(config.tracking_uri, config.model_uri)
    champion = registry.champion(config.tracking_uri, candidate.name, config.alias)
    metric = runs.metric(config.tracking_uri, candidate.run_id, config.metric)
    champion_metric = None if champion is None else runs.metric(config.tracking_uri, champion.run_id, config.metric)

    def decided(promoted: bool, reason: str) -> PromoteResult:
        return PromoteResult(candidate.uri, config.alias, promoted, reason, metric, champion_metric)

    def refused(reason: str) -> PromoteResult:
        return decided(False, reason)

    if metric is None:
        return refused(f"the model has no {config.metric}: evaluate it first")
    if champion is not None and champion.version != candidate.version:
        if champion_metric is None:
            return refused(f"{champion.uri}, the {config.alias}, has no {config.metric}: evaluate it first")
        split = config.metric.partition("/")[0]
        if _set(config.tracking_uri, candidate.run_id, split) != _set(config.tracking_uri, champion.run_id, split):
            return refused(f"{champion.uri}, the {config.alias}, was evaluated on other rows: evaluate both on one set")
        if not metric >= champion_metric - config.margin:  # also refuses what is not a number
            return refused(
                f"{config.metric} {metric:.4f} is below {champion_metric:.4f} of {champion.uri}, the {config.alias}, "
                f"by more than the margin {config.margin:g}"
            )
    registry.set_alias(config.tracking_uri, candidate.name, config.alias, candidate.version)
    if champion is None:
        return decided(True, f"the first {config.alias}, {config.metric} {metric:.4f}")
    if champion_metric is None or champion.version == candidate.version:
        return decided(True, f"is the {config.alias} already")
    return decided(True, f"{config.metric} {metric:.4f}, {champion_metric:.4f} of {champion.uri} before")


def _set(tracking_uri: str, run_id: str, split: str) -> str | None:
    return runs.client(tracking_uri).get_run(run_id).data.tags.get(set_tag(split))
