"""The slices of one series in order, with a verdict on whether they make one stack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rayseg.dicom.reading import Geometry, Header
from rayseg.records import Reason

_SAME_POSITION_MM = 0.01  # closer slices lie at one position
_SAME_DIRECTION = 0.01  # cosines: half a degree
_SAME_SPACING = 0.001  # of the pixel spacing, relative
_UNEVEN = 0.02  # of the slice distance, relative to the median; less is rounding in the attributes
_GAP = 1.5  # times the median slice distance
_TILT_DEGREES = 0.5  # between the way from slice to slice and the plane normal


@dataclass(frozen=True)
class SeriesVerdict:
    """Whether and in which order a series' slices can be used.

    verdict: "ok": all slices; "salvaged": some left out, or an order that no position confirms; "rejected": none.
    detail: what was done or found (slices left out, gaps, uneven distances, tilt), or why not; empty where nothing was.
    order: indices of the slices to use, ascending along the plane normal (row direction x column direction).
    spacing_mm: median distance between neighbours along the normal; None without positions or with one slice.
    """

    verdict: Literal["ok", "salvaged", "rejected"]
    reason: Reason | None
    detail: str
    order: list[int]
    spacing_mm: float | None


def verdict(headers: Sequence[Header]) -> SeriesVerdict:
    """Judges the slices of one series, at least one, given in any order.

    Copies of one object count once. Of several sizes, pixel spacings, orientations or frames of reference the one that
    more than half of the slices have is kept (a localizer before a stack falls away), else the series is rejected as
    SERIES_MIXED. Different slices at one position (phases, echoes) are rejected as SERIES_DUPLICATES.
    """
    assert headers, "a series has at least one slice"
    unique = list({header.sop_instance_uid: index for index, header in reversed(list(enumerate(headers)))}.values())
    unique.sort()
    notes = []
    if len(unique) < len(headers):
        notes.append(f"{len(headers) - len(unique)} copies left out")
    groups = _groups(headers, unique)
    kept = max(groups, key=len)
    if len(kept) * 2 <= len(unique):
        detail = f"{len(groups)} sizes, spacings or orientations, none of them in more than half of the slices"
        return SeriesVerdict("rejected", Reason.SERIES_MIXED, detail, [], None)
    if len(groups) > 1:
        notes.append(f"{len(unique) - len(kept)} of {len(unique)} slices of another size, spacing or plane left out")
    if not _is_placed(headers[kept[0]].geometry):
        if len(kept) > 1:
            notes.append("no positions: ordered by InstanceNumber")
        order = sorted(kept, key=lambda index: _by_number(headers[index]))
        return SeriesVerdict("salvaged" if notes else "ok", None, "; ".join(notes), order, None)

    positions_mm = np.array([headers[index].geometry.image_position_mm for index in kept])
    orientation = np.array(headers[kept[0]].geometry.image_orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    along_mm = positions_mm @ (normal / np.linalg.norm(normal))
    ascending = np.argsort(along_mm, kind="stable")
    steps_mm = np.diff(along_mm[ascending])
    if (steps_mm < _SAME_POSITION_MM).any():
        detail = f"{int((steps_mm < _SAME_POSITION_MM).sum())} slices lie where another one lies"
        return SeriesVerdict("rejected", Reason.SERIES_DUPLICATES, detail, [], None)
    outcome: Literal["ok", "salvaged"] = "salvaged" if notes else "ok"
    notes += _findings(positions_mm[ascending], steps_mm)
    spacing_mm = float(np.median(steps_mm)) if len(steps_mm) else None
    return SeriesVerdict(outcome, None, "; ".join(notes), [kept[index] for index in ascending], spacing_mm)


def _groups(headers: Sequence[Header], indices: Sequence[int]) -> list[list[int]]:
    """Indices of slices that lie on parallel planes with equal grids, in order of appearance."""
    groups: list[list[int]] = []
    for index in indices:
        for group in groups:
            if _match(headers[group[0]], headers[index]):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _match(first: Header, second: Header) -> bool:
    a, b = first.geometry, second.geometry
    if (a.rows, a.columns) != (b.rows, b.columns) or _is_placed(a) != _is_placed(b):
        return False
    spacing_a, spacing_b = (geometry.pixel_spacing_mm or (0.0, 0.0) for geometry in (a, b))
    if not np.allclose(spacing_a, spacing_b, rtol=_SAME_SPACING, atol=0):
        return False
    if not _is_placed(a):
        return True
    same_frame = first.frame_of_reference_uid == second.frame_of_reference_uid
    return same_frame and np.allclose(
        np.array(a.image_orientation), np.array(b.image_orientation), rtol=0, atol=_SAME_DIRECTION
    )


def _is_placed(geometry: Geometry) -> bool:
    return geometry.image_position_mm is not None and geometry.image_orientation is not None


def _by_number(header: Header) -> tuple[bool, int, str]:
    number = header.instance_number
    return number is None, number or 0, header.sop_instance_uid


def _findings(positions_mm: np.ndarray, steps_mm: np.ndarray) -> list[str]:
    """What is unusual about a stack yet no obstacle to it: gaps, uneven distances, gantry tilt."""
    if not len(steps_mm):
        return []
    notes = []
    typical_mm = float(np.median(steps_mm))
    gaps = np.flatnonzero(steps_mm > _GAP * typical_mm)
    if len(gaps):
        named = ", ".join(f"{steps_mm[gap]:.4g} mm after slice {gap + 1}" for gap in gaps[:3])
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        notes.append(f"gaps in steps of {typical_mm:.4g} mm: {named}{more}")
    even = np.delete(steps_mm, gaps)
    if np.abs(even - typical_mm).max() > _UNEVEN * typical_mm:
        notes.append(f"uneven steps from {even.min():.4g} to {even.max():.4g} mm")
    way_mm = np.linalg.norm(positions_mm[-1] - positions_mm[0])
    tilt = np.degrees(np.arccos(np.clip(steps_mm.sum() / way_mm, -1.0, 1.0)))
    if tilt > _TILT_DEGREES:
        notes.append(f"planes tilted by {tilt:.1f} degrees against the stack (gantry tilt)")
    return notes
