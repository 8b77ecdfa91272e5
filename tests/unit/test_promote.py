"""Who gets the alias: on a real MLflow store (SQLite), with versions that have cases and no weights."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from rayseg.evaluation import promote as module
from rayseg.evaluation.promote import PromoteConfig, PromoteResult, promote
from rayseg.evaluation.scores import Counts
from rayseg.tracking import aliases, registry, runs
from rayseg.tracking.verification import Verified
from tests.unit.evaluated_models import found_of, register, table

PATIENTS = 30
HITS = np.random.default_rng(3).integers(60, 90, PATIENTS)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the module, as making one takes seconds; each test takes another model name."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """These versions have no weights; test_registry has a real process."""
    monkeypatch.setattr(registry, "verify", lambda *_: Verified(0.02, 400.0))


def shifted(points: float) -> object:
    """Cases whose Dice is so many hundredths higher than the standing model's, give or take some by patient."""
    noise = np.tile([-2, 2], PATIENTS // 2)
    return table({"lesion": found_of((HITS + points + noise).tolist())})


def standing_and(tracking: str, name: str, challenger: object, **options: object) -> tuple[str, str]:
    first = register(tracking, name, table({"lesion": found_of(HITS.tolist())}))
    assert promote(PromoteConfig(model_uri=first, tracking_uri=tracking)).promoted
    return first, register(tracking, name, challenger, **options)  # type: ignore[arg-type]


def run(tracking: str, uri: str, **options: object) -> PromoteResult:
    return promote(PromoteConfig(model_uri=uri, tracking_uri=tracking, **options))  # type: ignore[arg-type]


def check(result: PromoteResult, name: str) -> dict[str, object]:
    return next(one for one in result.checks if one["name"] == name)


def champion_of(tracking: str, name: str) -> str | None:
    found = registry.champion(tracking, name, "champion")
    return found.uri if found else None


def test_a_worse_model_is_refused_an_equal_one_is_no_worse_and_only_a_better_one_is_better(tracking: str) -> None:
    first, worse = standing_and(tracking, "one", shifted(-10))
    result = run(tracking, worse)
    assert not result.promoted
    assert "reaches beyond the margin of 0.02" in result.reason
    assert first in result.reason
    assert champion_of(tracking, "one") == first
    # Pooled Dice of cases with 200 pixels each is the mean of theirs.
    assert result.champion_metric == pytest.approx(HITS.mean() / 100)
    assert result.difference == pytest.approx(-0.10)
    assert result.low is not None
    assert result.high is not None
    # 1.96 standard errors of differences of -0.12 and -0.08.
    assert (result.low, result.high) == pytest.approx(
        (-0.1 - 1.96 * 0.02 / 30**0.5, -0.1 + 1.96 * 0.02 / 30**0.5), abs=0.001
    )

    equal = register(tracking, "one", shifted(0))
    assert "not all of it is better" in run(tracking, equal, better=True).reason
    assert not run(tracking, equal, margin=0.002).promoted, "the interval is wider than that"
    assert champion_of(tracking, "one") == first
    assert run(tracking, equal).promoted
    assert champion_of(tracking, "one") == equal

    better = register(tracking, "one", shifted(3))
    assert run(tracking, better, better=True).promoted
    assert champion_of(tracking, "one") == better


def test_the_same_predictions_are_no_worse_at_any_margin(tracking: str) -> None:
    _, same = standing_and(tracking, "same", table({"lesion": found_of(HITS.tolist())}))
    result = run(tracking, same, margin=0.0)
    assert result.promoted
    assert (result.difference, result.low, result.high) == (0, 0, 0)


def test_of_metrics_that_should_be_low_lower_is_better(tracking: str) -> None:
    distances = np.linspace(2, 8, PATIENTS)
    counted = {"lesion": found_of(HITS.tolist())}
    near, far = table(counted, hd95_mm=distances.tolist()), table(counted, hd95_mm=(distances + 3).tolist())
    metric = {"metric": "test/hd95_mm_per_case", "margin": 1.0}
    first, second = register(tracking, "low", near), register(tracking, "low", far)
    assert run(tracking, first, **metric).promoted
    refused = run(tracking, second, **metric)
    assert not refused.promoted
    assert refused.difference == pytest.approx(3)
    assert run(tracking, second, metric="test/hd95_mm_per_case", margin=3.5).promoted
    assert run(tracking, first, **metric, better=True).promoted, "and back, as it is better"


def test_one_class_can_be_asked_for(tracking: str) -> None:
    a, b = found_of(HITS.tolist()), found_of((HITS - 20).tolist())
    first, second = (register(tracking, "classes", table(of)) for of in ({"a": a, "b": b}, {"a": b, "b": a}))
    assert run(tracking, first).promoted
    assert not run(tracking, second, metric="test/dice_pooled/a").promoted
    assert run(tracking, second, metric="test/dice_pooled/b", better=True).promoted
    with pytest.raises(ValueError, match=r"promote\.metric: .* has no class c; it has a, b"):
        run(tracking, first, metric="test/dice_pooled/c")


def test_patients_that_it_learned_from_do_not_test_it(tracking: str) -> None:
    _, leaked = standing_and(tracking, "leak", shifted(5), train=["someone", "patient-007"], val=["patient-003"])
    result = run(tracking, leaked)
    assert not result.promoted
    assert "2 of 30 test patients were trained or validated on: patient-00 " in result.reason
    assert check(result, "non-inferiority")["passed"]

    heir = register(tracking, "leak", shifted(5), tags={registry.INITIAL_TAG: leaked})
    assert leaked in run(tracking, heir).reason, "it began with the weights of one that did"

    stranger = register(tracking, "leak", shifted(5), test=["patient-000"])
    evidence = check(run(tracking, stranger), "no leak")["evidence"]
    assert isinstance(evidence, dict)
    assert (evidence["leaked_patients"], evidence["unknown_patients"]) == (0, 29)
    assert "; 29 of them no split.csv knows" in str(check(run(tracking, stranger, alias="other"), "no leak")["detail"])


def test_whom_it_learned_from_must_be_known(tracking: str) -> None:
    client = runs.client(tracking)
    name = register(tracking, "unknown", shifted(0)).split("/")[1]
    run_id = runs.start(tracking, "models", "no split")
    made = client.create_model_version(name, source="x", run_id=run_id)
    heir = register(tracking, name, shifted(0), tags={registry.INITIAL_TAG: f"models:/{name}/{made.version}"})
    assert "its run has no split.csv" in run(tracking, heir).reason


def test_scores_of_other_rows_are_not_compared(tracking: str) -> None:
    first, other = standing_and(tracking, "rows", shifted(9), rows="set b")
    result = run(tracking, other)
    assert "evaluated on other rows" in result.reason
    assert champion_of(tracking, "rows") == first


def test_nobody_is_promoted_unseen(tracking: str) -> None:
    never = register(tracking, "unseen", None)
    assert "never evaluated on test" in run(tracking, never).reason
    assert champion_of(tracking, "unseen") is None
    registry.set_alias(tracking, "unseen", "champion", "1")
    challenger = register(tracking, "unseen", shifted(0))
    assert f"{never} was never evaluated" in run(tracking, challenger).reason
    nothing = register(tracking, "nothing", table({"lesion": [Counts(tn=9)] * 9}))
    assert "test/dice_pooled is undefined" in run(tracking, nothing).reason


def test_few_patients_show_nothing_whatever_they_say(tracking: str) -> None:
    counted = found_of(HITS[:11].tolist())
    first, second = (register(tracking, "few", table({"lesion": counted})) for _ in range(2))
    assert run(tracking, first).promoted
    assert "promote.min_patients: 11 patients have a value of dice_pooled" in run(tracking, second).reason
    assert "at least 12 are asked for" in run(tracking, second).reason
    assert run(tracking, second, min_patients=11).promoted
    # Twenty more with nothing in them are no patients of this metric.
    healthy = table({"lesion": [*counted, *[Counts(tn=1000)] * 20]})
    first, second = (register(tracking, "few ill", healthy) for _ in range(2))
    assert run(tracking, first).promoted
    assert not run(tracking, second, metric="test/dice_per_case").promoted
    one = table({"lesion": [found_of([80])[0], *[Counts(tn=1000)] * 5]})
    first, second = register(tracking, "single", one), register(tracking, "single", one)
    assert run(tracking, first).promoted
    assert "1 patients have a value of dice_pooled" in run(tracking, second, min_patients=2).reason


@pytest.mark.parametrize(
    ("metric", "margin"),
    [("hd95_mm_per_case", 2.0), ("assd_mm_per_case", 2.0), ("precision_per_case", 0.02), ("precision_pooled", 0.02),
     ("lesions_false_per_case", 0.5), ("lesion_precision", 0.02)],
)  # fmt: skip
def test_who_finds_nothing_in_hard_patients_does_not_pass_by_what_leaves_them_out(
    tracking: str, metric: str, margin: float
) -> None:
    far = np.linspace(2, 20, PATIENTS)
    hard = np.arange(PATIENTS) >= PATIENTS // 2
    precise = np.where(hard, 60, 90)
    lesions = {"lesions_true": [1] * PATIENTS, "lesions_false": hard.astype(int).tolist()}
    all_found = table(
        {"lesion": found_of(precise.tolist())},
        hd95_mm=far.tolist(), assd_mm=far.tolist(), lesions_found=[1] * PATIENTS,
        lesions_predicted=(1 + hard).tolist(), **lesions,
    )  # fmt: skip
    easy = [None if one else float(value) for one, value in zip(hard, far, strict=True)]
    nothing = [Counts(fn=100, tn=1000) if one else case for one, case in zip(hard, found_of(precise), strict=True)]
    half_found = table(
        {"lesion": nothing},
        hd95_mm=easy, assd_mm=easy, lesions_found=(~hard).astype(int).tolist(),
        lesions_predicted=(~hard).astype(int).tolist(), **(lesions | {"lesions_false": [0] * PATIENTS}),
    )  # fmt: skip
    name = f"misses {metric}"
    first, second = register(tracking, name, all_found), register(tracking, name, half_found)
    asked: dict[str, object] = {"metric": f"test/{metric}", "margin": margin}
    assert run(tracking, first, **asked).promoted
    for better in (False, True):
        result = run(tracking, second, better=better, **asked)
        assert not result.promoted
        assert f"it finds nothing in 15 cases that have something to find, {first} in 0" in result.reason
    assert run(tracking, first, **asked).promoted, "nobody is refused for being the champion"
    same = register(tracking, name, all_found)
    assert run(tracking, same, **asked).promoted, "who misses no more may be compared"


def test_many_small_steps_down_end_at_the_first_champion(tracking: str) -> None:
    """Each is worse than the one before by less than the margin: the first of them, and no more, is let through."""
    noise = np.tile([-1, 1], PATIENTS // 2)
    hits = HITS.astype(int) * 10  # thousandths
    steps = [hits + step * -15 + noise * (step % 2) for step in range(4)]

    def model(of: np.ndarray) -> str:
        cases = [Counts(tp=int(hit), fp=1000 - int(hit), fn=1000 - int(hit), tn=9000) for hit in of]
        return register(tracking, "decay", table({"lesion": cases}))

    uris = [model(of) for of in steps]
    assert [run(tracking, uri).promoted for uri in uris[:2]] == [True, True]
    third = run(tracking, uris[2])
    assert not third.promoted
    assert check(third, "non-inferiority")["passed"], "than the second it is no worse"
    against = check(third, "reference")
    assert (against["passed"], against["evidence"]["reference"]) == (False, uris[0])  # type: ignore[index]
    assert f"of {uris[0]}: difference -0.0300" in third.reason
    assert not run(tracking, uris[2], reference=uris[0]).promoted
    assert run(tracking, uris[2], reference=uris[1]).promoted, "whoever names another one may"
    assert not run(tracking, uris[3]).promoted
    assert run(tracking, uris[0]).promoted, "the first is compared with the champion alone"
    with pytest.raises(ValueError, match=r"promote\.reference: .*models:/decay/99"):
        run(tracking, uris[3], reference="models:/decay/99")


def test_a_first_champion_that_is_gone_or_was_scored_elsewhere_is_told(tracking: str) -> None:
    _, second = standing_and(tracking, "gone", shifted(2))
    assert run(tracking, second).promoted
    third = register(tracking, "gone", shifted(4))
    other = register(tracking, "other set", shifted(4), rows="set b")
    assert "evaluated on other rows" in run(tracking, third, reference=other).reason
    runs.client(tracking).delete_model_version("gone", "1")
    told = run(tracking, third).reason
    assert "it is the first that was champion: name another version by promote.reference" in told
    assert run(tracking, third, reference=second).promoted


def test_limits_of_time_and_memory(tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = register(tracking, "limits", shifted(0))
    slow = run(tracking, uri, max_latency_s=0.01, max_memory_mb=399)
    assert slow.reason == "latency 0.02 s, over the limit of 0.01 s; memory 400 MB, over the limit of 399 MB"
    assert (slow.latency_s, slow.memory_mb) == (0.02, 400.0)
    monkeypatch.setattr(registry, "verify", lambda *_: Verified(None, None))
    assert "not known" in run(tracking, uri, max_latency_s=1.0).reason
    assert run(tracking, uri).promoted


def test_what_does_not_run_in_a_clean_process_is_refused(tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Verified:
        raise RuntimeError("bundle: example_mask_sha256 is 1 in a clean process, 2 when it was saved")

    monkeypatch.setattr(registry, "verify", broken)
    result = run(tracking, register(tracking, "broken", shifted(0)))
    assert not result.promoted
    assert "example_mask_sha256" in result.reason


def test_the_decision_is_kept_with_its_evidence(tracking: str) -> None:
    first, worse = standing_and(tracking, "kept", shifted(-10))
    result = run(tracking, worse)
    version = runs.client(tracking).get_model_version("kept", "2")
    assert version.tags["rayseg.champion.decision"] == "refused"
    assert version.tags["rayseg.champion.reason"] == result.reason
    assert version.tags["rayseg.champion.champion"] == first
    assert version.tags["rayseg.champion.no_leak"].startswith("passed")
    path = version.tags["rayseg.champion.evidence"]
    kept = json.loads(runs.read_bytes(tracking, version.run_id, path))
    assert result.evidence is not None
    assert result.evidence.endswith(path)
    assert (kept["promoted"], kept["checks"], kept["config"]["margin"]) == (False, result.checks, 0.02)
    names = ["clean process", "latency", "memory", "evaluated", "no leak", "non-inferiority"]
    assert [one["name"] for one in kept["checks"]] == names
    assert "p_value" in kept["checks"][-1]["evidence"]


def test_one_command_gives_the_alias_back_and_its_history_is_told(tracking: str) -> None:
    first, second = standing_and(tracking, "back", shifted(2))
    third = register(tracking, "back", shifted(4))
    assert run(tracking, second).promoted
    again = run(tracking, second)
    assert (again.promoted, again.checks) == (True, []), "it is the champion already"
    assert run(tracking, third).promoted
    back = run(tracking, "models:/back/latest", rollback=True)
    assert (back.model_uri, back.champion) == (second, third)
    assert champion_of(tracking, "back") == second
    assert run(tracking, third, rollback=True).model_uri == first, "one further"
    with pytest.raises(ValueError, match=r"promote\.rollback: champion of back has no earlier version"):
        run(tracking, third, rollback=True)
    moves = [(one.action, one.previous, one.version) for one in aliases.history(tracking, "back", "champion")]
    assert moves == [
        ("promoted", None, "1"), ("promoted", "1", "2"), ("promoted", "2", "3"),
        ("rolled back", "3", "2"), ("rolled back", "2", "1"),
    ]  # fmt: skip
    assert [one["version"] for one in back.history] == ["1", "2", "3", "2"]
    # Whoever moves it by hand goes unnoticed until the next command, which goes back to what was last decided.
    registry.set_alias(tracking, "back", "champion", "3")
    assert run(tracking, third, rollback=True).model_uri == first


def test_who_was_compared_with_a_former_champion_is_compared_anew(
    tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, good = standing_and(tracking, "race", shifted(1))
    better = register(tracking, "race", shifted(8))
    compared = module._checks

    def overtaken(*arguments: object) -> object:
        """The other one is promoted while this one's checks run."""
        monkeypatch.setattr(module, "_checks", compared)
        made = compared(*arguments)
        assert run(tracking, better).promoted
        return made

    monkeypatch.setattr(module, "_checks", overtaken)
    result = run(tracking, good)  # no worse than the first, but worse than the one that is champion by now
    assert (result.promoted, result.champion) == (False, better)
    assert champion_of(tracking, "race") == better
    assert [move["version"] for move in result.history] == [first[-1], better[-1]]


def test_of_processes_that_move_an_alias_one_does_so_at_a_time(tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tracking, "busy", shifted(0))
    within = threading.Semaphore()

    def moves(_: int) -> bool:
        with aliases.moving(tracking, "busy", "champion") as check:
            alone = within.acquire(blocking=False)
            check()
            within.release()
            return alone

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(moves, range(8)))
    client = runs.client(tracking)
    monkeypatch.setattr(aliases, "STALE_S", 1.0)
    with aliases.moving(tracking, "busy", "champion") as check:  # paused for longer than STALE_S
        assert moves(0)
        with pytest.raises(RuntimeError, match="another process went on"):
            check()
    with aliases.moving(tracking, "busy", "champion"), aliases.moving(tracking, "busy", "other"):
        locks = [model.name for model in client.search_registered_models() if "moving" in model.name]
    assert len(locks) == 2
    assert not [model for model in client.search_registered_models() if "moving" in model.name]


def test_a_lock_that_goes_while_mlflow_looks_at_it_is_tried_again(
    tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tracking, "busy", shifted(0))
    get, holder = SqlAlchemyStore.get_registered_model, ExitStack()
    holder.enter_context(aliases.moving(tracking, "busy", "champion"))

    def removed_first(store: SqlAlchemyStore, name: str) -> object:
        monkeypatch.setattr(SqlAlchemyStore, "get_registered_model", get)
        holder.close()
        return get(store, name)

    monkeypatch.setattr(SqlAlchemyStore, "get_registered_model", removed_first)
    with aliases.moving(tracking, "busy", "champion") as check:
        check()


def test_other_aliases_are_left_alone(tracking: str) -> None:
    uri = register(tracking, "others", shifted(0))
    assert run(tracking, uri, alias="candidate").promoted
    assert champion_of(tracking, "others") is None
    assert aliases.history(tracking, "others", "champion") == []


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"margin": -0.1}, "margin"), ({"level": 1.0}, "level"), ({"min_patients": 1}, "min_patients"),
        ({"max_latency_s": 0.0}, "max_latency_s"), ({"metric": "dice_pooled"}, "metric"),
        ({"metric": "test/ece"}, "metric"), ({"metric": "test/volume_bias_ml"}, "metric"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(tracking: str, options: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=rf"promote\.{key}"):
        run(tracking, "models:/x/1", **options)


def test_unknown_models_are_errors(tracking: str) -> None:
    with pytest.raises(ValueError, match="models:/nobody/1"):
        run(tracking, "models:/nobody/1")
