"""Intensities of a volume, gathered slice by slice, against numpy on all of it in float64."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseg import config
from rayseg.data import histogram
from rayseg.data.histogram import Histogram
from rayseg.data.intensity import Intensity, Levels
from rayseg.dicom.reading import Slice

SHAPE = (5, 24, 18)


def series(kind: str, seed: int = 0) -> list[Slice]:
    """Slices of one kind; `own slopes`: each has slope and intercept of its own, as PET has."""
    rng = np.random.default_rng(seed)
    normal = rng.gamma(2.0, 60.0, SHAPE)
    stored, slope, intercept = {
        "uint8": (normal.clip(0, 255).astype(np.uint8), 1.0, 0.0),
        "int16": ((normal * 30 - 9000).clip(-32768, 32767).astype(np.int16), 0.5, 10.0),
        "int16, HU": (normal.astype(np.int16), 1.0, -1024.0),
        "uint16": ((normal * 200).clip(0, 65535).astype(np.uint16), 2.0, -3.0),
        "uint16, falling": ((normal * 200).clip(0, 65535).astype(np.uint16), -2.0, 7.0),
        "uint16, own slopes": ((normal * 200).clip(0, 65535).astype(np.uint16), None, None),
        "int32": ((normal * 1e6 - 1e8).astype(np.int32), 1e-3, -4.0),
        "float32": (normal.astype(np.float32), 1.0, 0.0),
        "float32 with a spike": (np.where(normal == normal.max(), 3e38, normal).astype(np.float32), 1.0, 0.0),
        "several types": (normal.astype(np.uint8), 1.0, 0.0),
    }[kind]
    slices = []
    for number, plane in enumerate(stored):
        own = (0.1 + number, number * 2.0 - 5) if slope is None or intercept is None else (slope, intercept)
        if kind == "several types":
            plane = plane.astype([np.uint8, np.int16, np.uint16, np.int32, np.float32][number])
        slices.append(Slice(plane, *own, None))
    return slices


KINDS = (
    "uint8", "int16", "int16, HU", "uint16", "uint16, falling", "uint16, own slopes", "int32", "float32",
    "float32 with a spike", "several types",
)  # fmt: skip


def values(slices: list[Slice]) -> np.ndarray:
    return np.stack([one.stored.astype(np.float64) * one.rescale_slope + one.rescale_intercept for one in slices])


def gathered(slices: list[Slice]) -> Histogram:
    volume = Histogram()
    for one in slices:
        volume.add(one)
    return volume


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_a_volume_are_numpys(kind: str) -> None:
    slices = series(kind)
    whole, volume = values(slices), gathered(slices)
    scale = np.abs(whole).max()
    assert volume.count == whole.size
    assert volume.mean == pytest.approx(whole.mean(), abs=1e-12 * scale)
    assert volume.deviation == pytest.approx(whole.std(), rel=1e-9)
    wanted = [0, 0.5, 1, 25, 50, 73.21, 99.5, 100]
    assert volume.percentiles(wanted) == pytest.approx(np.percentile(whole, wanted), rel=1e-12, abs=1e-12 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_inside_a_mask_and_of_halves_put_together(kind: str) -> None:
    slices = series(kind)
    inside = np.random.default_rng(3).random(SHAPE) < 0.3
    inside[1] = False
    halves = Histogram(), Histogram()
    for number, one in enumerate(slices):
        halves[number % 2].add(one, inside[number])
    halves[0].merge(halves[1])
    whole = values(slices)[inside]
    scale = np.abs(whole).max()
    assert halves[0].count == len(whole)
    assert halves[0].mean == pytest.approx(whole.mean(), abs=1e-12 * scale)
    assert halves[0].deviation == pytest.approx(whole.std(), rel=1e-9)
    assert halves[0].percentiles([0.5, 99.5]) == pytest.approx(np.percentile(whole, [0.5, 99.5]), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["uint16, own slopes", "float32", "int32"]))
def test_where_too_many_values_differ_percentiles_are_off_by_little_and_moments_by_nothing(
    seed: int, kind: str
) -> None:
    slices = series(kind, seed)
    whole = values(slices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "_DISTINCT", 256)
        volume = gathered(slices)
        low, middle, high = volume.percentiles([1, 50, 99])
        assert len(volume._values[0]) <= 256
        assert volume.deviation == pytest.approx(whole.std(), rel=1e-9)
        for found, percentile in ((low, 1), (middle, 50), (high, 99)):
            rank = (whole < found).mean() * 100
            assert abs(rank - percentile) < 2 * 100 / 128


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_network_sees_is_what_numpy_makes_of_the_whole_volume(kind: str) -> None:
    slices = series(kind)
    whole = values(slices)
    volume = gathered(slices)
    low, high = np.percentile(whole, [2, 97])
    wanted = {
        Intensity(): (whole - whole.mean()) / whole.std(),
        Intensity("percentiles", (2, 97)): np.clip((whole - low) / (high - low), 0, 1) * 2 - 1,
        Intensity("ct", low=40.0, high=300.0, mean=90.0, deviation=45.0): (np.clip(whole, 40, 300) - 90) / 45,
    }
    for intensity, expected in wanted.items():
        levels = intensity.levels(volume)
        found = np.stack([levels.apply(one) for one in slices])
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= 3e-6 * max(
            1.0, np.abs(expected).max(), np.abs(whole).max() / whole.std()
        )


@pytest.mark.parametrize("intensity", [Intensity(), Intensity("percentiles")])
@pytest.mark.parametrize("value", [0, 7, -1000])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_a_volume_of_one_value_becomes_nothing(intensity: Intensity, value: int, dtype: type) -> None:
    slices = [Slice(np.full((6, 5), value, dtype), 0.1, -0.3, None) for _ in range(3)]
    levels = intensity.levels(gathered(slices))
    assert np.abs(np.stack([levels.apply(one) for one in slices])).max() < 1e-4


def test_the_foreground_of_a_training_set_makes_the_levels_of_ct() -> None:
    rng = np.random.default_rng(5)
    hu = np.rint(rng.normal(60, 25, 20_000)).astype(np.int16)
    foreground = Histogram()
    for part in np.split(hu, 10):
        foreground.add(Slice((part + 1024).reshape(20, 100), 1.0, -1024.0, None))
    asked = Intensity("ct")
    assert not asked.is_measured
    measured = asked.of_foreground(foreground)
    assert measured.is_measured
    assert (measured.low, measured.high) == tuple(np.percentile(hu, [0.5, 99.5]))
    assert measured.mean == pytest.approx(hu.mean())
    assert measured.deviation == pytest.approx(hu.std())
    assert config.build(Intensity, config.plain(measured)) == measured
    assert measured.levels() == Levels(measured.low, measured.high, measured.mean, measured.deviation)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="foreground"):
        asked.of_foreground(Histogram())


def test_pixels_outside_of_a_small_foreground_do_not_count() -> None:
    one = Slice(np.arange(12, dtype=np.uint16).reshape(3, 4), 1.0, 0.0, None)
    volume = Histogram()
    volume.add(one, np.zeros((3, 4), bool))
    assert volume.count == 0
    volume.add(one, one.stored == 5)
    assert (volume.mean, volume.deviation, volume.percentiles([0, 100])) == (5.0, 0.0, (5.0, 5.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ct", "low": 1.0}, "intensity: give all of low, high, mean and deviation"),
        ({"kind": "z_score", "low": 0.0, "high": 1.0, "mean": 0.5, "deviation": 1.0}, "are of the kind ct"),
        ({"kind": "ct", "low": 2.0, "high": 1.0, "mean": 0.5, "deviation": 1.0}, "intensity.low"),
        ({"kind": "ct", "low": 0.0, "high": 1.0, "mean": 0.5, "deviation": 0.0}, "intensity.deviation"),
        ({"kind": "percentiles", "percentiles": [99.0, 1.0]}, "intensity.percentiles"),
        ({"kind": "hounsfield"}, "kind"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(Intensity, values)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Intensity().kind = "ct"  # type: ignore[misc]
