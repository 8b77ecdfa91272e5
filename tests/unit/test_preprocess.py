"""Preprocess: the standard's window, percentiles as numpy's, and a geometry that comes back to where it was."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from rayseg import config
from rayseg.data.preprocess import Preprocess, Window
from rayseg.dicom.reading import Slice


def slice_of(stored: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> Slice:
    return Slice(stored=stored, rescale_slope=slope, rescale_intercept=intercept, header=None)


def blob(rows: int, columns: int, row: float, column: float, sigma: float) -> np.ndarray:
    """A Gaussian with its centre at pixel coordinates (row, column)."""
    rr, cc = np.mgrid[:rows, :columns]
    return np.exp(-((rr - row) ** 2 + (cc - column) ** 2) / (2 * sigma**2))


# By hand from the formula of PS3.3 C.11.2.1.2.1 and the four pairs that its note works out.
WORKED = [
    # c=2048, w=4096: x <= 0 -> 0, x > 4095 -> 255, else ((x - 2047.5) / 4095 + 0.5) * 255
    (2048, 4096, {-5: 0, 0: 0, 1: 0, 9: 1, 2047: 127, 2048: 128, 4086: 254, 4095: 255, 5000: 255}),
    # c=2048, w=1: x <= 2047.5 -> 0, above -> 255
    (2048, 1, {2047: 0, 2048: 255}),
    # c=0, w=100: x <= -50 -> 0, x > 49 -> 255, else ((x + 0.5) / 99 + 0.5) * 255
    (0, 100, {-51: 0, -50: 0, -49: 3, -1: 126, 0: 129, 48: 252, 49: 255, 50: 255}),
    # c=0, w=1: x <= -0.5 -> 0, above -> 255
    (0, 1, {-1: 0, 0: 255}),
]


@pytest.mark.parametrize(("center", "width", "expected"), WORKED)
@pytest.mark.parametrize("dtype", ["int16", "int32"])  # by table, by arithmetic
def test_window_gives_the_standards_worked_values(center: int, width: int, expected: dict, dtype: str) -> None:
    stored = np.array([list(expected)], dtype)
    preprocess = Preprocess(size=stored.shape, window=Window(center, width), percentiles=None)
    assert preprocess.apply(slice_of(stored))[..., 0].tolist() == [list(expected.values())]


def test_window_is_in_rescaled_units() -> None:
    # A brain window of 40/80 on 12-bit CT storage: 0 HU is stored 1024; ((0 - 39.5) / 79 + 0.5) * 255 = 0; 79 HU: 255.
    stored = np.array([[1024, 1063, 1103, 0, 4095]], np.uint16)
    preprocess = Preprocess(size=(1, 5), window=Window(40, 80), percentiles=None)
    # 39 HU: ((39 - 39.5) / 79 + 0.5) * 255 = 125.89
    assert preprocess.apply(slice_of(stored, intercept=-1024.0))[0, :, 0].tolist() == [0, 126, 255, 0, 255]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32"])
@pytest.mark.parametrize("slope", [1.0, 0.25, -2.0])
def test_percentiles_are_those_of_the_rescaled_values(dtype: str, slope: float) -> None:
    rng = np.random.default_rng(3)
    limits = np.iinfo(dtype)
    stored = rng.integers(max(limits.min, -3000), min(limits.max, 3000), (31, 17)).astype(dtype)
    values = stored * slope + 7.5
    low, high = np.percentile(values, [2, 97])
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    got = Preprocess(size=(31, 17), percentiles=(2, 97)).apply(slice_of(stored, slope, 7.5))[..., 0]
    assert np.abs(got - expected).max() <= 0.5 + 1e-6


def test_a_slice_of_one_value_is_black() -> None:
    with np.errstate(all="raise"):
        assert not Preprocess(size=(4, 4)).apply(slice_of(np.full((4, 4), -7, np.int16))).any()


def test_apply_keeps_the_aspect_and_centres_with_black() -> None:
    stored = np.tile(np.array([0, 1000], np.int16), (64, 16))  # 64 rows, 32 columns
    image_HWC = Preprocess(size=(32, 48), window=Window(-1000, 1), percentiles=None).apply(slice_of(stored))
    assert image_HWC.shape == (32, 48, 1)
    assert image_HWC.dtype == np.uint8
    filled = np.zeros((32, 48), bool)
    filled[:, 16:32] = True  # 64 x 32 halves to 32 x 16, with 16 columns of padding on either side
    assert np.array_equal(image_HWC[..., 0] > 0, filled)


def test_shrinking_is_anti_aliased() -> None:
    # A checkerboard of single pixels has no detail left at a quarter of the size: its mean, not one of its colours.
    checkers = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image_HWC = Preprocess(size=(16, 16), percentiles=(0, 100)).apply(slice_of(checkers))
    assert np.abs(image_HWC.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("shape", [(128, 128), (96, 160), (201, 77), (40, 40), (64, 64)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (63, 65)])
def test_a_blob_comes_back_to_its_place(shape: tuple[int, int], size: tuple[int, int]) -> None:
    rows, columns = shape
    factor = max(rows / size[0], columns / size[1], 1)
    centre = (rows * 0.45 + 0.3, columns * 0.6 - 0.2)
    stored = np.rint(blob(rows, columns, *centre, sigma=2.5 * factor) * 4000).astype(np.int16)
    preprocess = Preprocess(size=size, window=Window(2000.5, 4001), percentiles=None)
    plane_HW = preprocess.apply(slice_of(stored))[..., 0].astype(np.float32)
    restored = preprocess.restore(plane_HW, rows, columns)
    assert restored.shape == shape
    assert restored.dtype == np.float32
    assert np.allclose(ndimage.center_of_mass(restored), centre, atol=0.05)


def test_the_mask_lies_where_the_image_does() -> None:
    # One disk as image and as mask: the centroids on the network's grid agree.
    rr, cc = np.mgrid[:200, :120]
    disk = (rr - 130.2) ** 2 + (cc - 40.7) ** 2 <= 22**2
    preprocess = Preprocess(size=(64, 64), percentiles=(0, 100))
    image_HW = preprocess.apply(slice_of(disk.astype(np.uint8)))[..., 0]
    mask_HW = preprocess.apply_mask(disk.astype(np.uint8))
    assert np.allclose(ndimage.center_of_mass(image_HW), ndimage.center_of_mass(mask_HW), atol=0.15)
    # and restoring the mask gives the disk back up to its rim: Dice over 0.97
    back = preprocess.restore(mask_HW.astype(np.float32), 200, 120) > 0.5
    assert 2 * (back & disk).sum() / (back.sum() + disk.sum()) > 0.97


def test_without_scaling_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (20, 30)).astype(np.uint8)
    preprocess = Preprocess(size=(25, 30))
    mask_HW = preprocess.apply_mask(mask)
    assert np.array_equal(mask_HW[2:22], mask)
    plane_HW = rng.random((25, 30), np.float32)
    assert np.array_equal(preprocess.restore(plane_HW, 20, 30), plane_HW[2:22])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_survives_in_a_mask(data: st.DataObject) -> None:
    """By the triangle: a square of 1.47 steps covers half of a pixel wherever it lies, and a line as wide as a step.

    Nearest neighbour, which samples one pixel in each step, never loses a rectangle of one step by one.
    """
    rows, columns = data.draw(st.integers(16, 120)), data.draw(st.integers(16, 120))
    size = data.draw(st.integers(6, 60)), data.draw(st.integers(6, 60))
    mask_filter, times = data.draw(
        st.sampled_from([("nearest", (1, 1)), ("image", (1.5, 1.5)), ("image", (1, 3)), ("image", (3, 1))])
    )
    preprocess = Preprocess(size=size, mask_filter=mask_filter)
    height, width = preprocess._fitted(rows, columns)
    sides = int(np.ceil(times[0] * rows / height)), int(np.ceil(times[1] * columns / width))
    assume(sides[0] <= rows and sides[1] <= columns)
    top = data.draw(st.integers(0, rows - sides[0]))
    left = data.draw(st.integers(0, columns - sides[1]))
    mask = np.zeros((rows, columns), np.uint8)
    mask[top : top + sides[0], left : left + sides[1]] = 7
    values = np.unique(preprocess.apply_mask(mask)).tolist()
    assert 7 in values
    assert set(values) <= {0, 7}  # and no value is made up


def test_a_single_pixel_may_be_lost() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20, 20] = 1
    assert Preprocess(size=(16, 16)).apply_mask(mask).sum() == 0


def test_extreme_shapes_keep_a_pixel() -> None:
    preprocess = Preprocess(size=(16, 16))
    assert preprocess.apply(slice_of(np.arange(400, dtype=np.uint16).reshape(1, 400))).shape == (16, 16, 1)
    assert preprocess.restore(np.ones((16, 16), np.float32), 1, 400).tolist() == [[1.0] * 400]


def test_a_read_only_and_strided_slice_is_fine() -> None:
    stored = np.arange(600, dtype=np.int16).reshape(20, 30)[:, ::2]
    stored.setflags(write=False)
    preprocess = Preprocess(size=(20, 15))
    assert np.array_equal(preprocess.apply(slice_of(stored)), preprocess.apply(slice_of(stored.copy())))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32"])
@pytest.mark.parametrize("slope", [1.0, 0.5, -2.0])
def test_z_scores_are_about_the_mean_of_the_rescaled_values(dtype: str, slope: float) -> None:
    rng = np.random.default_rng(4)
    stored = rng.normal(120, 30, (40, 25)).clip(0, 255).astype(dtype)
    values = stored * slope - 3.0
    scores = (values - values.mean()) / values.std()
    expected = np.clip((scores + 2.5) / 5, 0, 1) * 255
    got = Preprocess(size=(40, 25), percentiles=None, z_score=2.5).apply(slice_of(stored, slope, -3.0))[..., 0]
    assert np.abs(got - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_without_any_normalisation_values_stay_as_they_are(dtype: str) -> None:
    stored = np.array([[-7, 0, 1, 100, 254, 255, 256, 3000]], dtype)
    preprocess = Preprocess(size=stored.shape, percentiles=None)
    assert preprocess.apply(slice_of(stored))[0, :, 0].tolist() == [0, 0, 1, 100, 254, 255, 255, 255]
    # 0.5 x + 10: 60 and 137, 137.5 rounded up
    assert preprocess.apply(slice_of(stored, 0.5, 10.0))[0, 3:6, 0].tolist() == [60, 137, 138]


def test_windows_by_name_are_radiologys_numbers() -> None:
    known = {"brain": (40, 80), "subdural": (80, 200), "stroke": (40, 40), "bone": (600, 2800)}
    for name, numbers in known.items():
        assert Preprocess(window=name, percentiles=None).window == Window(*numbers)


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_several_windows_are_as_many_channels(dtype: str) -> None:
    rng = np.random.default_rng(5)
    slice = slice_of(rng.integers(-1000, 3000, (70, 50)).astype(dtype))
    preprocess = Preprocess(size=(32, 48), window=("brain", Window(600, 2800), "subdural"), percentiles=None)
    image_HWC = preprocess.apply(slice)
    assert preprocess.channels == 3
    assert image_HWC.shape == (32, 48, 3)
    assert image_HWC.flags.c_contiguous  # as `tobytes` and its readers take it
    for channel, window in enumerate((Window(40, 80), Window(600, 2800), Window(80, 200))):
        alone = Preprocess(size=(32, 48), window=window, percentiles=None).apply(slice)
        assert np.array_equal(image_HWC[..., channel], alone[..., 0])


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(size=(128, 96), window=Window(40, 80), percentiles=None),
        Preprocess(window="stroke", percentiles=None),
        Preprocess(window=("brain", Window(50, 130)), percentiles=None),
        Preprocess(percentiles=None, z_score=3),
        Preprocess(percentiles=None),
    ],
)
def test_it_goes_through_a_configuration_and_back(preprocess: Preprocess) -> None:
    assert config.build(Preprocess, config.plain(preprocess)) == preprocess


def test_what_older_bundles_say_is_still_read() -> None:
    values = {"size": [64, 48], "window": {"center": 40.0, "width": 80.0}, "percentiles": None}
    assert config.build(Preprocess, values) == Preprocess((64, 48), Window(40, 80), None)
    values = {"size": [64, 48], "window": None, "percentiles": [0.5, 99.5]}
    assert config.build(Preprocess, values) == Preprocess((64, 48))


def test_a_bundle_says_numbers_not_names() -> None:
    by_numbers = config.build(Preprocess, {"window": {"center": 40, "width": 80}, "percentiles": None})
    for name in ("brain", ("brain",)):
        by_name = Preprocess(window=name, percentiles=None)
        assert config.digest(by_name) == config.digest(by_numbers)
        assert config.plain(by_name)["window"] == {"center": 40, "width": 80}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": {"center": 40, "width": 80}}, "at most one of window, percentiles and z_score"),
        ({"z_score": 2}, "at most one of window, percentiles and z_score"),
        ({"z_score": 0, "percentiles": None}, "z_score: a positive number"),
        ({"window": "brian", "percentiles": None}, "unknown name 'brian'; give one of brain, subdural, stroke, bone"),
        ({"window": [], "percentiles": None}, "the list is empty"),
        ({"window": ["brain", {"center": 4, "width": 0}], "percentiles": None}, "key window.1: .*width: at least 1"),
        ({"window": ["brain", {"center": 4, "with": 9}], "percentiles": None}, "key window.1.with: unknown"),
        ({"percentiles": [90, 10]}, "percentiles: 0 <= low < high <= 100"),
        ({"size": [0, 64]}, "size: two positive numbers"),
        ({"window": {"center": 40, "width": 0.5}, "percentiles": None}, "width: at least 1"),
    ],
)
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(Preprocess, values)


def test_a_colour_image_is_three_channels_each_by_its_own_values() -> None:
    rng = np.random.default_rng(2)
    stored = np.stack(
        [rng.integers(low, high, (24, 20), np.uint8) for low, high in ((0, 90), (50, 200), (200, 255))], -1
    )
    preprocess = Preprocess(size=(16, 16), color=True)
    assert preprocess.channels == 3
    image_HWC = preprocess.apply(Slice(stored, 1.0, 0.0, None))
    grey = Preprocess(size=(16, 16))
    for channel in range(3):
        alone = grey.apply(Slice(np.ascontiguousarray(stored[..., channel]), 1.0, 0.0, None))
        assert np.array_equal(image_HWC[..., channel], alone[..., 0])


def test_a_grey_slice_stands_three_times_where_colours_are_wanted() -> None:
    slice = Slice(np.arange(60, dtype=np.uint8).reshape(6, 10), 1.0, 0.0, None)
    image_HWC = Preprocess(size=(8, 8), color=True).apply(slice)
    assert image_HWC.shape == (8, 8, 3)
    assert np.array_equal(image_HWC, np.repeat(Preprocess(size=(8, 8)).apply(slice), 3, axis=2))
