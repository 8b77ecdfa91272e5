"""One axis of two grids: weights from the samples of one to those of the other, against integrals and Pillow."""

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import integrate

from rayseg.geometry.axes import Weights, axis, plane, weights

UNEVEN_MM = np.array([0.0, 4, 8, 12, 19, 26, 27, 34])


def dense(one: Weights) -> np.ndarray:
    return one.matrix.toarray().astype(np.float64)


@st.composite
def positions(draw: st.DrawFn) -> np.ndarray:
    steps = draw(st.lists(st.floats(0.1, 9), min_size=1, max_size=30))
    return draw(st.floats(-500, 500)) + np.cumsum(steps)


@pytest.mark.parametrize("spacing_mm", [0.0, 1.7, 5.0, 9.0, 30.0])
def test_weights_are_the_integral_of_the_joined_samples_under_a_triangle(spacing_mm: float) -> None:
    after_mm = np.array([-6.0, -1, 0, 0.3, 5, 9.9, 12, 17, 19.5, 26.2, 26.9, 31, 34, 39])
    found = dense(weights(UNEVEN_MM, after_mm, spacing_mm))
    for at, row in zip(after_mm, found, strict=True):
        gap_mm = np.diff(UNEVEN_MM)[np.clip(np.searchsorted(UNEVEN_MM, at, side="right") - 1, 0, 6)]
        half_mm = np.sqrt(max(spacing_mm**2 - gap_mm**2, 0))
        for number, value in enumerate(row):
            hat = np.eye(8)[number]
            if half_mm == 0:
                assert value == pytest.approx(np.interp(at, UNEVEN_MM, hat), abs=1e-5)
                continue

            def inside(x: float, hat: np.ndarray = hat, at: float = at, half_mm: float = half_mm) -> float:
                return float(np.interp(x, UNEVEN_MM, hat) * (1 - abs(x - at) / half_mm) / half_mm)

            corners = [mm for mm in (*UNEVEN_MM, at) if at - half_mm < mm < at + half_mm]
            share, _ = integrate.quad(inside, at - half_mm, at + half_mm, points=corners, limit=200)
            assert value == pytest.approx(share, abs=3e-5)


@settings(max_examples=200, deadline=None)
@given(positions(), positions(), st.floats(0, 20))
def test_weights_are_a_mean_and_give_a_straight_line_back(
    before_mm: np.ndarray, after_mm: np.ndarray, spacing_mm: float
) -> None:
    found = dense(weights(before_mm, after_mm, spacing_mm))
    assert (found >= 0).all()
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-6
    inside = (after_mm - spacing_mm >= before_mm[0]) & (after_mm + spacing_mm <= before_mm[-1])
    assert np.abs(found @ before_mm - after_mm)[inside].max(initial=0) < 1e-3 * max(1.0, spacing_mm)
    # Outside of the samples, the nearest one.
    assert (found[after_mm + spacing_mm <= before_mm[0]] == np.eye(len(before_mm))[0]).all()


