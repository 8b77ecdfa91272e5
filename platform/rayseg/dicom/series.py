"""The slices of one series in order, with a verdict on whether they make one stack. A frame is a slice like others."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rayseg.dicom.reading import Header
from rayseg.geometry import planes
from rayseg.records import Reason

_UNEVEN = 0.02  # of the slice distance, relative to the median; less is rounding in the attributes
_GAP = 1.5  # times the median slice distance
_TILT_DEGREES = 0.5  # between the way from slice to slice and the plane normal


@dataclass(frozen=True)
class SeriesVerdict:
    """Whether and in which order a series' slices can be used.

    verdict: "ok": all slices; "salvaged": some left out, or an order that no position confirms; "rejected": none.
    detail: what was done or found (slices left out, gaps, uneven distances, distances unlike SliceThickness, tilt), or
        why not; empty where nothing was.
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

    Localizers are left out: a series of nothing else is rejected as LOCALIZER. Copies of one slice count once. Of
    several sizes, pixel spacings, orientations or frames of reference the one that more than half of the slices have is
    kept, else the series is rejected as SERIES_MIXED. Different slices at one position (phases, echoes) are rejected as
    SERIES_DUPLICATES.
    """
    assert headers, "a series has at least one slice"
    first = {header.slice_uid: index for index, header in reversed(list(enumerate(headers)))}
    unique = sorted(index for index in first.values() if not headers[index].localizer)
    if not unique:
        return SeriesVerdict("rejected", Reason.LOCALIZER, "nothing but localizers", [], None)
    notes = []
    if len(unique) < len(first):
        notes.append(f"{len(first) - len(unique)} localizers left out")
    if len(first) < len(headers):
        notes.append(f"{len(headers) - len(first)} copies left out")
    groups = grids(headers, unique)
    kept = max(groups, key=len)
    if len(kept) * 2 <= len(unique):
        detail = f"{len(groups)} sizes, spacings or orientations, none of them in more than half of the slices"
        return SeriesVerdict("rejected", Reason.SERIES_MIXED, detail, [], None)
    if len(groups) > 1:
        notes.append(f"{len(unique) - len(kept)} of {len(unique)} slices of another size, spacing or plane left out")
    if not planes.is_placed(headers[kept[0]].geometry):
        if len(kept) > 1:
            notes.append("no positions: ordered by InstanceNumber")
        order = sorted(kept, key=lambda index: _by_number(headers[index]))
        return SeriesVerdict("salvaged" if notes else "ok", None, "; ".join(notes), order, None)

    positions_mm = np.array([headers[index].geometry.image_position_mm for index in kept])
    orientation = headers[kept[0]].geometry.image_orientation
    assert orientation is not None
    along_mm = planes.along_mm(positions_mm, orientation)
    ascending = np.argsort(along_mm, kind="stable")
    steps_mm = np.diff(along_mm[ascending])
    same = steps_mm < planes.same_position_mm(headers[kept[0]].geometry.pixel_spacing_mm)
    if same.any():
        detail = _of_duplicates(same)
        return SeriesVerdict("rejected", Reason.SERIES_DUPLICATES, detail, [], None)
    outcome: Literal["ok", "salvaged"] = "salvaged" if notes else "ok"
    notes += _findings(positions_mm[ascending], steps_mm)
    notes += _against_thickness([headers[index].geometry.slice_thickness_mm for index in kept], steps_mm)
    spacing_mm = float(np.median(steps_mm)) if len(steps_mm) else None
    return SeriesVerdict(outcome, None, "; ".join(notes), [kept[index] for index in ascending], spacing_mm)


def grids(headers: Sequence[Header], indices: Sequence[int]) -> list[list[int]]:
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
    if (a.rows, a.columns) != (b.rows, b.columns) or planes.is_placed(a) != planes.is_placed(b):
        return False
    spacing_a, spacing_b = (geometry.pixel_spacing_mm or (0.0, 0.0) for geometry in (a, b))
    if not all(math.isclose(x, y, rel_tol=planes.SAME_SPACING) for x, y in zip(spacing_a, spacing_b, strict=True)):
        return False
    if a.image_orientation is None or b.image_orientation is None or not planes.is_placed(a):
        return True
    if first.frame_of_reference_uid != second.frame_of_reference_uid:
        return False
    return planes.are_parallel([a.image_orientation, b.image_orientation])


def _by_number(header: Header) -> tuple[bool, int, str, int]:
    number = header.instance_number
    return number is None, number or 0, header.sop_instance_uid, header.frame or 0


def _of_duplicates(repeated: np.ndarray) -> str:
    """How many slices lie where others do; `repeated`: whether a slice but the first lies where the one before does."""
    sizes = np.diff(np.flatnonzero(np.concatenate([[True], ~repeated, [True]])))
    if len(set(sizes)) == 1:  # phases, echoes, diffusion weights
        return f"{sizes[0]} slices at each of {len(sizes)} positions"
    return f"{int(repeated.sum())} slices lie where another one lies"


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


def _against_thickness(thicknesses_mm: Sequence[float | None], steps_mm: np.ndarray) -> list[str]:
    """Where the positions, which count, say other than SliceThickness, which does not."""
    counted = Counter(thickness for thickness in thicknesses_mm if thickness is not None)
    if not counted:
        return []
    if len(counted) > 1:
        return [f"SliceThickness from {min(counted):.4g} to {max(counted):.4g} mm"]
    (thickness_mm,) = counted
    if not len(steps_mm):
        return []
    spacing_mm = float(np.median(steps_mm))
    if math.isclose(spacing_mm, thickness_mm, rel_tol=_UNEVEN):
        return []
    effect = "they overlap" if spacing_mm < thickness_mm else "with room between them"
    return [f"slices every {spacing_mm:.4g} mm, SliceThickness {thickness_mm:.4g} mm: {effect}"]
