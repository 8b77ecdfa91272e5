"""The training step of volumes: patches of a set as prepare writes it, in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import f1_score

from rayseg.data import chunks
from rayseg.data.augment import Augment
from rayseg.data.patches import Patches, windows
from rayseg.data.prepared import describe
from rayseg.data.volume_augment import VolumeAugment
from rayseg.models.presets import NetworkConfig
from rayseg.training import start
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
from rayseg.training.state import Part, State
from tests import balls

FORM: dict[str, Any] = {
    "preset": "unet3d-plain",
    "widths": (4, 8),
    "convolutions": 1,
    "kernels": ((1, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2)),
    "deep_supervision": 0,
}
# With an auxiliary output.
DEEP: dict[str, Any] = FORM | {
    "widths": (4, 8, 8),
    "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "deep_supervision": 1,
}
STEPS = 4  # of an epoch of 7 volumes with 2 patches each


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return balls.prepare(tmp_path_factory.mktemp("balls"))


def config(prepared: str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "prepared": prepared,
        "storage": "unused",
        "tracking_uri": "unused",
        "model": NetworkConfig(**FORM),
        "patches": Patches(2, augment=VolumeAugment()),
        "batch_size": 4,
        "learning_rate": 0.02,
        "schedule": "constant",
        "num_workers": 1,
    }
    return TrainConfig(**(values | changes))


def learner(prepared: str, **changes: Any) -> Learner:
    keras.utils.clear_session()  # names are counted
    keras.utils.set_random_seed(1)
    return Learner(config(prepared, **changes), describe(prepared), 0, 1, lambda: None)


def train(learner: Learner, epoch: int = 0) -> dict[str, Any]:
    return learner.train(epoch, keras.callbacks.CallbackList([], model=learner.model))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_it_learns_with_deep_supervision_and_in_half_precision(volumes: str, policy: str) -> None:
    # Without a normalisation over a patch, as windows of validation hang over the small volumes.
    form = NetworkConfig(**DEEP, normalization="none")
    run = learner(volumes, model=form, mixed_precision=policy, patches=Patches(8), learning_rate=0.01)
    before = run.validate()
    losses = [train(run, epoch)["train/loss"] for epoch in range(4)]
    after = run.validate()
    assert losses[-1] < 0.6 * losses[0]
    assert after["val/loss"] < 0.8 * before["val/loss"]
    assert after["val/dice_pooled"] > 0.35 > 0.2 > (before["val/dice_pooled"] or 0)


def test_a_batch_in_parts_makes_the_step_of_the_whole(volumes: str) -> None:
    whole, parts = learner(volumes), learner(volumes, accumulation=4)
    losses = [train(one)["train/loss"] for one in (whole, parts)]
    assert whole.steps == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, others in zip(whole.model.get_weights(), parts.model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, others, atol=1e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_an_epoch_that_goes_on_from_a_checkpoint_within_ends_bit_equal(
    volumes: str, tmp_path: Path, policy: str
) -> None:
    changes = {"ema_momentum": 0.8, "model": NetworkConfig(**FORM, dropout=0.3), "mixed_precision": policy}
    whole, folder, first = learner(volumes, **changes), str(tmp_path), 2
    (tmp_path / "outputs").mkdir()

    def keep(step: int, summed: Callable[[], Part]) -> None:
        if step == first:
            State(part=summed()).save(folder, whole.model, tmp_path / "outputs")

    logs = whole.train(0, keras.callbacks.CallbackList([], model=whole.model), look=keep)
    rest = learner(volumes, **changes)
    state = State.load(folder, tmp_path / "back", rest.model)
    assert state is not None
    assert (state.part.step, state.part.rows) == (first, 4 * first)
    again = rest.train(0, keras.callbacks.CallbackList([], model=rest.model), state.part)
    assert again["train/loss"] == logs["train/loss"]
    for ours, others in ((whole.model, rest.model), (whole.model.optimizer, rest.model.optimizer)):
        for one, other in zip(ours.variables, others.variables, strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_validation_counts_every_voxel_of_the_volumes_windows(volumes: str) -> None:
    run, prepared = learner(volumes), describe(volumes)
    train(run)
    truth, found, losses = [], [], []
    for window in windows(prepared, "val"):
        uri = str(Path(volumes, prepared.volumes["val"][window.volume]))
        assert window.first is not None
        image_DHW, mask_DHW = chunks.index(uri).read(uri, window.first, balls.PATCH)
        probability = run.model(image_DHW[None, ..., None])
        truth.append(mask_DHW)
        found.append(probability.numpy()[0].argmax(axis=-1))
        losses.append(run._loss(mask_DHW[None], probability).numpy()[0])
    whole = [np.concatenate([one.ravel() for one in of]) for of in (truth, found)]
    assert len(truth) > balls.VOLUMES["val"], "several windows a volume"
    scores = run.validate()
    for index, name in ((1, "front"), (2, "back")):
        expected = f1_score(whole[0] == index, whole[1] == index)
        assert scores[f"val/dice_pooled/{name}"] == pytest.approx(expected, abs=1e-3)
    assert scores["val/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert "val/threshold" not in scores


def test_a_timed_step_takes_noise_of_the_set_s_type(volumes: str) -> None:
    timed, other = learner(volumes), learner(volumes)
    assert timed._signature[0] == tf.TensorSpec((4, 8, 16, 16, 1), tf.float16)
    assert timed._signature[1] == tf.TensorSpec((4, 8, 16, 16), tf.uint8)
    before = timed.model.get_weights()
    assert timed.timed_step() > 0
    assert other.timed_step() > 0
    for old, new, same in zip(before, timed.model.get_weights(), other.model.get_weights(), strict=True):
        assert (old != new).any()
        np.testing.assert_array_equal(new, same, "always the same noise")


def test_averaged_weights_have_statistics_of_their_own(volumes: str) -> None:
    form = NetworkConfig(**FORM, normalization="batch")
    run = learner(volumes, model=form, ema_momentum=0.9, learning_rate=0.2)
    for epoch in range(2):
        train(run, epoch)
    (norm, *_) = [layer for layer in run.model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    raw = [value.numpy() for value in run.model.non_trainable_variables]
    with run.averaged(7):
        mean = norm.moving_mean.numpy()
        inputs = keras.Model(run.model.inputs, norm.input)
        batches = [inputs(image).numpy() for image in run._images(7)]
    assert len(batches) == STEPS - 1, "14 patches: the fourth batch is padded"
    np.testing.assert_allclose(mean, np.mean([batch.mean(axis=(0, 1, 2, 3)) for batch in batches], axis=0), rtol=1e-3)
    for value, before in zip(run.model.non_trainable_variables, raw, strict=True):
        np.testing.assert_array_equal(value.numpy(), before)


def test_augmentation_of_the_other_kind_is_refused_by_name(volumes: str, discs: str) -> None:
    with pytest.raises(ValueError, match=r"train\.augment: is of images, .* give train\.patches\.augment"):
        start.check_augmentation(config(volumes, augment=Augment()), describe(volumes))
    with pytest.raises(ValueError, match=r"train\.patches: is of volumes, and the prepared set has images"):
        start.check_augmentation(config(discs), describe(discs))
    start.check_augmentation(config(volumes), describe(volumes))
    start.check_augmentation(config(discs, patches=Patches(), augment=Augment()), describe(discs))


def test_a_network_of_images_is_refused_for_volumes(volumes: str) -> None:
    with pytest.raises(ValueError, match=r"model\.preset: unet-small is for images, the prepared set has volumes"):
        start.network(config(volumes, model=NetworkConfig()), describe(volumes))