@pytest.mark.parametrize(("before", "after"), [(10, 10), (10, 20), (7, 23), (20, 10), (30, 10), (23, 7), (100, 37)])
def test_of_even_samples_it_is_what_pillow_does_or_near_it(before: int, after: int) -> None:
    """The same where it enlarges; where it shrinks the same width, and so little else for what has few details."""
    values = np.sin(np.arange(before) / before * 5).astype(np.float32)
    picture = Image.fromarray(values[np.newaxis])
    pillow = np.asarray(picture.resize((after, 1), Image.Resampling.BILINEAR))[0]
    scale = before / after
    found = weights(np.arange(before) + 0.5, (np.arange(after) + 0.5) * scale, scale)
    margin = int(np.ceil(scale)) if scale > 1 else 0  # Pillow takes less beyond the edge, and not the edge more often
    inside = slice(margin // 2, after - margin // 2)
    assert np.abs(found.apply(values[:, np.newaxis])[:, 0] - pillow)[inside].max() < (2e-6 if scale <= 1 else 0.01)
    if scale > 1:
        at = (np.arange(after) + 0.5) * scale
        of_pillow = np.array(
            [np.asarray(Image.fromarray(row[np.newaxis]).resize((after, 1), Image.Resampling.BILINEAR))[0]
             for row in np.eye(before, dtype=np.float32)]
        ).T  # fmt: skip
        middle = after // 2
        spread = [float(one[middle] @ (np.arange(before) + 0.5 - at[middle]) ** 2) for one in (dense(found), of_pillow)]
        assert spread[0] == pytest.approx(spread[1], rel=0.15)


def test_a_finer_and_finer_scale_leaves_no_step_at_one() -> None:
    before = np.arange(40) + 0.5
    for scale in (0.999, 1.0, 1.001):
        count = round(40 / scale)
        found = dense(weights(before, 20 + (np.arange(count) - (count - 1) / 2) * scale, scale))
        assert found.max(axis=1).min() > 0.95


def test_samples_at_the_same_places_are_taken_as_they_are() -> None:
    exact = np.array([0.1, 0.2, 0.30000000000000004, 0.4]) * 7 - 3
    same = weights(exact, exact + 1e-9, 0.7)
    assert same.is_identity
    array = np.random.default_rng(0).random((4, 3), dtype=np.float32)
    assert same.apply(array) is array
    assert not weights(exact, exact + 0.1, 0.7).is_identity
    assert not weights(exact, exact[:3], 0.7).is_identity


@settings(max_examples=100, deadline=None)
@given(positions(), positions(), st.floats(0, 20))
def test_a_stream_gives_what_the_whole_gives_and_holds_what_it_needs(
    before_mm: np.ndarray, after_mm: np.ndarray, spacing_mm: float
) -> None:
    one = weights(before_mm, after_mm, spacing_mm)
    values = np.random.default_rng(1).random((len(before_mm), 6), dtype=np.float32)
    alive: dict[int, weakref.ref] = {}

    def coming() -> Iterator[np.ndarray]:
        for number, row in enumerate(values):
            copied = row.copy()
            alive[number] = weakref.ref(copied)
            yield copied

    whole = one.matrix.toarray() @ values
    for number, array in enumerate(one.stream(coming())):
        assert np.abs(array - whole[number]).max() < 1e-6
        first, last = one.needed[number]
        assert max(alive, default=-1) < last  # no plane is read before it is needed
        del array
        gc.collect(0)
        held = [index for index, reference in alive.items() if reference() is not None]
        assert all(index >= first for index in held if index < last - 1)
    used = one.matrix.indices
    assert (one.needed[:, 0] <= np.minimum.reduceat(used, one.matrix.indptr[:-1])).all()
    assert (np.diff(one.needed, axis=0) >= 0).all()


@pytest.mark.parametrize(("length_mm", "spacing_mm", "count"), [(10, 3, 3), (10, 4, 2), (10, 100, 1), (0.4, 1, 1)])
def test_an_axis_is_centred_and_has_its_spacing_exactly(length_mm: float, spacing_mm: float, count: int) -> None:
    source_mm = 5 + (np.arange(20) + 0.5) * length_mm / 20
    one = axis(source_mm, (5, 5 + length_mm), spacing_mm)
    assert (one.there.after, one.back.after, one.spacing_mm) == (count, 20, spacing_mm)
    # What the samples' own positions become says where the new samples are, away from the edges.
    centre_mm = one.there.apply(source_mm.astype(np.float32)[:, np.newaxis])[:, 0]
    assert centre_mm.mean() == pytest.approx(5 + length_mm / 2, abs=1e-4)
    if count == 3:
        assert np.diff(centre_mm) == pytest.approx([3, 3], abs=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_a_plane_is_both_of_its_axes(rows: int, columns: int, height: int, width: int) -> None:
    array = np.random.default_rng(2).random((rows, columns), dtype=np.float32)
    before = array.copy()
    down = weights(np.arange(rows) + 0.5, (np.arange(height) + 0.5) * rows / height, rows / height)
    along = weights(np.arange(columns) + 0.5, (np.arange(width) + 0.5) * columns / width, columns / width)
    found = plane(array, down, along)
    assert (found.shape, found.dtype) == ((height, width), np.float32)
    assert found.flags.c_contiguous
    assert np.abs(found - dense(down) @ array @ dense(along).T).max() < 1e-6
    assert np.array_equal(array, before)
