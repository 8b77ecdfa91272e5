"""A series on the network's grid in millimetres and back: ellipsoids of known volume, SimpleITK, scipy, real slices."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, as everybody calls it
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from rayseg import config
from rayseg.data.intensity import Intensity, Levels
from rayseg.data.volume import Grid, VolumePreprocess
from rayseg.dicom.reading import Slice, read_slice
from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import places
from rayseg.geometry.volume import volume_ml
from rayseg.records import Reason, Reject

SEMI_AXES_MM = np.array([30.0, 24, 27])
CENTRE_MM = np.array([12.0, -33, 71])
AS_THEY_ARE = Levels(-np.inf, np.inf, 0.0, 1.0)


def geometries(
    along_mm: Sequence[float] | np.ndarray,
    pixel_mm: tuple[float, float],
    *,
    rows: int = 96,
    columns: int = 90,
    turn: Rotation | None = None,
    lean: tuple[float, float] = (0.0, 0.0),
) -> list[Geometry]:
    """Slices so far along their normal, each shifted in its plane by `lean` millimetres for each one along that."""
    row, column, normal = (turn or Rotation.identity()).apply(np.eye(3))
    middle = (np.min(along_mm) + np.max(along_mm)) / 2
    corner = CENTRE_MM - column * pixel_mm[0] * (rows - 1) / 2 - row * pixel_mm[1] * (columns - 1) / 2
    return [
        Geometry(
            rows, columns, pixel_mm, 3.0,
            tuple((corner + (mm - middle) * (normal + lean[0] * column + lean[1] * row)).tolist()),
            tuple(np.concatenate([row, column]).tolist()),
        )
        for mm in along_mm
    ]  # fmt: skip


EVEN_MM = np.arange(0, 75, 3.0)
UNEVEN_MM = np.cumsum(np.random.default_rng(7).choice([1.0, 2.0, 3.5, 4.0], 32))
OBLIQUE = Rotation.from_euler("xyz", [25, -40, 10], degrees=True)
STACKS = {
    "upright": geometries(EVEN_MM, (0.9, 0.9)),
    "anisotropic": geometries(np.arange(0, 75, 4.0), (0.8, 1.1)),
    "fine": geometries(np.arange(0, 75, 0.8), (0.8, 0.8)),
    "reversed": geometries(EVEN_MM[::-1], (0.9, 0.9)),
    "oblique": geometries(EVEN_MM, (0.9, 0.8), turn=OBLIQUE),
    "tilted": geometries(EVEN_MM, (0.9, 0.9), lean=(0.34, 0.0)),
    "uneven": geometries(UNEVEN_MM, (0.9, 0.9)),
    "oblique, tilted, uneven and out of order": [
        geometries(UNEVEN_MM, (0.9, 0.8), turn=OBLIQUE, lean=(0.3, -0.1))[number]
        for number in np.random.default_rng(1).permutation(len(UNEVEN_MM))
    ],
    "a gap": geometries([mm for mm in EVEN_MM if mm not in (9, 12)], (0.9, 0.9)),
}


def pixels_mm(geometry: Geometry) -> np.ndarray:
    """PS3.3 equation C.7.6.2.1-1, (rows, columns, 3)."""
    row, column = np.array(geometry.image_orientation).reshape(2, 3)
    assert geometry.pixel_spacing_mm is not None
    down, along = np.mgrid[: geometry.rows, : geometry.columns]
    return (
        np.array(geometry.image_position_mm)
        + down[..., np.newaxis] * column * geometry.pixel_spacing_mm[0]
        + along[..., np.newaxis] * row * geometry.pixel_spacing_mm[1]
    )


def ellipsoid(points_mm: np.ndarray, turn: Rotation) -> np.ndarray:
    off = (points_mm - CENTRE_MM).reshape(-1, 3) @ turn.as_matrix()
    return ((off / SEMI_AXES_MM) ** 2).sum(axis=1).reshape(points_mm.shape[:-1]) <= 1


def network_mm(grid: Grid, given: Sequence[Geometry]) -> np.ndarray:
    """Where the samples of the network lie, (D, H, W, 3): from the definition of the grid."""
    where = places(given)
    assert not isinstance(where, Reject)
    normal = np.cross(where.row_mm, where.column_mm)
    normal /= np.linalg.norm(normal)
    along = where.positions_mm @ normal
    steps = np.diff(along)
    ends = along[0] - steps[0] / 2, along[-1] + steps[-1] / 2
    wanted = sum(ends) / 2 + (np.arange(grid.shape[0]) - (grid.shape[0] - 1) / 2) * grid.spacing_mm[0]
    # Outside of the slices a stack leans on as it does between the last two.
    slopes = (
        (where.positions_mm[1] - where.positions_mm[0]) / steps[0],
        (where.positions_mm[-1] - where.positions_mm[-2]) / steps[-1],
    )
    firsts = []
    for mm in wanted:
        if mm < along[0]:
            firsts.append(where.positions_mm[0] + (mm - along[0]) * slopes[0])
        elif mm > along[-1]:
            firsts.append(where.positions_mm[-1] + (mm - along[-1]) * slopes[1])
        else:
            firsts.append([np.interp(mm, along, where.positions_mm[:, axis]) for axis in range(3)])
    down, along_row = np.linalg.norm(where.column_mm), np.linalg.norm(where.row_mm)
    (_, rows, columns), (_, height, width) = grid.source_shape, grid.shape
    at_down = rows / 2 - 0.5 + (np.arange(height) - (height - 1) / 2) * grid.spacing_mm[1] / down
    at_along = columns / 2 - 0.5 + (np.arange(width) - (width - 1) / 2) * grid.spacing_mm[2] / along_row
    return (
        np.array(firsts)[:, np.newaxis, np.newaxis]
        + at_down[:, np.newaxis, np.newaxis] * where.column_mm
        + at_along[:, np.newaxis] * where.row_mm
    )


def grid_of(preprocess: VolumePreprocess, given: Sequence[Geometry]) -> Grid:
    grid = preprocess.grid(given)
    assert isinstance(grid, Grid), grid
    return grid


def restored(grid: Grid, labels_DHW: np.ndarray) -> np.ndarray:
    one_hot = np.stack([labels_DHW == 0, labels_DHW == 1]).astype(np.float32)
    return np.stack([plane[1] >= plane[0] for plane in grid.restore([one_hot])])


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.0, 1.8, 1.8), (3.0, 0.6, 0.7), (None, 1.3, 1.3)])
@pytest.mark.parametrize("name", STACKS)
def test_an_ellipsoid_comes_back_as_large_and_where_it_was(
    name: str, spacing_mm: tuple[float | None, float, float]
) -> None:
    given = STACKS[name]
    turn = Rotation.from_euler("xyz", [10, 20, 30], degrees=True)
    preprocess = VolumePreprocess(spacing_mm, (1, 64, 64))
    grid = grid_of(preprocess, given)
    ordered = [given[number] for number in grid.order]
    masks = [ellipsoid(pixels_mm(one), turn).astype(np.uint8) for one in ordered]
    # Two slices are missing where the ellipsoid ends: what lies between is a guess.
    close = 0.02 if name == "a gap" else 0.01
    truth_ml = 4 / 3 * np.pi * np.prod(SEMI_AXES_MM) / 1000
    labels = np.stack(list(grid.labels(masks)))
    assert (labels.shape, labels.dtype) == (grid.shape, np.uint8)
    if spacing_mm[0] is not None:
        assert labels.sum() * np.prod(grid.spacing_mm) / 1000 == pytest.approx(truth_ml, rel=close)
        points = network_mm(grid, given)
        off_mm = points[labels > 0].mean(axis=0) - CENTRE_MM
        assert np.abs(off_mm).max() < 0.5 * min(grid.spacing_mm)
        # Each sample is what lies at its place, but for those beside the surface.
        assert np.mean(labels.astype(bool) == ellipsoid(points, turn)) > 0.98
    back = restored(grid, labels)
    found_ml = volume_ml([int(mask.sum()) for mask in back], ordered)
    assert found_ml == pytest.approx(truth_ml, rel=close)
    points = np.stack([pixels_mm(one) for one in ordered])
    width_mm = np.gradient(
        [np.dot(one.image_position_mm, np.cross(*np.reshape(one.image_orientation, (2, 3)))) for one in ordered]
    )
    weight = back * width_mm[:, np.newaxis, np.newaxis]
    centre_mm = (points * weight[..., np.newaxis]).sum(axis=(0, 1, 2)) / weight.sum()
    assert np.abs(centre_mm - CENTRE_MM).max() < 0.5 * 0.8


@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 1 / 2, 0.7, 0.9, 1.0, 1.1, 4 / 3, 1.5, 2.0, 2.5, 3.0, 4.0])
def test_a_mask_there_and_back_is_not_shifted_at_any_scale(scale: float) -> None:
    """On the mean over places between the pixels of both grids, where what the rim does cancels out."""
    size = 24 if scale < 1 else 36
    step = 1.0
    given = geometries(np.arange(size) * step, (1.0, 1.0), rows=size, columns=size)
    grid = grid_of(VolumePreprocess((scale, scale, scale), (1, 1, 1)), given)
    rng = np.random.default_rng(0)
    zz, rr, cc = np.mgrid[:size, :size, :size]
    shifts = []
    radius = max(5.0, 3 * scale)
    for off in rng.uniform(-scale if scale > 1 else -1, scale if scale > 1 else 1, (12, 3)):
        for mirror in (1, -1):  # of each ball its mirror image, too: half of the noise is that of the places drawn
            centre = (size - 1) / 2 + mirror * off
            mask = ((zz - centre[0]) ** 2 + (rr - centre[1]) ** 2 + (cc - centre[2]) ** 2 <= radius**2).astype(np.uint8)
            back = restored(grid, np.stack(list(grid.labels(mask))))
            shifts.append(np.array(ndimage.center_of_mass(back)) - ndimage.center_of_mass(mask))
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.02
    assert np.abs(shifts).max() < 0.25 * max(1.0, scale)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_mask_between_the_pixels_of_an_even_factor_goes_neither_way(factor: int) -> None:
    """What nearest neighbours would move by half a pixel: a mask that is its own mirror image stays one."""
    size = 8 * factor
    given = geometries(np.arange(size) * 1.0, (1.0, 1.0), rows=size, columns=size)
    grid = grid_of(VolumePreprocess((factor, factor, factor), (1, 1, 1)), given)
    for width in range(2, size, 2):
        mask = np.zeros((size,) * 3, np.uint8)
        inside = slice((size - width) // 2, (size + width) // 2)
        mask[inside, inside, inside] = 1
        back = restored(grid, np.stack(list(grid.labels(mask))))
        for axis in range(3):
            assert np.array_equal(back, np.flip(back, axis))


def image_slices(volume: np.ndarray, given: Sequence[Geometry]) -> list[Slice]:
    return [Slice(plane, 1.0, 0.0, None, one) for plane, one in zip(volume, given, strict=True)]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 12), st.integers(2, 12), st.floats(0.4, 1.0), st.integers(0, 99))
def test_enlarging_is_simpleitks_linear_interpolation_in_three_dimensions(
    count: int, rows: int, columns: int, scale: float, seed: int
) -> None:
    volume = np.random.default_rng(seed).integers(-1000, 2000, (count, rows, columns)).astype(np.int16)
    given = geometries(np.arange(count) * 2.5, (0.8, 1.2), rows=rows, columns=columns, turn=OBLIQUE, lean=(0.0, 0.0))
    spacing_mm = (2.5 * scale, 0.8 * scale, 1.2 * scale)
    grid = grid_of(VolumePreprocess(spacing_mm, (1, 1, 1)), given)
    found = np.stack(list(grid.image(image_slices(volume, given), AS_THEY_ARE))).astype(np.float64)
    image = sitk.GetImageFromArray(volume.astype(np.float64))
    row, column = np.reshape(given[0].image_orientation, (2, 3))
    direction = np.column_stack([row, column, np.cross(row, column)])
    image.SetDirection(direction.ravel())
    image.SetSpacing((1.2, 0.8, 2.5))
    image.SetOrigin(given[0].image_position_mm)
    points = network_mm(grid, given)
    wanted = sitk.Resample(
        image, grid.shape[::-1], sitk.Transform(), sitk.sitkLinear, points[0, 0, 0].tolist(), spacing_mm[::-1],
        direction.ravel().tolist(), 0.0, sitk.sitkFloat64, True,
    )  # fmt: skip
    assert np.abs(found - sitk.GetArrayFromImage(wanted)).max() <= 1.5  # float16 has 11 bits


def test_restoring_is_scipys_linear_interpolation() -> None:
    given = geometries(UNEVEN_MM, (0.9, 0.8), rows=40, columns=50)
    grid = grid_of(VolumePreprocess((2.0, 1.3, 1.1), (1, 1, 1)), given)
    probabilities = np.random.default_rng(0).random((2, *grid.shape), dtype=np.float32)
    found = np.stack(list(grid.restore([probabilities])), axis=1)
    extent_mm = np.diff(UNEVEN_MM)[0] / 2 + UNEVEN_MM[-1] - UNEVEN_MM[0] + np.diff(UNEVEN_MM)[-1] / 2
    at_normal = (UNEVEN_MM - UNEVEN_MM[0] + np.diff(UNEVEN_MM)[0] / 2 - extent_mm / 2) / 2.0
    at_down = (np.arange(40) + 0.5 - 20) * 0.9 / 1.3
    at_along = (np.arange(50) + 0.5 - 25) * 0.8 / 1.1
    at = np.stack(
        np.meshgrid(
            *(mm + (n - 1) / 2 for mm, n in zip((at_normal, at_down, at_along), grid.shape, strict=True)), indexing="ij"
        )
    )
    for ours, network in zip(found, probabilities, strict=True):
        wanted = ndimage.map_coordinates(network.astype(np.float64), at, order=1, mode="nearest")
        assert np.abs(ours - wanted).max() < 1e-5


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (4.0, 1.8, 2.2), (6.0, 3.0, 3.0)])
@pytest.mark.parametrize("name", STACKS)
def test_what_changes_slowly_is_on_the_network_what_it_is_at_its_place(
    name: str, spacing_mm: tuple[float, float, float]
) -> None:
    def field(points_mm: np.ndarray) -> np.ndarray:
        return np.sin((points_mm - CENTRE_MM) @ np.array([0.03, -0.05, 0.04]))

    given = STACKS[name]
    grid = grid_of(VolumePreprocess(spacing_mm, (1, 1, 1)), given)
    slices = [Slice(field(pixels_mm(given[number])).astype(np.float32), 1.0, 0.0, None) for number in grid.order]
    found = np.stack(list(grid.image(slices, AS_THEY_ARE))).astype(np.float64)
    wanted = field(network_mm(grid, given))
    inside = (slice(2, -2),) * 3
    assert np.abs(found - wanted)[inside].max() < 0.03
    assert abs((found - wanted)[inside].mean()) < 0.001


def test_details_finer_than_the_grid_are_averaged_and_do_not_alias() -> None:
    size = 64
    board = (np.indices((size,) * 3).sum(axis=0) % 2).astype(np.uint8) * 200
    given = geometries(np.arange(size) * 1.0, (1.0, 1.0), rows=size, columns=size)
    for spacing_mm in (2.0, 3.0, 4.5):
        grid = grid_of(VolumePreprocess((spacing_mm,) * 3, (1, 1, 1)), given)
        found = np.stack(list(grid.image(image_slices(board, given), AS_THEY_ARE)))
        assert np.abs(found[1:-1, 1:-1, 1:-1].astype(float) - 100).max() < 2


@pytest.mark.parametrize("intensity", [Intensity(), Intensity("percentiles", (1, 99))])
def test_a_volume_of_slices_in_any_order(intensity: Intensity) -> None:
    rng = np.random.default_rng(3)
    given = geometries(UNEVEN_MM, (0.9, 0.8), rows=30, columns=20, lean=(0.2, 0.1))
    volume = rng.integers(0, 4000, (len(given), 30, 20)).astype(np.uint16)
    slices = image_slices(volume, given)
    preprocess = VolumePreprocess((2.0, 1.0, 1.0), (8, 16, 16), intensity)
    found = preprocess.apply(slices)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float16
    grid = grid_of(preprocess, given)
    assert found.shape == (*grid.shape, 1)
    assert preprocess.apply(slices[::-1]).tobytes() == found.tobytes()  # type: ignore[union-attr]
    # Without resampling it is numpy's of the whole volume.
    flat = VolumePreprocess((None, 0.9, 0.8), (1, 16, 16), intensity)
    seen = flat.apply(slices)
    assert isinstance(seen, np.ndarray)
    values = volume.astype(np.float64)
    low, high = np.percentile(values, (1, 99))
    wanted = (
        (values - values.mean()) / values.std()
        if intensity.kind == "z_score"
        else np.clip((values - low) / (high - low), 0, 1) * 2 - 1
    )
    assert np.abs(seen[..., 0] - wanted).max() < 2e-3


def test_bytes_are_the_same_whatever_the_threads_and_however_a_stream_is_cut() -> None:
    rng = np.random.default_rng(4)
    given = geometries(UNEVEN_MM, (0.9, 0.8), rows=70, columns=60)
    slices = image_slices(rng.integers(0, 4000, (len(given), 70, 60)).astype(np.uint16), given)
    masks = rng.integers(0, 4, (len(given), 70, 60)).astype(np.uint8)
    grid = grid_of(VolumePreprocess((1.1, 1.4, 1.7), (1, 1, 1)), given)
    probabilities = rng.random((3, *grid.shape), dtype=np.float32)
    levels = VolumePreprocess((1.1, 1.4, 1.7), (1, 1, 1)).levels(slices)
    images = {np.stack(list(grid.image(slices, levels, threads))).tobytes() for threads in (1, 2, 5)}
    labels = {np.stack(list(grid.labels(masks, threads))).tobytes() for threads in (1, 2, 5)}
    back = {
        np.stack(list(grid.restore(np.split(probabilities, cuts, axis=1), threads))).tobytes()
        for threads in (1, 3)
        for cuts in ([], [1], [3, 4, 20], list(range(1, grid.shape[0])))
    }
    assert (len(images), len(labels), len(back)) == (1, 1, 1)


def test_slices_are_read_as_they_are_needed_and_no_more_of_them_are_held() -> None:
    given = geometries(np.arange(60) * 1.5, (0.9, 0.8), rows=40, columns=30)
    grid = grid_of(VolumePreprocess((1.0, 1.0, 1.0), (1, 1, 1)), given)
    read = []

    def reading() -> Iterator[Slice]:
        for number, one in enumerate(given):
            read.append(number)
            yield Slice(np.full((40, 30), number, np.int16), 1.0, 0.0, None, one)

    for depth, _ in enumerate(grid.image(reading(), AS_THEY_ARE)):
        first, last = grid.needed(depth)
        assert len(read) == last
        assert last - first <= 3
    before = threading.active_count()
    coming = grid.image(reading(), AS_THEY_ARE, threads=2)
    read.clear()
    next(coming)
    assert len(read) <= grid.needed(0)[1] + 3
    coming.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_float16_is_rounded_as_numpy_does() -> None:
    given = geometries(np.arange(3) * 1.0, (1.0, 1.0), rows=300, columns=200)
    values = (
        np.random.default_rng(0).normal(0, 1, (3, 300, 200)) * 10.0 ** np.arange(-9, 3).repeat(25)[:300, np.newaxis]
    ).astype(np.float32)
    grid = grid_of(VolumePreprocess((1.0, 1.0, 1.0), (1, 1, 1)), given)
    found = np.stack(list(grid.image(image_slices(values, given), AS_THEY_ARE)))
    assert np.array_equal(found, values.astype(np.float16))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_position_mm": None}, Reason.MISSING_ATTRIBUTE),
        ({"image_orientation": None}, Reason.MISSING_ATTRIBUTE),
        ({"pixel_spacing_mm": None}, Reason.MISSING_ATTRIBUTE),
        ({"rows": 8}, Reason.SERIES_MIXED),
        ({"image_position_mm": STACKS["upright"][2].image_position_mm}, Reason.SERIES_DUPLICATES),
    ],
)
def test_a_series_without_a_place_is_refused_with_a_reason(change: dict, reason: Reason) -> None:
    given = [replace(STACKS["upright"][0], **change), *STACKS["upright"][1:]]
    refused = VolumePreprocess((1.0, 1.0, 1.0), (8, 8, 8)).grid(given)
    assert isinstance(refused, Reject)
    assert refused.reason is reason


@pytest.mark.parametrize(
    ("change", "spacing_mm"),
    [
        ({"image_position_mm": (0.0, 0.0, 1e5)}, 1.0),  # a digit too many
        ({"image_position_mm": (0.0, 0.0, -1e12)}, 1.0),  # nothing may be laid out at this length
        ({"pixel_spacing_mm": (700.0, 700.0)}, 1.0),  # micrometres
        ({"pixel_spacing_mm": (90.0, 90.0)}, 0.5),  # below ten metres, but 17,280 x 16,200 pixels
    ],
)
def test_a_position_or_spacing_in_error_is_refused_before_it_costs_anything(change: dict, spacing_mm: float) -> None:
    given = [replace(STACKS["upright"][0], **change), *STACKS["upright"][1:]]
    if "pixel_spacing_mm" in change:
        given = [replace(one, **change) for one in given]
    refused = VolumePreprocess((spacing_mm,) * 3, (8, 8, 8)).grid(given)
    assert isinstance(refused, Reject)
    assert refused.reason is Reason.TOO_LARGE


def test_slices_that_stay_as_they_are_may_lie_anywhere() -> None:
    given = [replace(STACKS["upright"][0], image_position_mm=(0.0, 0.0, 1e5)), *STACKS["upright"][1:]]
    assert grid_of(VolumePreprocess((None, 1.0, 1.0), (1, 8, 8)), given).shape[0] == len(given)


def test_two_metres_at_half_a_millimetre_are_not_too_much() -> None:
    given = [
        replace(STACKS["upright"][0], image_position_mm=(0.0, 0.0, 1.0 * number), slice_thickness_mm=1.0)
        for number in range(2000)
    ]
    assert grid_of(VolumePreprocess((0.5, 1.0, 1.0), (8, 8, 8)), given).shape[0] == 4000


def test_a_slice_alone_is_as_thick_as_it_says() -> None:
    alone = STACKS["upright"][:1]
    assert grid_of(VolumePreprocess((1.0, 1.0, 1.0), (8, 8, 8)), alone).shape[0] == 3  # SliceThickness 3 mm
    assert (
        grid_of(VolumePreprocess((1.0, 1.0, 1.0), (8, 8, 8)), [replace(alone[0], slice_thickness_mm=0.3)]).shape[0] == 1
    )
    thin = [replace(alone[0], slice_thickness_mm=None)]
    assert isinstance(VolumePreprocess((1.0, 1.0, 1.0), (8, 8, 8)).grid(thin), Reject)
    flat = VolumePreprocess((None, 1.0, 1.0), (1, 8, 8))
    assert grid_of(flat, thin).shape[0] == 1
    image = flat.apply([Slice(np.eye(96, 90, dtype=np.int16), 1.0, 0.0, None, thin[0])])
    assert isinstance(image, np.ndarray)
    pictures = flat.apply([Slice(np.zeros((4, 4), np.uint8), 1.0, 0.0, None)])
    assert isinstance(pictures, Reject)


def test_a_real_tilted_uneven_head_there_and_back(shared_data: Path) -> None:
    slices = [read_slice(file.read_bytes()) for file in sorted((shared_data / "real-ct").rglob("*")) if file.is_file()]
    kept = [one for one in slices if isinstance(one, Slice) and one.header is not None]
    assert len(kept) == 28
    preprocess = VolumePreprocess(
        (2.0, 0.9, 0.9), (1, 1, 1), Intensity("ct", low=-100.0, high=200.0, mean=0.0, deviation=100.0)
    )
    image = preprocess.apply(kept)
    assert isinstance(image, np.ndarray)
    assert (image.min(), image.max()) == (-1.0, 2.0)
    grid = grid_of(preprocess, [one.header.geometry for one in kept])  # type: ignore[union-attr]
    ordered = [kept[number] for number in grid.order]
    masks = [(one.values() > 300).astype(np.uint8) for one in ordered]  # the skull
    back = restored(grid, np.stack(list(grid.labels(masks))))
    truth = np.stack(masks).astype(bool)
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.9
    volumes = [volume_ml(one.sum(axis=(1, 2)).tolist(), [s.header.geometry for s in ordered]) for one in (truth, back)]  # type: ignore[union-attr]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spacing_mm": [1.0, 0.0, 1.0], "patch": [8, 8, 8]}, "volume.spacing_mm"),
        ({"spacing_mm": [1.0, None, 1.0], "patch": [8, 8, 8]}, "spacing_mm"),
        ({"spacing_mm": [1.0, 1.0, 1.0], "patch": [8, 0, 8]}, "volume.patch"),
        ({"spacing_mm": [None, 1.0, 1.0], "patch": [8, 8, 8]}, "volume.patch: depth 1"),
        ({"spacing_mm": [1.0, 1.0, 1.0], "patch": [8, 8, 8], "step": 1.5}, "volume.step"),
        ({"spacing_mm": [1.0, 1.0, 1.0], "patch": [8, 8, 8], "sigma": 0.0}, "volume.sigma"),
        ({"spacing_mm": [1.0, 1.0, 1.0], "patch": [8, 8, 8], "spacing": 1}, "unknown"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(VolumePreprocess, values)


def test_it_is_read_and_written_as_plain_values() -> None:
    values = {"spacing_mm": [None, 1, 0.5], "patch": [1, 64, 64], "intensity": {"kind": "percentiles"}}
    built = config.build(VolumePreprocess, values)
    assert built == VolumePreprocess((None, 1.0, 0.5), (1, 64, 64), Intensity("percentiles"))
    assert config.build(VolumePreprocess, config.plain(built)) == built
