"""Checkpoints: what is saved comes back, and a disk that is full leaves the one before."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pytest

from rayseg import retry
from rayseg.training.settings import TrainConfig
from rayseg.training.state import State


def model(seed: int) -> keras.Model:
    keras.utils.clear_session()  # names are counted
    keras.utils.set_random_seed(seed)
    built = keras.Sequential([keras.Input((4,)), keras.layers.Dense(200), keras.layers.Dropout(0.5)])
    built.compile(optimizer=keras.optimizers.Adam(0.1))
    built.optimizer.build(built.trainable_variables)
    return built


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond it fails, as on a full disk; Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved, outputs, folder = model(1), tmp_path / "outputs", str(tmp_path / "run")
    outputs.mkdir()
    (outputs / "history.csv").write_text("epoch\n0\n")
    saved.optimizer.apply([np.ones(value.shape, np.float32) for value in saved.trainable_variables])
    state = State(2, {"val/loss": 0.25}, [{"epoch": 1}, {"epoch": 2, "val/loss": None}], [{"best": 0.5}], True)
    assert State.load(folder, tmp_path / "none") is None
    State(1).save(folder, model(3), outputs)
    state.save(folder, saved, outputs)

    restored = model(2)
    assert State.load(folder, tmp_path / "back", restored) == state
    assert (tmp_path / "back/history.csv").read_text() == "epoch\n0\n"
    for ours, others in (
        (saved.variables, restored.variables),
        (saved.optimizer.variables, restored.optimizer.variables),
    ):
        assert [value.path for value in ours] == [value.path for value in others]
        for one, other in zip(ours, others, strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert [path.name for path in Path(folder).glob("epoch-*")] == ["epoch-00002"], "one is kept"


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.0)
    folder, outputs = str(tmp_path / "run"), tmp_path / "outputs"
    outputs.mkdir()
    State(1, history=[{"epoch": 1}]).save(folder, model(1), outputs)
    with (
        files_of_at_most(1000),
        pytest.raises(RuntimeError, match=r"train.storage: the checkpoint of epoch 2 .*File too large"),
    ):
        State(2).save(folder, model(1), outputs)
    restored = State.load(folder, outputs, model(2))
    assert restored == State(1, history=[{"epoch": 1}])


def test_the_best_epoch_is_the_one_whose_weights_keras_has_kept(tmp_path: Path) -> None:
    for dice in ([0.1, 0.5, 0.5, 0.4], [None, None], [0.0, None, 0.0], [0.3, None, 0.2, 0.4, 0.4]):
        state = State(history=[{"epoch": epoch, "val/dice_pooled": value} for epoch, value in enumerate(dice, 1)])
        built, file = model(1), tmp_path / "best.weights.h5"
        keeper = keras.callbacks.ModelCheckpoint(
            str(file), monitor="val/dice_pooled", mode="max", save_best_only=True, save_weights_only=True
        )
        keeper.set_model(built)
        for epoch, value in enumerate(dice, 1):
            for weight in built.trainable_variables:
                weight.assign(np.full(weight.shape, epoch))
            keeper.on_epoch_end(epoch, {} if value is None else {"val/dice_pooled": value})
        built.load_weights(file)
        assert {state.best()[0]} == set(built.get_weights()[0].ravel().tolist()), dice


def test_the_threshold_is_the_best_epochs_or_the_one_that_was_given() -> None:
    def config(threshold: float | None) -> TrainConfig:
        return TrainConfig(prepared="p", storage="s", tracking_uri="t", threshold=threshold)

    rows = [(0.4, 0.31), (0.6, 0.62), (0.5, 0.53)]
    history = [
        {"epoch": epoch, "val/dice_pooled": dice, "val/threshold": threshold}
        for epoch, (dice, threshold) in enumerate(rows, start=1)
    ]
    assert State(3, history=history).threshold(config(None)) == 0.62
    assert State(3, history=history).threshold(config(0.7)) == 0.7
    nothing = [{"epoch": 1, "val/dice_pooled": None, "val/threshold": None}]
    assert State(1, history=nothing).threshold(config(None)) == 0.5
