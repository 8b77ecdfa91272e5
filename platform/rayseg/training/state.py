"""What a training run is at the end of an epoch, so that it can go on from there as if never interrupted."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

_ARRAYS, _VALUES = "state.npz", "state.json"


@dataclass
class State:
    """Beside the variables of the model and its optimizer, which stay in those.

    epoch: epochs done.
    untrained: validation before the first step, `val/loss` and `val/dice_pooled`.
    history: one row an epoch: `epoch`, `train/loss`, `val/loss`, `val/dice_pooled`, ...
    best_epoch: of the highest pooled validation Dice; where it is equal, of the lowest validation loss.
    best_weights: of that epoch, in the order of `model.get_weights()`.
    """

    epoch: int = 0
    untrained: dict[str, float | None] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: list[np.ndarray] = field(default_factory=list)

    def add(self, epoch: int, logs: dict[str, Any], model: keras.Model) -> None:
        """Takes in the epoch that `model` has just gone through."""
        self.epoch = epoch
        self.history.append({"epoch": epoch, **logs})
        if not self.best_epoch or _rank(logs) > _rank(self.history[self.best_epoch - 1]):
            self.best_epoch, self.best_weights = epoch, model.get_weights()

    def save(self, folder: Path, model: keras.Model) -> None:
        """Writes this and the variables of the model (seeds of dropout included) and of its optimizer."""
        arrays: dict[str, Any] = {f"best/{index}": weight for index, weight in enumerate(self.best_weights)}
        arrays |= {name: variable.numpy() for name, variable in _variables(model).items()}
        np.savez(folder / _ARRAYS, **arrays)
        values = asdict(self)
        del values["best_weights"]
        (folder / _VALUES).write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "State":
        """Reads what `save` wrote, without the variables."""
        values = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
        with np.load(folder / _ARRAYS) as arrays:
            count = sum(name.startswith("best/") for name in arrays.files)
            return cls(**values, best_weights=[arrays[f"best/{index}"] for index in range(count)])

    @classmethod
    def restore(cls, folder: Path, model: keras.Model) -> "State":
        """`load`, and sets the variables of the model and its optimizer, which must be built alike."""
        variables = _variables(model)
        with np.load(folder / _ARRAYS) as arrays:
            saved = {name for name in arrays.files if not name.startswith("best/")}
            assert saved == variables.keys(), "a checkpoint of another network"
            for name, variable in variables.items():
                variable.assign(arrays[name])
        return cls.load(folder)


def _variables(model: keras.Model) -> dict[str, Any]:
    of_model = {f"model/{index}/{variable.path}": variable for index, variable in enumerate(model.variables)}
    of_optimizer = {
        f"optimizer/{index}/{variable.path}": variable for index, variable in enumerate(model.optimizer.variables)
    }
    return of_model | of_optimizer


def _rank(logs: dict[str, Any]) -> tuple[float, float]:
    dice = logs["val/dice_pooled"]
    return (-math.inf if dice is None else dice, -logs["val/loss"])
