"""Engines: what runs a network's forward pass, in which precision. OpenVINO on CPUs, TensorFlow on GPUs.

OpenVINO reads a network in its own form (`convert`, two files of every bundle), so a process that only segments needs
no TensorFlow: it starts in a second and takes a tenth of the memory.
"""

import contextlib
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rayseg.models.inputs import VOLUME_AXES, input_dtype
from rayseg.models.sharing import Shared

# TensorFlow takes seconds and hundreds of MB: only what needs it imports it.
if TYPE_CHECKING:
    import keras

# uint8 images (N, height, width, channels) to float32 probabilities (N, height, width, outputs), or float16 volumes
# (N, depth, height, width, channels) to (N, depth, height, width, outputs), for any N.
Forward = Callable[[np.ndarray], np.ndarray]

_GPU_BATCH = 16
_GPU_VOXELS = 2**20  # of a batch of volumes, whose feature maps take gigabytes
_DRIVER = Path("/dev/nvidiactl")  # of NVIDIA
_NATIVE = (8, 0)  # compute capability of the first GPUs with bfloat16


@dataclass(frozen=True)
class Engine:
    """Which engine runs the network, and how exactly.

    name: `auto` is TensorFlow where it sees a GPU (`has_gpu`), else OpenVINO.
    precision: `screened` runs every slice in bfloat16 and those where something may be found once more in float32, so
        that masks are float32's and slices with nothing cost half. Where bfloat16 is not native (`has_bfloat16`)
        `screened` and `bfloat16` are `float32`.
    """

    name: Literal["auto", "openvino", "tensorflow"] = "auto"
    precision: Literal["screened", "bfloat16", "float32"] = "screened"


@dataclass(frozen=True)
class Network:
    """A network in OpenVINO's form, float32."""

    xml: bytes
    weights: bytes


@dataclass(frozen=True)
class Compiled:
    """The network, ready to run; `screen` is None where all slices go through `exact`."""

    exact: Forward
    screen: Forward | None
    description: str  # engine with its version, and precision


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU here; a task or actor of Ray sees what it was given (`rayseg.grant`).

    TensorFlow is only imported, which takes seconds, where something says that there may be one.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or (visible is None and not _DRIVER.exists()):
        return False
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def has_bfloat16(on_gpu: bool) -> bool:
    """Whether the CPU, or each GPU that TensorFlow sees, has instructions for bfloat16.

    Elsewhere bfloat16 is emulated, which is several times slower than float32. NVIDIA's GPUs have them since compute
    capability 8.0 (Ampere).
    """
    if not on_gpu:
        return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return all(one.get("compute_capability", (0, 0)) >= _NATIVE for one in details)


def require_gpu(engine: Engine, key: str) -> None:
    """Raises ValueError where `key` asked for a GPU, Ray gave one, and the engine would not run on it."""
    if engine.name != "openvino" and not has_gpu():
        raise ValueError(
            f"{key}: Ray gave a GPU, and TensorFlow sees none there: install the GPU build on the GPU nodes (the extra "
            f"gpu in place of cpu), see that nvidia-smi lists the GPU there, or run on CPUs with {key}=0"
        )


def convert(model: "keras.Model") -> Network:
    """The float32 form of a Keras model, whatever the precision that it was trained in."""
    import tensorflow as tf

    openvino = _openvino()
    exact = _with_policy(model, "float32")
    shape = exact.input_shape[1:]
    spec = tf.TensorSpec((1, *shape), input_dtype(shape))
    function = tf.function(lambda images: exact(images, training=False), input_signature=[spec], autograph=False)
    converted = openvino.convert_model(function.get_concrete_function())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.xml")
        openvino.save_model(converted, file, compress_to_fp16=False)
        return Network(file.read_bytes(), file.with_suffix(".bin").read_bytes())


