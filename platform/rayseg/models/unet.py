"""A parametric U-Net (Ronneberger et al. 2015, arXiv:1505.04597): its way down and its way up.

The way up is also that of the U-Nets over an encoder of `models.encoders`.
"""

from collections.abc import Sequence
from typing import Any

from keras import layers

from rayseg.models.blocks import Blocks


def encode(values: Any, widths: Sequence[int], residual: Sequence[int], blocks: Blocks) -> list[Any]:
    """The way down: the features of each level, from the full resolution to the bottleneck.

    Args:
        values: (N, H, W, C), H and W divisible by 2 for each level below the first.
        widths: filters of each level.
        residual: residual blocks of each level, or empty: plain blocks.
        blocks: makes them.
    """
    features: list[Any] = []
    for level, filters in enumerate(widths, 1):
        name = "bottom" if level == len(widths) else f"down{level}"
        if residual:
            values = blocks.stem(values, filters) if level == 1 else values
            for index in range(1, residual[level - 1] + 1):
                strides = 2 if level > 1 and index == 1 else 1
                values = blocks.residual(values, filters, f"{name}_block{index}", strides)
        else:
            if level > 1:
                values = layers.MaxPooling2D(dtype=blocks.policy, name=f"down{level - 1}_pool")(values)
            values = blocks.plain(values, filters, name)
        if level >= len(widths) - 1:
            values = blocks.dropped(values, name, "deep")
        features.append(values)
    return features


def decode(features: Sequence[Any], widths: Sequence[int], blocks: Blocks) -> list[Any]:
    """The way up: its features at each level, from the full resolution to the one above the bottleneck.

    Args:
        features: of the way down, as `encode` gives them; None at a level whose features are not handed over.
        widths: filters of each level.
        blocks: makes them.
    """
    *skips, values = features
    decoded: list[Any] = []
    for level, (filters, skip) in reversed(list(enumerate(zip(widths, skips, strict=True), 1))):
        values = blocks.doubled(values, filters, f"up{level}")
        if skip is not None:
            values = layers.Concatenate(dtype=blocks.policy, name=f"up{level}_skip")([skip, values])
        values = blocks.plain(values, filters, f"up{level}")
        decoded.append(values)
    return decoded[::-1]
