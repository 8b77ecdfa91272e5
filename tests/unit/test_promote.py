"""Who gets the alias: on a real MLflow store (SQLite), with versions that have metrics and no weights."""

import pytest

from rayseg.evaluation.promote import PromoteConfig, promote
from rayseg.evaluation.publish import set_tag
from rayseg.tracking import registry, runs

METRIC = "test/dice_pooled"


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the module, as making one takes seconds; each test takes another model name."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def version(tracking: str, name: str, dice: float | None, rows: str = "set a") -> str:
    """Registers a version of `name` whose run has that metric; returns its URI."""
    client = runs.client(tracking)
    run_id = runs.start(tracking, "promote", "run")
    if dice is not None:
        runs.log_metrics(tracking, run_id, {METRIC: dice})
        client.set_tag(run_id, set_tag("test"), rows)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = client.create_model_version(name, source=f"runs:/{run_id}/model", run_id=run_id)
    return f"models:/{name}/{made.version}"


def champion_of(tracking: str, name: str) -> str | None:
    found = registry.champion(tracking, name, "champion")
    return found.uri if found else None


def test_the_first_evaluated_model_becomes_champion_and_a_better_one_replaces_it(tracking: str) -> None:
    first, better = version(tracking, "one", 0.5), version(tracking, "one", 0.6)
    result = promote(PromoteConfig(model_uri=first, tracking_uri=tracking))
    assert (result.promoted, result.metric, result.champion_metric) == (True, 0.5, None)
    assert champion_of(tracking, "one") == first
    result = promote(PromoteConfig(model_uri=better, tracking_uri=tracking))
    assert (result.promoted, result.metric, result.champion_metric) == (True, 0.6, 0.5)
    assert champion_of(tracking, "one") == better


def test_a_model_without_the_metric_is_refused_even_where_there_is_no_champion(tracking: str) -> None:
    uri = version(tracking, "two", None)
    result = promote(PromoteConfig(model_uri=uri, tracking_uri=tracking))
    assert not result.promoted
    assert METRIC in result.reason
    assert champion_of(tracking, "two") is None


@pytest.mark.parametrize(
    ("dice", "margin", "promoted"),
    [(0.69, 0.0, False), (0.70, 0.0, True), (0.69, 0.02, True), (0.67, 0.02, False), (float("nan"), 1.0, False)],
)
def test_a_challenger_may_be_worse_by_the_margin_only(
    tracking: str, dice: float, margin: float, promoted: bool
) -> None:
    name = f"three-{dice}-{margin}"
    standing, challenger = version(tracking, name, 0.70), version(tracking, name, dice)
    registry.set_alias(tracking, name, "champion", standing.rpartition("/")[2])
    result = promote(PromoteConfig(model_uri=challenger, tracking_uri=tracking, margin=margin))
    assert result.promoted is promoted
    assert result.champion_metric == 0.70
    assert champion_of(tracking, name) == (challenger if promoted else standing)
    if not promoted:
        assert standing in result.reason


def test_scores_of_other_rows_are_not_compared(tracking: str) -> None:
    standing, challenger = version(tracking, "four", 0.3, "set a"), version(tracking, "four", 0.9, "set b")
    registry.set_alias(tracking, "four", "champion", "1")
    result = promote(PromoteConfig(model_uri=challenger, tracking_uri=tracking))
    assert not result.promoted
    assert "other rows" in result.reason
    assert champion_of(tracking, "four") == standing


def test_a_champion_that_was_never_evaluated_is_not_replaced_unseen(tracking: str) -> None:
    standing, challenger = version(tracking, "five", None), version(tracking, "five", 0.9)
    registry.set_alias(tracking, "five", "champion", "1")
    result = promote(PromoteConfig(model_uri=challenger, tracking_uri=tracking))
    assert not result.promoted
    assert standing in result.reason


def test_promoting_the_champion_again_changes_nothing(tracking: str) -> None:
    uri = version(tracking, "six", 0.4)
    config = PromoteConfig(model_uri=uri, tracking_uri=tracking)
    promote(config)
    again = promote(PromoteConfig(model_uri="models:/six@champion", tracking_uri=tracking))
    assert again.promoted
    assert (again.model_uri, again.metric, again.champion_metric) == (uri, 0.4, 0.4)


def test_other_aliases_are_left_alone(tracking: str) -> None:
    uri = version(tracking, "seven", 0.4)
    promote(PromoteConfig(model_uri=uri, tracking_uri=tracking, alias="candidate"))
    assert champion_of(tracking, "seven") is None


def test_unknown_models_and_negative_margins_are_errors(tracking: str) -> None:
    with pytest.raises(ValueError, match="models:/nothing/1"):
        promote(PromoteConfig(model_uri="models:/nothing/1", tracking_uri=tracking))
    with pytest.raises(ValueError, match=r"promote\.margin"):
        PromoteConfig(model_uri="models:/x/1", tracking_uri=tracking, margin=-0.1)