def compile_openvino(network: Network, precision: str, threads: int = 1) -> Compiled:
    """The network on this machine's CPU; safe to call from several threads, of which `threads` run at once.

    A forward pass takes exactly one image or volume, so that a mask cannot depend on what is segmented beside it; on a
    CPU a batch is no faster. Its result does not depend on `threads`.
    """
    openvino = _openvino()
    core = openvino.Core()
    version = openvino.__version__.partition("-")[0]
    model = core.read_model(network.xml, network.weights)
    shape, native = tuple(model.input(0).shape), has_bfloat16(on_gpu=False)
    blank = np.zeros(shape, input_dtype(shape[1:]))

    def ready(hint: str) -> Forward:
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # several processes would all sit on the same first cores
        }
        compiled = core.compile_model(model, "CPU", settings)
        # Two threads that are the first of a process to give an array to OpenVINO wait for each other for ever: one
        # imports numpy's interface and needs the interpreter's lock for it, the other has that and waits for the first.
        compiled.create_infer_request().infer([blank])
        own = threading.local()

        def forward(images_NHWC: np.ndarray) -> np.ndarray:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            made = []
            for image_HWC in images_NHWC:
                own.request.infer([image_HWC[np.newaxis]])
                made.append(own.request.get_output_tensor().data[0].copy())
            return np.stack(made)

        return forward

    if precision == "bfloat16" and native:
        return Compiled(ready("bf16"), None, f"openvino {version} bfloat16")
    exact = ready("f32")
    if precision == "screened" and native:
        return Compiled(exact, ready("bf16"), f"openvino {version} bfloat16 screened, float32")
    return Compiled(exact, None, f"openvino {version} float32")


def compile_tensorflow(model: "keras.Model", precision: str, threads: int = 1) -> Compiled:
    """The network through TensorFlow; safe to call from several threads, whose images share batches.

    The network always runs on exactly one number of images, filled up where there are fewer: TensorFlow adds up group
    normalisation in another order for each batch size, and a mask must not depend on its company. By default it takes
    every core of the machine: `threads` bounds that, unless TensorFlow runs in this process already.
    """
    import tensorflow as tf

    from rayseg.models import numerics

    numerics.settle()
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    batch = _gpu_batch(model.input_shape[1:]) if on_gpu else 1

    def ready(policy: str) -> Forward:
        cast = _with_policy(model, policy)
        shape_NHWC = (batch, *cast.input_shape[1:])
        dtype = input_dtype(shape_NHWC[1:])

        @tf.function(input_signature=[tf.TensorSpec(shape_NHWC, dtype)], autograph=False, jit_compile=on_gpu)
        def network(images_NHWC: Any) -> Any:
            return tf.cast(cast(images_NHWC, training=False), tf.float32)

        network(np.zeros(shape_NHWC, dtype))  # traced and warmed up
        return Shared(lambda images_NHWC: network(images_NHWC).numpy(), batch)

    name = f"tensorflow {tf.__version__}{' xla' if on_gpu else ''}"
    if precision == "float32" or not has_bfloat16(on_gpu):
        return Compiled(ready("float32"), None, f"{name} float32")
    if precision == "bfloat16":
        return Compiled(ready("mixed_bfloat16"), None, f"{name} bfloat16")
    return Compiled(ready("float32"), ready("mixed_bfloat16"), f"{name} bfloat16 screened, float32")


def _gpu_batch(shape: tuple[int, ...]) -> int:
    """How many images or volumes of a shape a GPU takes at once."""
    if len(shape) < VOLUME_AXES:
        return _GPU_BATCH
    return max(1, min(_GPU_BATCH, _GPU_VOXELS // math.prod(shape[:-1])))


@cache
def _openvino() -> Any:
    # OpenVINO tells Google Analytics that it is imported, unless its package for that is not there.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


def _with_policy(model: "keras.Model", policy: str) -> "keras.Model":
    """The same network and weights computing in another precision, and group normalisation in our form of it."""
    import keras

    config = _replaced(model.get_config(), policy)
    cast = type(model).from_config(config) if isinstance(model, keras.Sequential) else keras.Model.from_config(config)
    cast.set_weights(model.get_weights())
    return cast


def _replaced(config: Any, policy: str) -> Any:
    if isinstance(config, list | tuple):
        return type(config)(_replaced(value, policy) for value in config)
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy" and config["config"].get("name", "") in _FLOATS:
        return config | {"config": {"name": policy}}
    if config.get("class_name") == "GroupNormalization" and _is_ours(config):
        import keras

        from rayseg.models.blocks import GroupNormalization  # faster, and more exact: see there

        name = keras.saving.get_registered_name(GroupNormalization)
        config |= {"module": GroupNormalization.__module__, "registered_name": name}
    return {key: _replaced(value, policy) for key, value in config.items()}


def _is_ours(config: dict[str, Any]) -> bool:
    """Whether a group normalisation is one that ours can stand for: of images or volumes, scaled and shifted."""
    shape, values = config.get("build_config", {}).get("input_shape", ()), config["config"]
    fixed = len(shape) in (4, 5) and None not in shape[1:]
    return fixed and values["axis"] in (-1, len(shape) - 1) and values["scale"] and values["center"]


_FLOATS = ("float32", "mixed_bfloat16", "mixed_float16")
