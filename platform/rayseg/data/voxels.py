"""Voxels: the volume that a pixel of each slice stands for in its series, of the rows of a manifest."""

from itertools import groupby
from typing import Any

import pyarrow as pa

from rayseg.geometry.grid import Geometry
from rayseg.geometry.volume import voxels_mm3

_PLACE = ("rows", "columns", "pixel_spacing_mm", "slice_thickness_mm", "image_position_mm", "image_orientation")
COLUMNS = ("series_key", *_PLACE)  # of a manifest


def of_rows(accepted: pa.Table) -> pa.Array:
    """Cubic millimetres of a pixel of each row, float64, by `geometry.volume` over all accepted slices of its series.

    Null where that gives none: image files, a series without positions, one slice alone without SliceThickness.

    Args:
        accepted: all accepted rows, those of a series together, as a manifest has them; COLUMNS.
    """
    made: list[float | None] = []
    for _, series in groupby(accepted.select(COLUMNS).to_pylist(), key=lambda row: row["series_key"]):
        slices = [geometry(row) for row in series]
        sizes_mm3 = voxels_mm3(slices)
        made += [None] * len(slices) if sizes_mm3 is None else sizes_mm3.tolist()
    return pa.array(made, pa.float64())


def geometry(row: dict[str, Any]) -> Geometry:
    """Where the slice of a row with `COLUMNS` lies."""
    values: dict[str, Any] = {name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in _PLACE}
    return Geometry(**values)
