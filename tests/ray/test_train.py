"""Training on real Ray Train workers: equal work gives equal weights, whatever the workers and whatever happens."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml
from scipy.stats import entropy

from rayseg import storage
from rayseg.config import build, plain
from rayseg.data.prepared import DESCRIPTION, describe
from rayseg.tracking import bundle, registry, runs
from rayseg.training.trainer import TrainConfig, TrainResult, fit
from tests.faults import faulty
from tests.long_runs import EPOCHS, config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

OUTAGE_S = 60.0
# Adam turns rounding noise of small gradients into steps of its own; a wrong loss is off by 0.01 and more.
TOLERANCE = 2e-3


def final(job: TrainConfig) -> dict[str, np.ndarray]:
    """All that the last checkpoint holds: variables of the model and the optimizer, and what callbacks remember."""
    [folder] = Path(job.storage).glob("*/epoch-*")
    assert folder.name == f"epoch-{EPOCHS:05d}"
    with np.load(folder / "state.npz") as arrays:
        variables = dict(arrays)
    memory = json.loads((folder / "state.json").read_text())["callbacks"]
    return variables | {"callbacks": np.array(json.dumps(memory))}


def apart(job: TrainConfig, other: TrainConfig) -> dict[str, float]:
    """The greatest difference of each of the model's variables."""
    ours, others = final(job), final(other)
    assert ours.keys() == others.keys()
    return {name: float(np.abs(ours[name] - others[name]).max()) for name in ours if name.startswith("model/")}


def unequal(job: TrainConfig, other: TrainConfig) -> list[str]:
    """What is not bit-equal."""
    ours, others = final(job), final(other)
    assert ours.keys() == others.keys()
    return [name for name in ours if not np.array_equal(ours[name], others[name])]


@pytest.fixture(scope="module")
def undisturbed(discs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainResult]:
    """A run of two workers from start to end."""
    job = config(discs, tmp_path_factory.mktemp("undisturbed"))
    return job, fit(job)


def test_a_run_ends_registered_and_has_learnt(undisturbed: tuple[TrainConfig, TrainResult], tmp_path: Path) -> None:
    job, result = undisturbed
    assert (result.model_uri, result.epochs, result.rows, result.restarts) == ("models:/rayseg/1", EPOCHS, 22, 0)
    assert [row["epoch"] for row in result.history] == list(range(1, EPOCHS + 1))
    assert result.history[-1]["train/loss"] < 0.8 * result.history[0]["train/loss"]
    assert result.val_dice == max(row["val/dice_pooled"] for row in result.history)
    assert result.history[result.best_epoch - 1]["val/dice_pooled"] == result.val_dice
    assert result.val_dice > 0.7 > 0.5 > result.untrained_val_dice
    rates = [row["learning_rate"] for row in result.history]
    assert rates[0] == pytest.approx(0.02)
    assert rates[-1] == pytest.approx(0.01), "the plateau has lowered it"
    assert not list(Path(job.storage).glob("*.unfinished.json"))


