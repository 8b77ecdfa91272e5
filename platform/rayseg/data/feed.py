"""Feed: a prepared set as the batches of one rank, the same global batches for any number of ranks.

`windows` says what a rank reads in which order. Threads of the rank read and augment it, some batches ahead of the
training: decompression, OpenCV and numpy let go of the interpreter's lock, and an epoch begins as soon as its first
rows are read. Augmentation is drawn from (seed, epoch, row), so it follows the rows.

Why not Ray Data: what a batch is made of was cleaned, scaled and dealt by Ray Data's tasks when the set was prepared.
What is left takes a millisecond a row; through tasks it took two to five, and seconds at the start of each epoch.
"""

import io
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayseg import storage
from rayseg.data.augment import Augment, generator
from rayseg.data.batches import Batch, Batches
from rayseg.data.patch_feed import patch_feed
from rayseg.data.patches import Patches
from rayseg.data.prepared import PreparedSet
from rayseg.data.windows import Piece, Window, lanes, share, steps, windows

_FOOTERS = 1024  # that are kept
_COLUMNS = ["row_id", "image", "mask"]


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
    patches: Patches | None = None,
    first: int = 0,
    parts: int = 1,
    threads: int = 1,
) -> Batches:
    """One epoch of `split` as rank `rank` of `world_size` sees it: `steps` batches of `windows.share` rows.

    Of a set of volumes a row is a patch, and there are `patches.count` of them.

    Args:
        prepared: the set.
        split: which part of it.
        global_batch: rows of a batch over all ranks.
        rank: of this process, from 0.
        world_size: ranks.
        seed: of the order and the augmentation, with `epoch`.
        epoch: another epoch is another order, and the rows are augmented anew.
        shuffle: False keeps the set's order within each lane; of slices.
        augment: what may happen to each row of slices; None gives them as they are.
        patches: what is drawn of volumes; None gives the windows that cover them, in order.
        first: the batch to begin with; those before it were seen already.
        parts: of equal size that a rank's batch can be cut into.
        threads: that read and augment. The batches are the same whatever their number.

    Raises:
        ValueError: fewer rows in a batch than ranks; later, while iterating: a row whose pixels do not fit the set.
    """
    if global_batch < world_size:
        raise ValueError(
            f"train.batch_size: a row for each of train.num_workers expected, got {global_batch} for {world_size}"
        )
    if prepared.volume is not None:
        of_volumes = patch_feed(
            prepared,
            split,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            seed=seed,
            epoch=epoch,
            patches=patches,
            first=first,
            parts=parts,
        )
        return Batches(of_volumes.begin, threads)
    wanted = windows(
        prepared,
        split,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epoch=epoch,
        shuffle=shuffle,
        first=max(0, first - 1),  # what a lane that has ended repeats is in the batch before
    )
    height, width, channels = prepared.shape
    reader = _Reader((height, width, channels), augment, seed, epoch)
    own, padded = len(lanes(global_batch, rank, world_size)), share(global_batch, world_size, parts)
    wanted_steps = range(first, steps(sum(prepared.shard_rows[split]), global_batch))
    return Batches(_Feed(reader, wanted, own, padded, wanted_steps).begin, threads)


class _Rows(NamedTuple):
    """The rows of a window as they are in the set, in the set's order; `order` is the window's."""

    ids: list[str]
    images: pa.ChunkedArray
    masks: pa.ChunkedArray
    order: list[int]


