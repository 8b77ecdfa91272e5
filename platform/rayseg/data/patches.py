"""Patches: which pieces of which volumes an epoch has, a function of (seed, epoch).

In training every volume gives equally many. Of each volume's patches, counted over all epochs, a share lies around
foreground, exactly as many as the share says: the classes that the volume has take turns, and a voxel is drawn of those
that prepare has kept of the class, see `places`. The others lie anywhere. Both lie within the volume, as nnU-Net has it
(Isensee et al. 2021). Along an axis where a volume is smaller than a patch it stands in the middle of it, with 0, the
mean of `z_score` and `ct`, and background around.

In validation windows cover each volume without overlap, so that no voxel counts twice; what they have more than the
volume lies around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from rayseg.data.chunks import Index
from rayseg.data.prepared import PreparedSet
from rayseg.data.volume_augment import VolumeAugment

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Patches:
    """What training sees of volumes."""

    per_volume: int = 2  # patches of each volume in an epoch
    foreground: float = 0.33  # share of them around a voxel of foreground, each class in turn
    augment: VolumeAugment | None = None  # null is off; {} is nnU-Net's

    def __post_init__(self) -> None:
        if self.per_volume < 1:
            raise ValueError(f"train.patches.per_volume: a positive number expected, got {self.per_volume}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"train.patches.foreground: a number from 0 to 1 expected, got {self.foreground}")

    def turn(self, volume: int, number: int) -> int | None:
        """Which time it is that a patch of a volume lies around foreground, from 0; None for one anywhere.

        Args:
            volume: its number in the split: in an epoch the share holds over volumes, too.
            number: of the patch, counted over all epochs.
        """
        place = volume + number
        before, after = (int((place + one) * self.foreground + 1e-9) for one in (0, 1))
        return before if after > before else None


@dataclass(frozen=True)
class Patch:
    """A patch of a volume, by its number in the split; in training `number` of its patches, counted over all epochs."""

    volume: int
    number: int | None = None
    first: Shape | None = None  # voxel, of a window of validation


def count(prepared: PreparedSet, split: str, patches: Patches | None) -> int:
    """Rows of an epoch: patches that are drawn, or windows where `patches` is None."""
    if patches is not None:
        return prepared.rows[split] * patches.per_volume
    return sum(1 for _ in windows(prepared, split))


def drawn(prepared: PreparedSet, split: str, patches: Patches, seed: int, epoch: int) -> list[Patch]:
    """The patches of an epoch of training, in its order."""
    total = count(prepared, split, patches)
    order = np.random.default_rng((seed, epoch)).permutation(total)
    return [
        Patch(place // patches.per_volume, epoch * patches.per_volume + place % patches.per_volume)
        for place in order.tolist()
    ]


def windows(prepared: PreparedSet, split: str) -> Iterator[Patch]:
    """The windows of all volumes, in order."""
    if not prepared.rows[split]:
        return
    for volume, shape in enumerate(prepared.read_rows(split, ["shape"])["shape"].to_pylist()):
        starts = []
        for length, edge in zip(shape, _patch(prepared), strict=True):
            counted = -(-length // edge)
            beyond = (counted * edge - length) // 2
            starts.append([number * edge - beyond for number in range(counted)])
        for depth, top, left in product(*starts):
            yield Patch(volume, first=(depth, top, left))


def placed(index: Index, patch: Shape, turn: int | None, generator: np.random.Generator) -> Shape:
    """The first voxel of a patch of training; negative where the patch is larger than the volume.

    Args:
        index: of the volume.
        patch: its size.
        turn: see `Patches.turn`.
        generator: of this patch; four numbers are drawn, whatever is done with them.
    """
    drawn = generator.random(4).tolist()
    voxel = None if turn is None else _of_class(index, turn, drawn[3])
    first = []
    for axis, (length, edge) in enumerate(zip(index.shape, patch, strict=True)):
        room = length - edge
        if room <= 0:
            first.append(-(-room // 2))
        elif voxel is None:
            first.append(int(drawn[axis] * (room + 1)))
        else:
            first.append(min(max(voxel[axis] - edge // 2, 0), room))
    return first[0], first[1], first[2]


def _of_class(index: Index, turn: int, drawn: float) -> tuple[int, ...] | None:
    """A voxel of the class whose turn it is; None where the volume has no foreground."""
    ends = np.cumsum([0, *index.told["class_places"]])
    present = np.flatnonzero(np.diff(ends))
    if not len(present):
        return None
    of_class = present[turn % len(present)]
    first, end = int(ends[of_class]), int(ends[of_class + 1])
    voxel = index.places[first + int(drawn * (end - first))]
    return tuple(int(one) for one in np.unravel_index(voxel, index.shape))


def _patch(prepared: PreparedSet) -> Shape:
    depth, height, width, _ = prepared.shape
    return depth, height, width
