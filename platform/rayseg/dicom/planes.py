"""Whether two grids of pixels lie in one place: how a mask without a name for its image is told to belong to it."""

import numpy as np

from rayseg.dicom.reading import Geometry

_SAME_PLACE = 0.25  # of the smaller pixel spacing: less than what would put a pixel upon another one


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
