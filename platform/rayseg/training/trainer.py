"""Trainer: runs the loop on Ray Train workers and registers what comes out.

A run is resumable as a whole. Its folder in `train.storage` holds the checkpoints; a small file beside it, named after
the configuration and the prepared set's digest, says that the run is unfinished. When the same job is started again
after its driver was lost or it failed, it finds that file and goes on, in the same MLflow run. Any other configuration
or data is another run, and so is a start after the run has finished.
"""

import contextlib
import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from ray.train import FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.tensorflow import TensorflowTrainer

from rayseg import cluster, logs, retry, storage
from rayseg import config as configuration
from rayseg.data import phantom_volumes, synthetic
from rayseg.data.prepared import PreparedSet, reading
from rayseg.data.range import measure
from rayseg.data.split import LEAK_COLUMNS, SPLITS, check_leak
from rayseg.inference import calibrate
from rayseg.models import numerics
from rayseg.models.encoders import encoder_layers
from rayseg.models.losses import loss_function
from rayseg.models.network import portable
from rayseg.tracking import bundle, registry, runs
from rayseg.training import cases, doubts, journal, precision, record, start
from rayseg.training.callbacks import BEST_FILE
from rayseg.training.interruptions import Count, Interruptions
from rayseg.training.loop import ATTEMPTS_FILE, NO_GPU_FILE, train_worker
from rayseg.training.settings import TrainConfig, TrainResult, Trial
from rayseg.training.state import State

__all__ = ["TrainConfig", "TrainResult", "fit"]

logger = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks for the announced loss of a node
RESIZE_S = 60.0  # between two looks for nodes that an elastic run could take
_KEYS = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker", "count": "num_workers"}


def keys(config: TrainConfig) -> dict[str, str]:
    """The key of each thing that workers take of the cluster, for `cluster.require`."""
    return _KEYS | dict.fromkeys(config.resources, "resources")


def fit(config: TrainConfig, trial: Trial | None = None, callbacks: Sequence[UserCallback] = ()) -> TrainResult:
    """Trains a model on the prepared set and registers its best epoch.

    Args:
        config: the run.
        trial: the run is one of a sweep.
        callbacks: of Ray Train; each epoch reports `epoch`, and `dice`, the validation Dice of all epochs so far.

    Lost and hung workers are replaced and the run goes on from its last checkpoint, `max_failures` times. A node that
    is lost after Ray was told of it, and an elastic run that takes other nodes, do not count there. The MLflow run gets
    what `record` and `journal` say, and ends FINISHED, or FAILED where this raises.

    Raises:
        ValueError: no prepared set, a patient in two splits, no rows to train or validate on, sizes that do not fit
            the network, weights to start from that do not, a run to reproduce that is not there or had other data,
            workers that the cluster could never hold, GPUs that TensorFlow does not see, or a loss that is not finite.
        RuntimeError: workers failed more often than `max_failures`, or MLflow does not answer; the same job started
            again goes on.
    """
    began = time.monotonic()
    cluster.connect()
    config = absolute(config)
    if config.reproduce:
        config = absolute(record.to_repeat(config))
    with reading(config.prepared, "train") as prepared:
        result = _fit(config, prepared, trial, callbacks)
    return dataclasses.replace(result, seconds=time.monotonic() - began)


