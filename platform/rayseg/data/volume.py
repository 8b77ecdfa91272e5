"""VolumePreprocess: from a series' slices to a grid in millimetres, the network's, and back onto the slices.

The one object of a bundle of volumes that training, bulk and online use. Axes are (D, H, W): along the normal of the
slices in ascending order of position, rows, columns. A stack that leans stays so: the network sees each slice where its
rows and columns are, and a mask leaves on the slices as they were.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import cv2
import numpy as np

from rayseg import ahead
from rayseg.data import resampling
from rayseg.data.histogram import Histogram
from rayseg.data.intensity import Intensity, Levels
from rayseg.dicom.reading import MAX_PIXELS, Slice
from rayseg.geometry import planes
from rayseg.geometry.axes import Axis, axis, plane
from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import Places, places
from rayseg.records import Reason, Reject

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_ANY_THICKNESS_MM = 1.0  # of a slice alone whose thickness does not matter
_MOST_MM = 10_000.0  # from end to end of an axis that is resampled; beyond lies no body, but a position in error


@dataclass(frozen=True, eq=False)
class Grid:
    """The network's grid of one series, and the slices that it is made of.

    Attributes:
        order: int (S,), which of the slices, as they were given, comes at each place along the normal.
        axes: along the normal, down a column, along a row.
    """

    order: np.ndarray
    axes: tuple[Axis, Axis, Axis]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the network's grid: D, H, W."""
        depth, height, width = (axis.there.after for axis in self.axes)
        return depth, height, width

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns of the series."""
        count, rows, columns = (axis.there.before for axis in self.axes)
        return count, rows, columns

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Of the network's grid: between slices (the mean where these stay as they are), rows, columns."""
        normal_mm, row_mm, column_mm = (axis.spacing_mm for axis in self.axes)
        return normal_mm, row_mm, column_mm

    def needed(self, depth: int) -> tuple[int, int]:
        """The slices [first, last), by place along the normal, that network slice `depth` is made of."""
        first, last = self.axes[0].there.needed[depth].tolist()
        return first, last

    def needed_back(self, place: int) -> tuple[int, int]:
        """The network slices [first, last) that the slice at `place` along the normal is made of."""
        first, last = self.axes[0].back.needed[place].tolist()
        return first, last

    def image(self, slices: Iterable[Slice], levels: Levels, threads: int = 1) -> Iterator[np.ndarray]:
        """Network slices in order, float16 (H, W), while slices are read; it holds only those that are still needed.

        Args:
            slices: in order of place along the normal; each is taken when it is needed, and a few ahead by threads.
            levels: of the volume, see `VolumePreprocess.levels`.
            threads: how many slices are worked on at a time; bytes do not depend on it.
        """
        _, down, along = self.axes

        def within(slice: Slice) -> np.ndarray:
            return plane(levels.apply(slice), down.there, along.there)

        for plane_HW in self.axes[0].there.stream(_mapped(within, slices, threads)):
            # Twenty times faster than `astype`, and the same bits but for the sign of 0.
            yield cv2.add(plane_HW, 0.0, dtype=cv2.CV_16F)  # type: ignore[call-overload]

    def labels(self, masks: Iterable[np.ndarray], threads: int = 1) -> Iterator[np.ndarray]:
        """Label maps of network slices in order, uint8 (H, W): each class by the filter of images, the greatest wins.

        Args:
            masks: uint8 (rows, columns), in order of place along the normal.
            threads: as `image` has them.
        """
        normal, down, along = (axis.there for axis in self.axes)
        return resampling.stacked(
            _mapped(lambda mask_HW: resampling.class_shares(mask_HW, down, along), masks, threads),
            normal,
            (down.after, along.after),
        )

    def restore(self, probabilities: Iterable[np.ndarray], threads: int = 1) -> Iterator[np.ndarray]:
        """Probabilities on the slices, in order of place along the normal, float32 (K, rows, columns).

        Args:
            probabilities: float32 (K, d, H, W) of consecutive network slices, in slabs of any d.
            threads: as `image` has them.
        """
        normal, down, along = (axis.back for axis in self.axes)

        def within(plane_KHW: np.ndarray) -> np.ndarray:
            restored_KHW = np.empty((len(plane_KHW), down.after, along.after), np.float32)
            for of_class, plane_HW in zip(restored_KHW, plane_KHW, strict=True):
                of_class[...] = plane(np.ascontiguousarray(plane_HW), down, along)
            return restored_KHW

        planes_KHW = (slab[:, depth] for slab in probabilities for depth in range(slab.shape[1]))
        return _mapped(within, normal.stream(planes_KHW), threads)


