"""A series of several volumes (b-values, echoes, phases, kernels, times) split into stacks by what tells them apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rayseg.dicom import traits
from rayseg.dicom.reading import Header
from rayseg.dicom.series import grids
from rayseg.geometry import planes
from rayseg.records import Reason

_MOST_TRAITS = 3  # that tell the stacks of a series apart together
_MORE_STACKS = 2  # times as many as slices lie at one position: more are no stacks, but slices that all differ
_PLANES = ("sagittal", "coronal", "axial")  # by the axis that the normal is nearest to


@dataclass(frozen=True)
class Part:
    """A stack of a series: its slices by index, in no order, with copies of them; `name` is None of an only one."""

    name: str | None
    indices: list[int]


@dataclass(frozen=True)
class Split:
    """The stacks of a series, and the slices that are of none of them; nothing of these where it is one stack."""

    parts: list[Part]
    rest: dict[int, Reason]


def split(headers: Sequence[Header]) -> Split:
    """Splits the slices of one series, at least one, given in any order.

    A series is split only where several slices lie at one position, or where several sizes, spacings or orientations
    are such that none has more than half of the slices. Of the traits (`traits.TRAITS`, and those of the geometry) the
    first one, or the first two or three, by which no two slices at one position are equal tell the stacks apart, those
    before others that give as many stacks as slices lie at one position. A slice that would be a stack by itself while
    others have many positions is left out. What no traits tell apart stays one stack, which `series.verdict` rejects.
    """
    whole = Split([Part(None, list(range(len(headers))))], {})
    first = {header.slice_uid: index for index, header in reversed(list(enumerate(headers)))}
    unique = sorted(index for index in first.values() if not headers[index].localizer)
    groups = grids(headers, unique)
    most = max(groups, key=len, default=[])
    groups = [most] if len(most) * 2 > len(unique) else [group for group in groups if len(group) > 1]
    groups = [group for group in groups if planes.is_placed(headers[group[0]].geometry)]
    slices = _Slices.of(headers, groups)
    if slices is None:
        return whole
    columns = _columns(headers, slices)
    names = _telling(slices, columns)
    if names is None:
        return whole
    numbers = _numbers(columns, names)
    # By number the first slice of each stack, which stands for it; a slice alone is none where others have many.
    first_of = {
        number: int(np.argmax(numbers == number))
        for number, size in enumerate(np.bincount(numbers))
        if size > 1 or not slices.several_positions
    }
    texts = _texts(columns, _named(columns, names, numbers), list(first_of.values()))
    if len(set(texts)) < len(texts):
        return whole
    parts = {number: Part(text, []) for number, text in zip(first_of, texts, strict=True)}
    number_of = {index: int(number) for index, number in zip(slices.indices, numbers, strict=True)}
    rest: dict[int, Reason] = {}
    for index, header in enumerate(headers):
        number = number_of.get(first[header.slice_uid])
        if number in parts:
            parts[number].indices.append(index)
        elif header.localizer:
            rest[index] = Reason.LOCALIZER
        else:
            rest[index] = Reason.SERIES_MIXED if number is None else Reason.SERIES_DUPLICATES
    order = sorted(parts, key=lambda number: _sortable(columns, names, first_of[number]))
    if len(order) == 1:
        return Split([Part(None, parts[order[0]].indices)], rest)
    return Split([parts[number] for number in order], rest)


@dataclass(frozen=True, eq=False)
class _Slices:
    """The slices that stacks are made of. `grid` and `place`, int64 (slices,): on which grid and at which position."""

    indices: list[int]
    grid: np.ndarray
    place: np.ndarray  # numbered over all grids
    stacks: int  # at least so many: the most slices at one position, summed over the grids
    several_positions: int  # how many grids have several

    @classmethod
    def of(cls, headers: Sequence[Header], groups: Sequence[Sequence[int]]) -> "_Slices | None":
        """None where each group, if any, and all together are one stack already."""
        places, stacks, several, start = [], 0, 0, 0
        for group in groups:
            first = headers[group[0]].geometry
            orientation, apart_mm = first.image_orientation, planes.same_position_mm(first.pixel_spacing_mm)
            assert orientation is not None
            positions_mm = np.array([headers[index].geometry.image_position_mm for index in group], np.float64)
            along_mm = planes.along_mm(positions_mm, orientation)
            order = np.argsort(along_mm, kind="stable")
            place = np.empty(len(group), np.int64)
            place[order] = np.cumsum(np.diff(along_mm[order], prepend=-np.inf) >= apart_mm) - 1
            places.append(place + start)
            start += int(place.max()) + 1
            stacks += int(np.bincount(place).max())
            several += int(place.max()) > 0
        if stacks < 2:
            return None
        grid = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        return cls([index for group in groups for index in group], grid, np.concatenate(places), stacks, several)


_Columns = Mapping[str, Sequence[str | None]]  # by trait, in the order of TRAITS: its value of each slice


def _columns(headers: Sequence[Header], slices: _Slices) -> _Columns:
    """The traits that are not the same of all slices."""
    rows = [traits.parsed(headers[index].traits) for index in slices.indices]
    first = {int(grid): headers[slices.indices[place]] for place, grid in reversed(list(enumerate(slices.grid)))}
    of_grid = {grid: _geometry_traits(header) for grid, header in first.items()}
    for row, index, grid in zip(rows, slices.indices, slices.grid, strict=True):
        header = headers[index]
        row.update(of_grid[int(grid)])
        if header.geometry.slice_thickness_mm is not None:
            row["SliceThickness"] = f"{header.geometry.slice_thickness_mm:.7g}"
        if header.frame is not None and header.instance_number is not None:
            row["InstanceNumber"] = str(header.instance_number)
    for row, phase in zip(rows, _phases([row.get("TriggerTime") for row in rows], slices.place), strict=False):
        row["Phase"] = phase
    columns = {trait.name: [row.get(trait.name) for row in rows] for trait in traits.TRAITS}
    return {name: column for name, column in columns.items() if len(set(column)) > 1}


def _geometry_traits(header: Header) -> dict[str, str]:
    geometry = header.geometry
    assert geometry.image_orientation is not None
    normal = planes.normal(geometry.image_orientation)
    spacing_mm = geometry.pixel_spacing_mm
    return {
        "Plane": _PLANES[int(np.abs(normal).argmax())],
        "Normal": " ".join(f"{round(float(part), 3) + 0.0:g}" for part in normal),
        "Size": f"{geometry.rows}x{geometry.columns}",
    } | ({} if spacing_mm is None else {"Spacing": "x".join(f"{step:.4g}" for step in spacing_mm)})


def _phases(times: Sequence[str | None], place: np.ndarray) -> list[str]:
    """Which one of its position each slice is by time, from 1; none where times do not say it of all, all alike."""
    if None in times or len(set(np.bincount(place))) > 1:
        return []
    times_ms = np.array(times, float)
    order = np.lexsort((times_ms, place))
    again = (np.diff(place[order]) == 0) & (np.diff(times_ms[order]) == 0)
    if again.any():
        return []
    phase = np.empty(len(place), np.int64)
    phase[order] = np.tile(np.arange(1, np.bincount(place)[0] + 1), int(place.max()) + 1)
    return [str(number) for number in phase]


def _telling(slices: _Slices, columns: _Columns) -> tuple[str, ...] | None:
    """The traits that tell stacks apart; None where none do."""
    few = [name for name, column in columns.items() if len(set(column)) <= _MORE_STACKS * slices.stacks]
    codes = {name: _codes(columns[name]) for name in few}
    sizes = {name: int(column.max()) + 1 for name, column in codes.items()}
    enough: list[tuple[str, ...]] = []
    for count in range(1, _MOST_TRAITS + 1):
        for names in combinations(few, count):
            if np.prod([sizes[name] for name in names]) < slices.stacks:
                continue
            numbers = _numbers(codes, names)
            stacks = int(numbers.max()) + 1
            if stacks > _MORE_STACKS * slices.stacks or not _are_stacks(slices, numbers, stacks):
                continue
            if stacks == slices.stacks:
                return names
            enough.append(names)
    return enough[0] if enough else None


def _are_stacks(slices: _Slices, numbers: np.ndarray, stacks: int) -> bool:
    """Whether each is of one grid and has one slice at a position, and most slices lie in one of several slices."""
    if len(np.unique(slices.place * stacks + numbers)) < len(numbers):
        return False
    if len(np.unique(slices.grid * stacks + numbers)) > stacks:
        return False
    alone = int((np.bincount(numbers) == 1).sum())
    return not slices.several_positions or alone * 2 < len(numbers)


def _numbers(columns: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The number of each slice's stack, int64 (slices,): equal where the values of all these traits are."""
    numbers = np.zeros(len(columns[names[0]]), np.int64)
    for name in names:
        codes = _codes(columns[name])
        numbers = np.unique(numbers * (int(codes.max()) + 1) + codes, return_inverse=True)[1]
    return numbers


