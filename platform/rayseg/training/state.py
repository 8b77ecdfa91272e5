"""What a training run is after a step, so that it can go on from there as if never interrupted.

Any number of workers can go on. A run's folder on the store has a folder for each checkpoint, one an epoch and some
within long ones, of which only the last one is kept, and a small file that says which one is whole: it is written last
and atomically, so a run killed at any moment finds a checkpoint or none.
"""

import json
import math
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from rayseg import storage
from rayseg.training.settings import DEFAULT_THRESHOLD, TrainConfig

ARRAYS, _VALUES, _OUTPUTS = "state.npz", "state.json", "outputs"
_LATEST = "latest.json"


@dataclass(frozen=True)
class Part:
    """What is done of an epoch: steps, and what they came to over all rows and ranks so far."""

    step: int = 0
    loss: float = 0.0  # summed over the rows
    rows: float = 0.0
    waited_s: float = 0.0  # for data; as `seconds`, the mean over the ranks
    seconds: float = 0.0


@dataclass
class State:
    """Beside the variables of the model and its optimizer, which stay in those.

    epoch: epochs done.
    part: what is done of the next one.
    untrained: validation before the first step, `val/loss` and `val/dice_pooled`.
    history: one row an epoch: `epoch`, `train/loss`, `val/loss`, `val/dice_pooled`, ...
    callbacks: what Keras's callbacks remember, see `callbacks.remembered`.
    stopped: a callback has ended the run.
    """

    epoch: int = 0
    untrained: dict[str, float | None] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    part: Part = Part()

    def best(self) -> tuple[int, dict[str, Any]]:
        """The epoch whose weights Keras's ModelCheckpoint has kept, and its row.

        It is the first of the highest pooled validation Dice; one that has no Dice, without any foreground, replaces
        what was kept before.
        """
        highest, kept = -math.inf, self.history[0]
        for row in self.history:
            dice = row["val/dice_pooled"]
            if dice is None or dice > highest:
                highest, kept = highest if dice is None else dice, row
        return kept["epoch"], kept

    def threshold(self, config: TrainConfig) -> float:
        """What the best epoch's pixels of one class are decided by: given, or chosen on the validation patients.

        A half where these have nothing to find. Several classes have none.
        """
        if config.threshold is not None:
            return config.threshold
        chosen: float | None = self.best()[1].get("val/threshold")
        return DEFAULT_THRESHOLD if chosen is None else chosen

    def save(self, uri: str, model: keras.Model, outputs: Path) -> None:
        """Makes this the last checkpoint of the run in folder `uri`.

        Args:
            uri: of the run's folder.
            model: its variables (seeds of dropout included) and those of its optimizer are saved.
            outputs: a local folder of files that callbacks write; they are saved as they are.

        Raises:
            RuntimeError: the store cannot take it; what was saved before stays.
        """
        name = _name(self.epoch, self.part.step)
        try:
            before = _latest(uri)
            with tempfile.TemporaryDirectory(prefix="rayseg-checkpoint-") as temporary:
                variables = {name: variable.numpy() for name, variable in _variables(model).items()}
                np.savez(Path(temporary, ARRAYS), **variables)
                Path(temporary, _VALUES).write_text(json.dumps(asdict(self)), encoding="utf-8")
                storage.upload(temporary, storage.join(uri, name))
            storage.upload(outputs, storage.join(uri, name, _OUTPUTS))
            storage.write_json(storage.join(uri, _LATEST), {"epoch": self.epoch, "step": self.part.step})
            if before is not None and before != name:
                storage.delete_tree(storage.join(uri, before))
        except OSError as error:
            raise RuntimeError(
                f"train.storage: the checkpoint of epoch {self.epoch} cannot be written ("
                f"{error.strerror or type(error).__name__}); the one before stays, and the same job started again goes "
                "on from there"
            ) from error

    @classmethod
    def load(cls, uri: str, outputs: Path, model: keras.Model | None = None) -> "State | None":
        """The last checkpoint of the run in folder `uri`, None where it has none.

        Args:
            uri: of the run's folder.
            outputs: a local folder; the files of callbacks are put there.
            model: its variables and those of its optimizer are set. It must be built alike.
        """
        latest = _latest(uri)
        if latest is None:
            return None
        checkpoint = storage.join(uri, latest)
        if storage.exists(storage.join(checkpoint, _OUTPUTS)):
            storage.download(storage.join(checkpoint, _OUTPUTS), outputs)
        if model is not None:
            with tempfile.TemporaryDirectory(prefix="rayseg-checkpoint-") as temporary:
                arrays_file = Path(temporary, ARRAYS)
                arrays_file.write_bytes(storage.read(storage.join(checkpoint, ARRAYS)))
                _assign(model, arrays_file)
        values = storage.read_json(storage.join(checkpoint, _VALUES))
        return cls(**{**values, "part": Part(**values.get("part", {}))})


def _assign(model: keras.Model, arrays_file: Path) -> None:
    variables = _variables(model)
    with np.load(arrays_file) as arrays:
        assert set(arrays.files) == variables.keys(), "a checkpoint of another network"
        for name, variable in variables.items():
            variable.assign(arrays[name])


def _latest(uri: str) -> str | None:
    """The folder of the last whole checkpoint."""
    try:
        latest = storage.read_json(storage.join(uri, _LATEST))
    except FileNotFoundError:
        return None
    return _name(latest["epoch"], latest.get("step", 0))


def _name(epoch: int, step: int) -> str:
    return f"epoch-{epoch:05d}" + (f"-step-{step:07d}" if step else "")


def _variables(model: keras.Model) -> dict[str, Any]:
    of_model = {f"model/{index}/{variable.path}": variable for index, variable in enumerate(model.variables)}
    of_optimizer = {
        f"optimizer/{index}/{variable.path}": variable for index, variable in enumerate(model.optimizer.variables)
    }
    return of_model | of_optimizer
