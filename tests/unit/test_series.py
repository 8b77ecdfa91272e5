"""Series verdicts: order along the normal, copies, mixtures, duplicates, gaps, tilt."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseg.dicom.reading import Header, read_header
from rayseg.dicom.series import verdict
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def header(number: int, position_mm: Sequence[float] | None, **changes: Any) -> Header:
    geometry = {"image_position_mm": position_mm, "image_orientation": AXIAL, "pixel_spacing_mm": (0.5, 0.5)}
    geometry |= {key: changes.pop(key) for key in list(changes) if key in Geometry.__dataclass_fields__}
    made = Header("1.2.840.10008.5.1.4.1.1.2", f"1.{number}", "2", "3", "4", "5", "CT", "6", number, Geometry(8, 9))
    return replace(made, geometry=replace(made.geometry, **geometry), **changes)


def stack(*heights_mm: float, **changes: Any) -> list[Header]:
    return [header(number, (10.0, 20.0, z), **changes) for number, z in enumerate(heights_mm)]


def test_order_is_by_position_not_by_number() -> None:
    result = verdict(stack(5.0, -5.0, 10.0, 0.0))
    assert (result.verdict, result.reason, result.detail) == ("ok", None, "")
    assert result.order == [1, 3, 0, 2]
    assert result.spacing_mm == pytest.approx(5.0)


def test_one_slice() -> None:
    result = verdict(stack(7.0))
    assert (result.verdict, result.order, result.spacing_mm, result.detail) == ("ok", [0], None, "")


@settings(max_examples=60, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    steps_mm=st.lists(st.floats(0.5, 8), min_size=1, max_size=12),
    shear=st.floats(-0.4, 0.4),
    seed=st.integers(0, 99),
)
def test_any_orientation_tilt_and_shuffle(
    angles: tuple[float, float, float], steps_mm: list[float], shear: float, seed: int
) -> None:
    """Slices laid out in a rotated, sheared frame come back in the order in which they were laid out."""
    a, b, c = angles
    rotation = (
        np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        @ np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    )
    heights_mm = np.cumsum([0.0, *steps_mm])
    places = np.random.default_rng(seed).permutation(len(heights_mm))
    headers = [
        header(
            int(place),
            tuple(rotation @ [3.0, shear * heights_mm[place], heights_mm[place]]),
            image_orientation=(*rotation[:, 0], *rotation[:, 1]),
        )
        for place in places
    ]
    result = verdict(headers)
    assert result.verdict == "ok"
    assert [int(places[index]) for index in result.order] == list(range(len(heights_mm)))
    assert result.spacing_mm == pytest.approx(float(np.median(steps_mm)), abs=1e-6)
    tilt = abs(np.degrees(np.arctan(shear)))
    if abs(tilt - 0.5) > 0.01:
        assert ("tilted" in result.detail) == (tilt > 0.5)


def test_gaps_and_uneven_steps_are_named_and_kept() -> None:
    result = verdict(stack(0.0, 5.0, 10.0, 25.0, 30.0))
    assert (result.verdict, result.order, result.spacing_mm) == ("ok", [0, 1, 2, 3, 4], pytest.approx(5.0))
    assert result.detail == "gaps in steps of 5 mm: 15 mm after slice 3"
    result = verdict(stack(0.0, 5.0, 10.0, 11.5, 13.0, 18.0))
    assert result.verdict == "ok"
    assert result.detail == "uneven steps from 1.5 to 5 mm"
    many = verdict(stack(0, 1, 2, 3, 4, 5, 10, 15, 20, 25, 26, 27))
    assert "and 1 more" in many.detail


def test_gantry_tilt_is_named_with_its_angle() -> None:
    shear = np.tan(np.radians(20.0))
    result = verdict([header(n, (0.0, shear * 5.0 * n, 5.0 * n)) for n in range(4)])
    assert (result.verdict, result.spacing_mm) == ("ok", pytest.approx(5.0))
    assert "tilted by 20.0 degrees" in result.detail


def test_copies_of_one_object_count_once() -> None:
    headers = stack(0.0, 5.0, 10.0)
    result = verdict([headers[1], headers[0], headers[1], headers[2]])
    assert (result.verdict, result.order) == ("salvaged", [1, 0, 3])
    assert result.detail == "1 copies left out"


def test_different_slices_at_one_position_are_rejected() -> None:
    result = verdict([*stack(0.0, 5.0), header(9, (10.0, 20.0, 5.001))])
    assert (result.verdict, result.reason, result.order) == ("rejected", Reason.SERIES_DUPLICATES, [])
    assert "1 slices" in result.detail


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 16},
        {"image_orientation": SAGITTAL},
        {"pixel_spacing_mm": (0.6, 0.5)},
        {"pixel_spacing_mm": None},
        {"image_position_mm": None},
        {"frame_of_reference_uid": "another"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_odd_one_falls_away_the_majority_stays(changes: dict[str, Any]) -> None:
    position_mm = changes.pop("image_position_mm", (10.0, 20.0, 99.0))
    odd = header(99, position_mm, **changes)
    result = verdict([odd, *stack(5.0, 0.0)])
    assert (result.verdict, result.reason, result.order) == ("salvaged", None, [2, 1])
    assert result.detail.startswith("1 of 3 slices")
    mixed = verdict([odd, *stack(5.0)])
    assert (mixed.verdict, mixed.reason, mixed.order) == ("rejected", Reason.SERIES_MIXED, [])


def test_rounding_in_orientation_and_spacing_is_no_mixture() -> None:
    first = header(0, (0.0, 0.0, 0.0))
    second = header(1, (0, 0, 5.0), image_orientation=(0.99999, 0.0004, 0, 0, 1, 0), pixel_spacing_mm=(0.50001, 0.5))
    assert verdict([first, second]).verdict == "ok"


def test_localizers_are_left_out() -> None:
    """Wherever they lie, as in the very plane of a slice; a series of nothing else has no stack."""
    scouts = [replace(one, localizer=True) for one in (header(90, (0, 0, 0), rows=64), header(91, (10.0, 20.0, 5.0)))]
    result = verdict([scouts[0], *stack(0.0, 5.0, 10.0), scouts[1]])
    assert (result.verdict, result.reason, result.order) == ("salvaged", None, [1, 2, 3])
    assert result.detail == "2 localizers left out"
    alone = verdict(scouts)
    assert (alone.verdict, alone.reason, alone.order) == ("rejected", Reason.LOCALIZER, [])


@pytest.mark.parametrize(
    ("thickness_mm", "detail"),
    [
        (5.0, ""),
        (4.95, ""),
        (None, ""),
        (10.0, "slices every 5 mm, SliceThickness 10 mm: they overlap"),
        (1.25, "slices every 5 mm, SliceThickness 1.25 mm: with room between them"),
    ],
)
def test_slice_thickness_is_told_where_the_positions_say_otherwise(thickness_mm: float | None, detail: str) -> None:
    result = verdict(stack(0.0, 5.0, 10.0, slice_thickness_mm=thickness_mm))
    assert (result.verdict, result.spacing_mm, result.detail) == ("ok", pytest.approx(5.0), detail)


def test_several_thicknesses_are_told() -> None:
    headers = [*stack(0.0, 5.0, slice_thickness_mm=5.0), header(9, (10.0, 20.0, 10.0), slice_thickness_mm=2.5)]
    assert verdict(headers).detail == "SliceThickness from 2.5 to 5 mm"


def test_phases_are_counted() -> None:
    heights_mm = [float(z) for z in (0, 5, 10) for _ in range(4)]
    result = verdict(stack(*heights_mm))
    assert (result.verdict, result.reason) == ("rejected", Reason.SERIES_DUPLICATES)
    assert result.detail == "4 slices at each of 3 positions"


def test_frames_of_one_object_are_slices_of_their_own() -> None:
    frames = [replace(header(1, (10.0, 20.0, z)), frame=n) for n, z in enumerate((10.0, 0.0, 5.0))]
    result = verdict([*frames, frames[1]])
    assert (result.verdict, result.order, result.detail) == ("salvaged", [1, 2, 0], "1 copies left out")
    placeless = [replace(header(2, None), frame=n) for n in (2, 0, 1)]
    assert verdict(placeless).order == [1, 2, 0]


def test_without_positions_the_instance_number_orders() -> None:
    headers = [header(number, None) for number in (30, 10, 20)]
    result = verdict(headers)
    assert (result.verdict, result.order, result.spacing_mm) == ("salvaged", [1, 2, 0], None)
    assert "InstanceNumber" in result.detail
    unnumbered = replace(header(5, None), instance_number=None)
    assert verdict([unnumbered, *headers]).order == [2, 3, 1, 0]
    assert verdict([header(1, None)]).verdict == "ok"


def test_real_archive(shared_data: Path) -> None:
    """The slices' own SliceLocation-free truth: positions along z, one step apart, in 22 and 24 slices."""
    for folder in sorted((shared_data / "mr-archive").glob("*/*")):
        headers = [read_header(path.read_bytes()) for path in sorted(folder.glob("*.dcm"))]
        assert all(isinstance(header, Header) for header in headers)
        result = verdict(headers)
        assert result.verdict == "ok", (folder.name, result)
        z_mm = [headers[index].geometry.image_position_mm[2] for index in result.order]
        assert len(z_mm) == len(headers)
        assert z_mm == sorted(z_mm)
        assert result.spacing_mm is not None
        assert 1.0 < result.spacing_mm < 10.0
