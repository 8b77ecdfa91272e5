"""Windows of a network's patch that slide over a volume and overlap: where they lie, and the mean of what they give.

They are taken along the normal, row of windows after row of windows, so that of image and sums only those slices are
held that windows still touch.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

import numpy as np

_Span = tuple[slice, slice]  # of the volume, and of the window


def starts(length: int, patch: int, step: float) -> list[int]:
    """Where windows begin on an axis, evenly spread, the first at its beginning and the last at its end.

    As many as are needed for a distance of at most `step` of the patch, as nnU-Net has it (Isensee et al. 2021,
    doi:10.1038/s41592-020-01008-z); rounding may make it one voxel more. One window where the patch is no smaller.
    """
    if length <= patch:
        return [0]
    distances = math.ceil((length - patch) / (patch * step))
    return [round(number * (length - patch) / distances) for number in range(distances + 1)]


def gaussian(patch: int, sigma: float) -> np.ndarray:
    """The weight of a window's voxels on an axis, float32 (patch,): 1 in its middle, sigma `sigma` of the patch."""
    distances = np.arange(patch) - (patch - 1) / 2
    return np.exp(-0.5 * np.square(distances / (sigma * patch))).astype(np.float32)


def _spans(length: int, patch: int, step: float) -> list[_Span]:
    """What each window of an axis covers; a volume smaller than the patch lies in its middle."""
    if length < patch:
        before = (patch - length) // 2
        return [(slice(0, length), slice(before, before + length))]
    return [(slice(start, start + patch), slice(0, patch)) for start in starts(length, patch, step)]


@dataclass(frozen=True)
class Windows:
    """The windows over a volume, in the order in which `patches` gives and `means` takes them.

    shape: of the volume (D, H, W).
    patch: of a window (D, H, W).
    step: between windows, of the patch, see `starts`.
    sigma: of the Gaussian weight, of the patch; that of a voxel is the product over the axes.
    padding: what is around a volume that is smaller than the patch.
    """

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    step: float = 0.5
    sigma: float = 0.125
    padding: float = 0.0

    def __len__(self) -> int:
        return math.prod(map(len, self._axes))

    def patches(self, image_DHWC: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The image in each window, (D, H, W, C): a copy.

        Args:
            image_DHWC: the volume's slices (H, W, C), in order; each is taken when the first window needs it.
        """
        slices = iter(image_DHWC)
        held: deque[np.ndarray] = deque()
        first = 0  # the number of the first slice held
        for _, (along, inside) in self._rows():
            for _ in range(along.start - first):
                held.popleft()
            first = along.start
            while first + len(held) < along.stop:
                held.append(next(slices))
            for (rows, to_rows), (columns, to_columns) in product(*self._axes[1:]):
                window = np.full((*self.patch, held[0].shape[-1]), self.padding, held[0].dtype)
                for place, image_HWC in zip(range(inside.start, inside.stop), held, strict=True):
                    window[place, to_rows, to_columns] = image_HWC[rows, columns]
                yield window

    def weighed(self, values_DHWK: np.ndarray) -> np.ndarray:
        """What a window gave, float32 (D, H, W, K), times the weights, as `means` takes it."""
        return values_DHWK * self._weights_DHW[..., np.newaxis]

    def means(self, weighed_DHWK: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The mean over all windows of each slice, float32 (H, W, K), in order, as soon as no window touches it.

        The sums do not depend on who computed a window: these are added in their order.

        Args:
            weighed_DHWK: what each window gave, `weighed`, in the order of `patches`.
        """
        results = iter(weighed_DHWK)
        sums: deque[np.ndarray] = deque()
        first = 0
        for ends, (along, inside) in self._rows():
            for (rows, of_rows), (columns, of_columns) in product(*self._axes[1:]):
                weighed = next(results)
                while first + len(sums) < along.stop:
                    sums.append(np.zeros((*self.shape[1:], weighed.shape[-1]), np.float32))
                for place in range(along.start, along.stop):
                    of_window = weighed[place - along.start + inside.start, of_rows, of_columns]
                    sums[place - first][rows, columns] += of_window
            for number in range(first, ends):
                mean_HWK = sums.popleft()
                mean_HWK /= (self._totals[0][number] * self._plane_HW)[..., np.newaxis]
                yield mean_HWK
            first = ends

    def _rows(self) -> Iterator[tuple[int, _Span]]:
        """The windows' spans along the normal, each with the first slice that a later one touches."""
        spans = self._axes[0]
        ends = [later.start for _, (later, _) in pairwise(spans)]
        return zip([*ends, self.shape[0]], spans, strict=True)

    @cached_property
    def _axes(self) -> Sequence[list[_Span]]:
        return [_spans(*axis, self.step) for axis in zip(self.shape, self.patch, strict=True)]

    @cached_property
    def _along_axes(self) -> list[np.ndarray]:
        return [gaussian(patch, self.sigma) for patch in self.patch]

    @cached_property
    def _weights_DHW(self) -> np.ndarray:
        depth, height, width = self._along_axes
        weights: np.ndarray = depth[:, None, None] * height[:, None] * width
        return weights

    @cached_property
    def _totals(self) -> list[np.ndarray]:
        """The sum of all windows' weights, float32, on each axis: on the volume it is the product of these."""
        totals = []
        for length, weights, spans in zip(self.shape, self._along_axes, self._axes, strict=True):
            total = np.zeros(length, np.float32)
            for there, inside in spans:
                total[there] += weights[inside]
            totals.append(total)
        return totals

    @cached_property
    def _plane_HW(self) -> np.ndarray:
        plane: np.ndarray = self._totals[1][:, None] * self._totals[2]
        return plane