@dataclass(frozen=True)
class _Reader:
    """Rows of windows, augmented."""

    shape: tuple[int, int, int]  # height, width, channels
    augment: Augment | None
    seed: int
    epoch: int

    def read(self, window: Window) -> _Rows:
        ids, images, masks = pa.concat_tables([_read(piece) for piece in window.pieces]).select(_COLUMNS).columns
        return _Rows(ids.to_pylist(), images, masks, window.order())

    def row(self, rows: _Rows, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, C) and mask (H, W), uint8, of the row at a place of the window's order."""
        index = rows.order[place]
        image, mask = rows.images[index].as_buffer(), rows.masks[index].as_buffer()
        if image.size != math.prod(self.shape) or mask.size != math.prod(self.shape[:2]):
            raise ValueError(
                f"prepared: row {rows.ids[index]} has {image.size} image and {mask.size} mask bytes, the set says "
                f"{self.shape}; prepare again"
            )
        image_HWC = np.frombuffer(image, np.uint8).reshape(self.shape)
        mask_HW = np.frombuffer(mask, np.uint8).reshape(self.shape[:2])
        if self.augment is None:
            return image_HWC, mask_HW
        return self.augment.apply(image_HWC, mask_HW, generator(self.seed, self.epoch, rows.ids[index]))


class _Lane(NamedTuple):
    """What a position in the batches is filled from."""

    window: Window
    rows: Future[_Rows]


@dataclass(frozen=True)
class _Feed:
    """Begins the batches of an epoch, see `Batches`."""

    reader: _Reader
    windows: Sequence[Window]
    own: int  # lanes
    per_rank: int  # rows of a batch: the rest is padding
    steps: range

    def begin(self, pool: ThreadPoolExecutor) -> Iterator[Future[Batch]]:
        """The batches, each given to the threads when it is asked for here.

        The windows that it begins are given to them before it. They take what they are given in that order, so that a
        batch waits for reads that are done or under way.
        """
        windows = deque(self.windows)
        lanes: list[_Lane | None] = [None] * self.own
        for step in range(max(0, self.steps.start - 1), self.steps.stop):
            while windows and windows[0].start == step:
                window = windows.popleft()
                lanes[window.lane] = _Lane(window, pool.submit(self.reader.read, window))
            if step >= self.steps.start:
                yield pool.submit(self._make, step, tuple(lanes))

    def _make(self, step: int, lanes: Sequence[_Lane | None]) -> Batch:
        height, width, channels = self.reader.shape
        image_NHWC = np.zeros((self.per_rank, height, width, channels), np.uint8)
        mask_NHW = np.zeros((self.per_rank, height, width), np.uint8)
        weight_N = np.zeros(self.per_rank, np.float32)
        for position, lane in enumerate(lanes):
            if lane is None:  # fewer rows than lanes
                continue
            # A lane that has ended repeats its last row: real pixels for batch statistics.
            row, last = step - lane.window.start, lane.window.rows - 1
            image_NHWC[position], mask_NHW[position] = self.reader.row(lane.rows.result(), min(row, last))
            weight_N[position] = row <= last
        image_NHWC[self.own :], mask_NHW[self.own :] = image_NHWC[0], mask_NHW[0]
        return Batch(image_NHWC, mask_NHW, weight_N)


@lru_cache(maxsize=_FOOTERS)
def _footer(uri: str, digest: str) -> bytes:
    """The shard's footer as `pq.read_metadata` takes it; parsed it is thirteen times as large."""
    buffer = io.BytesIO()
    storage.read_footer(uri).write_metadata_file(buffer)
    return buffer.getvalue()


def _read(piece: Piece) -> pa.Table:
    try:
        return _rows(piece)
    except FileNotFoundError:
        raise ValueError(
            f"prepared: there is no {piece.uri} any more: another set was prepared in the place of this one, or it was "
            "removed; start the job again"
        ) from None


def _rows(piece: Piece) -> pa.Table:
    metadata = pq.read_metadata(io.BytesIO(_footer(piece.uri, piece.digest)))
    if piece.index >= metadata.num_row_groups or piece.last > metadata.row_group(piece.index).num_rows:
        raise ValueError(f"prepared: {piece.uri} has fewer rows than the set says; prepare again")
    table = storage.read_row_group(piece.uri, piece.index, _COLUMNS, metadata)
    return table.slice(piece.first, piece.last - piece.first)