def test_the_run_tells_what_it_was(undisturbed: tuple[TrainConfig, TrainResult], tmp_path: Path) -> None:
    job, result = undisturbed
    mlflow = runs.client(job.tracking_uri)
    run = mlflow.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["plateau.min_delta"] == "0.5"
    assert run.data.params["preprocess.size"] == "[32, 32]"
    glance = {name: run.data.tags[f"rayseg.{name}"] for name in ("model", "input", "augment", "parameters")}
    weights = bundle.load_keras(registry.fetch(job.tracking_uri, result.model_uri)[0]).get_weights()
    parameters = f"{sum(weight.size for weight in weights):,}"
    assert glance == {"model": "unet-small 4-8", "input": "32x32x1", "augment": "none", "parameters": parameters}
    [given] = run.inputs.dataset_inputs
    assert (given.dataset.digest, given.dataset.source) == ("0" * 36, job.prepared)
    steps = [metric.step for metric in mlflow.get_metric_history(result.run_id, "val/dice_pooled")]
    assert sorted(steps) == list(range(EPOCHS + 1))

    kept = Path(mlflow.download_artifacts(result.run_id, "", str(tmp_path)))
    assert (kept / "split.csv").read_bytes() == describe(job.prepared).read_split()
    assert build(TrainConfig, json.loads((kept / "config.json").read_text())["train"]) == job
    with (kept / "history.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["val/loss"]) for row in table] == [row["val/loss"] for row in result.history]
    for picture in ("curves.png", "val/best.png", "val/median.png", "val/worst.png"):
        assert (kept / picture).read_bytes().startswith(b"\x89PNG")
    assert list((kept / "tensorboard").rglob("events.out.tfevents.*"))
    assert f"numpy=={np.__version__}" in (kept / "environment.txt").read_text().splitlines()
    card = (kept / "model_card.md").read_text()
    assert "not a medical device" in card
    assert f"| val/dice_pooled | {result.val_dice:.4f} |" in card
    assert mlflow.get_model_version("rayseg", "1").description == card


def test_the_registered_model_scores_what_the_history_says(
    discs: str, undisturbed: tuple[TrainConfig, TrainResult]
) -> None:
    job, result = undisturbed
    folder, _ = registry.fetch(job.tracking_uri, result.model_uri)
    rows = describe(discs).read_rows("val").to_pylist()
    images = np.stack([np.frombuffer(row["image"], np.uint8).reshape(32, 32, 1) for row in rows])
    truth = np.stack([np.frombuffer(row["mask"], np.uint8).reshape(32, 32) for row in rows]) > 0
    loaded = bundle.load(folder)
    probability = bundle.load_keras(folder)(images).numpy()[..., 0]

    def dice(threshold: float) -> float:
        found = probability >= threshold
        return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))

    # The validation ran in another process and order of additions; a pixel at the threshold may fall to either side.
    assert dice(loaded.threshold) == pytest.approx(result.val_dice, abs=2e-3)
    # What is registered decides by the threshold of the best Dice on validation.
    assert loaded.threshold == result.history[result.best_epoch - 1]["val/threshold"]
    assert dice(loaded.threshold) >= max(dice(one) for one in np.linspace(0.01, 0.99, 99)) - 2e-3
    assert runs.metric(job.tracking_uri, result.run_id, "threshold") == loaded.threshold
    # It knows what it was trained on, and how sure it is of validation, where each row is a patient.
    assert loaded.range is not None
    train = describe(discs).read_rows("train", ["foreground_pixels"])["foreground_pixels"].to_pylist()
    assert loaded.range.foreground_share == max(train) / 32**2
    bits = entropy([probability, 1 - probability], base=2)
    means = [of_row[found].mean() for of_row, found in zip(bits, probability >= loaded.threshold, strict=True)]
    assert loaded.range.entropy_bits == pytest.approx(np.nanmax(means), abs=1e-3)


def test_one_worker_ends_with_the_weights_of_two_at_the_same_global_batch(
    discs: str, tmp_path: Path, undisturbed: tuple[TrainConfig, TrainResult], unregistered: None
) -> None:
    # That both ranks of two are bit-equal is checked by the loop itself, each epoch.
    # And that several threads feed it changes nothing.
    alone = config(discs, tmp_path, num_workers=1, feed_threads=3)
    result = fit(alone)
    differences = apart(alone, undisturbed[0])
    assert max(differences.values()) < TOLERANCE, differences
    for row, other in zip(result.history, undisturbed[1].history, strict=True):
        for name in ("train/loss", "val/loss"):
            assert row[name] == pytest.approx(other[name], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "tolerance"),
    [
        ({"accumulation": 3}, 1e-5),
        # Adam turns other roundings into other weights, but not into another loss.
        ({"jit_compile": True}, 1e-3),
        # A step that one rank alone skipped for an overflow would end the run: its ranks must be bit-equal.
        ({"mixed_precision": "mixed_float16"}, 5e-3),
    ],
)
def test_two_workers_learn_alike_in_parts_by_xla_and_in_half_precision(
    discs: str,
    tmp_path: Path,
    undisturbed: tuple[TrainConfig, TrainResult],
    unregistered: None,
    way: dict[str, object],
    tolerance: float,
) -> None:
    result = fit(config(discs, tmp_path, **way))
    for row, other in zip(result.history, undisturbed[1].history, strict=True):
        for name in ("train/loss", "val/loss"):
            assert row[name] == pytest.approx(other[name], abs=tolerance)


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_reproduces_the_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[TrainConfig, TrainResult], unregistered: None
) -> None:
    before, first = undisturbed
    copied, runs_folder = tmp_path / "prepared", str(tmp_path / "runs")
    shutil.copytree(before.prepared, copied)
    again = TrainConfig(
        reproduce=first.run_id, tracking_uri=before.tracking_uri, storage=runs_folder, prepared=str(copied)
    )

    def replace_the_set_and_kill_a_worker() -> None:
        other = storage.read_json(str(copied / DESCRIPTION)) | {"digest": "1" * 64, "rows": {"train": 1}, "shards": {}}
        storage.write_json(str(copied / DESCRIPTION), other)
        os.kill(_train_workers()[-1], signal.SIGKILL)

    with when_there_is(tmp_path, "runs/*/epoch-00001/state.json", replace_the_set_and_kill_a_worker):
        result = fit(again)
    assert (result.restarts, result.epochs, result.reproduced) == (1, EPOCHS, True)
    assert unequal(again, before) == []
    tags = runs.client(before.tracking_uri).get_run(result.run_id).data.tags
    assert (tags["rayseg.reproduces"], tags["rayseg.reproduced"]) == (first.run_id, "true")


