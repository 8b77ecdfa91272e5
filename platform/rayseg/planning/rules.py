"""The rules that make a plan of a fingerprint: target spacing, patch, levels, batch. nnU-Net's, see `topology`."""

import math
from dataclasses import dataclass

import numpy as np

from rayseg.planning import topology
from rayseg.planning.fingerprint import Fingerprint
from rayseg.planning.topology import Network, Topology

_ANISOTROPIC = 3  # an axis is coarse where its spacing is so many times the next one's, and it has so many times less
_COARSE_PERCENTILE = 10  # of the spacings along such an axis
_LEAST_BATCH = 2
MOST_OF_SET = 0.05  # of the set's voxels in a batch
_REFERENCE_GB = 8.0


@dataclass(frozen=True)
class _Budget:
    """What fits into `_REFERENCE_GB`, by nnU-Net's measurements: so many numbers, for a batch of so many patches."""

    numbers: int
    batch: int
    start: int  # edge of the cube, or square, that patches are shrunk from
    most_filters: int


_BUDGETS: dict[tuple[int, Network], _Budget] = {
    (3, "plain"): _Budget(560_000_000, 2, 256, 320),
    (3, "residual"): _Budget(680_000_000, 2, 256, 320),
    (2, "plain"): _Budget(85_000_000, 12, 2048, 512),
    (2, "residual"): _Budget(135_000_000, 12, 2048, 512),
}


@dataclass(frozen=True)
class Plan:
    """What is planned. Axes are (depth, height, width); of 2D networks height and width.

    Attributes:
        spacing_mm: of the network's grid, always of three axes.
        coarse: the axis whose spacing is its tenth percentile, as it is much coarser than the others; None of none.
        shape: the median of the volumes on that grid, of three axes.
        start: the first patch that was tried.
        network: its levels and the patch.
        widths: filters of each level.
        most_filters: of a level.
        numbers: in the feature maps of one patch.
        batch: patches of a batch.
        fitting: what the memory would take.
    """

    spacing_mm: tuple[float, float, float]
    coarse: int | None
    shape: tuple[float, float, float]
    start: tuple[int, ...]
    network: Topology
    widths: tuple[int, ...]
    most_filters: int
    numbers: int
    batch: int
    fitting: int


def target_spacing_mm(fingerprint: Fingerprint) -> tuple[np.ndarray, int | None]:
    """The median by axis; of one that is more than three times coarser, and has that much less samples, less.

    Such an axis gets the tenth percentile, but stays coarser than the others: fewer slices would be made up, as few
    volumes are that fine. The number of that axis is returned, too.
    """
    spacing_mm = np.median(fingerprint.spacings_mm, axis=0)
    shape = np.median(fingerprint.shapes, axis=0)
    coarsest = int(np.argmax(spacing_mm))
    others = [axis for axis in range(3) if axis != coarsest]
    next_mm = spacing_mm[others].max()
    if spacing_mm[coarsest] <= _ANISOTROPIC * next_mm or shape[coarsest] * _ANISOTROPIC >= shape[others].min():
        return spacing_mm, None
    finer_mm = np.percentile(fingerprint.spacings_mm[:, coarsest], _COARSE_PERCENTILE)
    spacing_mm[coarsest] = finer_mm if finer_mm >= next_mm else next_mm + 1e-5
    return spacing_mm, coarsest


def plan(
    fingerprint: Fingerprint, network: Network, dimensions: int, memory_gb: float, filters: int, classes: int
) -> Plan:
    """Plans for a set.

    Args:
        fingerprint: its volumes.
        network: the form of the network.
        dimensions: 3, or 2 of networks that see a slice.
        memory_gb: of the GPU.
        filters: of the first level.
        classes: the background among them.

    Raises:
        ValueError: not even the smallest patch fits.
    """
    spacing_mm, coarse = target_spacing_mm(fingerprint)
    shapes = np.rint(fingerprint.spacings_mm / spacing_mm * fingerprint.shapes)
    shape = np.median(shapes, axis=0)
    budget = _BUDGETS[dimensions, network]
    axis_mm, median = spacing_mm[-dimensions:].tolist(), shape[-dimensions:].tolist()
    most = budget.numbers * memory_gb / _REFERENCE_GB

    def sized(levels: Topology) -> tuple[tuple[int, ...], int]:
        widths = topology.widths(len(levels.strides), filters, budget.most_filters)
        return widths, topology.feature_maps(levels, widths, classes, network)

    # As many samples as the cube has, with edges of equal length in millimetres; no longer than the median volume.
    edge_mm = (budget.start**dimensions * math.prod(axis_mm)) ** (1 / dimensions)
    levels = topology.topology(
        axis_mm, [min(round(edge_mm / mm), samples) for mm, samples in zip(axis_mm, median, strict=True)]
    )
    start = levels.patch
    widths, numbers = sized(levels)
    while numbers * (_LEAST_BATCH / budget.batch if network == "plain" else 1) > most:
        levels = _smaller(levels, axis_mm, median)
        widths, numbers = sized(levels)
    fitting = round(most / numbers * budget.batch)
    covering = round(math.prod(shape.tolist()) * len(shapes) * MOST_OF_SET / math.prod(levels.patch))
    return Plan(
        spacing_mm=_three(spacing_mm),
        coarse=coarse,
        shape=_three(shape),
        start=start,
        network=levels,
        widths=widths,
        most_filters=budget.most_filters,
        numbers=numbers,
        batch=max(_LEAST_BATCH, min(fitting, covering)),
        fitting=fitting,
    )


def _smaller(levels: Topology, spacing_mm: list[float], median: list[float]) -> Topology:
    """The next smaller patch: shorter along the axis that covers most of the median volume."""
    covered = [samples / of for samples, of in zip(levels.patch, median, strict=True)]
    axis = max(range(len(covered)), key=lambda number: (covered[number], number))
    shorter = list(levels.patch)
    shorter[axis] -= levels.divisor[axis]
    # With one level less there are sizes between: 224 between 192 and 256.
    step = topology.topology(spacing_mm, shorter).divisor[axis]
    shorter[axis] = levels.patch[axis] - step
    if shorter[axis] < topology.LEAST_EDGE:
        raise ValueError("plan.memory_gb: not even the smallest patch fits; give more, or fewer plan.filters")
    return topology.topology(spacing_mm, shorter)


def _three(values: np.ndarray) -> tuple[float, float, float]:
    depth, height, width = values.tolist()
    return depth, height, width
