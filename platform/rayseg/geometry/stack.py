"""A series' slices, with masks or without, as one stack in patient space: what volumes and surfaces are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject

_SIZES = "slices of several sizes"


@dataclass(frozen=True, eq=False)
class Places:
    """Where the slices of a series lie, in the order of their planes.

    Slices are parallel; they may be tilted against the way from one to the next, and lie at uneven distances.
    """

    order: np.ndarray  # int (S,), which slice, as they were given, each one is
    positions_mm: np.ndarray  # float64 (S, 3), of the centre of each slice's first pixel (PS3.3 C.7.6.2.1.1)
    row_mm: np.ndarray  # float64 (3,), from a pixel to the next one of its row
    column_mm: np.ndarray  # float64 (3,), from a pixel to the next one of its column
    beyond_mm: np.ndarray  # float64 (3,), from the last slice to where another one would lie
    tolerance_mm: float  # what is not told apart: a quarter of a pixel

    def affine_lps(self) -> np.ndarray | Reject:
        """(column, row, slice) to millimetres, float64 (4, 4); UNEVEN_SLICES where no matrix says where slices lie."""
        count = len(self.positions_mm)
        step_mm = self.beyond_mm if count == 1 else (self.positions_mm[-1] - self.positions_mm[0]) / (count - 1)
        even_mm = self.positions_mm[0] + np.arange(count)[:, np.newaxis] * step_mm
        off_mm = float(np.linalg.norm(self.positions_mm - even_mm, axis=1).max())
        if off_mm > self.tolerance_mm:
            return Reject(Reason.UNEVEN_SLICES, f"slices lie up to {off_mm:.2f} mm off even distances")
        affine = np.eye(4)
        affine[:3] = np.column_stack([self.row_mm, self.column_mm, step_mm, self.positions_mm[0]])
        return affine

    def points_mm(self, voxels: np.ndarray) -> np.ndarray:
        """Patient coordinates (LPS) of fractional (slice, row, column), float64 (..., 3), up to a slice outside."""
        ends = np.vstack(
            [self._before_mm(), self.positions_mm, self.positions_mm[-1] + self.beyond_mm]
        )  # of slices -1 to S
        numbers = np.arange(-1, len(self.positions_mm) + 1)
        along_mm = np.stack([np.interp(voxels[..., 0], numbers, ends[:, axis]) for axis in range(3)], axis=-1)
        points: np.ndarray = along_mm + voxels[..., 1:2] * self.column_mm + voxels[..., 2:] * self.row_mm
        return points

    def _before_mm(self) -> np.ndarray:
        first_mm: np.ndarray = self.positions_mm[0]
        return first_mm - (self.positions_mm[1] - first_mm if len(self.positions_mm) > 1 else self.beyond_mm)


@dataclass(frozen=True, eq=False)
class Stack(Places):
    """Label maps in the order of their planes, and where each slice's first pixel lies."""

    masks: np.ndarray  # uint8 (slices, rows, columns)


def stack(masks: Sequence[np.ndarray], geometries: Sequence[Geometry]) -> Stack | Reject:
    """Puts the slices of a series, in any order, together.

    Args:
        masks: uint8 label maps (rows, columns).
        geometries: where they lie.

    Returns:
        A reject where `places` gives one, or label maps are of several sizes (SERIES_MIXED).
    """
    assert masks
    assert len(masks) == len(geometries)
    slice_places = places(geometries)
    if isinstance(slice_places, Reject):
        return slice_places
    ordered = [masks[index] for index in slice_places.order]
    if len({mask.shape for mask in ordered}) > 1:
        return Reject(Reason.SERIES_MIXED, _SIZES)
    return Stack(**vars(slice_places), masks=np.stack(ordered))


def places(geometries: Sequence[Geometry]) -> Places | Reject:
    """Where the slices of a series, one or more and in any order, lie.

    Returns:
        MISSING_ATTRIBUTE where a slice has no place, or one alone no thickness; SERIES_DUPLICATES where two are at one
        position; SERIES_MIXED where sizes differ, which a series' verdict does not let pass.
    """
    assert geometries
    known = []
    for geometry in geometries:
        if geometry.image_position_mm is None or geometry.image_orientation is None or not geometry.pixel_spacing_mm:
            return Reject(Reason.MISSING_ATTRIBUTE, "ImagePositionPatient, ImageOrientationPatient and PixelSpacing")
        known.append((geometry.image_position_mm, geometry.image_orientation, geometry.pixel_spacing_mm))
    if len({(geometry.rows, geometry.columns) for geometry in geometries}) > 1:
        return Reject(Reason.SERIES_MIXED, _SIZES)
    _, orientation, spacing_mm = known[0]
    along_row, along_column = np.array(orientation, float).reshape(2, 3)
    positions_mm = np.array([position for position, _, _ in known], float)
    order, along_mm = planes.in_order(positions_mm, orientation)
    positions_mm = positions_mm[order]
    if len(known) > 1:
        if np.diff(along_mm).min() < planes.same_position_mm(spacing_mm):
            return Reject(Reason.SERIES_DUPLICATES, "several slices at one position")
        beyond_mm = positions_mm[-1] - positions_mm[-2]
    elif geometries[0].slice_thickness_mm:
        beyond_mm = planes.normal(orientation) * geometries[0].slice_thickness_mm
    else:
        return Reject(Reason.MISSING_ATTRIBUTE, "SliceThickness of a slice alone")
    return Places(
        order,
        positions_mm,
        along_row * spacing_mm[1],
        along_column * spacing_mm[0],
        beyond_mm,
        planes.tolerance_mm(geometries[0]),
    )
