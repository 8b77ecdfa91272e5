"""What TensorFlow is told of float32 and of the order of sums."""

from collections.abc import Iterator

import keras
import pytest
import tensorflow as tf
from tensorflow.python.framework import config

from rayseg.models import engine, numerics
from rayseg.models.network import build_network
from rayseg.models.presets import NetworkConfig


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """As TensorFlow comes, before and after."""

    def reset() -> None:
        tf.config.experimental.enable_tensor_float_32_execution(True)
        config.disable_op_determinism()

    reset()
    yield
    reset()


def settled() -> tuple[bool, bool]:
    return tf.config.experimental.tensor_float_32_execution_enabled(), config.is_op_determinism_enabled()


def test_float32_is_not_tf32_and_ops_are_deterministic_where_they_can_be() -> None:
    assert settled() == (True, False)
    numerics.settle("max pooling by XLA")
    assert settled() == (False, False)
    numerics.settle()
    assert settled() == (False, True)


def test_the_engine_computes_so() -> None:
    identity = keras.Sequential([keras.layers.Input((4, 4, 1), dtype="uint8"), keras.layers.Rescaling(1 / 255)])
    engine.compile_tensorflow(identity, "float32")
    assert settled() == (False, True)


def network(**form: object) -> keras.Model:
    return build_network(NetworkConfig(**form), (64, 64, 1))


def test_gradients_without_deterministic_kernels_are_named() -> None:
    plain = network(widths=(4, 8), convolutions=1)
    assert numerics.told(plain, False, True) == {"rayseg.tf32": "off", "rayseg.deterministic_ops": "on"}
    assert numerics.told(plain, True, True)["rayseg.deterministic_ops"] == "off: max pooling by XLA"
    assert numerics.told(plain, True, False)["rayseg.deterministic_ops"] == "off: max pooling by XLA"
    depthwise = network(preset="unet-efficientnet-b0")
    assert numerics.told(depthwise, False, True)["rayseg.deterministic_ops"] == "off: depthwise convolutions"
    assert numerics.told(depthwise, False, False)["rayseg.deterministic_ops"] == "on"
    residual = network(preset="unet-residual", widths=(4, 8))
    assert numerics.undetermined(residual, True, on_gpu=True) is None
