"""Encoders of image classification, as the way down of a U-Net or under DeepLab's head.

Those that Keras has are Keras's own, built anew layer by layer so that they take our dtype policy and batch
normalisation over all workers; the others are of `models.resnet`. All their layers' names begin with `PREFIX`: that
says which layers pretrained weights are for, in any copy of a network.
"""

from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from rayseg.models.blocks import BATCH_MOMENTUM, SYNCHRONIZED
from rayseg.models.resnet import resnet

PREFIX = "encoder_"
_CONV4_CONV5 = ("conv4_", "conv5_")


@dataclass(frozen=True)
class Encoder:
    """An encoder as Keras has it.

    application: its function in `keras.applications`.
    taps: the layers that give its features at a half, 4th, 8th, 16th and 32nd of the size.
    bgr: whether its weights expect blue, green and red, from which only the mean was taken, as Caffe's did; else each
        channel was brought to mean 0 and deviation 1.
    """

    application: str
    taps: tuple[str, ...]
    bgr: bool = False


def _resnet(application: str, blocks: tuple[int, ...]) -> Encoder:
    ends = (f"conv{stage}_block{count}_out" for stage, count in enumerate(blocks, 2))
    return Encoder(application, ("conv1_relu", *ends), bgr=True)


APPLICATIONS = {
    "resnet50": _resnet("ResNet50", (3, 4, 6, 3)),
    "resnet101": _resnet("ResNet101", (3, 4, 23, 3)),
    "densenet121": Encoder("DenseNet121", ("conv1_relu", "pool2_relu", "pool3_relu", "pool4_relu", "relu")),
    "efficientnet-b0": Encoder(
        "EfficientNetB0",
        (*(f"block{stage}a_expand_activation" for stage in (2, 3, 4, 6)), "top_activation"),
    ),
}

# What ImageNet's images had, in red, green and blue of 0..255 (keras.applications.imagenet_utils).
_MEAN, _DEVIATION = (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)
_CAFFE_MEAN = (123.68, 116.779, 103.939)


def encode(inputs: Any, name: str, policy: str, output_stride: int = 32) -> list[Any]:
    """The encoder's features of a uint8 image, finest first.

    Args:
        inputs: a Keras input (N, H, W, C), H and W divisible by 32.
        name: `resnet34`, `resnext101-32x8d`, or one of `APPLICATIONS`.
        policy: Keras dtype policy of the layers.
        output_stride: of the last features; of a residual network of Keras also 16 or 8: then its last one or two
            stages keep the size and dilate their convolutions instead (Chen et al. 2017, arXiv:1706.05587, with the
            multi-grid 1, 2, 4 in the last).
    """
    encoder = APPLICATIONS.get(name)
    values = _normalized(inputs, bgr=encoder is not None and encoder.bgr)
    if encoder is None:
        return resnet(values, name, policy, PREFIX)
    form = getattr(keras.applications, encoder.application)(include_top=False, weights=None, input_tensor=values)
    found = keras.Model(inputs, [form.get_layer(tap).output for tap in encoder.taps])

    def rebuilt(layer: Any) -> Any:
        # Ours stays as it is; an encoder that brings its own normalisation gets its values normalised already.
        if layer.name == "normalize":
            return type(layer).from_config(layer.get_config())
        if isinstance(layer, layers.Rescaling | layers.Normalization):
            return layers.Identity(dtype=policy, name=PREFIX + layer.name)
        config = layer.get_config() | {"name": PREFIX + layer.name, "dtype": policy}
        if isinstance(layer, layers.BatchNormalization):
            config |= {"momentum": BATCH_MOMENTUM, "synchronized": SYNCHRONIZED}
        elif isinstance(layer, layers.Conv2D) and output_stride < 32:
            config |= _dilated(layer, output_stride)
        return type(layer).from_config(config)

    return keras.models.clone_model(found, input_tensors=inputs, clone_function=rebuilt).outputs


def encoder_layers(model: keras.Model) -> list[keras.Layer]:
    """The layers that `model.weights` is for, first to last; none in a network without such an encoder."""
    return [layer for layer in model.layers if layer.name.startswith(PREFIX)]


def _normalized(inputs: Any, bgr: bool) -> Any:
    """As ImageNet's images were. Channels other than red, green and blue get the mean of the three's figures."""
    mean, deviation = (_CAFFE_MEAN, (1.0, 1.0, 1.0)) if bgr else (_MEAN, _DEVIATION)
    channels = inputs.shape[-1]
    if channels != len(mean):
        mean, deviation = ((sum(of) / len(of),) * channels for of in (mean, deviation))
    return layers.Rescaling(
        [1 / of for of in deviation],
        [-middle / of for middle, of in zip(mean, deviation, strict=True)],
        # bfloat16's 8 bits are too few for a grey value with its mean taken away.
        dtype="float32",
        name="normalize",
    )(inputs)


def _dilated(layer: Any, output_stride: int) -> dict[str, Any]:
    """What changes in a convolution of Keras's residual networks, where the first block of a stage has the strides."""
    stages = _CONV4_CONV5 if output_stride == 8 else _CONV4_CONV5[1:]
    if not layer.name.startswith(stages):
        return {}
    if layer.name.endswith(("block1_0_conv", "block1_1_conv")):
        return {"strides": 1}
    if not layer.name.endswith("_2_conv"):
        return {}
    if layer.name.startswith("conv4_"):
        return {"dilation_rate": 2}
    block = int(layer.name.removeprefix("conv5_block").partition("_")[0])
    return {"dilation_rate": 32 // output_stride * 2 ** (block - 1)}
