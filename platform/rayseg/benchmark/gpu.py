"""The accelerator: training steps and forward passes of `unet-batchnorm` on the machine's GPU, beside the roofline.

Without a GPU the same is measured on the CPU, in small batches: so that the suite runs everywhere.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rayseg.benchmark import inputs
from rayseg.benchmark.data import figure

_SIZE, _PRESET = 256, "unet-batchnorm"
BATCH = 32  # of the roofline, and on a GPU; on a CPU `_CPU_BATCH`
_CPU_BATCH = 2
# A process of its own for each repeat: TensorFlow keeps a GPU's memory until it ends.
_MEASURE = """
import json, logging, sys, time
import numpy as np
import tensorflow as tf
from rayseg.data.prepared import describe
from rayseg.models import engine, numerics
from rayseg.models.network import portable
from rayseg.models.presets import NetworkConfig
from rayseg.training import precision
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
prepared, preset, gpu_batch, cpu_batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
gpus = tf.config.list_physical_devices("GPU")
batch = gpu_batch if gpus else cpu_batch
name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "a GPU") if gpus else "CPU"
learners = {
    policy: Learner(
        TrainConfig(prepared, "unused", "unused", model=NetworkConfig(preset=preset), batch_size=batch, num_workers=1,
                    mixed_precision=policy),
        describe(prepared), 0, 1, lambda: None)
    for policy in (precision.FLOAT32, precision.BFLOAT16)
}
numerics.settle()
rates = {f"train.{policy}": batch / seconds for policy, seconds in precision.paces(learners).items()}
model = portable(learners[precision.FLOAT32].model)
images = np.random.default_rng(1).integers(0, 256, (batch, *model.input_shape[1:]), np.uint8)
for policy, kind in ((precision.FLOAT32, "float32"), (precision.BFLOAT16, "bfloat16")):
    forward = engine.compile_tensorflow(model, kind).exact
    forward(images)
    began = time.perf_counter()
    for _ in range(5):
        forward(images)
    rates[f"infer.{policy}"] = 5 * batch / (time.perf_counter() - began)
print(json.dumps([name, rates]))
"""
_ROOFLINE = """
import json, sys
from rayseg.benchmark import roofline
from rayseg.models.network import build_network, portable
from rayseg.models.presets import NetworkConfig
preset, size, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = build_network(NetworkConfig(preset=preset), (size, size, 1))
rates = {}
for way, training in (("infer", False), ("train", True)):
    rows = roofline.kernels(portable(model), training)
    print(f"\\n{preset}, {size}x{size}, {way}, an image of a batch of {batch}, mixed_bfloat16:\\n", file=sys.stderr)
    print(roofline.table(rows, roofline.DEVICES, "mixed_bfloat16", batch), file=sys.stderr)
    for device in roofline.DEVICES:
        for policy in device.flops:
            rates[f"{way}.{policy}.{device.name}"] = roofline.images_per_second(rows, device, policy, batch)
print(json.dumps(rates))
"""


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """All figures of the suite; the tables of kernels go to standard error. `folder` is for its files.

    `images_per_s.*` are measured on the GPU that TensorFlow sees, else on the CPU. `roofline.*` is the most that a
    device could do, and `of_roofline.*` the measured part of it, where the GPU is one that the roofline knows.
    """
    limits = _run(_ROOFLINE, _PRESET, _SIZE, BATCH)
    prepared = inputs.prepared_set(folder / "set", 2 * BATCH, _SIZE)
    measured = [_run(_MEASURE, prepared, _PRESET, BATCH, _CPU_BATCH) for _ in range(repeats)]
    name = measured[0][0]
    rates = {way: [of_repeat[way] for _, of_repeat in measured] for way in measured[0][1]}
    figures = {f"images_per_s.{way}": figure(values) for way, values in rates.items()}
    for way, limit in limits.items():
        figures[f"roofline.{way}"] = figure([limit])
        of_way, _, device = way.rpartition(".")
        if device.partition(" ")[0] in name:
            figures[f"of_roofline.{of_way}"] = figure([value / limit for value in rates[of_way]])
    return figures


def _run(program: str, *arguments: object) -> Any:
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])
