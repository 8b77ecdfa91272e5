"""Every preset runs, learns, and comes back from a file; encoders are those whose weights they take."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.applications.densenet import DenseNet
from keras.src.applications.efficientnet import EfficientNet
from keras.src.applications.resnet import ResNet, stack_residual_blocks_v1

from rayseg.models import deeplab, encoders, network, resnet, weights
from rayseg.models.blocks import GroupedConv2D
from rayseg.models.encoders import encoder_layers
from rayseg.models.network import build_network, portable
from rayseg.models.presets import PRESETS, NetworkConfig
from rayseg.models.weights import load_encoder, start_from

SIZE = 32
# Forms that test_unet runs, and more layers of a form that runs here.
ELSEWHERE = ("unet-small", "unet-batchnorm", "unet-resnet101", "deeplabv3-resnet101")
SMALLER = {
    "unet-original": {"widths": (4, 8, 8)},
    "unet-stroke": {"widths": (4, 8)},
    "unet-dropout": {"widths": (4, 8)},
    "unet-residual": {"widths": (4, 8, 8, 8), "residual": (1, 2, 1, 1)},
}


def thin_resnet(**arguments: Any) -> keras.Model:
    def stages(values: Any) -> Any:
        for stage, filters in enumerate((4, 8, 16, 32), 2):
            values = stack_residual_blocks_v1(values, filters, 1, 1 if stage == 2 else 2, name=f"conv{stage}")
        return values

    return ResNet(stages, False, True, name="thin", **arguments)


@pytest.fixture(autouse=True, scope="module")
def thin() -> Iterator[None]:
    """One block a stage instead of up to 36, and narrow ones: the same forms made by the same code, in little time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.applications, "ResNet50", thin_resnet)
        patch.setattr(keras.applications, "DenseNet121", lambda **k: DenseNet([1, 1, 1, 1], **k))
        patch.setattr(keras.applications, "EfficientNetB0", lambda **k: EfficientNet(0.25, 0.25, 224, name="thin", **k))
        patch.setitem(encoders.APPLICATIONS, "resnet50", encoders._resnet("ResNet50", (1, 1, 1, 1)))
        for name in resnet.BLOCKS:
            patch.setitem(resnet.BLOCKS, name, (1, 1, 1, 1))
        patch.setattr(deeplab, "_FILTERS", 8)
        patch.setattr(network, "_DECODER_WIDTHS", (4, 4, 8, 8, 16))
        yield


def images(channels: int = 1, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, channels), dtype=np.uint8)


def built(preset: str, channels: int = 1, **changed: Any) -> keras.Model:
    return build_network(NetworkConfig(preset=preset, **changed), (SIZE, SIZE, channels))


def encoder(name: str, channels: int = 1, output_stride: int = 32) -> keras.Model:
    """An encoder alone, with all its features."""
    inputs = keras.Input((SIZE, SIZE, channels), dtype="uint8")
    return keras.Model(inputs, encoders.encode(inputs, name, "float32", output_stride))


def shuffled(model: keras.Model) -> keras.Model:
    """With other weights than zeros and ones in biases and normalisations, as training leaves them."""
    random = np.random.default_rng(2)
    model.set_weights([value * random.uniform(0.8, 1.2) + random.uniform(0, 0.02) for value in model.get_weights()])
    return model


def close(result: Any, expected: Any) -> bool:
    result, expected = np.asarray(result), np.asarray(expected)
    return result.shape == expected.shape and bool(np.abs(result - expected).max() < 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "preset", [preset for preset in PRESETS if preset not in ELSEWHERE and not preset.startswith("unet3d")]
)
def test_a_preset_gives_probabilities_learns_and_comes_back_from_a_file(preset: str, tmp_path: Path) -> None:
    config = NetworkConfig(preset=preset, **SMALLER.get(preset, {}))  # type: ignore[arg-type]
    keras.utils.set_random_seed(1)
    # TensorFlow has gradients of grouped convolutions in bfloat16 only on processors with instructions for that.
    policy = "float32" if "resnext" in preset else "mixed_bfloat16"
    model = build_network(config, (SIZE, SIZE, 1), classes=2, policy=policy)
    with tf.GradientTape() as tape:
        outputs = model(images(), training=True)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        loss = tf.add_n([tf.reduce_mean(tf.square(output[..., 1] - 1)) for output in outputs])
    assert len(outputs) == (3 if preset == "unet-residual" else 1)
    for output in outputs:
        assert output.shape == (2, SIZE, SIZE, 3)
        assert output.dtype == tf.float32
        assert np.allclose(tf.reduce_sum(output, axis=-1), 1, atol=1e-6)
    gradients = tape.gradient(loss, model.trainable_weights)
    assert all(np.isfinite(gradient.numpy()).all() for gradient in gradients)
    # Not of biases that a normalisation takes away; and stochastic depth may leave out a block of the EfficientNet.
    kernels = [gradient for gradient in gradients if gradient.ndim == 4]
    moved = [np.abs(gradient.numpy()).max() > 0 for gradient in kernels]
    assert all(moved) or ("efficientnet" in preset and np.mean(moved) > 0.5)

    plain = portable(model)
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    expected = model(images(), training=False)
    expected = np.asarray(expected[0] if isinstance(expected, list) else expected)
    plain.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    result = np.asarray(loaded(images()))
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() < 0.02, "group normalisation of Keras rounds otherwise in bfloat16"
    # Keras's grouped convolutions take seconds to compile: once is enough.
    assert "resnext" in preset or np.array_equal(plain(images()), result)


