"""Placement: which voxels of a mask are the pixels of a slice, where both have their centres at the same places.

Grids that are turned by right angles, mirrored, or of another part of the same plane are taken voxel by voxel. Nothing
is interpolated: where centres do not coincide there is no placement, but a reason.
"""

from dataclasses import dataclass

import numpy as np

from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject

_HALF = 0.5 + 1e-3  # of the distance of planes: up to there, the middle between two included, a slice lies in a voxel


@dataclass(frozen=True, eq=False)
class Placement:
    """The voxel of each pixel: `first` + row * `down` + column * `along`, integers (column, row, slice) of the mask."""

    first: np.ndarray  # int64 (3,), of the slice's first pixel; may lie outside of the mask
    down: np.ndarray  # int64 (3,), a unit vector or its opposite: from a row of the slice to the next one
    along: np.ndarray  # the same from a column of the slice to the next one
    shape: tuple[int, int]  # rows and columns of the slice

    def has_pixels(self, shape: tuple[int, int, int]) -> bool:
        """Whether any pixel of the slice lies in a mask of so many columns, rows and slices."""
        last = self.first + self.down * (self.shape[0] - 1) + self.along * (self.shape[1] - 1)
        return bool(((np.maximum(self.first, last) >= 0) & (np.minimum(self.first, last) < shape)).all())

    def take(self, values: np.ndarray) -> np.ndarray:
        """The slice, (rows, columns), of a mask's values (slices, rows, columns); 0 outside of the mask."""
        axis_down, axis_along = int(np.argmax(np.abs(self.down))), int(np.argmax(np.abs(self.along)))
        across = 3 - axis_down - axis_along
        plane = values.T[tuple(int(self.first[across]) if axis == across else slice(None) for axis in range(3))]
        if axis_down > axis_along:
            plane = plane.T
        rows = _span(int(self.first[axis_down]), int(self.down[axis_down]), plane.shape[0], self.shape[0])
        columns = _span(int(self.first[axis_along]), int(self.along[axis_along]), plane.shape[1], self.shape[1])
        if self.shape == plane.shape and len(rows[0]) == self.shape[0] and len(columns[0]) == self.shape[1]:
            return plane[:: int(self.down[axis_down]), :: int(self.along[axis_along])]
        taken = np.zeros(self.shape, values.dtype)
        taken[np.ix_(rows[0], columns[0])] = plane[np.ix_(rows[1], columns[1])]
        return taken


def _span(first: int, step: int, size: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (of `wanted`) along one axis that lie within `size` voxels, and their voxels."""
    pixels = np.arange(wanted)
    voxels = first + step * pixels
    inside = (voxels >= 0) & (voxels < size)
    return pixels[inside], voxels[inside]


def placement(affine: np.ndarray, shape: tuple[int, int, int], image: Geometry) -> Placement | Reject | None:
    """Where the pixels of a slice are in a mask.

    Centres coincide where the corners of the slice do, to `planes.tolerance_mm`.

    Args:
        affine: of the mask, (column, row, slice) to millimetres in patient coordinates (LPS), float64 (4, 4).
        shape: of the mask: columns, rows, slices.
        image: the slice; it says where it lies.

    Returns:
        None where the slice's plane lies beyond the mask's planes; MASK_MISMATCH where it lies between two of them, or
        pixels lie beside voxels.
    """
    corners_mm = planes.corners_mm(image)
    assert corners_mm is not None
    assert image.image_orientation is not None
    tolerance_mm = planes.tolerance_mm(image)
    to_voxels = np.linalg.inv(affine)
    first = to_voxels[:3, :3] @ corners_mm[0] + to_voxels[:3, 3]
    down, along = _steps(to_voxels, image)
    if down is None or along is None:
        if _is_beyond(to_voxels, shape, corners_mm):
            return None
        return Reject(Reason.MASK_MISMATCH, "the mask's pixels have another spacing or orientation than the image's")
    across = int(np.flatnonzero((down == 0) & (along == 0))[0])
    nearest = np.rint(first)
    beside_mm = abs(first[across] - nearest[across]) * abs(affine[:3, across] @ planes.normal(image.image_orientation))
    if beside_mm > tolerance_mm:
        if not -_HALF <= first[across] <= shape[across] - 1 + _HALF:
            return None
        return Reject(Reason.MASK_MISMATCH, f"the image lies {beside_mm:.3g} mm beside a plane of the mask")
    if not 0 <= nearest[across] < shape[across]:
        return None
    voxels = np.stack([nearest, nearest + along * (image.columns - 1), nearest + down * (image.rows - 1)])
    apart_mm = float(planes.apart_mm(corners_mm, voxels @ affine[:3, :3].T + affine[:3, 3]))
    if apart_mm > tolerance_mm:
        return Reject(Reason.MASK_MISMATCH, f"the mask's pixels lie {apart_mm:.3g} mm beside the image's")
    return Placement(nearest.astype(np.int64), down, along, (image.rows, image.columns))


def is_alike(affine: np.ndarray, image: Geometry) -> bool:
    """Whether a mask's axes and spacing are a slice's, permuted and mirrored, wherever both lie."""
    down, along = _steps(np.linalg.inv(affine), image)
    if down is None or along is None:
        return False
    first, last_column, last_row = planes.corners_mm(image)  # type: ignore[misc]
    steps = affine[:3, :3]
    off_mm = [
        np.linalg.norm(steps @ along * (image.columns - 1) - (last_column - first)),
        np.linalg.norm(steps @ down * (image.rows - 1) - (last_row - first)),
    ]
    return bool(max(off_mm) <= planes.tolerance_mm(image))


def is_in_line(affine: np.ndarray, shape: tuple[int, int, int], image: Geometry) -> bool:
    """Whether a mask that is alike would have some of the slice's pixels, if only it had more planes."""
    if not is_alike(affine, image):
        return False
    to_voxels = np.linalg.inv(affine)
    down, along = _steps(to_voxels, image)
    corners_mm = planes.corners_mm(image)
    assert down is not None
    assert along is not None
    assert corners_mm is not None
    voxels = corners_mm @ to_voxels[:3, :3].T + to_voxels[:3, 3]
    within = (voxels.max(axis=0) >= -_HALF) & (voxels.min(axis=0) <= np.array(shape) - 1 + _HALF)
    return bool(within[(down != 0) | (along != 0)].all())


def _steps(to_voxels: np.ndarray, image: Geometry) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Voxels from a row to the next one, and from a column to the next one; None where they are no unit vectors."""
    assert image.image_orientation is not None
    assert image.pixel_spacing_mm is not None
    along_row, along_column = np.array(image.image_orientation, float).reshape(2, 3)
    down = np.rint(to_voxels[:3, :3] @ along_column * image.pixel_spacing_mm[0]).astype(np.int64)
    along = np.rint(to_voxels[:3, :3] @ along_row * image.pixel_spacing_mm[1]).astype(np.int64)
    if np.abs(down).sum() != 1 or np.abs(along).sum() != 1 or down @ along:
        return None, None
    return down, along


def _is_beyond(to_voxels: np.ndarray, shape: tuple[int, int, int], corners_mm: np.ndarray) -> bool:
    """Whether all of the slice lies on one side of the mask."""
    corners_mm = np.vstack([corners_mm, corners_mm[1] + corners_mm[2] - corners_mm[0]])
    voxels = corners_mm @ to_voxels[:3, :3].T + to_voxels[:3, 3]
    below, above = voxels.max(axis=0) < -_HALF, voxels.min(axis=0) > np.array(shape) - 1 + _HALF
    return bool((below | above).any())
