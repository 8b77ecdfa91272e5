"""Numerics: what float32 and "equal" mean where TensorFlow computes: training, validation, the engine.

On a GPU its defaults are others. It rounds what convolutions and products of float32 take to TF32, of 10 bits in place
of 23, and it adds up gradients in whatever order threads come.
"""

from typing import Any

import keras
import tensorflow as tf


def settle(undetermined: str | None = None) -> None:
    """Float32 without TF32 and, unless something is `undetermined`, ops that give the same bits each time.

    For the whole process, before its first step. An op without a deterministic kernel would raise there.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)
    if undetermined is None:
        tf.config.experimental.enable_op_determinism()


def undetermined(model: keras.Model, jit_compile: bool, on_gpu: bool) -> str | None:
    """What of the gradients of a network TensorFlow has no deterministic kernel for; None: it has all."""
    layers: list[Any] = model._flatten_layers()
    if on_gpu and any(isinstance(layer, keras.layers.DepthwiseConv2D) for layer in layers):
        return "depthwise convolutions"  # tensorflow#47174
    if jit_compile and any(isinstance(layer, keras.layers.MaxPooling2D) for layer in layers):
        return "max pooling by XLA"  # refused on a CPU, too, as TensorFlow does not look where it computes
    return None


def told(model: keras.Model, jit_compile: bool, on_gpu: bool) -> dict[str, str]:
    """What a run is computed with, as tags."""
    without = undetermined(model, jit_compile, on_gpu)
    return {"rayseg.tf32": "off", "rayseg.deterministic_ops": f"off: {without}" if without else "on"}
