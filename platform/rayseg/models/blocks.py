"""What networks are made of: normalisations, convolutions, and the blocks of a U-Net, in Keras layers."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import layers, ops

_GROUPS = 8
# Keras's default of 0.99 needs some 500 steps before validation sees what training saw; small sets train for fewer.
BATCH_MOMENTUM = 0.9
# Of batch normalisation: statistics over all workers, which Keras has on TensorFlow alone.
SYNCHRONIZED = keras.backend.backend() == "tensorflow"
_LEAK = 0.01


@keras.saving.register_keras_serializable(package="rayseg")
class GroupNormalization(layers.GroupNormalization):
    """Group normalisation (Wu and He 2018, arXiv:1803.08494) of images and volumes of a fixed size, as Keras has it.

    Its input is (N, H, W, C) or (N, D, H, W, C). Keras reduces over a view with one axis more, which is slow on CPUs
    and, in OpenVINO, inexact on large images. Here the moments of each channel are taken first and then combined to
    those of the group. docs/explanation/engines.md has figures.
    """

    def call(self, inputs: Any) -> Any:
        """Normalises; statistics and scaling are computed in float32 whatever the type of `inputs`."""
        channels = inputs.shape[-1]
        values = ops.cast(inputs, "float32")
        mean = _mean_of_channels(values)
        variance = _mean_of_channels(ops.square(values - mean))

        grouped = (-1, self.groups, channels // self.groups)
        mean_NGc, variance_NGc = ops.reshape(mean, grouped), ops.reshape(variance, grouped)
        group_mean = ops.mean(mean_NGc, axis=2, keepdims=True)
        # Total variance: within the channels, plus between their means.
        group_variance = ops.mean(variance_NGc + ops.square(mean_NGc - group_mean), axis=2, keepdims=True)

        gamma_Gc, beta_Gc = ops.reshape(self.gamma, grouped[1:]), ops.reshape(self.beta, grouped[1:])
        scale_NGc = ops.rsqrt(group_variance + self.epsilon) * gamma_Gc
        shift_NGc = beta_Gc - group_mean * scale_NGc
        per_channel = (-1, *mean.shape[1:])
        normalized = values * ops.reshape(scale_NGc, per_channel) + ops.reshape(shift_NGc, per_channel)
        return ops.cast(normalized, self.compute_dtype)


def _mean_of_channels(values: Any) -> Any:
    """Over all places, (N, 1, 1, C) or (N, 1, 1, 1, C): by a matrix product an axis, the last one first.

    One sum of so many float32 values loses digits, and so do the reductions of OpenVINO.
    """
    *sizes, channels = values.shape[1:]
    single = (-1, *(1 for _ in sizes), channels)
    while sizes:
        last = sizes.pop()
        mean = ops.matmul(ops.full((1, last), 1 / last, "float32"), values)
        values = ops.reshape(mean, (-1, *sizes, channels))
    return ops.reshape(values, single)


@keras.saving.register_keras_serializable(package="rayseg")
class GroupedConv2D(layers.Conv2D):
    """A convolution in groups, as Keras has it.

    Keras compiles those with XLA, for TensorFlow once could not run them on CPUs; it can, and trains one there in a
    400th of the time.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """The convolution alone, of `inputs` (N, H, W, C)."""
        if keras.backend.backend() != "tensorflow":
            return super().convolution_op(inputs, kernel)
        import tensorflow as tf

        return tf.nn.convolution(inputs, kernel, self.strides, self.padding.upper(), dilations=self.dilation_rate)


def batch_normalization(policy: str, name: str, epsilon: float = 1e-3) -> keras.Layer:
    """Batch normalisation over the global batch."""
    return layers.BatchNormalization(
        momentum=BATCH_MOMENTUM, epsilon=epsilon, synchronized=SYNCHRONIZED, dtype=policy, name=name
    )


class _Kinds(NamedTuple):
    """Keras's layers for so many axes."""

    convolution: type[keras.Layer]
    transposed: type[keras.Layer]
    maximum: type[keras.Layer]
    average: type[keras.Layer]
    neighbours: type[keras.Layer]


_KINDS = {
    2: _Kinds(layers.Conv2D, layers.Conv2DTranspose, layers.MaxPooling2D, layers.AveragePooling2D, layers.UpSampling2D),
    3: _Kinds(layers.Conv3D, layers.Conv3DTranspose, layers.MaxPooling3D, layers.AveragePooling3D, layers.UpSampling3D),
}