@pytest.mark.slow
def test_three_workers_a_killed_driver_and_workers_that_hang_change_nothing(
    discs: str, tmp_path: Path, undisturbed: tuple[TrainConfig, TrainResult], unregistered: None
) -> None:
    copied = str(tmp_path / "prepared")
    shutil.copytree(discs, copied)
    job = config(copied, tmp_path, num_workers=3, hang_timeout_s=15.0, max_failures=20)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"train": plain(job)}))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": "platform"}
    command = [sys.executable, "-m", "jobs.train", "--config", str(recipe)]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with when_there_is(tmp_path, "runs/*/epoch-00001/state.json", driver.kill):
        _, told = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, told.decode()
    mlflow = runs.client(job.tracking_uri)
    [run] = mlflow.search_runs([mlflow.get_experiment_by_name(job.experiment).experiment_id])
    assert run.info.status == "RUNNING", "nobody was left to end it"

    # Who opens a pipe to read waits for somebody to write: a file system that hangs, until the workers begin anew.
    shard, whole, pipe = Path(copied, "split=train/part-00000.parquet"), tmp_path / "whole", tmp_path / "pipe"
    shutil.copy(shard, whole)
    os.mkfifo(pipe)

    def attempts() -> int:
        return max(json.loads(file.read_text())["attempts"] for file in tmp_path.glob("runs/*/attempts.json"))

    with (
        once(lambda: attempts() == 2, lambda: pipe.replace(shard)),
        once(lambda: attempts() >= 3, lambda: whole.replace(shard)),
    ):
        result = fit(job)
    assert result.run_id == run.info.run_id
    assert result.restarts >= 2, "on a busy machine a start may be taken for a hang, too"
    assert mlflow.get_run(result.run_id).info.status == "FINISHED"
    steps = [metric.step for metric in mlflow.get_metric_history(result.run_id, "val/loss")]
    assert sorted(steps) == list(range(EPOCHS + 1)), "each epoch once"
    differences = apart(job, undisturbed[0])
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.slow
@pytest.mark.e2e
def test_a_store_that_is_away_for_a_minute_changes_nothing(
    discs: str, s3_store: str, tmp_path: Path, undisturbed: tuple[TrainConfig, TrainResult]
) -> None:
    storage.upload(discs, f"{s3_store}/outage/prepared")
    runs_uri = f"{s3_store}/outage/runs"
    job = config(f"{s3_store}/outage/prepared", tmp_path, storage=runs_uri)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"train": plain(job)}))
    with faulty(os.environ["AWS_ENDPOINT_URL"], seed=1) as faults:
        back, gone = threading.Timer(OUTAGE_S, lambda: setattr(faults, "share", 0.0)), threading.Event()

        def goes(head: bytes) -> None:
            if head.startswith(b"PUT") and b"epoch-00001/state.json" in head and not gone.is_set():
                gone.set()
                faults.share = 1.0
                back.start()

        faults.kinds, faults.done = ("reset", "503"), goes
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"AWS_ENDPOINT_URL": faults.url, "PYTHONPATH": "platform"}
        command = [sys.executable, "-m", "jobs.train", "--config", str(recipe)]
        done = subprocess.run(command, env=environment, capture_output=True)
        back.cancel()
    assert done.returncode == 0, done.stderr.decode()[-8000:]
    assert faults.share == 0.0, "the run has lived through the whole outage"
    assert faults.counts["reset"] + faults.counts["503"] > 5
    result = json.loads(done.stdout.splitlines()[-1])
    assert runs.client(job.tracking_uri).get_run(result["run_id"]).info.status == "FINISHED"
    assert [row["epoch"] for row in result["history"]] == list(range(1, EPOCHS + 1))
    storage.download(runs_uri, tmp_path / "runs")
    there = dataclasses.replace(job, storage=str(tmp_path / "runs"))
    assert unequal(there, undisturbed[0]) == []


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the verification of the bundle in a clean process, which another test has."""
    monkeypatch.setattr(registry, "register", lambda *arguments: registry.ModelVersion("m", "1", "m/1", "", ""))


def when_there_is(folder: Path, pattern: str, act: Callable[[], object]) -> AbstractContextManager[None]:
    """`once` a file matches."""
    return once(lambda: bool(list(folder.glob(pattern))), act)


@contextmanager
def once(condition: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """Calls `act` as soon as the condition holds, which it must have done at the end."""
    acted, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not condition():
            if ended.wait(0.02):
                return
        act()
        acted.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert acted.is_set()


def _train_workers() -> list[int]:
    """Process ids of the training workers that this test's own cluster runs."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            names[int(folder.name)] = (folder / "cmdline").read_text()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended since
            continue

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return sorted(pid for pid, name in names.items() if name.startswith("ray::RayTrainWorker") and ours(pid))
