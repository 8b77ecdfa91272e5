"""What one Ray Train worker does: epochs, from the run's last checkpoint to its end."""

import contextlib
import logging
import math
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras
import ray.train
import tensorflow as tf
from ray.train.collective import barrier

from rayseg import config as configuration
from rayseg import logs, meters, storage
from rayseg.data.prepared import describe
from rayseg.grant import keep_to_grant
from rayseg.models import numerics
from rayseg.models.encoders import encoder_layers
from rayseg.training import start
from rayseg.training.callbacks import recall, remembered, rules, writers
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
from rayseg.training.state import State
from rayseg.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

ATTEMPTS_FILE = "attempts.json"
NO_GPU_FILE = "no-gpu.json"  # a rank without the GPU that it was to have says so, and all ranks stop


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Trains from the run's last checkpoint, if it has one, to its last epoch.

    Args:
        job: `config`, a plain `TrainConfig` with absolute URIs; `run_id` in MLflow; `folder`, URI of the run's folder;
            `quiet`, whether to leave out the lines on each epoch; `told`, of the driver, for the log.

    Returns:
        `attempts`, how often workers began on this run; `diverged`, the epoch whose loss is not finite, or None;
        `no_gpu`, whether nothing was trained, as a rank sees no GPU though `gpus_per_worker` asks for one.
    """
    config = configuration.build(TrainConfig, job["config"])
    logs.adopt(job["told"])
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    _set_up(config, rank, logging.WARNING if job["quiet"] else logging.INFO)
    attempts = _count_attempt(job["folder"]) if rank == 0 else 0
    keep_to_grant()
    devices = tf.config.list_physical_devices("GPU")
    if config.gpus_per_worker and _any_lacks_gpu(job["folder"], rank, lacks=not devices):
        return {"attempts": attempts, "diverged": None, "no_gpu": True}
    logger.info("rank %d of %d computes in %s on %s", rank, ranks, config.mixed_precision, _told(config, devices))
    with (
        Watchdog(config.hang_timeout_s) as watchdog,
        tempfile.TemporaryDirectory(prefix="rayseg-outputs-") as outputs,
        _system_metrics(config, job["run_id"]) if rank == 0 else contextlib.nullcontext(),
    ):
        learner = Learner(config, describe(config.prepared), rank, ranks, watchdog.beat)
        _settle(config, learner.model, on_gpu=bool(devices))
        state = State.load(job["folder"], Path(outputs), learner.model)
        if state is None:
            start.set_initial(learner.model, job["folder"])
            state = State()
        else:
            logger.info("rank %d goes on after epoch %d", rank, state.epoch)
        diverged = _Run(config, learner, state, job, Path(outputs)).to_the_end(watchdog)
    return {"attempts": attempts, "diverged": diverged, "no_gpu": False}


class _Run:
    def __init__(self, config: TrainConfig, learner: Learner, state: State, job: dict[str, Any], outputs: Path) -> None:
        self._config, self._learner, self._state = config, learner, state
        self._folder, self._outputs = job["folder"], outputs
        self._callbacks = rules(config)
        self._journal = None
        if learner.rank == 0:
            from rayseg.training.journal import Journal  # with MLflow

            self._callbacks += writers(config, outputs, learner.steps)
            self._journal = Journal(config.tracking_uri, job["run_id"])

    def to_the_end(self, watchdog: Watchdog) -> int | None:
        """Trains; returns the epoch whose loss is not finite, or None."""
        config, learner, state = self._config, self._learner, self._state
        called = keras.callbacks.CallbackList(
            self._callbacks, model=learner.model, epochs=config.epochs, steps=learner.steps
        )
        if state.untrained is None:
            state.untrained = learner.validate()
        called.on_train_begin()
        recall(self._callbacks, state.callbacks)
        self._publish()
        encoder = encoder_layers(learner.model)
        for epoch in range(state.epoch, config.epochs):  # counted from 0, as Keras's callbacks have it
            if state.stopped:
                break
            learner.freeze(encoder, epoch < config.freeze_epochs)
            called.on_epoch_begin(epoch)
            began = time.monotonic()
            logs = learner.train(epoch, called)
            if not math.isfinite(logs["train/loss"]):
                return epoch + 1
            if learner.rank == 0:
                _count(time.monotonic() - began, logs["stall_percent"] / 100)
            learner.check_ranks()
            with learner.averaged(epoch):
                logs |= learner.validate()
                called.on_epoch_end(epoch, {name: value for name, value in logs.items() if value is not None})
            state.epoch, state.stopped = epoch + 1, learner.any_rank(learner.model.stop_training)
            state.history.append({"epoch": epoch + 1, **logs})
            if learner.rank == 0:
                state.callbacks = remembered(self._callbacks)
                state.save(self._folder, learner.model, self._outputs)
            self._publish()
            # Waits for all ranks. With all epochs, as who hears this may not have heard of those before a restart.
            dice = [row["val/dice_pooled"] for row in state.history]
            ray.train.report({"epoch": epoch + 1, "dice": dice})
            watchdog.beat()
        called.on_train_end()
        return None

    def _publish(self) -> None:
        if self._journal is not None:
            assert self._state.untrained is not None, "validated before the first epoch"
            self._journal.publish(self._state.untrained, self._state.history)


def _count(seconds: float, stalled: float) -> None:
    """An epoch, with the share of its time that it waited for data, for Prometheus."""
    meters.add("rayseg_epochs_total", stage="train")
    meters.add("rayseg_seconds_total", seconds * stalled, stage="train", step="wait")
    meters.add("rayseg_seconds_total", seconds * (1 - stalled), stage="train", step="compute")


def _system_metrics(config: TrainConfig, run_id: str) -> AbstractContextManager[None]:
    # Only here: MLflow takes some 100 MB, and only rank 0 needs it.
    from rayseg.tracking import runs

    return runs.system_metrics(config.tracking_uri, run_id)


def _set_up(config: TrainConfig, rank: int, level: int) -> None:
    """The process's logging, threads and seeds."""
    tf.get_logger().setLevel(logging.WARNING)
    # Ray shows what is logged here where the job runs: our words of rank 0, not each report of each rank.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("rayseg").setLevel(level if rank == 0 else logging.WARNING)
    threads = max(1, int(config.cpus_per_worker))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    keras.utils.set_random_seed(config.seed)


