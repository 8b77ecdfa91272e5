"""Volumes in millilitres from the positions of slices, so that gaps, tilt and uneven spacing are no obstacle."""

from collections.abc import Sequence

import numpy as np

from rayseg.dicom.reading import Geometry
from rayseg.dicom.series import SAME_DIRECTION

_SAME_PLANE = 4 * SAME_DIRECTION  # of components of unit normals: what a series' verdict lets pass
_LEAST_DISTANCE_MM = 0.01


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
    widths_mm = None if any(one.pixel_spacing_mm is None for one in geometries) else _widths_mm(geometries)
    if widths_mm is None:
        return None
    spacings_mm = [one.pixel_spacing_mm for one in geometries if one.pixel_spacing_mm is not None]
    areas_mm2: np.ndarray = np.prod(np.array(spacings_mm, float), axis=1)
    return areas_mm2 * widths_mm


def _widths_mm(geometries: Sequence[Geometry]) -> np.ndarray | None:
    """How much of the normal each slice stands for."""
    if len(geometries) == 1:
        thickness_mm = geometries[0].slice_thickness_mm
        return np.array([thickness_mm]) if thickness_mm else None
    planes = [
        (geometry.image_position_mm, geometry.image_orientation)
        for geometry in geometries
        if geometry.image_position_mm is not None and geometry.image_orientation is not None
    ]
    if not planes or len(planes) < len(geometries):
        return None
    orientations = np.array([orientation for _, orientation in planes])
    normals = np.cross(orientations[:, :3], orientations[:, 3:])
    if np.abs(normals - normals[0]).max() > _SAME_PLANE:
        return None
    along_mm = np.array([position for position, _ in planes]) @ (normals[0] / np.linalg.norm(normals[0]))
    order = np.argsort(along_mm, kind="stable")
    distances_mm = np.diff(along_mm[order])
    if distances_mm.min() < _LEAST_DISTANCE_MM:
        return None
    below_mm = np.concatenate([distances_mm[:1], distances_mm])
    above_mm = np.concatenate([distances_mm, distances_mm[-1:]])
    widths_mm = np.empty(len(geometries))
    widths_mm[order] = (below_mm + above_mm) / 2
    return widths_mm
