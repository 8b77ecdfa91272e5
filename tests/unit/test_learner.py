"""The training step: what it does to the weights, against the formulas, in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import f1_score

from rayseg.data.prepared import describe
from rayseg.models.encoders import encoder_layers
from rayseg.models.losses import bce_dice
from rayseg.models.presets import NetworkConfig
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
from rayseg.training.state import Part, State

STEPS = 3  # of an epoch of 22 rows


def learner(discs: str, **changes: Any) -> Learner:
    keras.utils.set_random_seed(1)
    values: dict[str, Any] = {
        "prepared": discs,
        "storage": "unused",
        "tracking_uri": "unused",
        "model": NetworkConfig(widths=(4,), convolutions=1),
        "batch_size": 8,
        "learning_rate": 0.02,
        "schedule": "constant",
        "mixed_precision": "float32",
        "num_workers": 1,
    }
    return Learner(TrainConfig(**(values | changes)), describe(discs), 0, 1, lambda: None)


def train(learner: Learner, *callbacks: keras.callbacks.Callback, epoch: int = 0) -> dict[str, Any]:
    return learner.train(epoch, keras.callbacks.CallbackList(list(callbacks), model=learner.model))


def test_a_batch_in_parts_makes_the_step_of_the_whole(discs: str) -> None:
    whole, parts = learner(discs), learner(discs, accumulation=4)
    losses = [train(one)["train/loss"] for one in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for ours, others in zip(whole.model.get_weights(), parts.model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, others, atol=1e-5)


@pytest.mark.parametrize("first", [1, STEPS])
def test_an_epoch_that_goes_on_from_a_checkpoint_within_ends_bit_equal(discs: str, tmp_path: Path, first: int) -> None:
    changes = {"ema_momentum": 0.8, "model": NetworkConfig(widths=(4,), convolutions=1, dropout=0.3)}
    keras.utils.clear_session()  # names are counted
    whole, folder = learner(discs, **changes), str(tmp_path)

    def keep(step: int, summed: Callable[[], Part]) -> None:
        if step == first:
            State(part=summed()).save(folder, whole.model, tmp_path / "outputs")

    (tmp_path / "outputs").mkdir()
    logs = whole.train(0, keras.callbacks.CallbackList([], model=whole.model), look=keep)
    keras.utils.clear_session()
    rest = learner(discs, **changes)
    state = State.load(folder, tmp_path / "back", rest.model)
    assert state is not None
    assert (state.part.step, state.part.rows) == (first, min(22, 8 * first))
    seen: list[int] = []
    again = rest.train(
        0,
        keras.callbacks.CallbackList([], model=rest.model),
        state.part,
        lambda step, summed: seen.append(step),
    )
    assert seen == list(range(first + 1, STEPS + 1))
    assert again["train/loss"] == logs["train/loss"]
    for ours, others in ((whole.model, rest.model), (whole.model.optimizer, rest.model.optimizer)):
        for one, other in zip(ours.variables, others.variables, strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_timed_step_is_a_step_of_the_training_and_takes_time(discs: str) -> None:
    timed, other = learner(discs, batch_size=6, accumulation=2), learner(discs, batch_size=6, accumulation=2)
    before = timed.model.get_weights()
    assert timed.timed_step() > 0
    assert other.timed_step() > 0
    assert float(timed.model.optimizer.iterations.numpy()) == 1
    for old, new, same in zip(before, timed.model.get_weights(), other.model.get_weights(), strict=True):
        assert (old != new).any()
        np.testing.assert_array_equal(new, same, "always the same noise")


def test_validation_names_the_threshold_of_the_best_dice_unless_one_is_given(discs: str) -> None:
    run = learner(discs)
    train(run)
    rows = describe(discs).read_rows("val").to_pylist()
    images = np.stack([np.frombuffer(row["image"], np.uint8).reshape(32, 32, 1) for row in rows])
    truth = np.stack([np.frombuffer(row["mask"], np.uint8).reshape(32, 32) for row in rows]) > 0
    probability = run.model(images).numpy()[..., 0]

    def dice(threshold: float) -> float:
        return f1_score(truth.ravel(), (probability >= threshold).ravel())

    scores = run.validate()
    threshold = scores["val/threshold"]
    assert dice(threshold) == pytest.approx(scores["val/dice_pooled"], abs=1e-6)
    assert dice(threshold) >= max(dice(one) for one in np.quantile(probability, np.linspace(0, 1, 60))) - 1e-3
    assert dice(threshold) > dice(0.5) + 0.01, "else this would say little"
    assert "val/threshold" not in learner(discs, threshold=0.5).validate()


def test_xla_computes_the_same(discs: str) -> None:
    assert train(learner(discs, jit_compile=True))["train/loss"] == pytest.approx(
        train(learner(discs))["train/loss"], rel=1e-4
    )


def test_gradients_are_clipped_to_their_common_norm(discs: str) -> None:
    class Momentum(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            # Adam's first moment after one step is a tenth of the gradient (Kingma and Ba 2015, beta_1 = 0.9).
            if batch == 0:
                moments = [value.numpy() for value in self.model.optimizer.variables if "momentum" in value.path]
                self.norm = 10 * np.sqrt(sum(float(np.square(moment).sum()) for moment in moments))

    free, clipped = Momentum(), Momentum()
    train(learner(discs), free)
    train(learner(discs, clip_norm=0.01), clipped)
    assert free.norm > 0.1
    assert clipped.norm == pytest.approx(0.01, rel=1e-4)


def test_the_moving_average_follows_its_formula_and_leaves_the_weights(discs: str) -> None:
    class Weights(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[np.ndarray]] = []

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.seen.append([value.numpy() for value in self.model.trainable_variables])

    run, weights = learner(discs, ema_momentum=0.8), Weights()
    train(run, weights)
    assert len(weights.seen) == STEPS
    expected = weights.seen[0]
    for step in weights.seen[1:]:
        expected = [0.8 * average + 0.2 * value for average, value in zip(expected, step, strict=True)]
    with run.averaged(0):
        averaged = [value.numpy() for value in run.model.trainable_variables]
    for ours, formula in zip(averaged, expected, strict=True):
        np.testing.assert_allclose(ours, formula, atol=1e-6)
    for value, last in zip(run.model.trainable_variables, weights.seen[-1], strict=True):
        np.testing.assert_array_equal(value.numpy(), last)


def test_averaged_weights_have_statistics_of_their_own(discs: str) -> None:
    network = NetworkConfig(widths=(4,), convolutions=1, normalization="batch")
    run = learner(discs, model=network, ema_momentum=0.9, learning_rate=0.2)
    for epoch in range(3):
        train(run, epoch=epoch)
    (norm, *_) = [layer for layer in run.model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    raw = [value.numpy() for value in run.model.non_trainable_variables]
    with run.averaged(7):
        mean = norm.moving_mean.numpy()
        # The first normalisation's input does not depend on other normalisations: by hand, of the same whole batches.
        inputs = keras.Model(run.model.inputs, norm.input)
        batches = [inputs([image]).numpy() for image in run._images(7)]
    assert len(batches) == STEPS - 1, "22 rows: the third batch is padded"
    np.testing.assert_allclose(mean, np.mean([batch.mean(axis=(0, 1, 2)) for batch in batches], axis=0), rtol=1e-4)
    assert np.abs(mean - raw[0]).max() > 0.01 * np.abs(mean).max(), "else this would say little"
    for value, before in zip(run.model.non_trainable_variables, raw, strict=True):
        np.testing.assert_array_equal(value.numpy(), before)


def test_a_frozen_encoder_begins_to_learn_when_it_thaws(discs: str) -> None:
    run = learner(discs, model=NetworkConfig(preset="unet-resnet50"), freeze_epochs=2)
    encoder = {one.path for layer in encoder_layers(run.model) for one in layer.trainable_variables}
    late = run.model.optimizer._late_by_index
    assert {run._variables[index].path for index in late} == encoder
    assert set(late.values()) == {2 * STEPS}


def test_half_precision_skips_a_step_whose_gradients_overflow(discs: str) -> None:
    run = learner(discs, mixed_precision="mixed_float16")
    run.model.optimizer.dynamic_scale.assign(2.0**40)
    before = run.model.get_weights()
    train(run)
    for ours, others in zip(run.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, others)
    assert run.model.optimizer.dynamic_scale.numpy() == 2.0 ** (40 - STEPS)
    run.model.optimizer.dynamic_scale.assign(2.0**10)
    train(run)
    assert any((ours != others).any() for ours, others in zip(run.model.get_weights(), before, strict=True))


def test_frozen_layers_stay_and_learn_again_afterwards(discs: str) -> None:
    run = learner(discs)
    first, last = run.model.get_layer("bottom_conv1"), run.model.get_layer("logits")
    run.freeze([first], True)
    before = first.get_weights(), last.get_weights()
    train(run)
    np.testing.assert_array_equal(first.get_weights()[0], before[0][0])
    assert (last.get_weights()[0] != before[1][0]).any()
    run.freeze([first], False)
    train(run, epoch=1)
    assert (first.get_weights()[0] != before[0][0]).any()


def test_each_further_output_counts_half_as_much(discs: str) -> None:
    mask_NHW = tf.constant(np.random.default_rng(0).integers(0, 2, (2, 8, 8)), tf.uint8)
    outputs = [tf.fill((2, 8, 8, 1), value) for value in (0.3, 0.5, 0.9)]
    losses = [bce_dice(mask_NHW, output).numpy() for output in outputs]
    expected = (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75
    np.testing.assert_allclose(learner(discs)._supervised(mask_NHW, outputs).numpy(), expected, rtol=1e-6)


def test_validation_counts_what_the_model_finds(discs: str, tmp_path: Path) -> None:
    run = learner(discs, threshold=0.5)
    train(run)
    rows = describe(discs).read_rows("val").to_pylist()
    images = np.stack([np.frombuffer(row["image"], np.uint8).reshape(32, 32, 1) for row in rows])
    truth = np.stack([np.frombuffer(row["mask"], np.uint8).reshape(32, 32) for row in rows]) > 0
    found = np.asarray(run.model(images))[..., 0] >= 0.5
    scores = run.validate()
    assert scores["val/dice_pooled"] == pytest.approx(2 * (found & truth).sum() / (found.sum() + truth.sum()))
    assert scores["val/accuracy_pooled"] == pytest.approx((found == truth).mean())
