"""Feed: a prepared set as the batches of one rank, the same global batches for any number of ranks.

The row groups of a split, in an order drawn from (seed, epoch), form one sequence of rows. It is cut into as many
equal lanes as the global batch has samples; batch t takes row t of every lane, and rank r of N the lanes
[r B/N, (r+1) B/N). So every row comes exactly once an epoch, all ranks make equally many steps, a rank reads its lanes'
row groups and few others, and the number of ranks changes only who reads a row. A lane shuffles its rows within windows
of a few row groups, which bounds the memory. Augmentation is drawn from (seed, epoch, row), so it follows the rows.
"""

import io
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow.parquet as pq

from rayseg import storage
from rayseg.data.augment import Augment, generator
from rayseg.data.prepared import PreparedSet

_PREFETCH = 4  # batches made ahead
_WINDOW = 4  # row groups that a lane shuffles together
_FOOTERS = 1024  # that are kept
_COLUMNS = ["row_id", "image", "mask"]
_POLL_S = 0.1


class Batch(NamedTuple):
    """A rank's part of a global batch."""

    image: np.ndarray  # uint8 (N, H, W, C)
    mask: np.ndarray  # uint8 (N, H, W)
    weight: np.ndarray  # float32 (N,): 1, or 0 for padding, which only the last batch of an epoch has


class _Row(NamedTuple):
    id: str
    image: np.ndarray  # uint8 (H, W, C)
    mask: np.ndarray  # uint8 (H, W)


