"""Volumes in millilitres from the positions of slices, so that gaps, tilt and uneven spacing are no obstacle."""

from collections.abc import Sequence

import numpy as np

from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry

_SAME_PLANE = 4 * planes.SAME_DIRECTION  # of components of unit normals: what a series' verdict lets pass


def volume_ml(foreground_pixels: Sequence[int], geometries: Sequence[Geometry]) -> float | None:
    """The foreground's volume by Cavalieri's principle: the sum of area times width of each slice.

    A slice is as wide as half the distance to each neighbour along the plane's normal; the first and the last reach as
    far outward as inward. Missing slices are so bridged by their neighbours. One slice alone is SliceThickness wide.

    Args:
        foreground_pixels: of each slice.
        geometries: of the same slices, in any order.

    Returns:
        Millilitres; None where spacing, positions or orientation are missing, planes are not parallel or coincide.
    """
    assert len(foreground_pixels) == len(geometries)
    voxels = voxels_mm3(geometries)
    return None if voxels is None else float(np.dot(foreground_pixels, voxels) / 1000)


def voxels_mm3(geometries: Sequence[Geometry]) -> np.ndarray | None:
    """The volume that a pixel of each slice stands for, float64 (slices,), as `volume_ml` has it; None likewise."""
    spacings_mm = [one.pixel_spacing_mm for one in geometries if one.pixel_spacing_mm is not None]
    widths_mm = _widths_mm(geometries, min(spacings_mm)) if len(spacings_mm) == len(geometries) else None
    if widths_mm is None:
        return None
    areas_mm2: np.ndarray = np.prod(np.array(spacings_mm, float), axis=1)
    return areas_mm2 * widths_mm


def _widths_mm(geometries: Sequence[Geometry], spacing_mm: tuple[float, float]) -> np.ndarray | None:
    """How much of the normal each slice, of pixels of that size, stands for."""
    if len(geometries) == 1:
        thickness_mm = geometries[0].slice_thickness_mm
        return np.array([thickness_mm]) if thickness_mm else None
    places = [
        (geometry.image_position_mm, geometry.image_orientation)
        for geometry in geometries
        if geometry.image_position_mm is not None and geometry.image_orientation is not None
    ]
    if not places or len(places) < len(geometries):
        return None
    if not planes.are_parallel(planes.normal([orientation for _, orientation in places]), _SAME_PLANE):
        return None
    order, along_mm = planes.in_order([position for position, _ in places], places[0][1])
    distances_mm = np.diff(along_mm)
    if distances_mm.min() < planes.same_position_mm(spacing_mm):
        return None
    below_mm = np.concatenate([distances_mm[:1], distances_mm])
    above_mm = np.concatenate([distances_mm, distances_mm[-1:]])
    widths_mm = np.empty(len(geometries))
    widths_mm[order] = (below_mm + above_mm) / 2
    return widths_mm
