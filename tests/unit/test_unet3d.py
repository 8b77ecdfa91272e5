"""U-Nets of volumes: shapes, types, gradients, parameters, and a saved model that comes back the same."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from rayseg import config as configuration
from rayseg.models import engine, ensemble
from rayseg.models.blocks import GroupNormalization
from rayseg.models.losses import ce_dice
from rayseg.models.network import build_network, portable
from rayseg.models.presets import NetworkConfig
from rayseg.models.weights import start_from

SHAPE = (4, 8, 16, 1)
# Slices twice as far apart as pixels, at first.
AXES: dict[str, Any] = {
    "widths": (4, 8, 12),
    "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
}


def build(shape: tuple[int, ...] = SHAPE, classes: int = 2, policy: str = "float32", **form: Any) -> keras.Model:
    return build_network(NetworkConfig(**({"preset": "unet3d-plain"} | AXES | form)), shape, classes, policy)


def volumes(count: int = 2, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1.5, (count, *shape)).astype(np.float16)


@pytest.mark.parametrize("preset", ["unet3d-plain", "unet3d-residual"])
@pytest.mark.parametrize(
    ("normalization", "policy"),
    [
        ("instance", "float32"),
        ("instance", "mixed_bfloat16"),
        ("instance", "mixed_float16"),
        ("group", "float32"),
        ("batch", "float32"),
        ("none", "mixed_bfloat16"),
    ],
)
def test_probabilities_in_float32_and_finite_gradients_for_every_weight(
    preset: str, normalization: str, policy: str
) -> None:
    model = build(preset=preset, normalization=normalization, dropout=0.2, policy=policy)
    mask = (np.abs(volumes()[..., 0]) > 1).astype(np.uint8) + (volumes()[..., 0] > 2)
    with tf.GradientTape() as tape:
        finest, coarser = model(volumes(), training=True)
        loss = tf.reduce_mean(ce_dice(mask, finest) + ce_dice(mask, coarser))
    for probability in (finest, coarser):
        assert probability.shape == (2, 4, 8, 16, 3)
        assert probability.dtype == tf.float32
        assert np.allclose(probability.numpy().sum(axis=-1), 1, atol=1e-6)
    for weight, gradient in zip(model.trainable_weights, tape.gradient(loss, model.trainable_weights), strict=True):
        assert weight.dtype == "float32", "weights stay in float32 under any policy"
        assert np.isfinite(gradient.numpy()).all(), weight.path
        assert np.abs(gradient.numpy()).max() > 0, weight.path


def test_each_level_is_smaller_by_its_strides_and_has_its_kernel_both_ways() -> None:
    model = build()
    sizes = {"down1": (4, 8, 16), "down2": (4, 4, 8), "bottom": (2, 2, 4), "up2": (4, 4, 8), "up1": (4, 8, 16)}
    kernels = {"down1": (1, 3, 3), "down2": (3, 3, 3), "bottom": (3, 3, 3), "up2": (3, 3, 3), "up1": (1, 3, 3)}
    for name, size in sizes.items():
        for index in (1, 2):
            layer = model.get_layer(f"{name}_conv{index}")
            assert (layer.output.shape[1:-1], layer.kernel_size) == (size, kernels[name])
    for name, strides in (("up1_upsample", (1, 2, 2)), ("up2_upsample", (2, 2, 2))):
        layer = model.get_layer(name)
        assert (layer.kernel_size, layer.strides) == (strides, strides)
    residual = build(preset="unet3d-residual")
    assert residual.get_layer("down2_block1_conv1").strides == (1, 2, 2)
    assert residual.get_layer("down2_block1_short_pool").pool_size == (1, 2, 2)
    assert residual.get_layer("bottom_block1_conv1").strides == (2, 2, 2)
    assert residual.get_layer("bottom_block2_conv1").strides == (1, 1, 1)
    for upsampling in ("upsample", "upsample_conv"):
        assert build(upsampling=upsampling).output_shape == [(None, 4, 8, 16, 3)] * 2


def plain_parameters(widths: tuple[int, ...], kernel: int, strides: int, channels: int, auxiliary: int) -> int:
    """Of two convolutions a block with instance normalisation: `kernel` and `strides` are products over the axes."""

    def block(before: int, filters: int) -> int:
        return kernel * (before * filters + filters * filters) + 2 * 2 * filters

    down = sum(block(before, filters) for before, filters in pairwise((1, *widths)))
    up = sum(strides * lower * filters + filters + block(2 * filters, filters) for filters, lower in pairwise(widths))
    return down + up + sum((filters + 1) * channels for filters in widths[: 1 + auxiliary])


def test_the_number_of_parameters_is_that_of_the_formula_and_of_nnu_net_s_own_networks() -> None:
    def parameters(shape: tuple[int, ...], **form: Any) -> int:
        with keras.StatelessScope(initialize_variables=False):  # weights without values
            model = build_network(NetworkConfig(**form), shape, classes=2)
        keras.utils.clear_session()  # else the next scope would fill them
        return model.count_params()

    shape = (64, 64, 64, 1)
    preset = parameters(shape, preset="unet3d-plain")
    assert preset == plain_parameters((32, 64, 128, 256), 27, 8, 3, auxiliary=1)
    small = parameters(shape, preset="unet3d-plain", widths=(4, 8, 12), kernels=((1, 3, 3),) * 3, deep_supervision=0)
    assert small == plain_parameters((4, 8, 12), 9, 8, 3, auxiliary=0)
    # PlainConvUNet and ResidualEncoderUNet of dynamic_network_architectures 0.4.4 (PyTorch), with conv_bias=False and
    # n_conv_per_stage_decoder of 2 and 1, counted once: 5,601,545, 102,336,719 and 604,665. They keep an output at the
    # coarsest level of the way up, which is not trained, and have no biases in transposed convolutions.
    assert preset == 5_601_545 - 3 * 129 + (32 + 64 + 128)
    assert parameters(shape, preset="unet3d-residual") == 102_336_719 - 3 * 321 + (32 + 64 + 128 + 256 + 320)
    anisotropic: dict[str, Any] = {
        "widths": (8, 16, 32, 64),
        "residual": (1, 2, 2, 2),
        "kernels": ((1, 3, 3), *((3, 3, 3),) * 3),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
        "deep_supervision": 1,
    }
    counted = parameters((8, 16, 16, 1), preset="unet3d-residual", **anisotropic)
    assert counted == 604_665 - 3 * 33 + (8 + 16 + 32)


@pytest.mark.parametrize("normalization", ["none", "group", "instance"])
def test_volumes_of_one_slice_are_images(normalization: str) -> None:
    """Kernels and strides without a depth make the network of images, whose weights then fit."""
    flat: dict[str, Any] = {"kernels": ((1, 3, 3),) * 3, "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2))}
    form = {"normalization": normalization, "activation": "relu", "deep_supervision": 0}
    of_volumes = build((1, 16, 24, 1), **flat, **form)
    of_images = build_network(NetworkConfig(widths=(4, 8, 12), **form), (16, 24, 1), classes=2)  # type: ignore[arg-type]
    weights = [weight + np.float32(0.05) for weight in of_images.get_weights()]
    of_images.set_weights(weights)
    of_volumes.set_weights([weight[None] if weight.ndim == 4 else weight for weight in weights])
    black_or_white = np.random.default_rng(1).integers(0, 2, (2, 16, 24, 1), np.uint8)  # 0 and 1 within the network
    found = of_volumes(black_or_white[:, None].astype(np.float16))
    assert np.abs(found[:, 0] - of_images(255 * black_or_white)).max() < 1e-5


@pytest.mark.parametrize("preset", ["unet3d-plain", "unet3d-residual"])
@pytest.mark.parametrize("normalization", ["group", "batch", "instance"])
def test_a_saved_model_gives_the_same_probabilities(preset: str, normalization: str, tmp_path: Path) -> None:
    model = build(preset=preset, normalization=normalization)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    for ours, others in zip(loaded(volumes()), model(volumes()), strict=True):
        assert np.array_equal(ours, others)


def test_a_portable_model_opens_without_this_package_and_agrees(tmp_path: Path) -> None:
    model = build(preset="unet3d-residual", normalization="group")
    model.set_weights([weight + np.float32(0.02) for weight in model.get_weights()])
    portable(model).save(tmp_path / "model.keras")
    np.save(tmp_path / "volumes.npy", volumes())
    code = (
        "import keras, numpy as np, sys; assert not any(name.startswith('rayseg') for name in sys.modules);"
        "np.save('out.npy', keras.saving.load_model('model.keras')(np.load('volumes.npy')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "out.npy")
    assert found.shape == (2, 4, 8, 16, 3), "the finest output alone"
    assert np.abs(found - model(volumes())[0].numpy()).max() < 1e-5


def test_auxiliary_outputs_are_the_coarser_levels_at_full_size() -> None:
    model = build()
    assert model.get_layer("aux1_logits").output.shape == (None, 4, 4, 8, 3)
    logits = keras.Model(model.input, model.get_layer("aux1_logits").output)(volumes()).numpy()
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    found = model(volumes())[1].numpy()
    for row in range(8):
        for column in range(16):
            assert np.allclose(found[:, :, row, column], expected[:, :, row // 2, column // 2], atol=1e-6)


def test_a_network_starts_from_another_of_its_form() -> None:
    source, target, other = build(), build(deep_supervision=0), build(kernels=((3, 3, 3),) * 3)
    start_from(target, portable(source))
    assert np.array_equal(target(volumes()), source(volumes())[0])
    with pytest.raises(ValueError, match=r"train\.init_from: layer down1_conv1 has the shapes \[\(3, 3, 3, 1, 4\)"):
        start_from(other, source)


def test_a_sample_does_not_see_the_others_of_its_batch() -> None:
    model = build(preset="unet3d-residual", deep_supervision=0)
    together = model(volumes(4), training=True)
    alone = np.concatenate([model(volumes(4)[n : n + 1], training=True) for n in range(4)])
    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 6), (6, 6)])
def test_group_normalisation_is_that_of_float64(groups: int, channels: int, dtype: str) -> None:
    random = np.random.default_rng(1)
    # Far from mean 0, where a variance from sums of squares would lose its digits.
    values = (random.normal(300, 2, (3, 5, 8, 9, channels)) * random.uniform(0.1, 3, channels)).astype(np.float32)
    layer = GroupNormalization(groups, dtype=dtype)
    layer.build(values.shape)
    gamma, beta = random.normal(1, 0.3, channels), random.normal(0, 1, channels)
    layer.set_weights([gamma, beta])
    given = tf.cast(values, layer.compute_dtype)  # as the layer before gives it
    grouped = tf.cast(given, tf.float64).numpy().reshape(3, -1, groups, channels // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + layer.epsilon)).reshape(values.shape) * gamma + beta
    result = layer(given)
    assert result.dtype == given.dtype
    result = tf.cast(result, tf.float64).numpy()
    assert np.abs(result - expected).max() < (2e-4 if dtype == "float32" else 0.03)


def test_networks_of_one_form_and_their_mirror_images_are_one_network() -> None:
    first, second = (build(deep_supervision=0) for _ in range(2))
    flips = [(), (0,), (1, 2)]
    one = ensemble.mean([first, second], flips)
    expected = []
    for model in (first, second):
        for axes in flips:
            turned = tuple(axis + 1 for axis in axes)
            expected.append(np.flip(model(np.flip(volumes(), turned)), turned))
    assert one.input_shape == (None, *SHAPE)
    assert np.abs(one(volumes()) - np.mean(expected, axis=0)).max() < 1e-6
    compiled = engine.compile_openvino(engine.convert(one), "float32")
    assert np.abs(compiled.exact(volumes()) - np.mean(expected, axis=0)).max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "values", "message"),
    [
        (
            (36, 56, 40, 1),
            {"preset": "unet3d-plain"},
            r"model\.strides: the 4 levels need depth, height and width divisible by 8 x 8 x 8, the patch has "
            r"36 x 56 x 40; change model\.strides \(with model\.widths\) or prepare\.volume\.patch",
        ),
        ((4, 8, 14, 1), AXES | {"preset": "unet3d-plain"}, r"model\.strides: .* divisible by 2 x 4 x 4"),
        (
            (2, 4, 4, 1),
            AXES | {"preset": "unet3d-plain"},
            r"model\.normalization: instance .* one voxel of 2 x 4 x 4 at 3 levels; shorten model\.widths or take",
        ),
        (
            (8, 8, 8, 1),
            {},
            r"model\.preset: unet-small is for images, the prepared set has volumes \(prepare\.volume\)",
        ),
        ((8, 8, 1), {"preset": "unet3d-plain"}, r"model\.preset: unet3d-plain is for volumes, .* take a preset of im"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_the_key_to_change(
    shape: tuple[int, ...], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(NetworkConfig(**values), shape)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kernels": [[3, 3, 3]] * 3}, r"model\.kernels: three positive numbers, .* each of the 4 levels expected"),
        ({"kernels": [[3, 3, 3]] * 3 + [[3, 0, 3]]}, r"model\.kernels: three positive"),
        ({"kernels": [[3, 3, 3]] * 3 + [[3, 2, 3]]}, r"model\.kernels: odd numbers expected"),
        ({"strides": [[1, 1, 1]] * 5}, r"model\.strides: .* each of the 4 levels"),
        ({"strides": [[2, 2, 2]] * 4}, r"model\.strides: \[1, 1, 1\] expected of the first level, .* got \[2, 2, 2\]"),
        ({"strides": [[1, 1]] * 4}, r"strides"),
        ({"weights": "imagenet"}, r"model\.weights: does not apply to unet3d-plain"),
        ({"preset": "unet-small", "strides": [[1, 1, 1]] * 4}, r"model\.strides: does not apply to unet-small"),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_its_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration.build(NetworkConfig, {"preset": "unet3d-plain"} | values)


def test_kernels_and_strides_follow_the_number_of_levels() -> None:
    deep = configuration.build(NetworkConfig, {"preset": "unet3d-plain", "widths": [8] * 6}).resolved()
    assert (deep.kernels, deep.strides) == (((3, 3, 3),) * 6, ((1, 1, 1), *((2, 2, 2),) * 5))
    short = configuration.build(NetworkConfig, {"preset": "unet3d-residual", "widths": [8, 16]}).resolved()
    assert (short.kernels, short.strides) == (((3, 3, 3),) * 2, ((1, 1, 1), (2, 2, 2)))
    assert (short.residual, short.deep_supervision) == ((1, 3), 0)
    assert configuration.build(NetworkConfig, configuration.plain(deep)) == deep