def _mapped(function: Callable[[ItemT], ResultT], items: Iterable[ItemT], threads: int) -> Iterator[ResultT]:
    """Like `map`; by several threads one call more than there are threads is ahead of what was taken."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from ahead.mapped(pool, function, items, threads + 1)


@dataclass(frozen=True)
class VolumePreprocess:
    """How a series becomes the network's volume, and how the network's output returns onto its slices."""

    # Millimetres between slices, rows and columns of the network's grid; null for the first: slices stay as they are
    spacing_mm: tuple[float | None, float, float]
    patch: tuple[int, int, int]  # depth, height, width of the network's input; depth 1 is 2D in millimetres
    intensity: Intensity = field(default_factory=Intensity)
    step: float = 0.5  # from a window of inference to the next one, of the patch
    sigma: float = 0.125  # of the Gaussian that weights a window's pixels, of the patch

    def __post_init__(self) -> None:
        if not all(mm is None or mm > 0 for mm in self.spacing_mm):
            raise ValueError(f"volume.spacing_mm: positive numbers expected, got {self.spacing_mm}")
        if min(self.patch) < 1:
            raise ValueError(f"volume.patch: three positive numbers expected, got {self.patch}")
        if self.spacing_mm[0] is None and self.patch[0] != 1:
            raise ValueError(
                f"volume.patch: depth 1 expected where slices stay as they are (spacing_mm null), got {self.patch[0]}"
            )
        if not 0 < self.step <= 1:
            raise ValueError(f"volume.step: more than 0 and at most 1 expected, got {self.step}")
        if not self.sigma > 0:
            raise ValueError(f"volume.sigma: a positive number expected, got {self.sigma}")

    def grid(self, geometries: Sequence[Geometry]) -> Grid | Reject:
        """The network's grid of slices, given in any order.

        The slices reach half a pixel beyond the centres of the outermost pixels, and half a step to the next slice
        beyond the first and the last one; a slice alone is SliceThickness thick. The network's grid has as many samples
        exactly `spacing_mm` apart as fit when rounded, at least one, and is centred in that.

        Returns:
            A reject where `stack.places` gives one: MISSING_ATTRIBUTE (no place, or a slice alone without thickness),
            SERIES_DUPLICATES, SERIES_MIXED. TOO_LARGE where an axis that is resampled is over ten metres long, or a
            plane of the network's grid has more pixels than a slice may have.
        """
        if self.spacing_mm[0] is None and len(geometries) == 1:
            geometries = [dataclasses.replace(geometries[0], slice_thickness_mm=_ANY_THICKNESS_MM)]
        where = places(geometries)
        if isinstance(where, Reject):
            return where
        along_mm = where.positions_mm @ planes.normal(np.concatenate([where.row_mm, where.column_mm]))
        first_mm, last_mm = _half_steps_mm(where, along_mm)
        edges_mm = float(along_mm[0] - first_mm), float(along_mm[-1] + last_mm)
        pixels_mm = float(np.linalg.norm(where.column_mm)), float(np.linalg.norm(where.row_mm))
        rows, columns = geometries[0].rows, geometries[0].columns
        # Before any axis is laid out: one slice with a wrong position would ask for hours of work, and the memory.
        refusal = self._too_large((edges_mm[1] - edges_mm[0], rows * pixels_mm[0], columns * pixels_mm[1]))
        if refusal is not None:
            return refusal
        normal = axis(along_mm, edges_mm, self.spacing_mm[0])
        down, along = (
            axis((np.arange(count) + 0.5) * pixel_mm, (0.0, count * pixel_mm), spacing_mm)
            for count, pixel_mm, spacing_mm in zip((rows, columns), pixels_mm, self.spacing_mm[1:], strict=True)
        )
        return Grid(where.order, (normal, down, along))

    def _too_large(self, extent_mm: tuple[float, float, float]) -> Reject | None:
        longest_mm = max(mm for mm, spacing_mm in zip(extent_mm, self.spacing_mm, strict=True) if spacing_mm)
        if longest_mm > _MOST_MM:
            return Reject(Reason.TOO_LARGE, f"a stack of {longest_mm:.0f} mm, more than {_MOST_MM:.0f}")
        pixels = extent_mm[1] / self.spacing_mm[1] * (extent_mm[2] / self.spacing_mm[2])
        if pixels > MAX_PIXELS:
            return Reject(Reason.TOO_LARGE, f"{pixels:.3g} pixels in a plane of the network's grid")
        return None

    def levels(self, slices: Iterable[Slice]) -> Levels:
        """How the values of a volume are mapped; reads no slice where it need not, else each once."""
        if self.intensity.is_measured:
            return self.intensity.levels()
        volume = Histogram()
        for slice in slices:
            volume.add(slice)
        return self.intensity.levels(volume)

    def apply(self, slices: Sequence[Slice]) -> np.ndarray | Reject:
        """A whole volume at once: float16 (D, H, W, 1) on the network's grid, of slices in any order.

        Returns:
            A reject where `grid` gives one, or a slice is an image file, which has no place.
        """
        geometries = [geometry(slice) for slice in slices]
        known = [one for one in geometries if one is not None]
        if len(known) < len(slices):
            return Reject(Reason.MISSING_ATTRIBUTE, "ImagePositionPatient, ImageOrientationPatient and PixelSpacing")
        grid = self.grid(known)
        if isinstance(grid, Reject):
            return grid
        image = np.empty((*grid.shape, 1), np.float16)
        for depth, plane_HW in enumerate(grid.image((slices[number] for number in grid.order), self.levels(slices))):
            image[depth, ..., 0] = plane_HW
        return image


def _half_steps_mm(where: Places, along_mm: np.ndarray) -> tuple[float, float]:
    """Half the distance to the next slice, of the first and the last one; half the thickness of one alone."""
    if len(along_mm) == 1:
        half_mm = float(np.linalg.norm(where.beyond_mm)) / 2
        return half_mm, half_mm
    return float(along_mm[1] - along_mm[0]) / 2, float(along_mm[-1] - along_mm[-2]) / 2


def geometry(slice: Slice) -> Geometry | None:
    """Where a slice lies: by its header, or as a slice of a volume file; None for other image files."""
    return slice.geometry if slice.header is None else slice.header.geometry
