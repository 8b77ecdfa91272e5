"""The benchmark's inputs are what their names say, and its figures what was measured."""

import io
from pathlib import Path

import keras
import numpy as np
import pydicom
import pytest
import tensorflow as tf
from keras import layers

from rayseg.benchmark import data, inputs, roofline, suite
from rayseg.data.feed import batches
from rayseg.data.prepared import describe
from rayseg.dicom.reading import Slice, read_slice
from rayseg.models.network import build_network, portable
from rayseg.models.presets import NetworkConfig


def test_every_syntax_holds_the_same_slice() -> None:
    plain = pydicom.dcmread(io.BytesIO(inputs.ct_slice("uncompressed"))).pixel_array
    assert plain.shape == (512, 512)
    for name, syntax in inputs.SYNTAXES.items():
        encoded = inputs.ct_slice(name)
        assert pydicom.dcmread(io.BytesIO(encoded)).file_meta.TransferSyntaxUID == syntax
        slice = read_slice(encoded)
        assert isinstance(slice, Slice)
        assert np.array_equal(slice.stored, plain)


@pytest.mark.parametrize("rows", [3, 8, 21])
def test_a_made_set_has_as_many_rows_as_asked(tmp_path: Path, rows: int) -> None:
    prepared = describe(inputs.prepared_set(tmp_path, rows, size=4, rows_per_shard=8))
    assert len(prepared.read_rows("train")) == prepared.rows["train"] == rows
    feed = batches(prepared, "train", global_batch=1, rank=0, world_size=1, seed=1, epoch=0)
    assert sum(batch.weight.sum() for batch in feed) == rows


def test_a_figure_is_the_median_with_its_spread() -> None:
    assert data.figure([3.0, 1.0, 9.0]) == {"value": 3.0, "least": 1.0, "greatest": 9.0}
    table = suite._table(
        {"cpu": "a", "cores": 2, "load_before": 0.1}, {"x": data.figure([2.0]), "y": {"reason": "absent"}}
    )
    assert "2.000" in table
    assert "not measured: absent" in table


@pytest.mark.parametrize(("values", "key"), [({"repeats": 1}, "repeats"), ({"rows": 9}, "rows")])
def test_a_benchmark_without_spread_or_contrast_is_refused(values: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"benchmark.{key}"):
        suite.BenchmarkConfig(**values)


DEVICE = roofline.Device("made up", {"float32": 1e9, "mixed_bfloat16": 4e9}, 1e8)


def test_a_roofline_by_hand() -> None:
    images = keras.Input((8, 8, 2))
    values = layers.Conv2D(4, 3, padding="same", name="one_conv")(images)
    values = layers.Activation("relu", name="one_act")(layers.BatchNormalization(name="one_norm")(values))
    model = keras.Model(images, layers.Conv2DTranspose(3, 2, strides=2, name="two_up")(values))
    conv, norm, up = roofline.kernels(model, training=False)
    assert conv.flop == 2 * (3 * 3 * 2 * 4) * 64
    assert up.flop == 2 * (2 * 2 * 4 * 3) * 64, "each pixel of the input meets the kernel"
    assert (conv.values, norm.values, up.values) == (64 * (2 + 4), 2 * 64 * 4, 64 * 4 + 256 * 3)
    assert conv.moved_bytes("float32", batch=2) == 4 * (384 + 72 / 2)
    assert conv.moved_bytes("mixed_bfloat16", batch=2) == 2 * (384 + 72 / 2)
    # 9.2 us of arithmetic against 16.8 of bytes, and none against 20.5: memory binds.
    assert conv.seconds(DEVICE, "float32", 2) == pytest.approx(1680e-8)
    fast = roofline.Device("memory without end", {"float32": 1e9}, 1e15)
    assert conv.seconds(fast, "float32", 2) == pytest.approx(9216e-9)
    whole = sum(one.seconds(DEVICE, "float32", 2) for one in (conv, norm, up))
    assert roofline.images_per_second([conv, norm, up], DEVICE, "float32", 2) == pytest.approx(1 / whole)

    *trained, adam = roofline.kernels(model, training=True)
    assert sum(one.flop for one in trained) == 3 * (conv.flop + up.flop)
    weights = sum(weight.numpy().size for weight in model.trainable_weights)
    assert adam.moved_bytes("mixed_bfloat16", batch=2) == 4 * 7 * weights / 2, "weights stay float32"


@pytest.mark.parametrize("preset", ["unet-small", "unet-batchnorm"])
def test_arithmetic_is_what_tensorflow_counts(preset: str) -> None:
    model = portable(build_network(NetworkConfig(preset=preset), (32, 32, 1)))
    spec = tf.TensorSpec((1, 32, 32, 1), tf.uint8)
    network = tf.function(lambda image: model(image, training=False), input_signature=[spec], autograph=False)
    profiler, builder = tf.compat.v1.profiler, tf.compat.v1.profiler.ProfileOptionBuilder
    options = builder(builder.float_operation()).with_empty_output()
    options = options.with_accounted_types(["Conv2D", "Conv2DBackpropInput"]).build()
    counted = profiler.profile(network.get_concrete_function().graph, cmd="op", options=options).total_float_ops
    assert sum(one.flop for one in roofline.kernels(model, training=False)) == counted
