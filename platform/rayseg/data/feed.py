"""Feed: a prepared set as the batches of one rank, the same global batches for any number of ranks.

`windows` says what a rank reads in which order. Ray Data's tasks read and augment it, a window each, on any cores of
the cluster, and their rows become batches in a thread of the rank, some ahead of the training. Augmentation is drawn
from (seed, epoch, row), so it follows the rows.
"""

import contextlib
import io
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from rayseg import cluster, storage
from rayseg.data.augment import Augment, generator
from rayseg.data.prepared import PreparedSet
from rayseg.data.windows import Piece, Window, lanes, share, steps, windows

_PREFETCH = 4  # batches made ahead
_FOOTERS = 1024  # that are kept
_COLUMNS = ["row_id", "image", "mask"]
_MADE = pa.schema([("image", pa.binary()), ("mask", pa.binary())])
_POLL_S = 0.1


class Batch(NamedTuple):
    """A rank's part of a global batch."""

    image: np.ndarray  # uint8 (N, H, W, C)
    mask: np.ndarray  # uint8 (N, H, W)
    # float32 (N,): 1, or 0 for padding, which only the last batch of an epoch has, and ranks with a smaller share
    weight: np.ndarray


class _Row(NamedTuple):
    image: np.ndarray  # uint8 (H, W, C)
    mask: np.ndarray  # uint8 (H, W)


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
    tasks: int = 0,
    first: int = 0,
    parts: int = 1,
) -> "Batches":
    """One epoch of `split` as rank `rank` of `world_size` sees it: `steps` batches of `windows.share` rows.

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
        tasks: of Ray Data at a time that read and augment; 0: this process does it itself. The batches are the same.
        first: the batch to begin with; those before it were seen already.
        parts: of equal size that a rank's batch can be cut into.

    Raises:
        ValueError: fewer rows in a batch than ranks; later, while iterating: a row whose pixels do not fit the set.
    """
    if global_batch < world_size:
        raise ValueError(
            f"train.batch_size: a row for each of train.num_workers expected, got {global_batch} for {world_size}"
        )
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
    reader = _Reader(prepared.shape, augment, seed, epoch)
    own, padded = len(lanes(global_batch, rank, world_size)), share(global_batch, world_size, parts)
    wanted_steps = range(first, steps(sum(prepared.shard_rows[split]), global_batch))
    return Batches(reader, wanted, own, padded, wanted_steps, tasks)


@dataclass(frozen=True)
class _Reader:
    """Rows of windows, augmented."""

    shape: tuple[int, int, int]  # height, width, channels
    augment: Augment | None
    seed: int
    epoch: int

    def rows(self, window: Window) -> Iterator[_Row]:
        """In the window's order."""
        read = pa.concat_tables([_read(piece) for piece in window.pieces])
        ids, images, masks = (read[name] for name in _COLUMNS)
        for place in window.order():
            row_id, image, mask = ids[place].as_py(), images[place].as_buffer(), masks[place].as_buffer()
            if image.size != np.prod(self.shape) or mask.size != np.prod(self.shape[:2]):
                raise ValueError(
                    f"prepared: row {row_id} has {image.size} image and {mask.size} mask bytes, the set says "
                    f"{self.shape}; prepare again"
                )
            row = self._row(image, mask)
            if self.augment is not None:
                row = _Row(*self.augment.apply(row.image, row.mask, generator(self.seed, self.epoch, row_id)))
            yield row

    def through_ray(self, wanted: Sequence[Window], tasks: int) -> Generator[_Row, None, None]:
        """The rows of all windows in their order; so many tasks at a time make them, as far ahead as Ray Data lets."""
        cluster.quiet()
        # The feed is part of the training, which may have all CPUs to itself: its tasks ask for none.
        plan = [pa.table({"window": pa.array([pickle.dumps(window)], pa.binary())}) for window in wanted]
        dataset = ray.data.from_arrow(plan).map_batches(
            self._task,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=tasks),
        )
        dataset.context.execution_options.preserve_order = True
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for image, mask in zip(table["image"], table["mask"], strict=True):
                yield self._row(image.as_buffer(), mask.as_buffer())

    def _task(self, cell: pa.Table) -> pa.Table:
        cv2.setNumThreads(1)  # there are tasks enough
        rows = [row for value in cell["window"] for row in self.rows(pickle.loads(value.as_py()))]  # noqa: S301 (ours)
        return pa.table([[row.image.tobytes() for row in rows], [row.mask.tobytes() for row in rows]], schema=_MADE)

    def _row(self, image: pa.Buffer, mask: pa.Buffer) -> _Row:
        return _Row(
            np.frombuffer(image, np.uint8).reshape(self.shape),
            np.frombuffer(mask, np.uint8).reshape(self.shape[:2]),
        )