@pytest.mark.parametrize(("name", "mode"), [("resnet50", "caffe"), ("densenet121", "torch")])
def test_an_encoder_sees_what_keras_s_sees_with_the_same_file(name: str, mode: str, tmp_path: Path) -> None:
    """File, order of colours, normalisation and layers together: against Keras's own and its preprocessing."""
    form = encoders.APPLICATIONS[name]
    keras_s = shuffled(getattr(keras.applications, form.application)(include_top=False, weights=None))
    keras_s.save_weights(tmp_path / "encoder.weights.h5")
    ours = encoder(name, channels=3)
    load_encoder(ours, f"file://{tmp_path}/encoder.weights.h5", name)
    prepared = keras.applications.imagenet_utils.preprocess_input(images(3).astype(np.float32), mode=mode)
    expected = keras.Model(keras_s.input, [keras_s.get_layer(tap).output for tap in form.taps])(prepared)
    for tap, one, other in zip(form.taps, ours(images(3)), expected, strict=True):
        assert close(one, other), tap


def test_equal_channels_give_what_equal_colours_give(tmp_path: Path) -> None:
    shuffled(keras.applications.DenseNet121(include_top=False, weights=None)).save_weights(tmp_path / "a.weights.h5")
    colours, grey, four = (encoder("densenet121", channels) for channels in (3, 1, 4))
    for model in (colours, grey, four):
        load_encoder(model, str(tmp_path / "a.weights.h5"), "densenet121")

    def evenly(layer: keras.Layer) -> keras.Layer:
        """Colours are normalised each by its own figures, other channels alike: here the colours too."""
        form = layer.get_config()
        if layer.name == "normalize":
            alike = grey.get_layer("normalize").get_config()
            form |= {key: alike[key] * 3 for key in ("scale", "offset")}
        return type(layer).from_config(form)

    even = keras.models.clone_model(colours, clone_function=evenly)
    even.set_weights(colours.get_weights())
    expected = even(np.repeat(images(), 3, axis=-1))[-1]
    assert close(grey(images())[-1], expected)
    assert close(four(np.repeat(images(), 4, axis=-1))[-1], expected)
    assert np.allclose(grey.get_layer("normalize")(np.array([[[[114.495]]]])), 0, atol=1e-4), "ImageNet's mean grey"


def test_channels_are_told_apart() -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    for channels, expected in ((1, [[6, 9]]), (2, [[4, 6], [2, 3]]), (4, [[0, 0.5], [2, 3], [4, 5], [0, 0.5]])):
        assert np.array_equal(weights._for_channels(kernel, channels)[0, 0], expected)
    assert weights._for_channels(kernel, 3) is kernel


def test_dilation_gives_the_strided_network_s_features_in_every_place() -> None:
    """At every 4th place a dilated convolution sees what the strided one sees (arXiv:1706.05587, figure 3).

    The thin network has the first block of a stage alone, which the multi-grid leaves as it is.
    """
    strided, dilated = shuffled(encoder("resnet50")), encoder("resnet50", output_stride=8)
    start_from(dilated, strided)
    result = np.asarray(dilated(images())[-1])
    assert result.shape[1:3] == (SIZE // 8, SIZE // 8)
    assert close(result[:, ::4, ::4], strided(images())[-1])


def test_every_kind_of_file_is_read_by_the_names_of_its_layers(tmp_path: Path) -> None:
    model = shuffled(built("unet-resnet34"))
    expected = {layer.name: layer.get_weights() for layer in model.layers if layer.weights}
    model.save_weights(tmp_path / "model.weights.h5")
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    for name in ("model.weights.h5", "model.keras", "model.h5"):
        found = weights.read(str(tmp_path / name))
        assert found.keys() == expected.keys(), name
        for layer, values in expected.items():
            assert all(np.array_equal(*pair) for pair in zip(found[layer], values, strict=True)), (name, layer)
    other = built("unet-resnet34", weights=str(tmp_path / "model.keras"))
    for one, its in zip(encoder_layers(other), encoder_layers(model), strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one.get_weights(), its.get_weights(), strict=True)), one.name
    assert not np.array_equal(other.get_layer("up1_conv1").kernel, model.get_layer("up1_conv1").kernel)


