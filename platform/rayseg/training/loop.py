"""What one Ray Train worker does: epochs, from the run's last checkpoint to its end.

Beside the checkpoint at the end of each epoch there are some within: a node that is to be taken away is announced, and
what is done until then should not be done again.
"""

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import ray.train
import tensorflow as tf
from ray.train.collective import barrier

from rayseg import config as configuration
from rayseg import logs, meters, storage
from rayseg.grant import keep_to_grant
from rayseg.models import numerics
from rayseg.models.encoders import encoder_layers
from rayseg.training import start
from rayseg.training.callbacks import recall, remembered, rules, writers
from rayseg.training.interruptions import Interruptions
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
from rayseg.training.state import Part, State
from rayseg.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

ATTEMPTS_FILE = "attempts.json"
Publish = Callable[[State], None]
NO_GPU_FILE = "no-gpu.json"  # a rank without the GPU that it was to have says so, and all ranks stop
KEEP_S = 600.0  # of work that a loss without notice may cost
LAST_KEEP_S = 30.0  # the same within the time that a notice gives


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Trains from the run's last checkpoint, if it has one, to its last epoch.

    Args:
        job: `config`, a plain `TrainConfig` with absolute URIs; `prepared`, its set, as it was when the driver began,
            even if another one is prepared in its place; `run_id` in MLflow; `folder`, URI of the run's folder;
            `quiet`, whether to leave out the lines on each epoch; `told`, of the driver, for the log; `look_s`, between
            two looks for an announced loss.

    Returns:
        `attempts`, how often workers began on this run; `diverged`, the epoch whose loss is not finite, or None;
        `no_gpu`, whether nothing was trained, as a rank sees no GPU though `gpus_per_worker` asks for one.
    """
    config = configuration.build(TrainConfig, job["config"])
    logs.adopt(job["told"])
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    set_up(config, rank, logging.WARNING if job["quiet"] else logging.INFO)
    attempts = _count_attempt(job["folder"]) if rank == 0 else 0
    keep_to_grant()
    devices = tf.config.list_physical_devices("GPU")
    if config.gpus_per_worker and _any_lacks_gpu(job["folder"], rank, lacks=not devices):
        return {"attempts": attempts, "diverged": None, "no_gpu": True}
    logger.info("rank %d of %d computes in %s on %s", rank, ranks, config.mixed_precision, _told(config, devices))
    with (
        # Outside of the watchdog: to wait for MLflow, at the end, is not to hang.
        _mlflow(config, job) if rank == 0 else contextlib.nullcontext(_nobody) as publish,
        Watchdog(config.hang_timeout_s) as watchdog,
        tempfile.TemporaryDirectory(prefix="rayseg-outputs-") as outputs,
    ):
        learner = Learner(config, job["prepared"], rank, ranks, watchdog.beat)
        _settle(config, learner.model, on_gpu=bool(devices))
        state = State.load(job["folder"], Path(outputs), learner.model)
        if state is None:
            start.set_initial(learner.model, job["folder"])
            state = State()
        else:
            logger.info("rank %d of %d goes on after epoch %d, step %d", rank, ranks, state.epoch, state.part.step)
        run = _Run(config, learner, state, job["folder"], Path(outputs), publish, look_s=job["look_s"])
        diverged = run.to_the_end(watchdog)
    return {"attempts": attempts, "diverged": diverged, "no_gpu": False}


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        state: State,
        folder: str,
        outputs: Path,
        publish: Publish,
        *,
        look_s: float,
    ) -> None:
        self._config, self._learner, self._state = config, learner, state
        self._folder, self._outputs, self._publish, self._look_s = folder, outputs, publish, look_s
        self._callbacks = rules(config)
        self._looked = self._kept = state.part
        self._pace, self._noticed = 1, False  # steps between two looks; as all of these the same on all ranks
        if learner.rank == 0:
            self._callbacks += writers(config, outputs, learner.steps)

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
        self._publish(state)
        encoder = encoder_layers(learner.model)
        for epoch in range(state.epoch, config.epochs):  # counted from 0, as Keras's callbacks have it
            if state.stopped:
                break
            learner.freeze(encoder, epoch < config.freeze_epochs)
            called.on_epoch_begin(epoch)
            began = time.monotonic()
            self._looked = self._kept = state.part
            logs = learner.train(epoch, called, state.part, self._look)
            if not math.isfinite(logs["train/loss"]):
                return epoch + 1
            if learner.rank == 0:
                _count(time.monotonic() - began, logs["stall_percent"] / 100)
            learner.check_ranks()
            with learner.averaged(epoch):
                logs |= learner.validate()
                called.on_epoch_end(epoch, {name: value for name, value in logs.items() if value is not None})
            state.epoch, state.part, state.stopped = epoch + 1, Part(), learner.any_rank(learner.model.stop_training)
            state.history.append({"epoch": epoch + 1, **logs})
            if learner.rank == 0:
                state.callbacks = remembered(self._callbacks)
                state.save(self._folder, learner.model, self._outputs)
            self._publish(state)
            # Waits for all ranks. With all epochs, as who hears this may not have heard of those before a restart.
            dice = [row["val/dice_pooled"] for row in state.history]
            ray.train.report({"epoch": epoch + 1, "dice": dice})
            watchdog.beat()
        called.on_train_end()
        return None

    def _look(self, step: int, summed: Callable[[], Part]) -> None:
        """About every `look_s`: keeps what is done of the epoch where it would be much, or the last chance."""
        if step - self._looked.step < self._pace:
            return
        done = summed()
        seconds_a_step = (done.seconds - self._looked.seconds) / (step - self._looked.step)
        self._pace, self._looked = max(1, round(self._look_s / seconds_a_step)), done
        # Waits for all ranks, and tells them what rank 0 knows.
        notice = ray.train.get_preemption_info()
        first, self._noticed = notice is not None and not self._noticed, notice is not None
        if first or done.seconds - self._kept.seconds > (LAST_KEEP_S if self._noticed else KEEP_S):
            self._kept = self._state.part = done
            if self._learner.rank == 0:
                self._keep(first)

    def _keep(self, noticed: bool) -> None:
        state = self._state
        try:
            state.save(self._folder, self._learner.model, self._outputs)
        except RuntimeError as error:  # the one before stays, and there is time to try again
            logger.warning("%s", error)
            return
        if noticed:
            logger.info("a node is to be taken away: kept epoch %d up to step %d", state.epoch + 1, state.part.step)


def _count(seconds: float, stalled: float) -> None:
    """An epoch, with the share of its time that it waited for data, for Prometheus."""
    meters.add("rayseg_epochs_total", stage="train")
    meters.add("rayseg_seconds_total", seconds * stalled, stage="train", step="wait")
    meters.add("rayseg_seconds_total", seconds * (1 - stalled), stage="train", step="compute")


@contextlib.contextmanager
def _mlflow(config: TrainConfig, job: dict[str, Any]) -> Iterator[Publish]:
    """What takes the run's values and the machine's to MLflow, which training never waits for."""
    # Only here: MLflow takes some 100 MB, and only rank 0 needs it.
    from rayseg.tracking import runs
    from rayseg.tracking.courier import Courier
    from rayseg.training.journal import Journal

    # Its own limits add up to 20 minutes a call. The courier comes again anyway, and what it misses is told sooner.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    run_id = job["run_id"]
    journal = Journal(config.tracking_uri, run_id, dataclasses.asdict(Interruptions.of(job["folder"])))
    with (
        runs.system_metrics(config.tracking_uri, run_id),
        Courier[tuple[dict[str, Any], list[dict[str, Any]]]](lambda news: journal.publish(*news)) as courier,
    ):

        def publish(state: State) -> None:
            assert state.untrained is not None, "validated before the first epoch"
            courier.hand_over((state.untrained, list(state.history)))

        yield publish


def _nobody(state: State) -> None:
    """Of ranks that publish nothing."""


def set_up(config: TrainConfig, rank: int, level: int) -> None:
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
    undetermined = numerics.undetermined(model, config.jit_compile, on_gpu)
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
