"""The one way from a series to its probabilities: windows along the normal, and back onto the source's slices.

Held are the source's slices, the network's slices that windows still touch, and what a slice of the source is made of.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from rayseg.data.volume import Grid, VolumePreprocess
from rayseg.dicom.reading import Slice
from rayseg.geometry.axes import plane
from rayseg.geometry.windows import Windows

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

# A window, float16 (D, H, W, 1), to probabilities, float32 (D, H, W, K).
Forward = Callable[[np.ndarray], np.ndarray]


class Run(Protocol):
    """Calls a function with each item and gives the results in order: `map`, or one that has threads."""

    def __call__(self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], /) -> Iterator[ResultT]:
        """The results."""


def planes(
    preprocess: VolumePreprocess, grid: Grid, slices: Sequence[Slice], forward: Forward, run: Run
) -> Iterator[np.ndarray]:
    """Probabilities at the place of each slice along the normal, float32 (K, H, W): rows and columns are the network's.

    Args:
        preprocess: of the model.
        grid: that it lays over the slices.
        slices: in order of place along the normal.
        forward: runs the network.
        run: how windows are run; sums are added up in their order, whatever that is.
    """
    windows = Windows(grid.shape, preprocess.patch, preprocess.step, preprocess.sigma)
    image_DHWC = (image_HW[..., np.newaxis] for image_HW in grid.image(slices, preprocess.levels(slices)))
    weighed = run(lambda patch_DHWC: windows.weighed(forward(patch_DHWC)), windows.patches(image_DHWC))
    means = windows.means(weighed)
    return grid.axes[0].back.stream(np.ascontiguousarray(np.moveaxis(mean_HWK, -1, 0)) for mean_HWK in means)


def restore(grid: Grid, plane_KHW: np.ndarray) -> np.ndarray:
    """One of `planes` on its slice's own rows and columns, float32 (K, rows, columns)."""
    _, down, along = grid.axes
    return np.stack([plane(np.ascontiguousarray(one_HW), down.back, along.back) for one_HW in plane_KHW])
