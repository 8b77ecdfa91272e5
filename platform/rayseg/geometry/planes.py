"""Planes of slices: their normals, the order along these, and what counts as the same direction, position or place.

`highdicom.spatial` gives the same normals and, from the other end, the same order, as tests hold; ours stay because it
gives uneven and tilted stacks no distances, takes one plane at a time, and brings pydicom with it.
"""

import math
from collections.abc import Sequence

import numpy as np

from rayseg.geometry.grid import Geometry

# Of direction cosines, against the first of the planes: what rounding to three decimals leaves. On the far edge of a
# slice of 250 mm it is an eighth of a millimetre, a quarter of a pixel. A slice that differs by more lies on a plane of
# its own, and no segmentation can be of it and the others: the frames of one share an orientation.
SAME_DIRECTION = 5e-4
SAME_SPACING = 1e-3  # of pixel spacings, relative: the rest is rounding in the attribute
SAME_POSITION_MM = 0.01  # slices that are closer along their normal lie at one position
_SAME_PLACE = 0.25  # of the smaller pixel spacing: less than what would put a pixel upon another one
_ONE_DISTANCE = 0.1  # of the distance: how far off an even grid slices may lie that have one, rounding being the rest
_ORTHONORMAL = 0.01  # of the product of the two directions, and of their lengths against 1


def is_orthonormal(orientation: Sequence[float]) -> bool:
    """Whether ImageOrientationPatient is of two unit vectors at a right angle, as PS3.3 C.7.6.2.1.1 demands."""
    row, column = orientation[:3], orientation[3:]
    product = sum(a * b for a, b in zip(row, column, strict=True))
    lengths = math.hypot(*row), math.hypot(*column)
    return abs(product) < _ORTHONORMAL and all(abs(length - 1.0) < _ORTHONORMAL for length in lengths)


def normal(orientation: Sequence[float] | Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """The unit normal of a plane (6,), float64 (3,), or of several (planes, 6): row direction x column direction."""
    directions = np.asarray(orientation, np.float64)
    across = np.cross(directions[..., :3], directions[..., 3:])
    unit: np.ndarray = across / np.linalg.norm(across, axis=-1, keepdims=True)
    return unit


def along_mm(
    positions_mm: Sequence[Sequence[float]] | np.ndarray, orientation: Sequence[float] | np.ndarray
) -> np.ndarray:
    """How far positions (slices, 3) lie along the normal of an orientation, float64 (slices,)."""
    distances: np.ndarray = np.asarray(positions_mm, np.float64) @ normal(orientation)
    return distances


def in_order(
    positions_mm: Sequence[Sequence[float]] | np.ndarray, orientation: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The indices of positions (slices, 3) ascending along the normal, equals as given, and how far along each lies."""
    distances_mm = along_mm(positions_mm, orientation)
    order = np.argsort(distances_mm, kind="stable")
    return order, distances_mm[order]


def distance_mm(distances_mm: Sequence[float] | np.ndarray, tolerance_mm: float) -> float | None:
    """The one distance of planes that lie so far along their normal, in any order; None where there is not one.

    Planes may be missing: a gap is then a whole number of distances. The distance is that of most neighbours, and no
    plane lies farther from its place on the even grid than the tolerance or a tenth of the distance.
    """
    along = np.sort(np.asarray(distances_mm, np.float64))
    steps_mm = np.diff(along)
    if not len(steps_mm) or steps_mm.min() < min(SAME_POSITION_MM, tolerance_mm):
        return None
    counts = np.rint(steps_mm / np.quantile(steps_mm, 0.5, method="lower"))
    if counts.min() < 1:
        return None
    distance = float(steps_mm.sum() / counts.sum())
    off_mm = np.abs(along - along[0] - np.concatenate([[0.0], np.cumsum(counts)]) * distance).max()
    return distance if off_mm <= min(tolerance_mm, _ONE_DISTANCE * distance) else None


def are_parallel(orientations: Sequence[Sequence[float]] | np.ndarray, tolerance: float = SAME_DIRECTION) -> bool:
    """Whether no direction cosine (slices, 6) differs from the first slice's by more than the tolerance."""
    cosines = np.asarray(orientations, np.float64)
    return bool(np.abs(cosines - cosines[0]).max() <= tolerance)


def is_placed(geometry: Geometry) -> bool:
    """Whether position and orientation are known."""
    return geometry.image_position_mm is not None and geometry.image_orientation is not None


def corners_mm(geometry: Geometry) -> np.ndarray | None:
    """The centres of three corner pixels, float64 (3, 3), or None where the geometry does not say where they are.

    The first pixel, the last one of the first row and the last one of the first column, by PS3.3 equation C.7.6.2.1-1.
    """
    position_mm, orientation, spacing_mm = (
        geometry.image_position_mm,
        geometry.image_orientation,
        geometry.pixel_spacing_mm,
    )
    if position_mm is None or orientation is None or spacing_mm is None:
        return None
    first = np.array(position_mm, float)
    along_row, along_column = np.array(orientation, float).reshape(2, 3)
    last_column = first + along_row * spacing_mm[1] * (geometry.columns - 1)
    last_row = first + along_column * spacing_mm[0] * (geometry.rows - 1)
    return np.stack([first, last_column, last_row])


def apart_mm(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far the corners (..., 3, 3) of other grids lie from those of one, the farthest of each: float64 (...)."""
    distances: np.ndarray = np.linalg.norm(others - one, axis=-1).max(axis=-1)
    return distances


def tolerance_mm(geometry: Geometry) -> float:
    """How far apart the corners may lie where two grids are one, rounding in the attributes being the rest."""
    assert geometry.pixel_spacing_mm is not None
    return _SAME_PLACE * min(geometry.pixel_spacing_mm)


def same_position_mm(spacing_mm: Sequence[float] | None) -> float:
    """Slices of such pixels that are closer along their normal lie at one position: less in microscopy."""
    return SAME_POSITION_MM if spacing_mm is None else min(SAME_POSITION_MM, _SAME_PLACE * min(spacing_mm))
