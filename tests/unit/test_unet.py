"""The U-Net: shapes, types, gradients, and a saved model that comes back the same."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from rayseg.models.blocks import GroupNormalization
from rayseg.models.losses import bce_dice
from rayseg.models.network import build_network, portable
from rayseg.models.presets import NetworkConfig

SHAPE = (16, 24, 2)


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("normalization", ["none", "group", "batch"])
def test_probabilities_in_float32_and_finite_gradients_for_every_weight(normalization: str, policy: str) -> None:
    config = NetworkConfig(widths=(4, 8, 12), normalization=normalization, dropout=0.2)  # type: ignore[arg-type]
    model = build_network(config, SHAPE, policy=policy)
    assert model.input_shape == (None, *SHAPE)
    mask = (images()[..., 0] > 128).astype(np.uint8)
    with tf.GradientTape() as tape:
        probability = model(images(), training=True)
        loss = tf.reduce_mean(bce_dice(mask, probability))
    assert probability.shape == (3, 16, 24, 1)
    assert probability.dtype == tf.float32
    assert 0 < float(tf.reduce_min(probability)) < float(tf.reduce_max(probability)) < 1
    for weight, gradient in zip(model.trainable_weights, tape.gradient(loss, model.trainable_weights), strict=True):
        assert weight.dtype == "float32", "weights stay in float32 under any policy"
        assert np.isfinite(gradient.numpy()).all(), weight.path
        assert np.abs(gradient.numpy()).max() > 0, weight.path


@pytest.mark.parametrize("normalization", ["none", "group", "batch"])
def test_a_saved_model_gives_the_same_probabilities(normalization: str, tmp_path: Path) -> None:
    model = build_network(NetworkConfig(widths=(4, 8), normalization=normalization), SHAPE)  # type: ignore[arg-type]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert np.array_equal(loaded(images()), model(images()))


def test_a_portable_model_opens_without_this_package_and_agrees(tmp_path: Path) -> None:
    model = build_network(NetworkConfig(widths=(8, 16)), SHAPE)
    model.set_weights([weight + np.float32(0.1) for weight in model.get_weights()])
    portable(model).save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images())
    code = (
        "import keras, numpy as np, sys; assert not any(name.startswith('rayseg') for name in sys.modules);"
        "np.save('out.npy', keras.saving.load_model('model.keras')(np.load('images.npy')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert np.abs(np.load(tmp_path / "out.npy") - model(images()).numpy()).max() < 1e-5


def test_the_number_of_parameters_is_that_of_the_paper_s_network_without_its_extras() -> None:
    # By hand, widths (4, 8), one channel: 3*3*1*4 + 3*3*4*4 | 3*3*4*8 + 3*3*8*8 | up 2*2*8*4 + 4, 3*3*8*4 + 3*3*4*4
    # | 4 + 1; without normalisation a bias for each filter: 4 + 4 + 8 + 8 + 4 + 4.
    convolutions = 36 + 144 + 288 + 576 + 132 + 288 + 144 + 5
    shape = (8, 8, 1)
    assert build_network(NetworkConfig(widths=(4, 8), normalization="none"), shape).count_params() == convolutions + 32
    assert (
        build_network(NetworkConfig(widths=(4, 8), normalization="group"), shape).count_params()
        == convolutions + 2 * 32
    )
    assert (
        build_network(NetworkConfig(widths=(4, 8), normalization="batch"), shape).count_params()
        == convolutions + 4 * 32
    )


def test_equal_seeds_give_equal_weights() -> None:
    def weights(seed: int) -> list[np.ndarray]:
        keras.utils.set_random_seed(seed)
        return build_network(NetworkConfig(widths=(4, 8)), SHAPE).get_weights()

    assert all(np.array_equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


def test_a_sample_does_not_see_the_others_of_its_batch_with_group_normalisation() -> None:
    model = build_network(NetworkConfig(widths=(8, 16)), SHAPE)
    together = model(images(5), training=True)
    alone = np.concatenate([model(images(5)[n : n + 1], training=True) for n in range(5)])
    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 6), (6, 6), (8, 32)])
def test_group_normalisation_is_that_of_keras(groups: int, channels: int, dtype: str) -> None:
    random = np.random.default_rng(1)
    # Far from mean 0, where a variance from sums of squares would lose its digits.
    values = (random.normal(300, 2, (3, 8, 9, channels)) * random.uniform(0.1, 3, channels)).astype(np.float32)
    ours, keras_s = GroupNormalization(groups, dtype=dtype), keras.layers.GroupNormalization(groups, dtype=dtype)
    ours.build(values.shape)
    keras_s.build(values.shape)
    weights = [random.normal(1, 0.3, channels), random.normal(0, 1, channels)]
    ours.set_weights(weights)
    keras_s.set_weights(weights)
    result, expected = ours(values), keras_s(values)
    assert result.dtype == expected.dtype
    tolerance = 2e-4 if dtype == "float32" else 0.05
    assert np.abs(np.asarray(result, np.float32) - np.asarray(expected, np.float32)).max() < tolerance


def test_what_does_not_fit_is_refused_with_the_key() -> None:
    with pytest.raises(ValueError, match=r"model\.widths: 4 levels need .* divisible by 8.*20 x 24"):
        build_network(NetworkConfig(), (20, 24, 1))
    with pytest.raises(ValueError, match=r"model\.widths"):
        NetworkConfig(widths=())
    with pytest.raises(ValueError, match=r"model\.convolutions"):
        NetworkConfig(convolutions=0)
    with pytest.raises(ValueError, match=r"model\.dropout"):
        NetworkConfig(dropout=1.0)


def test_several_classes_are_a_softmax_with_the_background() -> None:
    model = build_network(NetworkConfig(widths=(4, 8)), SHAPE, classes=3, policy="mixed_bfloat16")
    probability = model(images()).numpy()
    assert probability.shape == (3, 16, 24, 4)
    assert probability.dtype == np.float32
    assert np.allclose(probability.sum(axis=-1), 1, atol=1e-6)
