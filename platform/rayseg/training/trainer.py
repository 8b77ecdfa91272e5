"""Trainer: runs the loop on Ray Train workers and registers what comes out.

A run is resumable as a whole. Its folder in `train.storage` holds the checkpoints; a small file beside it, named after
the configuration and the prepared set's digest, says that the run is unfinished. When the same job is started again
after its driver was lost or it failed, it finds that file and goes on, in the same MLflow run. Any other configuration
or data is another run, and so is a start after the run has finished.
"""

import dataclasses
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer

from rayseg import cluster, storage
from rayseg import config as configuration
from rayseg.data import synthetic
from rayseg.data.prepared import PreparedSet, describe
from rayseg.data.split import LEAK_COLUMNS, SPLITS, check_leak
from rayseg.models.network import build_network, portable
from rayseg.tracking import bundle, figures, registry, runs
from rayseg.training.loop import train_worker
from rayseg.training.settings import TrainConfig, TrainResult
from rayseg.training.state import State

__all__ = ["TrainConfig", "TrainResult", "fit"]

logger = logging.getLogger(__name__)


def fit(config: TrainConfig) -> TrainResult:
    """Trains a model on the prepared set and registers its best epoch.

    Lost workers are replaced and the run goes on from its last checkpoint, `max_failures` times. The MLflow run gets
    the configuration, the split (`split.csv`), each epoch's values, the curves and the bundle, and ends FINISHED, or
    FAILED where this raises.

    Raises:
        ValueError: no prepared set, a patient in two splits, no rows to train or validate on, sizes that do not fit
            the network, or a loss that is not finite.
        ray.train.TrainingFailedError: workers failed more often than `max_failures`.
    """
    began = time.monotonic()
    cluster.connect()
    # Workers run in folders of their own.
    config = dataclasses.replace(
        config,
        prepared=storage.absolute(config.prepared),
        storage=storage.absolute(config.storage),
        tracking_uri=runs.absolute(config.tracking_uri),
    )
    prepared = describe(config.prepared)
    _check(config, prepared)
    key = f"{config.name}-{configuration.digest([configuration.plain(config), prepared.digest])[:12]}"
    unfinished = storage.join(config.storage, f"{key}.unfinished.json")
    run_id = _unfinished(unfinished, config.tracking_uri)
    if run_id is None:
        parameters = configuration.flat(config) | {"prepared_digest": prepared.digest}
        run_id = runs.start(config.tracking_uri, config.experiment, config.name, parameters)
        storage.write_json(unfinished, {"run_id": run_id})
        runs.log_bytes(config.tracking_uri, run_id, "split.csv", prepared.read_split())
    else:
        logger.info("train: goes on with the unfinished run %s", run_id)
    try:
        result, state = _train(config, f"{key}-{run_id[:8]}", run_id)
        best = state.history[state.best_epoch - 1]
        version = _register(config, prepared, state, run_id)
        runs.log_metrics(
            config.tracking_uri, run_id, {"best_epoch": state.best_epoch, "restarts": result["attempts"] - 1}
        )
        curves = figures.curves(state.history)
        runs.log_bytes(config.tracking_uri, run_id, "curves.png", curves)
    except BaseException as error:
        runs.finish(config.tracking_uri, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    runs.finish(config.tracking_uri, run_id, "FINISHED")
    storage.delete(unfinished)
    assert state.untrained is not None, "validated before the first epoch"
    return TrainResult(
        run_id=run_id,
        model_uri=version.uri,
        version=version.version,
        epochs=state.epoch,
        best_epoch=state.best_epoch,
        val_dice=best["val/dice_pooled"],
        untrained_val_dice=state.untrained["val/dice_pooled"],
        train_workers=config.num_workers,
        rows=prepared.rows["train"],
        seconds=time.monotonic() - began,
        restarts=result["attempts"] - 1,
        history=state.history,
    )


def _check(config: TrainConfig, prepared: PreparedSet) -> None:
    for split, share in (("train", "the rest"), ("val", "prepare.split.val")):
        if not prepared.rows[split]:
            raise ValueError(f"train.prepared: the set has no rows in split {split}; prepare with more for {share}")
    check_leak(pa.concat_tables([prepared.read_rows(split, LEAK_COLUMNS) for split in SPLITS]))
    # Built once here, so that sizes that do not fit fail before any worker starts.
    build_network(config.model, prepared.shape, len(prepared.labels.names), config.mixed_precision)


def _unfinished(uri: str, tracking_uri: str) -> str | None:
    """The id of the run that `uri` says is unfinished, where MLflow still knows it."""
    try:
        run_id: str = storage.read_json(uri)["run_id"]
        runs.metric(tracking_uri, run_id, "val/dice_pooled")
    except (FileNotFoundError, ValueError):
        return None
    return run_id


def _train(config: TrainConfig, name: str, run_id: str) -> tuple[dict[str, Any], State]:
    """Runs the workers in the run's folder, where Ray Train finds the checkpoints of an earlier start by itself."""
    files, path = storage.filesystem(config.storage)
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if config.use_gpu else {})
    trainer = TensorflowTrainer(
        train_worker,
        train_loop_config={
            "config": configuration.plain(config),
            "run_id": run_id,
            "folder": storage.join(config.storage, name),
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            # Its own lines on every report would bury ours.
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    result: Result = trainer.fit()
    returned: dict[str, Any] = result.return_value
    if returned["diverged"] is not None:
        raise ValueError(
            f"train.learning_rate: the loss is not finite in epoch {returned['diverged']}; a lower rate than "
            f"{config.learning_rate} may help"
        )
    assert result.checkpoint is not None, "each epoch reports one"
    with result.checkpoint.as_directory() as folder:
        return returned, State.load(Path(folder))


def _register(config: TrainConfig, prepared: PreparedSet, state: State, run_id: str) -> registry.ModelVersion:
    # Its weights come from the training.
    form = dataclasses.replace(config.model, weights=None)
    model = build_network(form, prepared.shape, len(prepared.labels.names), config.mixed_precision)
    model.set_weights(state.best_weights)
    example = synthetic.slice_bytes()
    with tempfile.TemporaryDirectory(prefix="rayseg-bundle-") as folder:
        bundle.save(folder, portable(model), prepared.preprocess, prepared.labels, config.threshold, example)
        return registry.register(config.tracking_uri, run_id, folder, config.registered_model)
