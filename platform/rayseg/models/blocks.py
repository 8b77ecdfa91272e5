"""What networks are made of: normalisations, convolutions, and the blocks of a U-Net, in Keras layers."""

import math
from dataclasses import dataclass
from typing import Any

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
    """Group normalisation (Wu and He 2018, arXiv:1803.08494) of (N, H, W, C) with fixed H and W, as Keras has it.

    Keras reduces over a five-dimensional view, which is slow on CPUs and, in OpenVINO, inexact on large images. Here
    the moments of each channel are taken first and then combined to those of the group. docs/explanation/engines.md has
    figures.
    """

    def call(self, inputs: Any) -> Any:
        """Normalises; statistics and scaling are computed in float32 whatever the type of `inputs`."""
        channels = inputs.shape[-1]
        values_NHWC = ops.cast(inputs, "float32")
        mean_N11C = _mean_of_channels(values_NHWC)
        variance_N11C = _mean_of_channels(ops.square(values_NHWC - mean_N11C))

        grouped = (-1, self.groups, channels // self.groups)
        mean_NGc, variance_NGc = ops.reshape(mean_N11C, grouped), ops.reshape(variance_N11C, grouped)
        group_mean = ops.mean(mean_NGc, axis=2, keepdims=True)
        # Total variance: within the channels, plus between their means.
        group_variance = ops.mean(variance_NGc + ops.square(mean_NGc - group_mean), axis=2, keepdims=True)

        gamma_Gc, beta_Gc = ops.reshape(self.gamma, grouped[1:]), ops.reshape(self.beta, grouped[1:])
        scale_NGc = ops.rsqrt(group_variance + self.epsilon) * gamma_Gc
        shift_NGc = beta_Gc - group_mean * scale_NGc
        per_channel = (-1, 1, 1, channels)
        normalized = values_NHWC * ops.reshape(scale_NGc, per_channel) + ops.reshape(shift_NGc, per_channel)
        return ops.cast(normalized, self.compute_dtype)


def _mean_of_channels(values_NHWC: Any) -> Any:
    """Over rows and columns, (N, 1, 1, C): by matrix products, over a row and then over the rows.

    One sum of so many float32 values loses digits, and so do the reductions of OpenVINO.
    """
    height, width, channels = values_NHWC.shape[1:]
    of_rows_NH1C = ops.matmul(ops.full((1, width), 1 / width, "float32"), values_NHWC)
    of_rows_NHC = ops.reshape(of_rows_NH1C, (-1, height, channels))
    mean_N1C = ops.matmul(ops.full((1, height), 1 / height, "float32"), of_rows_NHC)
    return ops.reshape(mean_N1C, (-1, 1, 1, channels))


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


@dataclass(frozen=True)
class Blocks:
    """Makes blocks of one style; see `presets.NetworkConfig` for the fields. `policy` is a Keras dtype policy."""

    convolutions: int
    normalization: str
    bias: bool
    activation: str
    dropout: float
    dropout_place: str
    upsampling: str
    initializer: str
    policy: str

    def plain(self, values: Any, filters: int, name: str) -> Any:
        """Convolutions, each normalised and activated."""
        for index in range(1, self.convolutions + 1):
            values = self._unit(values, filters, name, index)
            if index == 1:
                values = self.dropped(values, name, "blocks")
        return values

    def residual(self, values: Any, filters: int, name: str, strides: int = 1) -> Any:
        """Two convolutions and a short cut, activated after their sum (He et al. 2016, arXiv:1512.03385).

        The short cut of a block with strides is averaged, then brought to the filters (ResNet-D, arXiv:1812.01187).
        """
        short = values
        if strides > 1:
            short = layers.AveragePooling2D(strides, dtype=self.policy, name=f"{name}_short_pool")(short)
        if short.shape[-1] != filters:
            short = self._convolution(short, filters, f"{name}_short_conv", kernel=1)
            short = self._normalized(short, f"{name}_short_norm")
        values = self._unit(values, filters, name, 1, strides)
        values = self.dropped(values, name, "blocks")
        values = self._normalized(self._convolution(values, filters, f"{name}_conv2"), f"{name}_norm2")
        values = layers.Add(dtype=self.policy, name=f"{name}_sum")([values, short])
        return self._activated(values, f"{name}_act2")

    def stem(self, values: Any, filters: int) -> Any:
        """One convolution, normalised and activated."""
        return self._unit(values, filters, "stem", 1)

    def head(self, values: Any, filters: int) -> Any:
        """One convolution more, activated."""
        return self._activated(self._convolution(values, filters, "head_conv"), "head_act")

    def doubled(self, values: Any, filters: int, name: str) -> Any:
        """At twice the height and width, with so many filters where the upsampling has filters."""
        if self.upsampling == "transpose":
            return layers.Conv2DTranspose(
                filters, 2, strides=2, kernel_initializer=self.initializer, dtype=self.policy, name=f"{name}_upsample"
            )(values)
        values = layers.UpSampling2D(dtype=self.policy, name=f"{name}_upsample")(values)
        if self.upsampling == "upsample_conv":
            convolution = layers.Conv2D(
                filters,
                2,
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

    def _unit(self, values: Any, filters: int, name: str, index: int, strides: int = 1) -> Any:
        values = self._convolution(values, filters, f"{name}_conv{index}", strides=strides)
        return self._activated(self._normalized(values, f"{name}_norm{index}"), f"{name}_act{index}")

    def _convolution(self, values: Any, filters: int, name: str, kernel: int = 3, strides: int = 1) -> Any:
        return layers.Conv2D(
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