def test_keras_s_own_downloads_are_read_where_names_have_slashes(tmp_path: Path) -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    with h5py.File(tmp_path / "a_notop.h5", "w") as file:  # as densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5
        file.attrs["layer_names"] = [b"input_1", b"conv1/conv"]
        file.create_group("input_1").attrs["weight_names"] = np.array([], "S1")
        file.create_group("conv1/conv").attrs["weight_names"] = [b"conv1/conv/kernel:0"]
        file["conv1/conv/conv1/conv/kernel:0"] = kernel
    ((name, values),) = weights.read(str(tmp_path / "a_notop.h5")).items()
    assert name == "conv1_conv"
    assert np.array_equal(values, [kernel])


def test_files_that_do_not_fit_are_refused_with_the_layer_and_its_shapes(tmp_path: Path) -> None:
    keras.applications.DenseNet121(include_top=False, weights=None).save(tmp_path / "densenet121.keras")
    (tmp_path / "text.h5").write_text("no weights")
    built("unet-small", widths=(4, 8)).save(tmp_path / "unet.keras")
    model = encoder("resnet34")
    before = model.get_weights()
    for name, message in (
        ("nowhere.keras", "there is no file"),
        ("text.h5", "is no weights file of Keras"),
        ("unet.keras", "has no layer conv1_conv"),
        ("densenet121.keras", r"layer conv2_block1_1_conv has the shapes \[\(3, 3, 64, 64\)\] in .*\(1, 1, 64, 128\)"),
    ):
        with pytest.raises(ValueError, match=f"model.weights: .*{message}"):
            load_encoder(model, str(tmp_path / name), "resnet34")
    assert all(np.array_equal(*pair) for pair in zip(model.get_weights(), before, strict=True)), "all or nothing"


def test_imagenet_comes_from_keras_or_the_user_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder("densenet121")
    downloaded = shuffled(keras.applications.DenseNet121(include_top=False, weights=None))
    monkeypatch.setattr(keras.applications, "DenseNet121", lambda include_top, weights: downloaded)
    load_encoder(model, "imagenet", "densenet121")
    kernel = downloaded.get_layer("conv2_block1_1_conv").kernel
    assert np.array_equal(model.get_layer("encoder_conv2_block1_1_conv").kernel, kernel)

    def offline(include_top: bool, weights: str) -> None:
        raise Exception("URL fetch failure")  # as Keras has it

    monkeypatch.setattr(keras.applications, "DenseNet121", offline)
    with pytest.raises(ValueError, match=r"model\.weights: .* densenet121 cannot be downloaded .* give the path"):
        load_encoder(model, "imagenet", "densenet121")
    with pytest.raises(ValueError, match=r"model\.weights: Keras has no ImageNet weights of resnet34, but of resnet50"):
        load_encoder(model, "imagenet", "resnet34")


def test_the_encoder_can_be_frozen() -> None:
    model = built("unet-efficientnet-b0")
    for layer in encoder_layers(model):
        layer.trainable = False
    names = {weight.path.partition("/")[0] for weight in model.trainable_weights}
    assert names == {f"up{level}_{part}{n}" for level in range(1, 6) for part in ("conv", "norm") for n in (1, 2)} | {
        "logits"
    }
    assert not encoder_layers(built("unet-small", widths=(4, 8)))


def test_a_grouped_convolution_is_that_of_its_groups_and_of_keras() -> None:
    values = tf.constant(np.random.default_rng(3).normal(size=(2, 6, 7, 8)), tf.float32)
    ours, keras_s = (form(12, 3, groups=4, padding="same") for form in (GroupedConv2D, keras.layers.Conv2D))
    ours.build(values.shape)
    keras_s.build(values.shape)
    keras_s.set_weights(ours.get_weights())
    with tf.GradientTape(persistent=True) as tape:
        result = ours(values)
        kernels, inputs = tf.split(ours.kernel, 4, axis=-1), tf.split(values, 4, axis=-1)
        pairs = zip(inputs, kernels, strict=True)
        apart = tf.concat([tf.nn.conv2d(one, kernel, 1, "SAME") for one, kernel in pairs], axis=-1) + ours.bias
        squares = [tf.reduce_sum(tf.square(of)) for of in (result, apart)]
    assert np.abs(result - keras_s(values)).max() < 1e-5
    assert np.abs(result - apart).max() < 1e-5
    gradients = [tape.gradient(square, ours.trainable_weights[0]) for square in squares]
    assert np.abs(gradients[0] - gradients[1]).max() < 1e-4 * np.abs(gradients[1]).max()