def steps(rows: int, global_batch: int) -> int:
    """Batches of an epoch; the last one may be padded."""
    return -(-rows // global_batch)


def batches(
    prepared: PreparedSet,
    split: str,
    *,
    global_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    augment: Augment | None = None,
) -> "Batches":
    """One epoch of `split` as rank `rank` of `world_size` sees it: `steps` batches of global_batch / world_size rows.

    Args:
        prepared: the set.
        split: which part of it.
        global_batch: rows of a batch over all ranks.
        rank: of this process, from 0.
        world_size: ranks.
        seed: of the order and the augmentation, with `epoch`.
        epoch: another epoch is another order, and the rows are augmented anew.
        shuffle: False keeps the set's order within each lane.
        augment: what may happen to each row; None gives them as they are.

    Raises:
        ValueError: the batch cannot be dealt evenly; later, while iterating: a row whose pixels do not fit the set.
    """
    if global_batch < 1 or global_batch % world_size:
        raise ValueError(
            f"train.batch_size: the global batch must be a multiple of train.num_workers, got {global_batch} for "
            f"{world_size}"
        )
    return Batches(_Plan(prepared, split, global_batch, rank, world_size, seed, epoch, shuffle, augment))


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group, or rows [first, last) of it."""

    uri: str
    digest: str  # of the set; it keeps the footers of an older one of the same names out of the cache
    index: int
    first: int
    last: int


@dataclass(frozen=True)
class _Plan:
    prepared: PreparedSet
    split: str
    global_batch: int
    rank: int
    world_size: int
    seed: int
    epoch: int
    shuffle: bool
    augment: Augment | None

    def batches(self) -> Iterator[Batch]:
        height, width, channels = self.prepared.shape
        per_rank = self.global_batch // self.world_size
        groups = _groups(self.prepared, self.split)
        rows = sum(group.last for group in groups)
        lanes = [
            self._lane(number, pieces)
            for number, pieces in enumerate(self._deal(groups, rows))
            if number // per_rank == self.rank
        ]
        image_NHWC = np.zeros((per_rank, height, width, channels), np.uint8)
        mask_NHW = np.zeros((per_rank, height, width), np.uint8)
        for _ in range(steps(rows, self.global_batch)):
            # A copy of the batch before: a lane that has ended repeats its last row, real pixels for batch statistics.
            image_NHWC, mask_NHW = image_NHWC.copy(), mask_NHW.copy()
            weight_N = np.zeros(per_rank, np.float32)
            for position, lane in enumerate(lanes):
                row = next(lane, None)
                if row is not None:
                    image_NHWC[position], mask_NHW[position] = self._pixels(row)
                    weight_N[position] = 1
            yield Batch(image_NHWC, mask_NHW, weight_N)

    def _pixels(self, row: _Row) -> tuple[np.ndarray, np.ndarray]:
        if self.augment is None:
            return row.image, row.mask
        return self.augment.apply(row.image, row.mask, generator(self.seed, self.epoch, row.id))

    def _deal(self, groups: list[_Group], rows: int) -> Iterator[list[_Group]]:
        """The pieces of row groups that each lane has; the first lanes have one row more where it does not come out."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(groups)) if self.shuffle else None
        rest = [groups[i] for i in order][::-1] if order is not None else groups[::-1]
        shorter, longer = divmod(rows, self.global_batch)
        for number in range(self.global_batch):
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

    def _lane(self, number: int, pieces: list[_Group]) -> Iterator[_Row]:
        # Lanes begin with windows of different sizes, so that they do not all read at the same step.
        first, size = 0, 1 + number % _WINDOW
        while first < len(pieces):
            rows = [row for piece in pieces[first : first + size] for row in _read(piece, self.prepared.shape)]
            order = range(len(rows))
            if self.shuffle:
                order = np.random.default_rng([self.seed, self.epoch, number, first]).permutation(len(rows)).tolist()
            for position in order:
                yield rows[position]
            first, size = first + size, _WINDOW


class Batches(Iterator[Batch]):
    """The batches of an epoch, made ahead in a thread.

    waited_s: seconds that the consumer has waited for batches so far.
    """

    def __init__(self, plan: _Plan) -> None:
        self.waited_s = 0.0
        self._made: queue.Queue[Batch | Exception | None] = queue.Queue(_PREFETCH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(plan,), daemon=True, name="rayseg-feed")
        self._thread.start()

    def __next__(self) -> Batch:
        began = time.perf_counter()
        made = None if self._closed.is_set() else self._made.get()
        self.waited_s += time.perf_counter() - began
        if isinstance(made, Batch):
            return made
        self.close()
        if made is None:
            raise StopIteration
        raise made

    def close(self) -> None:
        """Ends the thread; for who does not want the rest of the epoch."""
        self._closed.set()
        self._thread.join()

    def _make(self, plan: _Plan) -> None:
        cv2.setNumThreads(1)  # OpenCV's own threads would take the training's cores for pictures too small for them
        try:
            for batch in plan.batches():
                self._put(batch)
                if self._closed.is_set():
                    return
            self._put(None)
        except Exception as error:  # raised again in the consumer
            self._put(error)

    def _put(self, made: Batch | Exception | None) -> None:
        while not self._closed.is_set():
            try:
                self._made.put(made, timeout=_POLL_S)
                return
            except queue.Full:
                continue


def _part(group: _Group, first: int, last: int) -> _Group:
    return _Group(group.uri, group.digest, group.index, first, last)


def _groups(prepared: PreparedSet, split: str) -> list[_Group]:
    """All row groups of the split, by what the set tells of its shards: none of them is opened for it."""
    return [
        _Group(uri, prepared.digest, index, 0, min(prepared.row_group_rows, rows - first))
        for uri, rows in zip(prepared.files(split), prepared.shard_rows[split], strict=True)
        for index, first in enumerate(range(0, rows, prepared.row_group_rows))
    ]


@lru_cache(maxsize=_FOOTERS)
def _footer(uri: str, digest: str) -> bytes:
    """The shard's footer as `pq.read_metadata` takes it; parsed it is thirteen times as large."""
    buffer = io.BytesIO()
    storage.read_footer(uri).write_metadata_file(buffer)
    return buffer.getvalue()


def _read(piece: _Group, shape_HWC: tuple[int, int, int]) -> list[_Row]:
    metadata = pq.read_metadata(io.BytesIO(_footer(piece.uri, piece.digest)))
    if piece.index >= metadata.num_row_groups or piece.last > metadata.row_group(piece.index).num_rows:
        raise ValueError(f"prepared: {piece.uri} has fewer rows than the set says; prepare again")
    table = storage.read_row_group(piece.uri, piece.index, _COLUMNS, metadata)
    rows = []
    for row in table.slice(piece.first, piece.last - piece.first).to_pylist():
        image, mask = np.frombuffer(row["image"], np.uint8), np.frombuffer(row["mask"], np.uint8)
        if image.size != np.prod(shape_HWC) or mask.size != np.prod(shape_HWC[:2]):
            raise ValueError(
                f"prepared: row {row['row_id']} has {image.size} image and {mask.size} mask bytes, the set says "
                f"{shape_HWC}; prepare again"
            )
        rows.append(_Row(row["row_id"], image.reshape(shape_HWC), mask.reshape(shape_HWC[:2])))
    return rows