class Batches(Iterator[Batch]):
    """The batches of an epoch, made ahead in a thread.

    waited_s: seconds that the consumer has waited for batches so far.
    """

    def __init__(
        self, reader: _Reader, wanted: Sequence[Window], own: int, per_rank: int, steps: range, tasks: int
    ) -> None:
        self.waited_s = 0.0
        self._reader, self._windows, self._steps, self._tasks = reader, wanted, steps, tasks
        self._own, self._per_rank = own, per_rank  # lanes, and rows of a batch: the rest is padding
        self._made: queue.Queue[Batch | Exception | None] = queue.Queue(_PREFETCH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._make, daemon=True, name="rayseg-feed")
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

    def _make(self) -> None:
        cv2.setNumThreads(1)  # OpenCV's own threads would take the training's cores for pictures too small for them
        try:
            if not self._tasks:
                self._hand_over(self._reader.rows)
                return
            with contextlib.closing(self._reader.through_ray(self._windows, self._tasks)) as rows:
                self._hand_over(lambda window: iter(list(islice(rows, window.rows))))
        except Exception as error:  # raised again in the consumer
            self._put(error)

    def _hand_over(self, rows_of: Callable[[Window], Iterator[_Row]]) -> None:
        for batch in self._assembled(rows_of):
            self._put(batch)
            if self._closed.is_set():
                return
        self._put(None)

    def _put(self, made: Batch | Exception | None) -> None:
        while not self._closed.is_set():
            try:
                self._made.put(made, timeout=_POLL_S)
                return
            except queue.Full:
                continue

    def _assembled(self, rows_of: Callable[[Window], Iterator[_Row]]) -> Iterator[Batch]:
        height, width, channels = self._reader.shape
        image_NHWC = np.zeros((self._per_rank, height, width, channels), np.uint8)
        mask_NHW = np.zeros((self._per_rank, height, width), np.uint8)
        rows: list[Iterator[_Row]] = [iter(())] * self._own
        ahead = deque(self._windows)
        for step in range(max(0, self._steps.start - 1), self._steps.stop):
            while ahead and ahead[0].start == step:
                window = ahead.popleft()
                rows[window.lane] = rows_of(window)
            # A copy of the batch before: a lane that has ended repeats its last row, real pixels for batch statistics.
            image_NHWC, mask_NHW = image_NHWC.copy(), mask_NHW.copy()
            weight_N = np.zeros(self._per_rank, np.float32)
            for position, lane in enumerate(rows):
                row = next(lane, None)
                if row is not None:
                    image_NHWC[position], mask_NHW[position] = row
                    weight_N[position] = 1
            image_NHWC[self._own :], mask_NHW[self._own :] = image_NHWC[0], mask_NHW[0]
            if step >= self._steps.start:
                yield Batch(image_NHWC, mask_NHW, weight_N)


@lru_cache(maxsize=_FOOTERS)
def _footer(uri: str, digest: str) -> bytes:
    """The shard's footer as `pq.read_metadata` takes it; parsed it is thirteen times as large."""
    buffer = io.BytesIO()
    storage.read_footer(uri).write_metadata_file(buffer)
    return buffer.getvalue()


def _read(piece: Piece) -> pa.Table:
    metadata = pq.read_metadata(io.BytesIO(_footer(piece.uri, piece.digest)))
    if piece.index >= metadata.num_row_groups or piece.last > metadata.row_group(piece.index).num_rows:
        raise ValueError(f"prepared: {piece.uri} has fewer rows than the set says; prepare again")
    table = storage.read_row_group(piece.uri, piece.index, _COLUMNS, metadata)
    return table.slice(piece.first, piece.last - piece.first)
