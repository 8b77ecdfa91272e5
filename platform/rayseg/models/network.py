"""The networks: from a configuration to a Keras model, and from that to one that needs nothing of this package."""

from typing import Any

import keras
from keras import layers

from rayseg.models import deeplab, encoders, unet
from rayseg.models.blocks import Blocks, GroupedConv2D, GroupNormalization
from rayseg.models.presets import NetworkConfig
from rayseg.models.weights import AUXILIARY, load_encoder

_DECODER_WIDTHS = (16, 32, 64, 128, 256)  # over an encoder, from the full resolution down


def build_network(
    config: NetworkConfig, shape_HWC: tuple[int, int, int], classes: int = 1, policy: str = "float32"
) -> keras.Model:
    """Builds the network; initial weights come from Keras's global seed, but for those that `config.weights` names.

    Args:
        config: its form.
        shape_HWC: of the input; height and width divisible by 2 for each time that the network halves them.
        classes: of foreground. One gives one channel with a sigmoid, more a softmax over the background and them.
        policy: Keras dtype policy of the layers: `float32`, `mixed_bfloat16` or `mixed_float16`.

    Returns:
        uint8 images (N, H, W, C) to float32 probabilities (N, H, W, `output_channels(classes)`), under any policy.
        With deep supervision a list of them: the final ones, then those of the coarser levels, the finest first.

    Raises:
        ValueError: the size is not divisible, or the encoder's weights cannot be had or do not fit.
    """
    form = config.resolved()
    _check_size(form, shape_HWC)
    inputs = keras.Input(shape_HWC, dtype="uint8", name="image")
    kind, _, encoder = form.preset.partition("-")
    found = (_deeplab if kind == "deeplabv3" else _unet)(form, inputs, encoder, policy)
    channels = output_channels(classes)
    outputs = [
        _probability(values, channels, shape_HWC[0] // values.shape[1], f"{AUXILIARY}{index}_" if index else "")
        for index, values in enumerate(found)
    ]
    model = keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0], name=form.preset)
    if form.weights not in (None, "none"):
        load_encoder(model, form.weights, encoder)
    return model


def output_channels(classes: int) -> int:
    """Channels of a network that finds so many foreground classes."""
    return 1 if classes == 1 else classes + 1


def portable(model: keras.Model) -> keras.Model:
    """The network as inference needs it: its first output, and in Keras's own layers alone.

    Any Keras loads it without this package and on any backend.
    """

    def clone(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if isinstance(layer, GroupNormalization):
            return layers.GroupNormalization.from_config(config)
        if isinstance(layer, GroupedConv2D):
            return layers.Conv2D.from_config(config)
        if isinstance(layer, layers.BatchNormalization):
            config["synchronized"] = False  # matters in training, and is TensorFlow's alone
        return type(layer).from_config(config)

    single = keras.Model(model.input, model.outputs[0], name=model.name)
    copy = keras.models.clone_model(single, clone_function=clone)
    copy.set_weights(single.get_weights())
    return copy


def _deeplab(form: NetworkConfig, inputs: Any, encoder: str, policy: str) -> list[Any]:
    assert form.output_stride is not None, "resolved"
    assert form.dropout is not None, "resolved"
    assert form.initializer is not None, "resolved"
    *_, values = encoders.encode(inputs, encoder, policy, form.output_stride)
    return [deeplab.head(values, form.output_stride, form.dropout, form.initializer, policy)]


def _unet(form: NetworkConfig, inputs: Any, encoder: str, policy: str) -> list[Any]:
    """The features that an output each is made of, the finest first."""
    fields = Blocks.__dataclass_fields__.keys() - {"policy"}
    blocks = Blocks(**{key: getattr(form, key) for key in fields}, policy=policy)
    widths: tuple[int, ...]
    if form.widths is None:
        *upper, bottom = encoders.encode(inputs, encoder, policy)
        features, widths = [None, *upper, blocks.dropped(bottom, "bottom", "deep")], _DECODER_WIDTHS
    else:
        values = layers.Rescaling(1 / 255, dtype=policy, name="rescaling")(inputs)
        features, widths = unet.encode(values, form.widths, form.residual or (), blocks), form.widths[:-1]
    finest, *coarser = unet.decode(features, widths, blocks) or features
    if form.head:
        finest = blocks.head(finest, form.head)
    return [finest, *coarser[: form.deep_supervision]]


def _probability(values: Any, channels: int, factor: int, prefix: str) -> Any:
    """Of each class in each pixel, `factor` times as high and wide as `values`."""
    values = layers.Conv2D(channels, 1, dtype="float32", name=f"{prefix}logits")(values)
    if factor > 1:
        values = layers.UpSampling2D(factor, interpolation="bilinear", dtype="float32", name=f"{prefix}resize")(values)
    form = "sigmoid" if channels == 1 else "softmax"
    return layers.Activation(form, dtype="float32", name=f"{prefix}probability")(values)


def _check_size(form: NetworkConfig, shape_HWC: tuple[int, int, int]) -> None:
    height, width, _ = shape_HWC
    if form.widths is not None:
        key, what, factor = "widths", f"{len(form.widths)} levels need", 2 ** (len(form.widths) - 1)
    else:
        key, what, factor = "preset", f"{form.preset} needs", form.output_stride or 32
    if height % factor or width % factor:
        raise ValueError(
            f"model.{key}: {what} a height and width divisible by {factor}, the prepared images have {height} x "
            f"{width}; change model.{key} or prepare.preprocess.size"
        )
    if form.widths is not None and form.normalization == "instance" and height == width == factor:
        raise ValueError(
            f"model.normalization: instance has nothing to do at the bottleneck, which has one pixel of {height} x "
            f"{width} at {len(form.widths)} levels; shorten model.widths or take group"
        )