def _fit(
    config: TrainConfig, prepared: PreparedSet, trial: Trial | None, callbacks: Sequence[UserCallback]
) -> TrainResult:
    with_what = check(config, prepared)
    cluster.require("train", config.bundle, config.least_workers, keys(config))
    if config.reproduce:
        record.check_repeatable(config, prepared)
    unfinished = storage.join(config.storage, f"{_key(config, prepared)}.unfinished.json")
    mark = _unfinished(unfinished, config.tracking_uri)
    config, decision = precision.decided(config, prepared, mark)
    if not mark:
        for begun in runs.tagged(config.tracking_uri, config.experiment, trial.tags) if trial else ():
            runs.discard(config.tracking_uri, begun)  # its driver was lost before it could note it
        run_id = record.begin(config, prepared, with_what | precision.tags(decision) | (trial.tags if trial else {}))
        storage.write_json(unfinished, {"run_id": run_id, **decision})
    else:
        run_id = mark["run_id"]
        logger.info("train: goes on with the unfinished run %s", run_id)
        runs.resume(config.tracking_uri, run_id)
    folder = storage.join(config.storage, f"{_key(config, prepared)}-{run_id[:8]}")
    try:
        start.bring_initial(config, prepared, folder)
        attempts = _attempts_to_the_end(config, folder) or _train(config, prepared, folder, run_id, trial, callbacks)
        result = _conclude(config, prepared, folder, run_id, attempts - 1, trial is None or trial.register)
    except runs.UnreachableError:
        raise  # to ask once more would take as long again
    except BaseException as error:
        finish(config.tracking_uri, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    runs.finish(config.tracking_uri, run_id, "FINISHED")
    if trial is None:
        storage.delete(unfinished)
    return result


def absolute(config: TrainConfig) -> TrainConfig:
    """The run with URIs that hold in every folder: workers run in ones of their own."""
    return dataclasses.replace(
        config,
        prepared=config.prepared and storage.absolute(config.prepared),
        storage=config.storage and storage.absolute(config.storage),
        tracking_uri=runs.absolute(config.tracking_uri),
    )


def check(config: TrainConfig, prepared: PreparedSet) -> dict[str, str]:
    """What it will be computed with, see `numerics`; raises ValueError where such a run cannot begin, see `fit`."""
    for split, share in (("train", "the rest"), ("val", "prepare.split.val")):
        if not prepared.rows[split]:
            raise ValueError(f"train.prepared: the set has no rows in split {split}; prepare with more for {share}")
    check_leak(pa.concat_tables([prepared.read_rows(split, LEAK_COLUMNS) for split in SPLITS]))
    start.check_augmentation(config, prepared)
    # Built once here, so that what does not fit fails before any worker starts.
    loss_function(config.loss, len(prepared.labels.names))
    model = start.network(dataclasses.replace(config, mixed_precision="float32"), prepared)  # `auto` comes later
    if config.freeze_epochs and not encoder_layers(model):
        raise ValueError(f"train.freeze_epochs: {config.model.preset} has no encoder to freeze")
    synchronized = any(getattr(layer, "synchronized", False) for layer in model.layers)
    if config.jit_compile and synchronized:
        raise ValueError(
            "train.jit_compile: XLA cannot compile batch normalisation that is synchronised over workers; give another "
            "model.normalization (none, group), or jit_compile: false"
        )
    uneven = [n for n in range(config.least_workers, config.most_workers + 1) if not config.shares_evenly(n)]
    if synchronized and uneven:
        # Padding would count in the statistics of a batch, and the weights depend on who came.
        raise ValueError(
            "train.num_workers: with batch normalisation each number of workers that may come must have equal shares "
            f"of batch_size (in `accumulation` parts), and {uneven[0]} have none of {config.batch_size}; give other "
            "numbers, another batch_size, or another model.normalization (group)"
        )
    return numerics.told(model, config.jit_compile, config.gpus_per_worker > 0)


def _key(config: TrainConfig, prepared: PreparedSet) -> str:
    """Names a configuration and its data."""
    return f"{config.name}-{configuration.digest([configuration.plain(config), prepared.digest])[:12]}"


def _unfinished(uri: str, tracking_uri: str) -> dict[str, Any]:
    """The mark of an unfinished run at `uri`, where MLflow still knows its `run_id`; else empty."""
    try:
        mark: dict[str, Any] = storage.read_json(uri)
    except (FileNotFoundError, ValueError):
        return {}
    return mark if runs.exists(tracking_uri, mark["run_id"]) else {}


def _attempts_to_the_end(config: TrainConfig, folder: str) -> int | None:
    """How often workers began on a run whose last epoch has its checkpoint; None where there is more to train."""
    with tempfile.TemporaryDirectory(prefix="rayseg-outputs-") as outputs:
        state = State.load(folder, Path(outputs))
    if state is None or not (state.stopped or state.epoch >= config.epochs):
        return None
    attempts: int = storage.read_json(storage.join(folder, ATTEMPTS_FILE))["attempts"]
    return attempts


def _train(
    config: TrainConfig,
    prepared: PreparedSet,
    folder: str,
    run_id: str,
    trial: Trial | None,
    callbacks: Sequence[UserCallback],
) -> int:
    """Runs the workers, who leave their checkpoints in the folder; returns how often they began."""
    storage.delete(storage.join(folder, NO_GPU_FILE))  # of an earlier start
    files, path = storage.filesystem(config.storage, retry.ATTEMPTS)
    wanted = cluster.in_words(config.bundle)
    logger.info("train: asks for num_workers %s, each with %s on one node", config.workers_told, wanted)
    trainer = TensorflowTrainer(
        train_worker,
        train_loop_config={
            "config": configuration.plain(config),
            "prepared": prepared,
            "run_id": run_id,
            "folder": folder,
            "quiet": trial is not None,
            "told": logs.told(),
            "look_s": LOOK_S,
        },
        scaling_config=ScalingConfig(
            num_workers=(config.least_workers, config.most_workers) if config.elastic else config.most_workers,
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=config.bundle,
        ),
        run_config=RunConfig(
            name=folder.rpartition("/")[2],
            storage_path=path,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[*callbacks, Count(folder)],
            # Its own lines on every report would bury ours.
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result: Result = trainer.fit()
    except TrainingFailedError as error:
        with contextlib.suppress(runs.UnreachableError):  # the error that matters is the other one
            runs.log_metrics(config.tracking_uri, run_id, dataclasses.asdict(Interruptions.of(folder)))
        causes = getattr(error, "worker_failures", {})
        told = "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}".splitlines()[0] for cause in causes.values()))
        raise RuntimeError(
            f"train: workers failed more than {config.max_failures} times ({told or error}); the same job started "
            "again goes on from the last checkpoint"
        ) from error
    returned: dict[str, Any] = result.return_value
    if returned["no_gpu"]:
        raise ValueError(
            f"train.gpus_per_worker: {config.gpus_per_worker:g} is asked for, and in a worker to which Ray gave one "
            "TensorFlow sees no GPU: install the GPU build on the GPU nodes (the extra gpu in place of cpu), see that "
            "nvidia-smi lists the GPU there, or train on CPUs with gpus_per_worker=0"
        )
    if returned["diverged"] is not None:
        raise ValueError(
            f"train.learning_rate: the loss is not finite in epoch {returned['diverged']}; a lower rate than "
            f"{config.learning_rate} may help"
        )
    return returned["attempts"]


def _conclude(
    config: TrainConfig, prepared: PreparedSet, folder: str, run_id: str, restarts: int, register: bool
) -> TrainResult:
    """Logs what came out, and registers the best epoch's weights."""
    with tempfile.TemporaryDirectory(prefix="rayseg-bundle-") as temporary:
        outputs = Path(temporary, "outputs")
        state = State.load(folder, outputs)
        assert state is not None, "each epoch leaves one"
        assert state.untrained is not None, "validated before the first epoch"
        if not journal.Journal(config.tracking_uri, run_id).publish(state.untrained, state.history):
            raise runs.UnreachableError(
                f"train: MLflow at {config.tracking_uri} does not answer; start the same job again later, which goes "
                "on from here. Until then its run stays RUNNING"
            )
        model = start.network(config, prepared)
        model.load_weights(outputs / BEST_FILE)
        model = portable(model)
        best_epoch, best = state.best()
        threshold = state.threshold(config)
        looked = cases.look(model, prepared, threshold)
        text = record.end(config, prepared, state, model, looked.pictures, outputs, run_id)
        # A driver that was lost after this may have left one.
        version = registry.of_run(config.tracking_uri, run_id, config.registered_model) if register else None
        if register and version is None:
            saved = Path(temporary, "bundle")
            example, *golden = examples(prepared)
            known = dataclasses.replace(measure(prepared), pieces=looked.pieces, entropy_bits=looked.entropy_bits)
            bundle.save(saved, model, prepared.model_preprocess, prepared.labels, threshold, example, golden, known)
            bundle.calibrate(saved, calibrate.volume_errors(saved, prepared))
            version = registry.register(config.tracking_uri, run_id, saved, config.registered_model, text)
    for doubt in doubts.of_run(config.batch_size, prepared.rows["train"], best, state.untrained, state.history):
        logger.warning("train: doubt: %s", doubt)
    reproduced = record.repeated(config, state, run_id) if config.reproduce else None
    interruptions = dataclasses.asdict(Interruptions.of(folder))
    if restarts:
        reasons = ", ".join(f"{name} {number}" for name, number in interruptions.items())
        workers = " ".join(str(row.get("workers", "?")) for row in state.history)
        logger.info("train: workers began anew: %s; workers at the end of each epoch: %s", reasons, workers)
    outcome: dict[str, float] = {"best_epoch": best_epoch, "restarts": restarts, **interruptions}
    if len(prepared.labels.names) == 1:
        outcome["threshold"] = threshold
    runs.log_metrics(config.tracking_uri, run_id, outcome)
    return TrainResult(
        run_id=run_id,
        model_uri=version.uri if version else "",
        version=version.version if version else "",
        epochs=state.epoch,
        best_epoch=best_epoch,
        val_dice=best["val/dice_pooled"],
        untrained_val_dice=state.untrained["val/dice_pooled"],
        train_workers=state.history[-1].get("workers", config.most_workers),
        rows=prepared.rows["train"],
        seconds=0.0,
        restarts=restarts,
        **interruptions,
        history=state.history,
        reproduced=reproduced,
    )


def examples(prepared: PreparedSet) -> list[bytes]:
    """Of a bundle: phantoms, as it goes where no patient's picture may."""
    return synthetic.of_bundle() if prepared.volume is None else phantom_volumes.of_bundle(prepared.volume)


def finish(tracking_uri: str, run_id: str, status: Literal["FAILED", "KILLED"]) -> None:
    """Ends the run while an error is on its way, which must not be hidden by another one."""
    try:
        runs.finish(tracking_uri, run_id, status)
    except runs.UnreachableError:
        logger.error("MLflow cannot be reached: run %s stays RUNNING until the same job is started again", run_id)
