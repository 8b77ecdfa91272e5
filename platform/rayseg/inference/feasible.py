"""Which profiles can be made of a series, by its rows in the manifest: decided before the network runs."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import Places, places
from rayseg.inference.outputs import PICTURES, SEGMENTATIONS, Kind, lacking
from rayseg.records import Reject

_GEOMETRY = (
    "rows",
    "columns",
    "pixel_spacing_mm",
    "slice_thickness_mm",
    "image_position_mm",
    "image_orientation",
)


def columns(profiles: Iterable[str]) -> tuple[str, ...]:
    """The columns of a manifest that `divide` looks at: those of the geometry only where it matters."""
    return () if set(profiles) <= {*SEGMENTATIONS, *PICTURES} else _GEOMETRY


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What a series of such rows is; a volume's rows count its slices, and those of an image file do not."""
    if row["kind"] == "dicom":
        return "dicom"
    return "image" if row["frame"] is None else "volume"


def divide(
    profiles: Sequence[str], kind: Kind, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], dict[str, Reject]]:
    """The profiles that can be made of a series, and why the others cannot.

    Args:
        profiles: that are asked for, in order.
        kind: of the series.
        rows: of its slices, with `columns`.
    """

    @cache
    def where() -> Places | Reject:
        return places([_geometry(row) for row in rows])

    ended: dict[str, Reject | None] = {}
    for profile in profiles:
        ended[profile] = lacking(profile, kind, where, ended)
    return [name for name, reject in ended.items() if not reject], {name: one for name, one in ended.items() if one}


def _geometry(row: Mapping[str, Any]) -> Geometry:
    values: dict[str, Any] = {
        name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in _GEOMETRY
    }
    return Geometry(**values)
