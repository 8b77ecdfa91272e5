"""Feed of volumes: patches as the batches of one rank, the same global batches for any number of ranks.

Batch t has the patches t B to (t + 1) B - 1 of the epoch, B the global batch, and rank r of N the lanes of them that
`windows.lanes` gives it. Patches are read and augmented by threads; what happens to one is drawn from (seed, epoch,
volume, number), whoever reads it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rayseg import storage
from rayseg.data import chunks
from rayseg.data.augment import generator
from rayseg.data.batches import Batch
from rayseg.data.patches import Patch, Patches, Shape, drawn, placed, windows
from rayseg.data.prepared import PreparedSet
from rayseg.data.windows import lanes, share, steps


@dataclass(frozen=True)
class PatchFeed:
    """Begins the batches of an epoch, see `Batches`."""

    reader: "_Reader"
    patches: Sequence[Patch]  # of the epoch, over all ranks
    global_batch: int
    own: range  # lanes
    per_rank: int  # rows of a batch: those beyond the lanes are padding
    first: int

    def begin(self, pool: ThreadPoolExecutor) -> Iterator[Future[Batch]]:
        """The batches in order, each given to the threads when it is asked for."""
        for step in range(self.first, steps(len(self.patches), self.global_batch)):
            yield pool.submit(self._make, step)

    def _make(self, step: int) -> Batch:
        shape = self.reader.patch
        image_NDHWC = np.zeros((self.per_rank, *shape, 1), np.float16)
        mask_NDHW = np.zeros((self.per_rank, *shape), np.uint8)
        weight_N = np.zeros(self.per_rank, np.float32)
        numbers = [step * self.global_batch + lane for lane in self.own]
        for position, number in enumerate(numbers):
            if number < len(self.patches):
                image_NDHWC[position, ..., 0], mask_NDHW[position] = self.reader.read(self.patches[number])
                weight_N[position] = 1
        empty = int(weight_N.sum())
        if not empty:  # the last patch of the epoch is another rank's: real voxels for batch statistics all the same
            image_NDHWC[0, ..., 0], mask_NDHW[0] = self.reader.read(self.patches[-1])
            empty = 1
        image_NDHWC[empty:], mask_NDHW[empty:] = image_NDHWC[0], mask_NDHW[0]
        return Batch(image_NDHWC, mask_NDHW, weight_N)


@dataclass(frozen=True)
class _Reader:
    """Patches of the volumes of a split, augmented."""

    uris: Sequence[str]
    patch: Shape
    patches: Patches | None  # None: windows
    seed: int
    epoch: int

    def read(self, one: Patch) -> tuple[np.ndarray, np.ndarray]:
        """float16 image and uint8 mask (D, H, W)."""
        uri = self.uris[one.volume]
        try:
            index = chunks.index(uri)
            if self.patches is None or one.number is None:
                assert one.first is not None
                return index.read(uri, one.first, self.patch)
            source = generator(self.seed, self.epoch, f"{index.told['row_id']}/{one.number}")
            first = placed(index, self.patch, self.patches.turn(one.volume, one.number), source)
            if self.patches.augment is None:
                return index.read(uri, first, self.patch)
            change = self.patches.augment.draw(source, self.patch, index.spacing_mm)
            image_DHW, mask_DHW = index.read(uri, *change.region(first, self.patch))
            return change.apply(image_DHW, mask_DHW, first, self.patch)
        except FileNotFoundError:
            raise ValueError(
                f"prepared: there is no {uri} any more: another set was prepared in the place of this one, or it was "
                "removed; start the job again"
            ) from None


def patch_feed(
    prepared: PreparedSet,
    split: str,
    *,
    global_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    patches: Patches | None,
    first: int,
    parts: int,
) -> PatchFeed:
    """One epoch of the volumes of `split`, see `feed.batches`; windows that cover them where `patches` is None."""
    depth, height, width, _ = prepared.shape
    uris = [storage.join(prepared.uri, path) for path in prepared.volumes[split]]
    reader = _Reader(uris, (depth, height, width), patches, seed, epoch)
    of_epoch = list(windows(prepared, split)) if patches is None else drawn(prepared, split, patches, seed, epoch)
    own = lanes(global_batch, rank, world_size)
    return PatchFeed(reader, of_epoch, global_batch, own, share(global_batch, world_size, parts), first)
