"""Keras callbacks of the training loop: progress, MLflow and checkpoints.

The loop runs them, and any of Keras's own, through `keras.callbacks.CallbackList`. The logs of an epoch are the same on
every rank, those of a batch are a rank's own.
"""

import functools
import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import ray.train

from rayseg.training.state import State

logger = logging.getLogger(__name__)

_EVERY_S = 30.0


class Progress(keras.callbacks.Callback):
    """Logs a line an epoch, and one every half minute within long ones, with the time that is left."""

    def __init__(self, epochs: int, steps: int) -> None:
        super().__init__()
        self._epochs, self._steps = epochs, steps
        self._epoch = 0
        self._first: int | None = None  # epochs that were there when this process began
        self._began = self._spoken = 0.0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Notes which epoch it is, and when the first one began."""
        self._epoch, self._spoken = epoch, time.monotonic()
        if self._first is None:
            self._first, self._began = epoch, time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Speaks up in long epochs."""
        if time.monotonic() - self._spoken < _EVERY_S:
            return
        self._spoken = time.monotonic()
        done = self._epoch + (batch + 1) / self._steps
        logger.info("epoch %d/%d, %.0f %%%s", self._epoch + 1, self._epochs, 100 * (done % 1), self._left(done))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Says what the epoch gave."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in (logs or {}).items() if value is not None)
        logger.info("epoch %d/%d: %s%s", epoch + 1, self._epochs, shown, self._left(epoch + 1))

    def _left(self, epochs_done: float) -> str:
        """The time that the rest would take at the pace of this process so far."""
        assert self._first is not None, "an epoch has begun"
        left_s = (time.monotonic() - self._began) / (epochs_done - self._first) * (self._epochs - epochs_done)
        return f", {left_s:.0f} s left"


class RunMetrics(keras.callbacks.Callback):
    """Logs an epoch's values to the MLflow run, under the number of epochs done as step."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        # Only here: MLflow takes some 100 MB, and only rank 0 needs it.
        from rayseg.tracking import runs

        super().__init__()
        self._log = functools.partial(runs.log_metrics, tracking_uri, run_id)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs what has a value; step 0 is the untrained model."""
        self._log({name: value for name, value in values.items() if value is not None}, step=step)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Logs the epoch."""
        self.log(epoch + 1, logs or {})


class Checkpoints(keras.callbacks.Callback):
    """Adds each epoch to the state and reports it to Ray Train; rank 0 brings the checkpoint.

    Reporting waits for all ranks. Comes last in the list: the other callbacks' doing belongs to the checkpoint.
    """

    def __init__(self, state: State, rank: int) -> None:
        super().__init__()
        self._state, self._rank = state, rank

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Saves and reports."""
        self._state.add(epoch + 1, dict(logs or {}), self.model)
        with tempfile.TemporaryDirectory(prefix="rayseg-checkpoint-") as folder:
            if self._rank == 0:
                self._state.save(Path(folder), self.model)
            ray.train.report(
                {"epoch": epoch + 1},
                checkpoint=ray.train.Checkpoint.from_directory(folder) if self._rank == 0 else None,
                # A name of the epoch: what a killed attempt left half written is written over.
                checkpoint_dir_name=f"epoch-{epoch + 1:05d}",
            )
