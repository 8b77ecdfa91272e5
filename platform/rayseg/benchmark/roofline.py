"""A roofline: what a network's kernels compute and move, and how many images a second a GPU could make of that at most.

Williams, Waterman and Patterson 2009 (doi:10.1145/1498765.1498785): a kernel takes as long as its arithmetic at the
peak of the device, or as the bytes that it moves at the bandwidth of its memory, whichever is longer. Nothing is
counted for launching kernels, for caches that keep what the next kernel reads, or for convolutions that do not reach
the peak: a real device is slower, and a figure above this one is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

_ADAM_NUMBERS = 7  # read: weight, gradient, two moments; written: weight, two moments


@dataclass(frozen=True)
class Device:
    """A GPU, by NVIDIA's data sheets, dense; `float32` without TF32, as `numerics.settle` has it."""

    name: str
    flops: dict[str, float]  # a second, by Keras dtype policy
    bytes_per_s: float


_HOPPER = {"mixed_bfloat16": 989.4e12, "float32": 66.9e12}
DEVICES = (Device("H100 SXM", _HOPPER, 3.35e12), Device("H200 SXM", _HOPPER, 4.8e12))


@dataclass(frozen=True)
class Kernel:
    """Work of a kind in one block of the network, for one image."""

    block: str
    kind: str
    flop: float  # of matrix products; all else is bound by memory
    values: float  # of activations, read and written
    weights: float  # read and written for each batch, whatever its size
    value_bytes: int | None = None  # where it does not follow the policy

    def moved_bytes(self, policy: str, batch: int) -> float:
        """For one image of a batch."""
        size = self.value_bytes or (2 if policy == "mixed_bfloat16" else 4)
        return size * (self.values + self.weights / batch)

    def seconds(self, device: Device, policy: str, batch: int) -> float:
        """For one image of a batch."""
        return max(self.flop / device.flops[policy], self.moved_bytes(policy, batch) / device.bytes_per_s)


def kernels(model: Any, training: bool) -> list[Kernel]:
    """The kernels of a Keras model of one input, in the order of its layers.

    A normalisation and the activation after it are one kernel, which XLA makes of them. In training a convolution has
    three products (forward, the gradient of its input, that of its weights), a normalisation reads its input once more
    for the statistics and both its input and its gradient twice on the way back.
    """
    rows = [kernel for layer in model.layers for kernel in _of_layer(layer, training)]
    if training:
        weights = _ADAM_NUMBERS * sum(prod(weight.shape) for weight in model.trainable_weights)
        rows.append(Kernel("all", "Adam", 0.0, 0.0, float(weights), value_bytes=4))
    return rows


def images_per_second(rows: Sequence[Kernel], device: Device, policy: str, batch: int) -> float:
    """The most that the device could make of it, one kernel after the other."""
    return 1 / sum(row.seconds(device, policy, batch) for row in rows)


def table(rows: Sequence[Kernel], devices: Sequence[Device], policy: str, batch: int) -> str:
    """As Markdown: arithmetic, bytes and microseconds of each block and kind, and their sum."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for row in rows:
        groups.setdefault((row.block, row.kind), []).append(row)
    lines = [
        "| Block | Kernel | GFLOP | MB | " + " | ".join(f"µs, {device.name}" for device in devices) + " |",
        "|---" * (4 + len(devices)) + "|",
    ]

    def line(block: str, kind: str, some: Sequence[Kernel]) -> str:
        gflop, moved = sum(row.flop for row in some) / 1e9, sum(row.moved_bytes(policy, batch) for row in some) / 1e6
        times = (1e6 * sum(row.seconds(device, policy, batch) for row in some) for device in devices)
        return f"| {block} | {kind} | {gflop:.2f} | {moved:.1f} | " + " | ".join(f"{time:.1f}" for time in times) + " |"

    lines += [line(*names, some) for names, some in groups.items()]
    return "\n".join([*lines, line("all", "sum", rows)])


def _of_layer(layer: Any, training: bool) -> list[Kernel]:
    kind = type(layer).__name__
    if kind in ("InputLayer", "Dropout"):
        return []
    block = layer.name.partition("_")[0]
    given, made = _values(layer.input), _values(layer.output)
    if kind in ("Conv2D", "Conv2DTranspose"):
        kernel = float(prod(layer.kernel.shape))
        # Each value of the kernel meets each pixel of the output; of a transposed convolution, of the input.
        pixels = prod((layer.output if kind == "Conv2D" else layer.input).shape[1:3])
        product = Kernel(block, "convolution", 2.0 * kernel * pixels, given + made, kernel)
        return [product] * (3 if training else 1)
    if kind in ("BatchNormalization", "GroupNormalization"):
        return [Kernel(block, "normalisation, activation", 0.0, 8 * made if training else 2 * made, 0.0)]
    if kind in ("Activation", "LeakyReLU"):
        follows = type(_producer(layer)).__name__ in ("BatchNormalization", "GroupNormalization")
        return [] if follows else [Kernel(block, "activation", 0.0, (5 if training else 2) * made, 0.0)]
    if kind in ("MaxPooling2D", "AveragePooling2D", "UpSampling2D", "Concatenate", "Add", "Rescaling"):
        return [Kernel(block, kind, 0.0, (2 if training and kind != "Rescaling" else 1) * (given + made), 0.0)]
    raise ValueError(f"benchmark: what a layer {kind} computes is not known here")


def _producer(layer: Any) -> Any:
    return layer.input._keras_history.operation


def _values(tensors: Any) -> float:
    """Of one image."""
    return float(sum(prod(one.shape[1:]) for one in (tensors if isinstance(tensors, list) else [tensors])))