def _any_lacks_gpu(folder: str, rank: int, lacks: bool) -> bool:
    """Whether any rank has no GPU; the same on all ranks, so that none waits for another one."""
    uri = storage.join(folder, NO_GPU_FILE)
    if lacks:
        storage.write_json(uri, {"rank": rank})
    barrier()
    return storage.exists(uri)


def _told(config: TrainConfig, devices: list[Any]) -> str:
    """What it computes on, in words."""
    if not devices:
        return f"the CPU, {max(1, int(config.cpus_per_worker))} threads"
    names = (tf.config.experimental.get_device_details(one).get("device_name", "a GPU") for one in devices)
    return ", ".join(map(str, names))


def _settle(config: TrainConfig, model: keras.Model, on_gpu: bool) -> None:
    undetermined = numerics.undetermined(model, config.jit_compile) if on_gpu else None
    numerics.settle(undetermined)
    if undetermined:
        logger.warning(
            "TF32 is off; ops are not deterministic, as TensorFlow has no such kernel for gradients of %s: a run that "
            "goes on or is repeated ends with other last bits",
            undetermined,
        )
    else:
        logger.info("TF32 is off, ops are deterministic")


def _count_attempt(folder: str) -> int:
    uri = storage.join(folder, ATTEMPTS_FILE)
    attempts = 1 + (storage.read_json(uri)["attempts"] if storage.exists(uri) else 0)
    storage.write_json(uri, {"attempts": attempts})
    return attempts
