"""Which engine runs where: `auto` follows what TensorFlow sees, and what Ray gave. What engines make of a network."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from rayseg.models import engine
from rayseg.models.engine import Engine, has_gpu, require_gpu


@pytest.mark.parametrize(
    ("visible", "driver", "listed", "expected"),
    [
        (None, False, 1, False),  # nothing hints at one, and TensorFlow is not asked
        (None, True, 0, False),  # a driver, and TensorFlow's build for CPUs
        (None, True, 1, True),
        ("", True, 1, False),  # hidden
        ("-1", True, 1, False),
        ("0", False, 1, True),  # given, in a container without that device file
        ("0", True, 0, False),
    ],
)
def test_auto_takes_a_gpu_that_is_not_hidden_and_that_tensorflow_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, driver: bool, listed: int, expected: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(engine, "_DRIVER", tmp_path if driver else tmp_path / "absent")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one"] * listed if kind == "GPU" else ["cpu"])
    assert has_gpu() is expected


def test_a_gpu_that_was_given_and_is_not_seen_is_refused_by_the_key_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as Ray does
    for name in ("auto", "tensorflow"):
        with pytest.raises(ValueError, match=re.escape("segment.gpus_per_actor: Ray gave a GPU, and TensorFlow sees")):
            require_gpu(Engine(name), "segment.gpus_per_actor")
    require_gpu(Engine("openvino"), "segment.gpus_per_actor")  # wants none


@pytest.mark.parametrize("groups", [2, 8])  # the latter: of one channel each
def test_a_normalisation_of_keras_is_exact_to_1e_5_on_large_images(groups: int) -> None:
    """Against float64; Keras's own layer is off by 1e-4 here, and by 4e-3 in whole networks."""
    keras.utils.set_random_seed(1)
    images = keras.Input((384, 512, 1), dtype="uint8")
    values = layers.Conv2D(8, 3, padding="same")(layers.Rescaling(1 / 255)(images))
    values = layers.GroupNormalization(groups)(values)
    probability = layers.Conv2D(1, 1, activation="sigmoid")(layers.Activation("relu")(values))
    model = keras.Model(images, probability)
    rows, columns = np.mgrid[:384, :512]
    body = (rows - 192) ** 2 + (columns - 256) ** 2 < 150**2
    image_NHWC = (body * np.random.default_rng(1).integers(60, 120, body.shape)).astype(np.uint8)[None, ..., None]

    def by_hand() -> np.ndarray:
        kernel, bias, gamma, beta, last, last_bias = (np.asarray(value, np.float64) for value in model.get_weights())
        padded = np.pad(image_NHWC[0, ..., 0] / 255, 1)
        shifted = [padded[y : y + 384, x : x + 512] for y in range(3) for x in range(3)]
        maps_PGc = (np.stack(shifted, -1) @ kernel.reshape(9, 8) + bias).reshape(-1, groups, 8 // groups)
        mean, variance = maps_PGc.mean((0, 2), keepdims=True), maps_PGc.var((0, 2), keepdims=True)
        normal = ((maps_PGc - mean) / np.sqrt(variance + 1e-3)).reshape(384, 512, 8) * gamma + beta
        return 1 / (1 + np.exp(-(np.maximum(normal, 0) @ last.reshape(8, 1) + last_bias)))

    expected_HWK = by_hand()
    for compiled in (
        engine.compile_openvino(engine.convert(model), "float32"),
        engine.compile_tensorflow(model, "float32"),
    ):
        assert np.abs(compiled.exact(image_NHWC)[0] - expected_HWK).max() < 1e-5, compiled.description


def test_normalisations_that_ours_cannot_stand_for_are_left_as_they_are() -> None:
    images = keras.Input((8, 8, 4), dtype="uint8")
    values = layers.Rescaling(1 / 255)(images)
    values = layers.GroupNormalization(2, scale=False)(values)
    values = layers.GroupNormalization(2, axis=1)(values)
    model = keras.Model(images, layers.Conv2D(1, 1, activation="sigmoid")(values))
    image_NHWC = np.random.default_rng(1).integers(0, 255, (1, 8, 8, 4), np.uint8)
    found = engine.compile_openvino(engine.convert(model), "float32").exact(image_NHWC)
    assert np.abs(found - model(image_NHWC)).max() < 1e-5


@pytest.mark.parametrize("precision", ["screened", "bfloat16", "float32"])
def test_no_engine_uses_bfloat16_where_it_is_not_native(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    # OpenVINO asks the processor itself: no variable makes it one without bfloat16.
    monkeypatch.setattr(engine, "has_bfloat16", lambda on_gpu: False)
    images = keras.Input((8, 8, 1), dtype="uint8")
    model = keras.Model(images, layers.Conv2D(1, 1, activation="sigmoid")(layers.Rescaling(1 / 255)(images)))
    for compiled in (
        engine.compile_openvino(engine.convert(model), precision),
        engine.compile_tensorflow(model, precision),
    ):
        assert compiled.screen is None
        assert compiled.description.endswith(" float32")
        assert "bfloat16" not in compiled.description


def test_the_processor_has_bfloat16_where_the_kernel_lists_its_instructions() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if "avx2" not in flags:
        pytest.skip("no x86 processor")
    assert engine.has_bfloat16(on_gpu=False) is bool(flags & {"avx512_bf16", "avx_ne_convert"})


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True), (None, False)])
def test_a_gpu_has_bfloat16_since_ampere(monkeypatch: pytest.MonkeyPatch, capability: object, expected: bool) -> None:
    details = {} if capability is None else {"compute_capability": capability}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    assert engine.has_bfloat16(on_gpu=True) is expected