def _codes(column: Any) -> np.ndarray:
    if isinstance(column, np.ndarray):
        return column
    known: dict[str | None, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in column], np.int64)


def _named(columns: _Columns, names: Sequence[str], numbers: np.ndarray) -> list[traits.Trait]:
    """The traits that name stacks: those that tell them apart, and main ones that go along, before them or alike."""
    telling = [trait for trait in traits.TRAITS if trait.name in names]
    last, stacks = traits.TRAITS.index(telling[-1]), int(numbers.max())
    named = []
    for rank, trait in enumerate(traits.TRAITS):
        near = rank < last or (trait.kind != "" and trait.kind == telling[-1].kind)
        if trait in telling:
            named.append(trait)
        elif trait.main and near and trait.name in columns:
            goes_along = int(_numbers({"": numbers, trait.name: _codes(columns[trait.name])}, ("", trait.name)).max())
            named += [trait] if goes_along == stacks else []
    return named


def _texts(columns: _Columns, named: Sequence[traits.Trait], firsts: Sequence[int]) -> list[str]:
    """The names of the stacks, each by its first slice."""
    values = {trait.name: [columns[trait.name][first] for first in firsts] for trait in named}
    kinds = (
        _differing([columns["ImageType"][first] for first in firsts]) if "ImageType" in columns else [""] * len(firsts)
    )
    texts = []
    for number, kind in enumerate(kinds):
        parts = [(trait, kind if trait.name == "ImageType" else values[trait.name][number]) for trait in named]
        said = [trait.label.format(_shown(trait.name, value)) for trait, value in parts if value]
        texts.append(", ".join(said) or _shown("ImageType", kind or "") or f"no {named[-1].name}")
    return texts


def _shown(name: str, value: str) -> str:
    return value.lower() if name in ("Component", "DiffusionDirectionality") else " ".join(value.split("\\"))


def _differing(types: Sequence[str | None]) -> list[str | None]:
    """Of ImageType the values that differ, all of them where these are empty."""
    parts = [(kind or "").split("\\") for kind in types]
    length = max(map(len, parts))
    padded = [part + [""] * (length - len(part)) for part in parts]
    differ = [place for place in range(length) if len({part[place] for part in padded}) > 1]
    short = ["\\".join(part[place] for place in differ if part[place]) for part in padded]
    return [one or kind for one, kind in zip(short, types, strict=True)]


def _sortable(columns: _Columns, names: Sequence[str], first: int) -> list[tuple[bool, list[float], str]]:
    """By number where a trait is numbers, else by text; what lacks it comes first."""
    keys = []
    for name in names:
        value = columns[name][first]
        try:
            keys.append((value is not None, [float(part) for part in (value or "").split("\\") if part], ""))
        except ValueError:
            keys.append((True, [], value or ""))
    return keys
