"""Which engine runs where: `auto` follows what TensorFlow sees, and what Ray gave. What engines make of a network."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from rayseg.models import engine
from rayseg.models.engine import Engine, has_gpu, require_gpu
from rayseg.models.network import build_network, portable
from rayseg.models.presets import NetworkConfig


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


@pytest.mark.parametrize("groups", [2, 8])  # the latter: of one channel each
def test_a_normalisation_of_keras_is_exact_to_1e_5_on_large_volumes(groups: int) -> None:
    """Against float64; Keras's own layer is off by 1e-4 here."""
    keras.utils.set_random_seed(1)
    volumes = keras.Input((64, 72, 80, 1), dtype="float16")
    values = layers.Conv3D(8, 1)(volumes)
    values = layers.GroupNormalization(groups)(values)
    probability = layers.Conv3D(3, 1, activation="softmax")(layers.LeakyReLU(0.01)(values))
    model = keras.Model(volumes, probability)
    planes, rows, columns = np.mgrid[:64, :72, :80]
    body = (planes - 32) ** 2 + (rows - 36) ** 2 + (columns - 40) ** 2 < 28**2
    volume_NDHWC = np.where(body, np.random.default_rng(1).normal(5, 0.3, body.shape), -0.7)[None, ..., None]
    volume_NDHWC = volume_NDHWC.astype(np.float16)

    kernel, bias, gamma, beta, last, last_bias = (np.asarray(value, np.float64) for value in model.get_weights())
    maps_PGc = (volume_NDHWC.astype(np.float64) @ kernel[0, 0, 0] + bias).reshape(-1, groups, 8 // groups)
    mean, variance = maps_PGc.mean((0, 2), keepdims=True), maps_PGc.var((0, 2), keepdims=True)
    normal = ((maps_PGc - mean) / np.sqrt(variance + 1e-3)).reshape(*body.shape, 8) * gamma + beta
    logits = np.where(normal > 0, normal, 0.01 * normal) @ last[0, 0, 0] + last_bias
    expected_DHWK = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for compiled in (
        engine.compile_openvino(engine.convert(model), "float32"),
        engine.compile_tensorflow(model, "float32"),
    ):
        assert np.abs(compiled.exact(volume_NDHWC)[0] - expected_DHWK).max() < 1e-5, compiled.description


def uneven() -> keras.Model:
    """A network of volumes whose first slices are far apart, with weights that find something."""
    keras.utils.set_random_seed(3)
    form = NetworkConfig(
        preset="unet3d-residual",
        widths=(8, 16, 24),
        residual=(1, 1, 1),
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        deep_supervision=1,
    )
    model = portable(build_network(form, (6, 20, 24, 1), classes=2, policy="mixed_bfloat16"))
    model.get_layer("logits").set_weights([4 * weight for weight in model.get_layer("logits").get_weights()])
    return model


@pytest.mark.parametrize("name", ["openvino", "tensorflow"])
def test_volumes_have_keras_s_probabilities_and_the_same_bits_for_any_call_and_threads(name: str) -> None:
    model = uneven()
    volumes = np.random.default_rng(2).normal(0, 2, (5, 6, 20, 24, 1)).astype(np.float16)

    def compiled(threads: int) -> engine.Compiled:
        if name == "openvino":
            return engine.compile_openvino(network, "float32", threads)
        return engine.compile_tensorflow(model, "float32", threads)

    network = engine.convert(model)
    exact = compiled(1).exact
    found = exact(volumes)
    assert (found.shape, found.dtype) == ((5, 6, 20, 24, 3), np.float32)
    # The network was trained in bfloat16: its float32 form is what is asked for.
    in_float32 = engine._with_policy(model, "float32")(volumes, training=False).numpy()
    assert np.ptp(in_float32) > 0.9, "else this would say little"
    assert np.abs(found - in_float32).max() < 1e-5
    alone = np.concatenate([exact(volumes[n : n + 1]) for n in range(5)])
    np.testing.assert_array_equal(alone, found)
    of_more = compiled(2).exact
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(of_more, [volumes[:1], volumes[1:4], volumes[4:]]))
    np.testing.assert_array_equal(np.concatenate(parts), found)


@pytest.mark.skipif(not engine.has_bfloat16(on_gpu=False), reason="the processor has no bfloat16")
@pytest.mark.parametrize("name", ["openvino", "tensorflow"])
def test_volumes_are_screened_in_bfloat16(name: str) -> None:
    model = uneven()
    volumes = np.random.default_rng(2).normal(0, 2, (2, 6, 20, 24, 1)).astype(np.float16)
    if name == "openvino":
        compiled = engine.compile_openvino(engine.convert(model), "screened")
    else:
        compiled = engine.compile_tensorflow(model, "screened")
    assert compiled.screen is not None
    rough, exact = compiled.screen(volumes), compiled.exact(volumes)
    assert 0 < np.abs(rough - exact).max() < 0.2
    assert np.abs(rough - exact).mean() < 0.01


@pytest.mark.parametrize(
    ("shape", "batch"), [((512, 512, 1), 16), ((40, 56, 40, 1), 11), ((8, 8, 8, 1), 16), ((160, 160, 160, 1), 1)]
)
def test_a_gpu_takes_fewer_volumes_at_once_the_larger_they_are(shape: tuple[int, ...], batch: int) -> None:
    assert engine._gpu_batch(shape) == batch


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
