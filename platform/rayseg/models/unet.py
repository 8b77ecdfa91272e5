"""A parametric U-Net (Ronneberger et al. 2015, arXiv:1505.04597): its way down and its way up.

Of volumes it is that of Çiçek et al. 2016 (arXiv:1606.06650), with kernels and strides by axis as nnU-Net has them. The
way up is also that of the U-Nets over an encoder of `models.encoders`.
"""

from collections.abc import Sequence
from typing import Any

from keras import layers

from rayseg.models.blocks import Blocks, Level


def encode(values: Any, levels: Sequence[Level], residual: Sequence[int], blocks: Blocks) -> list[Any]:
    """The way down: the features of each level, from the full resolution to the bottleneck.

    Args:
        values: (N, H, W, C) or (N, D, H, W, C), each axis divisible by the product of its strides.
        levels: from the full resolution, whose strides are not used, down.
        residual: residual blocks of each level, or empty: plain blocks.
        blocks: makes them.
    """
    features: list[Any] = []
    for number, level in enumerate(levels, 1):
        name = "bottom" if number == len(levels) else f"down{number}"
        if residual:
            values = blocks.stem(values, level) if number == 1 else values
            for index in range(1, residual[number - 1] + 1):
                values = blocks.residual(values, level, f"{name}_block{index}", smaller=number > 1 and index == 1)
        else:
            if number > 1:
                values = blocks.pooled(values, level.strides, f"down{number - 1}")
            values = blocks.plain(values, level, name)
        if number >= len(levels) - 1:
            values = blocks.dropped(values, name, "deep")
        features.append(values)
    return features


def decode(features: Sequence[Any], levels: Sequence[Level], blocks: Blocks) -> list[Any]:
    """The way up: its features at each level, from the full resolution to the one above the bottleneck.

    Args:
        features: of the way down, as `encode` gives them; None at a level whose features are not handed over.
        levels: from the full resolution to the bottleneck, of which only the strides are used.
        blocks: makes them.
    """
    *skips, values = features
    decoded: list[Any] = []
    for number in range(len(skips), 0, -1):
        level, skip = levels[number - 1], skips[number - 1]
        values = blocks.enlarged(values, level.filters, levels[number].strides, f"up{number}")
        if skip is not None:
            values = layers.Concatenate(dtype=blocks.policy, name=f"up{number}_skip")([skip, values])
        values = blocks.plain(values, level, f"up{number}")
        decoded.append(values)
    return decoded[::-1]
