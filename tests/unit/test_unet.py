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
from rayseg.models.weights import start_from

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


def test_several_classes_are_a_softmax_with_the_background() -> None:
    model = build_network(NetworkConfig(widths=(4, 8)), SHAPE, classes=3, policy="mixed_bfloat16")
    probability = model(images()).numpy()
    assert probability.shape == (3, 16, 24, 4)
    assert probability.dtype == np.float32
    assert np.allclose(probability.sum(axis=-1), 1, atol=1e-6)


def test_instance_normalisation_brings_each_channel_of_each_image_to_mean_0_and_deviation_1() -> None:
    model = build_network(NetworkConfig(widths=(4, 8), normalization="instance"), SHAPE)
    layer = model.get_layer("down1_norm1")
    layer.set_weights([np.array([1, 2, 3, 4]), np.array([0, 1, 0, -1])])
    before, after = keras.Model(model.input, [layer.input, layer.output])(images())
    before = np.asarray(before, np.float64)
    mean, variance = before.mean(axis=(1, 2), keepdims=True), before.var(axis=(1, 2), keepdims=True)
    expected = (before - mean) / np.sqrt(variance + layer.epsilon) * [1, 2, 3, 4] + [0, 1, 0, -1]
    assert np.abs(np.asarray(after) - expected).max() < 1e-4


def test_auxiliary_outputs_are_the_coarser_levels_at_full_size() -> None:
    config = NetworkConfig(preset="unet-residual", widths=(4, 8, 8, 8), residual=(1, 1, 1, 1), deep_supervision=2)
    model = build_network(config, (32, 16, 1), classes=2)
    assert model.output_shape == [(None, 32, 16, 3)] * 3
    for index, factor in ((1, 2), (2, 4)):
        assert model.get_layer(f"aux{index}_logits").output.shape == (None, 32 // factor, 16 // factor, 3)
    single = portable(model)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 16, 1), dtype=np.uint8)
    assert single.output_shape == (None, 32, 16, 3)
    assert np.abs(single(pictures) - model(pictures)[0]).max() < 1e-5
    # An even field stays even however it is enlarged.
    for weight in model.get_layer("aux2_logits").weights[:1]:
        weight.assign(np.zeros(weight.shape))
    model.get_layer("aux2_logits").bias.assign([0, np.log(3), 0])
    assert np.allclose(model(pictures)[2], [0.2, 0.6, 0.2], atol=1e-6)


def test_a_network_starts_from_another_of_its_form_with_or_without_auxiliary_outputs() -> None:
    def residual(classes: int = 1, **changed: object) -> keras.Model:
        values = {"widths": (4, 8, 8), "residual": (1, 1, 1), "deep_supervision": 1} | changed
        return build_network(NetworkConfig(preset="unet-residual", **values), (16, 16, 1), classes)  # type: ignore[arg-type]

    source, target = residual(), residual()
    untouched = target.get_layer("aux1_logits").get_weights()
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    start_from(target, portable(source))
    assert np.array_equal(target(pictures)[0], source(pictures)[0])
    kept = zip(target.get_layer("aux1_logits").get_weights(), untouched, strict=True)
    assert all(np.array_equal(*pair) for pair in kept)
    start_from(target, source)
    assert np.array_equal(target(pictures)[1], source(pictures)[1])
    single = residual(deep_supervision=0)
    start_from(single, source)
    assert np.array_equal(single(pictures), source(pictures)[0])

    before = target.get_weights()
    for other, message in (
        (residual(classes=2), r"layer aux1_logits has the shapes \[\(1, 1, 8, 1\), \(1,\)\] in train.model and .*8, 3"),
        (residual(residual=(1, 1, 2)), "its network has a layer bottom_block2_conv1, which train.model has not"),
    ):
        with pytest.raises(ValueError, match=rf"train\.init_from: .*{message}"):
            start_from(target, other)
    assert all(np.array_equal(*pair) for pair in zip(target.get_weights(), before, strict=True)), "all or nothing"
    with pytest.raises(ValueError, match=r"train\.init_from: its network has no layer bottom_block2_conv1"):
        start_from(residual(residual=(1, 1, 2)), target)
