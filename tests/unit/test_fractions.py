"""Values of volumes that are no small integers: fractions with spikes, wide integers, and what is no number."""

import gzip
import tracemalloc
from typing import Any

import nibabel
import numpy as np
import pytest

from rayseg.data.labels import Labels
from rayseg.data.masks import truth
from rayseg.data.preprocess import Preprocess, Window
from rayseg.dicom import nifti
from rayseg.dicom.reading import Slice, read_slice
from rayseg.evaluation.panes import png
from rayseg.records import Reason, Reject
from serving.volumes import volumes

SHAPE = (48, 40, 5)
AFFINE = np.diag([-1.0, -1, 1, 1])
PERCENTILES = Preprocess(size=(40, 48), percentiles=(0.5, 99.5))
Z_SCORE = Preprocess(size=(40, 48), percentiles=None, z_score=2.5)
WINDOW = Preprocess(size=(40, 48), percentiles=None, window=(Window(40, 80), Window(10, 25)))
AS_IS = Preprocess(size=(40, 48), percentiles=None)


def file(values: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """The values as they are stored; nibabel would scale them anew."""
    image = nibabel.Nifti1Image(values, AFFINE, dtype=values.dtype)
    data = bytearray(image.to_bytes())
    data[112:120] = np.array([slope, intercept], "<f4").tobytes()
    return bytes(data)


def slice_of(data: bytes, index: int) -> Slice:
    found = read_slice(data, index)
    assert isinstance(found, Slice), found
    return found


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)


