"""A sweep on real Ray Train workers whose driver is killed: it goes on as if nothing had happened."""

import csv
from pathlib import Path

import keras
import pytest
import yaml
from mlflow.entities import ViewType

from rayseg.config import build, load, plain
from rayseg.data.prepared import describe
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import registry, runs
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
from rayseg.training.tune import Tune, TuneConfig, tune
from tests.drivers import kill_when

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

EPOCHS, FITS, TOO_DEEP = 3, [4, 8], [4] * 7  # halves 32 pixels six times


@pytest.mark.slow
def test_a_sweep_whose_driver_is_killed_goes_on_as_if_undisturbed(
    discs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [(0.02, FITS), (1e-5, FITS), (0.01, TOO_DEEP), (0.03, FITS)]
    config = TuneConfig(
        train=TrainConfig(
            prepared=discs,
            storage=str(tmp_path / "runs"),
            tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
            model=NetworkConfig(widths=tuple(FITS)),
            batch_size=11,
            epochs=EPOCHS,
            schedule="constant",
            mixed_precision="float32",
            num_workers=1,
        ),
        tune=Tune(
            space={"learning_rate": {"loguniform": [1e-5, 0.05]}, "model.widths": {"choice": [FITS, TOO_DEEP]}},
            points=tuple({"learning_rate": rate, "model.widths": widths} for rate, widths in values),
            trials=4,
            grace_epochs=1,
            concurrent=2,
            output=str(tmp_path / "found"),
        ),
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(plain(config)))
    kill_when("tune", recipe, tmp_path, "runs/*/trials/*-003-*/epoch-00001/state.json")
    before = {file.name for file in tmp_path.glob("runs/*/ended/*.json")}
    assert {"00001.json", "00002.json"} <= before != {f"{number:05d}.json" for number in range(4)}
    mlflow = runs.client(config.train.tracking_uri)
    registered: list[str] = []

    def register(tracking_uri: str, run_id: str, *_: object) -> registry.ModelVersion:
        registered.append(run_id)  # without the verification in a clean process, which another test has
        return registry.ModelVersion("m", "1", "models:/m/1", run_id, "")

    monkeypatch.setattr(registry, "register", register)
    result = tune(load(TuneConfig, None, recipe))

    # By hand: 0.02 is the first; 1e-5 has learnt nothing after an epoch; 0.03 is above the 67th percentile of the two.
    assert [trial.status for trial in result.trials] == ["completed", "stopped", "failed", "completed"]
    assert [trial.epochs for trial in result.trials] == [EPOCHS, 1, 0, EPOCHS]
    assert "divisible" in str(result.trials[2].reason)
    alone = undisturbed(discs, config.train, 0.03)
    assert (result.best, result.best_values["learning_rate"]) == (3, 0.03)
    assert result.val_dice == pytest.approx(max(alone), abs=2e-3)
    assert result.trials[3].val_dice == result.val_dice

    [experiment] = [found for found in mlflow.search_experiments() if found.name == "rayseg"]
    found = mlflow.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)  # deleted ones, too
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    trials = {int(run.data.tags["rayseg.trial"]): run for run in found if run not in parents}
    assert ([run.info.run_id for run in parents], len(found)) == ([result.run_id], 5), "none lost, none twice"
    assert {run.data.tags["mlflow.parentRunId"] for run in trials.values()} == {result.run_id}
    assert [trials[number].info.status for number in range(4)] == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    assert "divisible" in trials[2].data.tags["rayseg.trial_reason"]
    assert parents[0].info.status == "FINISHED"
    for number in (0, 3):
        steps = [metric.step for metric in mlflow.get_metric_history(trials[number].info.run_id, "val/loss")]
        assert sorted(steps) == list(range(EPOCHS + 1)), "each epoch once"
    assert registered == [trials[3].info.run_id] == [result.best_run_id]

    best = build(TrainConfig, yaml.safe_load(Path(result.recipe).read_text())["train"])
    assert plain(best) == plain(config.train) | {"learning_rate": 0.03}
    with Path(result.table).open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == [trial.status for trial in result.trials]
    kept = Path(mlflow.download_artifacts(result.run_id, "", str(tmp_path)))
    for name in ("trials.csv", "trials.png", "best.yaml"):
        assert (kept / name).read_bytes() == (tmp_path / "found" / name).read_bytes()
    assert not list(tmp_path.glob("runs/*.unfinished.json"))
    assert not list(tmp_path.glob("runs/*/trials")), "their checkpoints are of no use any more"


def undisturbed(discs: str, train: TrainConfig, rate: float) -> list[float]:
    """Validation Dice of a run in this process, without Ray, Tune or checkpoints, epoch by epoch."""
    keras.utils.set_random_seed(train.seed)
    learner = Learner(build(TrainConfig, plain(train) | {"learning_rate": rate}), describe(discs), 0, 1, lambda: None)
    dice = []
    for epoch in range(train.epochs):
        learner.train(epoch, keras.callbacks.CallbackList([], model=learner.model))
        dice.append(learner.validate()["val/dice_pooled"])
    return dice
