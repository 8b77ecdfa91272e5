"""Which profiles can be made of a series, by its rows in the manifest: decided before the network runs."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg.dicom.sources import PLACE, are_placed
from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import Places, places
from rayseg.geometry.volume import voxels_mm3
from rayseg.inference.outputs import PICTURES, SEGMENTATIONS, Kind, lacking
from rayseg.inference.postprocess import Postprocess
from rayseg.records import Reason, Reject

_GEOMETRY = (
    "rows",
    "columns",
    "pixel_spacing_mm",
    "slice_thickness_mm",
    "image_position_mm",
    "image_orientation",
)
_PLACE = dict(
    zip(PLACE, ("frame_of_reference_key", "pixel_spacing_mm", "image_position_mm", "image_orientation"), strict=True)
)
PRESENT = (*_PLACE.values(),)  # columns of a manifest of which it matters whether there is a value


def columns(profiles: Iterable[str], postprocess: Postprocess) -> tuple[str, ...]:
    """The columns of a manifest whose values are looked at here: those of the geometry only where these matter."""
    needless = set(profiles) <= {*SEGMENTATIONS, *PICTURES} and not postprocess.min_lesion_mm3
    return () if needless else _GEOMETRY


def present(table: pa.Table) -> list[int]:
    """Of each row of a manifest, which of `PRESENT` have a value: a bit each."""
    bits = [np.asarray(table[name].is_valid()).astype(int) << bit for bit, name in enumerate(PRESENT)]
    numbers: list[int] = np.sum(bits, axis=0).tolist()
    return numbers


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What a series of such rows is; a volume's rows count its slices, and those of an image file do not."""
    if row["kind"] == "dicom":
        return "dicom"
    return "image" if row["frame"] is None else "volume"


def refused(profiles: Sequence[str], kind: Kind, rows: Sequence[Mapping[str, Any]]) -> dict[str, Reject]:
    """The profiles that cannot be made of a series, and why.

    Args:
        profiles: that are asked for, in order.
        kind: of the series.
        rows: of its slices, with `columns`, and `present` of each.
    """

    @cache
    def where() -> Places | Reject:
        return places([_geometry(row) for row in rows])

    ended: dict[str, Reject | None] = {}
    for profile in profiles:
        ended[profile] = lacking(profile, kind, where, ended)
        if profile in SEGMENTATIONS and ended[profile] is None:
            ended[profile] = _unplaced({row["present"] for row in rows})
    return {profile: reject for profile, reject in ended.items() if reject}


def unmeasured(postprocess: Postprocess, rows: Sequence[Mapping[str, Any]]) -> Reject | None:
    """Why masks of a series of such rows, with `columns`, cannot be postprocessed; None where they can."""
    try:
        postprocess.check(voxels_mm3([_geometry(row) for row in rows]) if postprocess.min_lesion_mm3 else None)
    except ValueError as error:
        return Reject(Reason.MISSING_ATTRIBUTE, str(error))
    return None


def _unplaced(present: Iterable[int]) -> Reject | None:
    """Why a segmentation of DICOM slices would lie nowhere; None where it lies as they do."""
    placed = are_placed([keyword for bit, keyword in enumerate(_PLACE) if bits >> bit & 1] for bits in present)
    return placed if isinstance(placed, Reject) else None


def _geometry(row: Mapping[str, Any]) -> Geometry:
    values: dict[str, Any] = {
        name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in _GEOMETRY
    }
    return Geometry(**values)