def expected(values_HW: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """What the network sees, by the definitions, in float64."""
    values = values_HW.astype(np.float64)
    if preprocess.percentiles:
        return stretched(values, *np.percentile(values, preprocess.percentiles))[..., np.newaxis]
    if preprocess.z_score:
        reach = preprocess.z_score * values.std()
        return stretched(values, values.mean() - reach, values.mean() + reach)[..., np.newaxis]
    if preprocess.window is None:
        return stretched(values, 0, 255)[..., np.newaxis]
    assert isinstance(preprocess.window, tuple)
    # PS3.3 C.11.2.1.2.1
    ends = [(w.center - 0.5 - (w.width - 1) / 2, w.center - 0.5 + (w.width - 1) / 2) for w in preprocess.window]  # type: ignore[union-attr]
    return np.stack([stretched(values, *one) for one in ends], axis=-1)


MAPS = np.random.default_rng(0).gamma(2.0, 20.0, SHAPE)
STORED = {
    "float32": (MAPS.astype(np.float32), 1.0, 0.0),
    "float64": (MAPS, 1.0, 0.0),
    "float32 of a negative slope": (MAPS.astype(np.float32), -0.5, 100.0),
    "big-endian float32": (MAPS.astype(">f4"), 1.0, 0.0),
    "float64 in tiny units": (MAPS * 1e-9, 1e9, 0.0),
    "int16 with a slope": (np.rint(MAPS * 100).clip(0, 32000).astype(np.int16), 0.01, 0.0),
    "int64": (np.rint(MAPS * 1000).astype(np.int64), 0.001, 0.0),
}


@pytest.mark.parametrize("spike", [None, 1e7, -1e7, 3e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("preprocess", [PERCENTILES, Z_SCORE, WINDOW, AS_IS])
@pytest.mark.parametrize("name", STORED)
def test_a_spike_takes_nothing_from_what_the_network_sees_of_other_slices(
    name: str, preprocess: Preprocess, spike: float | None
) -> None:
    stored, slope, intercept = STORED[name]
    stored = stored.copy()
    if spike is not None:
        most = np.iinfo(stored.dtype) if stored.dtype.kind == "i" else np.finfo(stored.dtype)
        number = (
            0 if stored.dtype.kind == "i" and np.isnan(spike) else float(np.clip(spike, most.min / 2, most.max / 2))
        )
        stored[3, 2, 0] = number if stored.dtype.kind == "i" or np.isfinite(spike) else spike
    data = gzip.compress(file(stored, slope, intercept), 1)
    for index in (1, 4):
        seen = preprocess.apply(slice_of(data, index))
        scale, shift = np.float32(slope).astype(float), np.float32(intercept).astype(float)
        wanted = expected(stored[:, :, index].T * scale + shift, preprocess)
        assert np.abs(seen - wanted).max() <= 1


def test_a_spike_among_the_values_of_a_slice_is_cut_off_by_the_percentiles() -> None:
    spiked = MAPS.astype(np.float32)
    spiked[5, 6, 2] = 1e9
    seen = PERCENTILES.apply(slice_of(file(spiked), 2))
    assert seen[6, 5, 0] == 255
    assert np.abs(seen - expected(spiked[:, :, 2].T, PERCENTILES)).max() <= 1
    assert len(np.unique(seen)) > 150


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8"])
@pytest.mark.parametrize("slope", [1.0, -2.0])
def test_what_is_no_number_is_the_darkest_of_its_slice_and_what_is_infinite_the_end_of_it(
    dtype: str, slope: float
) -> None:
    values = (MAPS + 5).astype(dtype)
    values[0, 0, 1], values[1, 0, 1], values[2, 0, 1] = np.nan, np.inf, -np.inf
    values[:, :, 3] = np.nan
    values[0, 0, 0] = -1e6  # of another slice
    data = file(values, slope)
    plane = slice_of(data, 1)
    finite = values[:, :, 1].astype("f4").T
    inside = finite[np.isfinite(finite)]
    darkest = inside.min() if slope > 0 else inside.max()
    assert plane.stored.dtype == np.float32
    assert plane.stored[0, :3].tolist() == [darkest, inside.max(), inside.min()]
    assert np.array_equal(plane.stored[1:], finite[1:])
    assert np.isfinite(plane.values()).all()
    empty = slice_of(data, 3)
    rest = np.stack([slice_of(data, index).values() for index in (0, 1, 2, 4)])
    assert (empty.values() == rest.min()).all()


def test_beyond_float32_values_are_its_ends() -> None:
    values = MAPS.copy()
    values[0, 0, 0], values[1, 0, 0] = 1e300, -1e300
    found = slice_of(file(values), 0).stored
    assert found[0, :2].tolist() == [np.finfo(np.float32).max, np.finfo(np.float32).min]
    assert np.array_equal(found[1:], values[:, 1:, 0].T.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("uint32", 0, 1000),
        ("uint32", 5, 2**32 - 1),
        ("uint32", 2**32 - 300, 2**32 - 1),
        ("int64", -1000, 1000),
        ("int64", -(2**31), 2**31 - 1),
        ("int64", 2**40, 2**40 + 2**31),
        ("int64", -(2**62), -(2**62) + 70000),
        ("uint64", 2**63 + 5, 2**63 + 2**31),
        ("uint64", 0, 2**16),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_wide_integers_keep_their_values(dtype: str, low: int, high: int, order: str) -> None:
    random = np.random.default_rng(3)
    values = random.integers(low, high, SHAPE, dtype=dtype, endpoint=True)
    values[0, 0, 0], values[1, 0, 0] = low, high
    stored, slope, intercept = nifti.image(file(values.astype(np.dtype(dtype).newbyteorder(order))))  # type: ignore[misc]
    assert stored.dtype == np.int32
    assert slope == 1.0
    exact = [int(value) + int(intercept) for value in stored[0].ravel()]
    assert exact == [int(value) for value in values[:, :, 0].T.ravel()]


def test_integers_over_a_wider_range_are_as_exact_as_float32_holds() -> None:
    values = np.random.default_rng(1).integers(-(2**62), 2**62, SHAPE)
    found = slice_of(file(values), 2)
    assert found.stored.dtype == np.float32
    assert np.array_equal(found.stored, values[:, :, 2].T.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64", "float32", "float64"])
@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, 0.0), (1.0, -3.0), (np.nan, 0.0), (0.0, 7.0)])
def test_labels_of_every_type_are_integers_after_slope_and_intercept(
    dtype: str, slope: float, intercept: float
) -> None:
    marks = np.random.default_rng(4).integers(0, 4, SHAPE)
    scaled = slope if np.isfinite(slope) and slope else None
    stored = marks if scaled is None else (marks - intercept) / slope
    if scaled is None:
        intercept = 0.0
    found = nifti.labels(file(np.rint(stored).astype(dtype), slope, intercept))
    assert isinstance(found, np.ndarray)
    assert found.dtype.kind in "iu"
    assert np.array_equal(found, marks.transpose(2, 1, 0))


@pytest.mark.parametrize("spike", [1e7, -1e7, np.inf, np.nan, 1e12])
def test_a_spike_among_labels_is_refused_and_not_another_label(spike: float) -> None:
    marks = np.random.default_rng(4).integers(0, 3, SHAPE).astype(np.float64)
    marks[0, 0, 2] = spike
    labels = Labels(("a", "b"), values={1: "a", 2: "b"})
    found = truth([(file(marks), None)], SHAPE[1::-1], labels, None, 2)
    assert isinstance(found, Reject)
    assert found.reason in (Reason.UNSUPPORTED_PIXELS, Reason.MASK_VALUES)


def test_a_picture_and_a_viewers_volume_are_made_of_fractions() -> None:
    data = file(MAPS.astype(np.float32))
    slices = [slice_of(data, index) for index in range(SHAPE[2])]
    mask = (slices[0].values() > 40).astype(np.uint8)
    assert png(slices[0].stored, mask, mask, ("a", "b")).startswith(b"\x89PNG")
    image, _ = volumes(slices, [mask] * SHAPE[2])
    read = nibabel.Nifti1Image.from_bytes(gzip.decompress(image))
    assert np.array_equal(np.sort(read.get_fdata(), axis=None), np.sort(MAPS.astype(np.float32), axis=None))


def test_memory_is_no_multiple_of_the_volume() -> None:
    values: Any = np.random.default_rng(0).normal(size=(64, 64, 64)).astype(np.float32)
    datas = [file(values), gzip.compress(file(values), 1), file(values.astype(np.float64))]
    for data, most in zip(datas, (1.3, 2.5, 1.4), strict=True):
        tracemalloc.start()
        found = nifti.image(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert not isinstance(found, Reject)
        assert peak < most * values.nbytes, peak / values.nbytes
