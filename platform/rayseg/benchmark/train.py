"""Training: the platform against bare Keras with the same network, batch and cores; two workers; the feed alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from rayseg import config as configuration
from rayseg.benchmark import inputs
from rayseg.benchmark.data import figure
from rayseg.benchmark.watch import greatest
from rayseg.data.augment import Augment
from rayseg.data.feed import batches
from rayseg.data.prepared import describe
from rayseg.models.presets import NetworkConfig
from rayseg.training.settings import TrainConfig, TrainResult
from rayseg.training.trainer import fit

_ROWS, _SIZE, _BATCH = 256, 128, 8
_EPOCHS = 3  # the first one traces and warms up, and does not count
_MODEL = NetworkConfig(preset="unet-small")
_FED_ROWS, _FED_SIZE, _FED_BATCH = 1024, 256, 32
_TINY_SIZE = 8  # so few pixels that what a row costs is the interpreter's work, which threads cannot share
# The same network and loss, images and masks in memory, Keras's own loop; seconds of each epoch and peak memory.
_BARE = """
import json, sys, time
import keras, numpy as np, tensorflow as tf
from rayseg import config
from rayseg.data.prepared import describe
from rayseg.models.losses import bce_dice
from rayseg.models.network import build_network
from rayseg.models.presets import NetworkConfig
uri, form, batch, epochs, cores = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:])
tf.config.threading.set_intra_op_parallelism_threads(cores)
tf.config.threading.set_inter_op_parallelism_threads(cores)
prepared = describe(uri)
rows = prepared.read_rows("train", ["image", "mask"]).to_pylist()
images = np.stack([np.frombuffer(row["image"], np.uint8).reshape(prepared.shape) for row in rows])
masks = np.stack([np.frombuffer(row["mask"], np.uint8).reshape(*prepared.shape[:2], 1) for row in rows])
model = build_network(config.build(NetworkConfig, form), prepared.shape)
model.compile(optimizer=keras.optimizers.Adam(1e-3), loss=lambda mask, found: bce_dice(mask[..., 0], found))
class Clock(keras.callbacks.Callback):
    seconds = []
    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()
    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)
model.fit(images, masks, batch_size=batch, epochs=epochs, callbacks=[Clock()], verbose=0)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([Clock.seconds, int(peak.split()[1]) / 1024]))
"""


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """All figures of the suite; `folder` is for its files."""
    return _feeding(folder, repeats) | _training(folder, repeats)


def _feeding(folder: Path, repeats: int) -> dict[str, Any]:
    """Rows a second of CPU time that one thread of the feed makes of a set in the page cache.

    So many cores feed so many times as much, but no more than `feed.rows_per_s_of_one_interpreter`.
    """
    augments = {"plain": None, "augmented": Augment()}
    figures = {}
    for name, size in (("rows_per_s_and_core", _FED_SIZE), ("rows_per_s_of_one_interpreter", _TINY_SIZE)):
        uri = inputs.prepared_set(folder / f"fed{size}", _FED_ROWS, size)
        for kind, augment in augments.items():
            rates = [_fed_rows_per_cpu_s(uri, augment, epoch) for epoch in range(repeats + 1)]
            figures[f"feed.{name}.{kind}"] = figure(rates[1:])
    return figures


def _fed_rows_per_cpu_s(prepared: str, augment: Augment | None, epoch: int) -> float:
    began = time.process_time()
    feed = batches(
        describe(prepared),
        "train",
        global_batch=_FED_BATCH,
        rank=0,
        world_size=1,
        seed=1,
        epoch=epoch,
        augment=augment,
    )
    rows = sum(len(batch.image) for batch in feed)
    return rows / (time.process_time() - began)


def _training(folder: Path, repeats: int) -> dict[str, Any]:
    """The platform against bare Keras.

    A repeat is a run of each kind, one after the other, so that a busier minute meets them all.
    """
    prepared = inputs.prepared_set(folder / "set", _ROWS, _SIZE, validation_rows=_BATCH)
    cores = os.cpu_count() or 1
    names = ("bare", "platform", "augmented", "two_workers")
    rates: dict[str, list[float]] = {name: [] for name in names}
    stalls: dict[str, list[float]] = {name: [] for name in names[1:]}
    peaks: dict[str, list[float]] = {name: [] for name in names[:2]}
    for repeat in range(repeats):
        seconds, peak = _bare(prepared, cores)
        rates["bare"].append(_ROWS / min(seconds[1:]))
        peaks["bare"].append(peak)
        for name, workers, augment in (
            ("platform", 1, None),
            ("augmented", 1, Augment()),
            ("two_workers", 2, None),
        ):
            with greatest(_worker_mib) as seen:
                result = _run(folder / f"{name}{repeat}", prepared, workers, cores, augment)
            counted = result.history[1:]
            rates[name].append(max(row["rows_per_s"] for row in counted))
            stalls[name].append(max(row["stall_percent"] for row in counted))
            if name in peaks:
                peaks[name].append(seen[0])
        ray.shutdown()

    def ratio(one: str, other: str) -> dict[str, float]:
        return figure([ours / theirs for ours, theirs in zip(rates[one], rates[other], strict=True)])

    return {
        "train_vs_bare_keras": ratio("platform", "bare"),
        "train_vs_bare_keras.augmented": ratio("augmented", "bare"),
        "two_workers_vs_one": ratio("two_workers", "platform"),
        "rows_per_s.bare_keras": figure(rates["bare"]),
        "rows_per_s.platform": figure(rates["platform"]),
        "stall_percent": figure(stalls["platform"]),
        "stall_percent.augmented": figure(stalls["augmented"]),
        "stall_percent.two_workers": figure(stalls["two_workers"]),
        "peak_rss_mib.bare_keras": figure(peaks["bare"]),
        "peak_rss_mib.platform_worker": figure(peaks["platform"]),
    }


def _bare(prepared: str, cores: int) -> tuple[list[float], float]:
    form = json.dumps(configuration.plain(_MODEL))
    arguments = [prepared, form, *map(str, (_BATCH, _EPOCHS, cores))]
    done = subprocess.run([sys.executable, "-c", _BARE, *arguments], stdout=subprocess.PIPE, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def _run(folder: Path, prepared: str, workers: int, cores: int, augment: Augment | None) -> TrainResult:
    return fit(
        TrainConfig(
            prepared=prepared,
            storage=str(folder / "runs"),
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
            model=_MODEL,
            augment=augment,
            batch_size=_BATCH,
            epochs=_EPOCHS,
            schedule="constant",
            mixed_precision="float32",
            num_workers=workers,
            cpus_per_worker=max(1, cores // workers),
        )
    )


def _worker_mib() -> float:
    """The resident memory of the largest training worker among this process's descendants."""
    largest = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in "".join(process.cmdline()[:1]):
                largest = max(largest, process.memory_info().rss / 2**20)
        except psutil.Error:  # it has ended since
            continue
    return largest