@dataclass(frozen=True)
class Level:
    """Of a U-Net: its filters, its kernel's size and, by axis, how many times smaller it is than the level above."""

    filters: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """Makes blocks of one style, of images or volumes as the level has two or three axes.

    See `presets.NetworkConfig` for the fields. `policy` is a Keras dtype policy.
    """

    convolutions: int
    normalization: str
    bias: bool
    activation: str
    dropout: float
    dropout_place: str
    upsampling: str
    initializer: str
    policy: str

    def plain(self, values: Any, level: Level, name: str) -> Any:
        """Convolutions, each normalised and activated."""
        for index in range(1, self.convolutions + 1):
            values = self._unit(values, level, name, index)
            if index == 1:
                values = self.dropped(values, name, "blocks")
        return values

    def residual(self, values: Any, level: Level, name: str, *, smaller: bool) -> Any:
        """Two convolutions and a short cut, activated after their sum (He et al. 2016, arXiv:1512.03385).

        Where the block makes values `smaller`, by the level's strides, its short cut is averaged, then brought to the
        filters (ResNet-D, arXiv:1812.01187).
        """
        short, axes = values, len(level.kernel)
        strides = level.strides if smaller else (1,) * axes
        if max(strides) > 1:
            pool = _KINDS[axes].average(strides, dtype=self._of_pooling(axes), name=f"{name}_short_pool")
            short = pool(short)
        if short.shape[-1] != level.filters:
            short = self._convolution(short, level.filters, f"{name}_short_conv", (1,) * axes)
            short = self._normalized(short, f"{name}_short_norm")
        values = self._unit(values, level, name, 1, strides)
        values = self.dropped(values, name, "blocks")
        values = self._convolution(values, level.filters, f"{name}_conv2", level.kernel)
        values = self._normalized(values, f"{name}_norm2")
        values = layers.Add(dtype=self.policy, name=f"{name}_sum")([values, short])
        return self._activated(values, f"{name}_act2")

    def stem(self, values: Any, level: Level) -> Any:
        """One convolution, normalised and activated."""
        return self._unit(values, level, "stem", 1)

    def head(self, values: Any, filters: int, kernel: tuple[int, ...]) -> Any:
        """One convolution more, activated."""
        return self._activated(self._convolution(values, filters, "head_conv", kernel), "head_act")

    def pooled(self, values: Any, strides: tuple[int, ...], name: str) -> Any:
        """The greatest values, smaller by the strides."""
        axes = len(strides)
        return _KINDS[axes].maximum(strides, dtype=self._of_pooling(axes), name=f"{name}_pool")(values)

    def enlarged(self, values: Any, filters: int, strides: tuple[int, ...], name: str) -> Any:
        """Larger by the strides, with so many filters where the upsampling has filters."""
        kinds = _KINDS[len(strides)]
        if self.upsampling == "transpose":
            return kinds.transposed(
                filters,
                strides,
                strides=strides,
                kernel_initializer=self.initializer,
                dtype=self.policy,
                name=f"{name}_upsample",
            )(values)
        values = kinds.neighbours(strides, dtype=self.policy, name=f"{name}_upsample")(values)
        if self.upsampling == "upsample_conv":
            convolution = kinds.convolution(
                filters,
                strides,
                padding="same",
                kernel_initializer=self.initializer,
                dtype=self.policy,
                name=f"{name}_upsample_conv",
            )
            values = self._activated(convolution(values), f"{name}_upsample_act")
        return values

    def dropped(self, values: Any, name: str, place: str) -> Any:
        """With dropout where `place` is the one that has it."""
        if not self.dropout or place != self.dropout_place:
            return values
        return layers.Dropout(self.dropout, dtype=self.policy, name=f"{name}_dropout")(values)

    def _of_pooling(self, axes: int) -> str:
        """TensorFlow pools volumes of float16 on GPUs alone; values of float32 are pooled exactly everywhere."""
        return self.policy if axes == 2 else "float32"

    def _unit(self, values: Any, level: Level, name: str, index: int, strides: int | tuple[int, ...] = 1) -> Any:
        values = self._convolution(values, level.filters, f"{name}_conv{index}", level.kernel, strides)
        return self._activated(self._normalized(values, f"{name}_norm{index}"), f"{name}_act{index}")

    def _convolution(
        self, values: Any, filters: int, name: str, kernel: tuple[int, ...], strides: int | tuple[int, ...] = 1
    ) -> Any:
        return _KINDS[len(kernel)].convolution(
            filters,
            kernel,
            strides=strides,
            padding="same",
            # A normalisation takes the mean away again, and with it any bias.
            use_bias=self.bias or self.normalization == "none",
            kernel_initializer=self.initializer,
            dtype=self.policy,
            name=name,
        )(values)

    def _normalized(self, values: Any, name: str) -> Any:
        filters = values.shape[-1]
        if self.normalization == "group":
            return GroupNormalization(math.gcd(filters, _GROUPS), dtype=self.policy, name=name)(values)
        if self.normalization == "instance":
            return GroupNormalization(filters, dtype=self.policy, name=name)(values)
        if self.normalization == "batch":
            return batch_normalization(self.policy, name)(values)
        return values

    def _activated(self, values: Any, name: str) -> Any:
        if self.activation == "leaky_relu":
            return layers.LeakyReLU(_LEAK, dtype=self.policy, name=name)(values)
        return layers.Activation(self.activation, dtype=self.policy, name=name)(values)
