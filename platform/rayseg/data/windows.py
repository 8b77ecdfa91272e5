"""The order of an epoch: which rows of a prepared set a rank reads, and when, a function of (seed, epoch).

The row groups of a split, in an order drawn from (seed, epoch), form one sequence of rows. It is cut into as many
equal lanes as the global batch has samples; batch t takes row t of every lane, and rank r of N the lanes
[r B/N, (r+1) B/N). So every row comes exactly once an epoch, all ranks make equally many steps, a rank reads its lanes'
row groups and few others, and the number of ranks changes only who reads a row. Where N does not divide B some ranks
have a lane less; their batches are padded to the size of the others'. A lane shuffles its rows within windows of a few
row groups, which bounds the memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from rayseg.data.prepared import PreparedSet

_GROUPS = 4  # row groups that a lane shuffles together


@dataclass(frozen=True, slots=True)
class Piece:
    """A row group, or rows [first, last) of it."""

    uri: str
    digest: str  # of the set; it keeps the footers of an older one of the same names out of caches
    index: int
    first: int
    last: int


@dataclass(frozen=True)
class Window:
    """Rows that a lane has one after the other from batch `start` on."""

    lane: int  # of the rank, from 0: the position in its batches
    start: int
    pieces: tuple[Piece, ...]
    seed: tuple[int, ...] | None  # of the order of the rows; None leaves them in the set's
    skipped: int = 0  # so many rows of it were taken before

    @property
    def rows(self) -> int:
        """How many."""
        return self._read - self.skipped

    def order(self) -> list[int]:
        """Their places in the pieces together, one after the other."""
        if self.seed is None:
            return list(range(self.skipped, self._read))
        places = np.random.default_rng(self.seed).permutation(self._read)
        return [int(place) for place in places[self.skipped :]]

    def after(self, step: int) -> "Window":
        """What is left of it from batch `step` on."""
        passed = max(0, step - self.start)
        return replace(self, start=self.start + passed, skipped=self.skipped + passed)

    @property
    def _read(self) -> int:
        return sum(piece.last - piece.first for piece in self.pieces)


def steps(rows: int, global_batch: int) -> int:
    """Batches of an epoch; the last one may be padded."""
    return -(-rows // global_batch)


def lanes(global_batch: int, rank: int, ranks: int) -> range:
    """Those that rank `rank` reads."""
    return range(rank * global_batch // ranks, (rank + 1) * global_batch // ranks)


def share(global_batch: int, ranks: int, parts: int = 1) -> int:
    """Rows of a rank's batches, padding included: those of the largest share, in `parts` of equal size."""
    return -(-global_batch // (ranks * parts)) * parts


def windows(
    prepared: PreparedSet,
    split: str,
    *,
    global_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    first: int = 0,
) -> list[Window]:
    """What rank `rank` of `world_size` reads in an epoch from batch `first` on, in the order its batches need it."""
    groups = _groups(prepared, split)
    dealt = list(_deal(groups, global_batch, (seed, epoch) if shuffle else None))
    found = [
        window.after(first)
        for lane, number in enumerate(lanes(global_batch, rank, world_size))
        for window in _lane(lane, number, dealt[number], (seed, epoch) if shuffle else None)
        if window.start + window.rows > first
    ]
    return sorted(found, key=lambda window: (window.start, window.lane))


def _groups(prepared: PreparedSet, split: str) -> list[Piece]:
    """All row groups of the split, by what the set tells of its shards: none of them is opened for it."""
    return [
        Piece(uri, prepared.digest, index, 0, min(prepared.row_group_rows, rows - first))
        for uri, rows in zip(prepared.files(split), prepared.shard_rows[split], strict=True)
        for index, first in enumerate(range(0, rows, prepared.row_group_rows))
    ]


def _deal(groups: list[Piece], global_batch: int, seed: tuple[int, ...] | None) -> Iterator[list[Piece]]:
    """The pieces of row groups that each lane has; the first lanes have one row more where it does not come out."""
    order = range(len(groups)) if seed is None else np.random.default_rng(seed).permutation(len(groups))
    rest = [groups[place] for place in order][::-1]
    shorter, longer = divmod(sum(group.last for group in groups), global_batch)
    for number in range(global_batch):
        needed = shorter + (number < longer)
        pieces = []
        while needed:
            group = rest.pop()
            end = min(group.last, group.first + needed)
            pieces.append(_part(group, group.first, end))
            needed -= end - group.first
            if end < group.last:
                rest.append(_part(group, end, group.last))
        yield pieces


def _lane(lane: int, number: int, pieces: list[Piece], seed: tuple[int, ...] | None) -> Iterator[Window]:
    # Lanes begin with windows of different sizes, so that they do not all need the next one at the same step.
    start, first, size = 0, 0, 1 + number % _GROUPS
    while first < len(pieces):
        window = Window(
            lane, start, tuple(pieces[first : first + size]), None if seed is None else (*seed, number, first)
        )
        yield window
        start, first, size = start + window.rows, first + size, _GROUPS


def _part(piece: Piece, first: int, last: int) -> Piece:
    return Piece(piece.uri, piece.digest, piece.index, first, last)
