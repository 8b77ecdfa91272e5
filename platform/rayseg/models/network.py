"""The networks: from a configuration to a Keras model, and from that to one that needs nothing of this package."""

import math
from typing import Any

import keras
from keras import layers

from rayseg.models import deeplab, encoders, unet
from rayseg.models.blocks import Blocks, GroupedConv2D, GroupNormalization, Level
from rayseg.models.inputs import VOLUME_AXES, input_dtype
from rayseg.models.presets import NetworkConfig
from rayseg.models.weights import AUXILIARY, load_encoder

_DECODER_WIDTHS = (16, 32, 64, 128, 256)  # over an encoder, from the full resolution down


def build_network(
    config: NetworkConfig, shape: tuple[int, ...], classes: int = 1, policy: str = "float32"
) -> keras.Model:
    """Builds the network; initial weights come from Keras's global seed, but for those that `config.weights` names.

    Args:
        config: its form.
        shape: of the input, (height, width, channels) or, of the presets `unet3d-`, (depth, height, width, channels);
            each axis divisible by as much as the network makes it smaller.
        classes: of foreground. One gives one channel with a sigmoid, more a softmax over the background and them.
        policy: Keras dtype policy of the layers: `float32`, `mixed_bfloat16` or `mixed_float16`.

    Returns:
        uint8 images (N, H, W, C) to float32 probabilities (N, H, W, `output_channels(classes)`), or float16 volumes
        (N, D, H, W, C) to (N, D, H, W, `output_channels(classes)`), under any policy. With deep supervision a list of
        them: the final ones, then those of the coarser levels, the finest first.

    Raises:
        ValueError: the preset is not for such a shape, the size is not divisible, or the encoder's weights cannot be
            had or do not fit.
    """
    form = config.resolved()
    _check_shape(form, shape)
    inputs = keras.Input(shape, dtype=input_dtype(shape), name="image")
    kind, _, encoder = form.preset.partition("-")
    found = (_deeplab if kind == "deeplabv3" else _unet)(form, inputs, encoder, policy)
    channels = output_channels(classes)
    outputs = [
        _probability(values, channels, shape[:-1], f"{AUXILIARY}{index}_" if index else "")
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
    if form.widths is None:
        *upper, bottom = encoders.encode(inputs, encoder, policy)
        features = [None, *upper, blocks.dropped(bottom, "bottom", "deep")]
        levels = _levels(form, (*_DECODER_WIDTHS, bottom.shape[-1]))
    else:
        values = inputs
        if form.strides is None:
            values = layers.Rescaling(1 / 255, dtype=policy, name="rescaling")(inputs)
        levels = _levels(form, form.widths)
        features = unet.encode(values, levels, form.residual or (), blocks)
    finest, *coarser = unet.decode(features, levels, blocks) or features
    if form.head:
        finest = blocks.head(finest, form.head, levels[0].kernel)
    return [finest, *coarser[: form.deep_supervision]]


def _levels(form: NetworkConfig, widths: tuple[int, ...]) -> list[Level]:
    kernels, strides = form.kernels or [(3, 3)] * len(widths), form.strides or [(2, 2)] * len(widths)
    return [Level(*of_level) for of_level in zip(widths, kernels, strides, strict=True)]


def _probability(values: Any, channels: int, sizes: tuple[int, ...], prefix: str) -> Any:
    """Of each class in each pixel or voxel, at full size.

    Coarser volumes are enlarged by neighbours, as MONAI's DynUNet does it: Keras has no linear enlarging of volumes.
    """
    form = "sigmoid" if channels == 1 else "softmax"
    convolution = layers.Conv2D if len(sizes) == 2 else layers.Conv3D
    factors = tuple(size // coarse for size, coarse in zip(sizes, values.shape[1:-1], strict=True))
    values = convolution(channels, 1, dtype="float32", name=f"{prefix}logits")(values)
    if max(factors) > 1:
        if len(sizes) == 2:
            larger = layers.UpSampling2D(factors, interpolation="bilinear", dtype="float32", name=f"{prefix}resize")
        else:
            larger = layers.UpSampling3D(factors, dtype="float32", name=f"{prefix}resize")
        values = larger(values)
    return layers.Activation(form, dtype="float32", name=f"{prefix}probability")(values)


def _check_shape(form: NetworkConfig, shape: tuple[int, ...]) -> None:
    of_volumes, volumes_expected = len(shape) == VOLUME_AXES, form.strides is not None
    if of_volumes != volumes_expected:
        raise ValueError(
            f"model.preset: {form.preset} is for {'volumes' if volumes_expected else 'images'}, the prepared set has "
            f"{'volumes (prepare.volume)' if of_volumes else 'images (prepare.preprocess)'}; take "
            f"{'one of the presets unet3d-' if of_volumes else 'a preset of images, such as unet-small'}"
        )
    *sizes, _ = shape
    told = " x ".join(map(str, sizes))
    if form.strides is not None:
        factors = [math.prod(of_axis) for of_axis in zip(*form.strides, strict=True)]
        if any(size % factor for size, factor in zip(sizes, factors, strict=True)):
            raise ValueError(
                f"model.strides: the {len(form.strides)} levels need depth, height and width divisible by "
                f"{' x '.join(map(str, factors))}, the patch has {told}; change model.strides (with model.widths) or "
                "prepare.volume.patch"
            )
    else:
        if form.widths is not None:
            key, what, factor = "widths", f"{len(form.widths)} levels need", 2 ** (len(form.widths) - 1)
        else:
            key, what, factor = "preset", f"{form.preset} needs", form.output_stride or 32
        factors = [factor] * 2
        if any(size % factor for size in sizes):
            raise ValueError(
                f"model.{key}: {what} a height and width divisible by {factor}, the prepared images have {told}; "
                f"change model.{key} or prepare.preprocess.size"
            )
    if form.widths is not None and form.normalization == "instance" and sizes == factors:
        raise ValueError(
            "model.normalization: instance has nothing to do at the bottleneck, which has one "
            f"{'voxel' if of_volumes else 'pixel'} of {told} at {len(form.widths)} levels; shorten model.widths or "
            "take group"
        )
