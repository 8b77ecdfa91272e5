"""Pooling and kernels by axis, and how much memory the feature maps of a network need: nnU-Net's rules.

Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 2, and `experiment_planning` of its repository.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Network = Literal["plain", "residual"]

LEAST_EDGE = 4  # of feature maps at the bottleneck
_ISOTROPIC = 2  # spacings within this factor count as equal
_LEAST_ALONE = 3  # times the least edge: what a single axis must have to be halved without the others
RESIDUAL_BLOCKS = (1, 3, 4, 6)  # of each level of the way down; deeper ones as the last
_CONVOLUTIONS = 2  # of each level of a plain network, both ways


@dataclass(frozen=True)
class Topology:
    """A network's levels, from the full resolution down. Axes are those of the spacing it was made for.

    Attributes:
        strides: how many times smaller each level is than the one above; all 1 of the first.
        kernels: of each level's convolutions, 1 or 3.
        patch: the size, which the strides divide.
    """

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """What the patch is a multiple of, by axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


def topology(spacing_mm: Sequence[float], size: Sequence[float]) -> Topology:
    """Halves the axes that are long enough and have about the finest spacing of these, until none is left.

    An axis is long enough while half of it has `LEAST_EDGE` samples. Its spacing is about the finest where it is less
    than twice that. A kernel is 1 along an axis until this one's spacing is less than twice the finest of all, then 3.
    The size grows to the next multiple of what the strides divide it by.
    """
    axes = range(len(size))
    spacing, edge = list(spacing_mm), list(size)
    kernel = [1] * len(size)
    strides, kernels = [(1,) * len(size)], []
    while True:
        long = [axis for axis in axes if edge[axis] >= 2 * LEAST_EDGE]
        if not long:
            break
        finest = min(spacing[axis] for axis in long)
        halved = [axis for axis in long if spacing[axis] / finest < _ISOTROPIC]
        if len(halved) == 1 and edge[halved[0]] < _LEAST_ALONE * LEAST_EDGE:
            break
        kernel = [3 if spacing[axis] / min(spacing) < _ISOTROPIC else kernel[axis] for axis in axes]
        for axis in halved:
            spacing[axis] *= 2
            edge[axis] = math.ceil(edge[axis] / 2)
        strides.append(tuple(2 if axis in halved else 1 for axis in axes))
        kernels.append(tuple(kernel))
    kernels.append((3,) * len(size))
    divisor = [math.prod(axis) for axis in zip(*strides, strict=True)]
    patch = tuple(math.ceil(samples / by) * by for samples, by in zip(size, divisor, strict=True))
    return Topology(tuple(strides), tuple(kernels), patch)


def widths(levels: int, filters: int, most: int) -> tuple[int, ...]:
    """Filters of each level: twice those above, up to a limit."""
    return tuple(min(most, filters * 2**level) for level in range(levels))


def blocks(levels: int) -> tuple[int, ...]:
    """Residual blocks of each level."""
    return (RESIDUAL_BLOCKS + RESIDUAL_BLOCKS[-1:] * levels)[:levels]


def feature_maps(of: Topology, filters: Sequence[int], classes: int, network: Network) -> int:
    """Numbers in the feature maps that the convolutions of a network give for one patch, those of the way up too.

    Args:
        of: the levels.
        filters: of each level.
        classes: the background among them.
        network: two convolutions a level, or residual blocks of two down and one convolution up.
    """
    edge = list(of.patch)
    maps = []  # numbers in one feature map set of each level
    for stride, width in zip(of.strides, filters, strict=True):
        edge = [samples // by for samples, by in zip(edge, stride, strict=True)]
        maps.append(math.prod(edge) * width)
    voxels = math.prod(of.patch)
    up = sum(maps[:-1])
    if network == "plain":
        return _CONVOLUTIONS * sum(maps) + (_CONVOLUTIONS + 1) * up + classes * voxels
    down = maps[0]  # the stem
    before = filters[0]
    for level, (count, size) in enumerate(zip(blocks(len(maps)), maps, strict=True)):
        # The first block of a level has a convolution beside it where its input has another form.
        beside = filters[level] != before or max(of.strides[level]) > 1
        down += (2 * count + beside) * size
        before = filters[level]
    return down + 2 * up + classes * voxels
