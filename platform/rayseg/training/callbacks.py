"""Keras callbacks of the training loop, its own and Keras's; the loop runs them through `keras.callbacks.CallbackList`.

The logs of an epoch are the same on every rank, so those that decide anything run on every rank and decide the same.
Those that write run on rank 0, into a folder that belongs to the checkpoint.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from rayseg.training.settings import TrainConfig

logger = logging.getLogger(__name__)

BEST_FILE, HISTORY_FILE = "best.weights.h5", "history.csv"
_EVERY_S = 30.0
# Of an epoch on the terminal; MLflow and the history have all there is.
_SHOWN = ("train/loss", "val/loss", "val/dice_pooled", "learning_rate", "rows_per_s", "stall_percent")


def rules(config: TrainConfig) -> list[keras.callbacks.Callback]:
    """What every rank runs: it changes the learning rate or ends the run."""
    found: list[keras.callbacks.Callback] = []
    if config.schedule == "plateau":
        plateau = config.plateau
        found.append(
            keras.callbacks.ReduceLROnPlateau(
                monitor=plateau.monitor,
                mode=plateau.mode,
                patience=plateau.patience,
                factor=plateau.factor,
                min_delta=plateau.min_delta,
                cooldown=plateau.cooldown,
                min_lr=plateau.least,
            )
        )
    if config.early_stopping is not None:
        stop = config.early_stopping
        found.append(
            keras.callbacks.EarlyStopping(
                monitor=stop.monitor, mode=stop.mode, patience=stop.patience, min_delta=stop.min_delta
            )
        )
    return found


def writers(config: TrainConfig, outputs: Path, steps: int) -> list[keras.callbacks.Callback]:
    """What rank 0 runs beside: progress, the best weights so far, a table of the epochs, TensorBoard's files.

    Args:
        config: the run.
        outputs: a local folder for the files.
        steps: of an epoch.
    """
    found = [
        Progress(config.epochs, steps),
        keras.callbacks.ModelCheckpoint(
            str(outputs / BEST_FILE),
            monitor="val/dice_pooled",
            mode="max",
            save_best_only=True,
            save_weights_only=True,
        ),
        keras.callbacks.CSVLogger(str(outputs / HISTORY_FILE), append=True),
    ]
    if config.tensorboard:
        found.append(keras.callbacks.TensorBoard(str(outputs / "tensorboard"), write_graph=False))
    return found


# What EarlyStopping, ModelCheckpoint and ReduceLROnPlateau keep from epoch to epoch.
_MEMORY = ("best", "best_epoch", "wait", "stopped_epoch", "cooldown_counter")


def remembered(callbacks: Sequence[keras.callbacks.Callback]) -> list[dict[str, Any]]:
    """What each callback must know to go on, as JSON takes it."""
    return [
        {name: None if value is None else float(value) for name, value in vars(callback).items() if name in _MEMORY}
        for callback in callbacks
    ]


def recall(callbacks: Sequence[keras.callbacks.Callback], memory: Sequence[Mapping[str, Any]]) -> None:
    """Sets what `remembered` gave; after `on_train_begin`, which forgets."""
    for callback, values in zip(callbacks, memory, strict=False):
        for name, value in values.items():
            setattr(callback, name, value)


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
        known = {name: value for name, value in (logs or {}).items() if value is not None}
        shown = ", ".join(f"{name} {known[name]:.4g}" for name in _SHOWN if name in known)
        logger.info("epoch %d/%d: %s%s", epoch + 1, self._epochs, shown, self._left(epoch + 1))

    def _left(self, epochs_done: float) -> str:
        """The time that the rest would take at the pace of this process so far."""
        assert self._first is not None, "an epoch has begun"
        left_s = (time.monotonic() - self._began) / (epochs_done - self._first) * (self._epochs - epochs_done)
        return f", {left_s:.0f} s left"
