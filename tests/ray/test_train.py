"""Training on real Ray Train workers: equal work gives equal weights, whatever the workers and whatever happens."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayseg import storage
from rayseg.config import plain
from rayseg.data.labels import Labels
from rayseg.data.prepared import DESCRIPTION, PATIENTS, VERSION, describe
from rayseg.data.preprocess import Preprocess
from rayseg.models.unet import UNetConfig
from rayseg.records import PREPARED
from rayseg.tracking import bundle, registry, runs
from rayseg.training.trainer import TrainConfig, TrainResult, fit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SIZE = 32
ROWS = {"train": 22, "val": 7, "test": 3}
EPOCHS = 3
# Adam turns rounding noise of small gradients into steps of its own; a wrong loss is off by 0.01 and more.
TOLERANCE = 2e-3
SPLIT_CSV = b"patient_key,part,split,rows,positive\ntrain0,train,train,1,1\n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared set of bright discs on noise, a patient a row."""
    root = str(tmp_path_factory.mktemp("prepared"))
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    for split, rows in ROWS.items():
        table = []
        for row in range(rows):
            centre_y, centre_x, radius = [*random.uniform(8, 24, 2).tolist(), random.uniform(3, 8)]
            mask = ((y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2).astype(np.uint8)
            image = np.clip(random.normal(90, 20, mask.shape) + 70 * mask, 0, 255).astype(np.uint8)
            table.append(
                {
                    "row_id": f"{split}{row}",
                    "patient_key": f"{split}{row}",
                    "split": split,
                    "foreground_pixels": int(mask.sum()),
                    "image": image.tobytes(),
                    "mask": mask.tobytes(),
                }
            )
        path = storage.join(root, f"split={split}/part-00000.parquet")
        storage.write_table(path, pa.Table.from_pylist(table, schema=PREPARED), 4)
    description = {
        "version": VERSION,
        "digest": "0" * 64,
        "preprocess": plain(Preprocess(size=(SIZE, SIZE))),
        "labels": plain(Labels()),
        "shape": [SIZE, SIZE, 1],
        "rows": ROWS,
        "shards": {split: [f"split={split}/part-00000.parquet"] for split in ROWS},
        "shard_rows": {split: [rows] for split, rows in ROWS.items()},
        "row_group_rows": 4,
    }
    storage.write_json(storage.join(root, DESCRIPTION), description)
    storage.write(storage.join(root, PATIENTS), SPLIT_CSV)
    return root


def config(prepared: str, folder: Path, **changes: object) -> TrainConfig:
    values = {
        "prepared": prepared,
        "storage": str(folder / "runs"),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "model": UNetConfig(widths=(4, 8)),
        "batch_size": 4,
        "epochs": EPOCHS,
        "learning_rate": 0.015,
        "warmup_epochs": 0,
        "cpus_per_worker": 1.0,
    }
    return TrainConfig(**(values | changes))  # type: ignore[arg-type]


def final(job: TrainConfig) -> dict[str, np.ndarray]:
    """All that the last checkpoint holds: variables of the model and the optimizer, and the best weights."""
    [folder] = Path(job.storage).glob("*/epoch-*")
    assert folder.name == f"epoch-{EPOCHS:05d}"
    with np.load(folder / "state.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def undisturbed(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainResult]:
    """A run of two workers from start to end."""
    job = config(prepared, tmp_path_factory.mktemp("undisturbed"))
    return job, fit(job)


def test_a_run_ends_registered_and_has_learnt(undisturbed: tuple[TrainConfig, TrainResult], tmp_path: Path) -> None:
    job, result = undisturbed
    assert (result.model_uri, result.epochs, result.rows, result.restarts) == ("models:/rayseg/1", EPOCHS, 22, 0)
    assert [row["epoch"] for row in result.history] == list(range(1, EPOCHS + 1))
    assert result.history[-1]["train/loss"] < 0.8 * result.history[0]["train/loss"]
    assert result.val_dice == max(row["val/dice_pooled"] for row in result.history)
    assert result.history[result.best_epoch - 1]["val/dice_pooled"] == result.val_dice
    assert result.val_dice > 0.7 > 0.5 > result.untrained_val_dice
    assert runs.metric(job.tracking_uri, result.run_id, "val/dice_pooled") == result.history[-1]["val/dice_pooled"]
    mlflow = runs.client(job.tracking_uri)
    assert mlflow.get_run(result.run_id).info.status == "FINISHED"
    assert Path(mlflow.download_artifacts(result.run_id, "split.csv", str(tmp_path))).read_bytes() == SPLIT_CSV
    assert not list(Path(job.storage).glob("*.unfinished.json"))


def test_the_registered_model_scores_what_the_history_says(
    prepared: str, undisturbed: tuple[TrainConfig, TrainResult]
) -> None:
    job, result = undisturbed
    folder, _ = registry.fetch(job.tracking_uri, result.model_uri)
    rows = describe(prepared).read_rows("val").to_pylist()
    images = np.stack([np.frombuffer(row["image"], np.uint8).reshape(SIZE, SIZE, 1) for row in rows])
    truth = np.stack([np.frombuffer(row["mask"], np.uint8).reshape(SIZE, SIZE) for row in rows]) > 0
    found = bundle.load(folder).model(images).numpy()[..., 0] >= 0.5
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    # The validation ran in another process and order of additions; a pixel at the threshold may fall to either side.
    assert dice == pytest.approx(result.val_dice, abs=2e-3)


def test_one_worker_ends_with_the_weights_of_two_at_the_same_global_batch(
    prepared: str, tmp_path: Path, undisturbed: tuple[TrainConfig, TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    # That both ranks of two are bit-equal is checked by the loop itself, each epoch.
    monkeypatch.setattr(registry, "register", lambda *arguments: registry.ModelVersion("m", "1", "m/1", "", ""))
    alone = config(prepared, tmp_path, num_workers=1)
    result = fit(alone)
    ours, others = final(alone), final(undisturbed[0])
    assert ours.keys() == others.keys()
    apart = {name: float(np.abs(ours[name] - others[name]).max()) for name in ours if name.startswith("model/")}
    assert max(apart.values()) < TOLERANCE, apart
    for row, other in zip(result.history, undisturbed[1].history, strict=True):
        for name in ("train/loss", "val/loss"):
            assert row[name] == pytest.approx(other[name], abs=1e-4)


def test_a_killed_worker_costs_nothing_but_time(
    prepared: str, tmp_path: Path, undisturbed: tuple[TrainConfig, TrainResult]
) -> None:
    job = config(prepared, tmp_path, max_failures=1)
    killed, ended = threading.Event(), threading.Event()

    def kill_one_after_the_first_epoch() -> None:
        while not list(Path(job.storage).glob("*/epoch-00001/*")):
            if ended.wait(0.02):
                return
        os.kill(_train_workers()[-1], signal.SIGKILL)
        killed.set()

    killer = threading.Thread(target=kill_one_after_the_first_epoch)
    killer.start()
    try:
        result = fit(job)
    finally:
        ended.set()
        killer.join()
    assert killed.is_set()
    assert (result.restarts, result.epochs, result.model_uri) == (1, EPOCHS, "models:/rayseg/1")
    ours, others = final(job), final(undisturbed[0])
    assert ours.keys() == others.keys()
    assert [name for name in ours if not np.array_equal(ours[name], others[name])] == []


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
