"""Masks of volumes against phantoms of known shape, and against the same windows summed over the whole volume."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rayseg.data.intensity import Intensity
from rayseg.data.labels import Labels
from rayseg.data.volume import Grid, VolumePreprocess
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.geometry.windows import starts
from rayseg.inference.judgement import Judgement
from rayseg.inference.networks import Mirror
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.models.engine import Compiled, Network
from rayseg.records import Reason, Reject
from rayseg.tracking.bundle import Bundle
from tests.unit.stacks_of_ellipsoids import STACKS, Ellipsoid

HU = Intensity("ct", low=-1000.0, high=1000.0, mean=0.0, deviation=1000.0)
ONE, TWO = Labels(), Labels(("a", "b"))
Forward = Callable[[np.ndarray], np.ndarray]


def bright(image_NDHWC: np.ndarray) -> np.ndarray:
    """The probability of the one class: the value."""
    return image_NDHWC.astype(np.float32)


def share(image_NDHWC: np.ndarray) -> np.ndarray:
    """The probability is how much of the ellipsoid the value tells."""
    return (image_NDHWC.astype(np.float32) + np.float32(0.9)) / np.float32(1.8)


def lopsided(image_NDHWC: np.ndarray) -> np.ndarray:
    """Background and two classes, by the neighbours on one side and by the place in the window."""
    image = image_NDHWC.astype(np.float32)[..., 0]
    behind = np.roll(image, 1, axis=1) + 2 * np.roll(image, 1, axis=2) + 3 * np.roll(image, 1, axis=3)
    ramp = np.linspace(0, 1, image.shape[3], dtype=np.float32)
    logits = np.stack([0.3 + ramp + 0 * image, image + behind, 2 * image], axis=-1)
    odds = np.exp(logits)
    return odds / odds.sum(axis=-1, keepdims=True)


def predictor(
    *models: tuple[VolumePreprocess, Forward],
    labels: Labels = ONE,
    mirror: Mirror | None = None,
    threads: int = 2,
    screen: Forward | None = None,
) -> VolumePredictor:
    network = Network(b"", b"")
    bundles = [Bundle(network, preprocess, labels, 0.5, "", b"") for preprocess, _ in models]
    return VolumePredictor(bundles, [Compiled(one, screen, "numpy") for _, one in models], mirror, threads)


def noise(count: int = 9, shape: tuple[int, int] = (20, 24), seed: int = 5) -> list[Slice]:
    """Blocks of noise, smooth between slices, 2.5 mm apart with pixels of 1 x 1.2 mm."""
    generator = np.random.default_rng(seed)
    stored = generator.integers(-900, 900, (count, shape[0] // 4, shape[1] // 4)).repeat(4, 1).repeat(4, 2)
    return [Slice(one.astype(np.int16), 1.0, 0.0, None, place(number, *shape)) for number, one in enumerate(stored)]


def place(number: float, rows: int, columns: int) -> Geometry:
    return Geometry(rows, columns, (1.0, 1.2), 2.5, (0.0, 0.0, 2.5 * number), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))


def judged(found: VolumePredictor, slices: list[Slice]) -> list[Judgement]:
    made = dict(found.judge_series(slices))
    assert sorted(made) == list(range(len(slices)))
    return [one for _, one in sorted(made.items()) if isinstance(one, Judgement)]


def by_the_whole(preprocess: VolumePreprocess, network: Forward, slices: list[Slice]) -> np.ndarray:
    """Probabilities (S, K, rows, columns) as sliding windows are usually written: sums of the whole volume."""
    image = preprocess.apply(slices)
    grid = preprocess.grid([slice.geometry for slice in slices if slice.geometry])
    assert isinstance(grid, Grid)
    assert isinstance(image, np.ndarray)
    shape, patch = image.shape[:3], preprocess.patch
    before = [max(0, size - length) // 2 for length, size in zip(shape, patch, strict=True)]
    after = [max(0, size - length) - first for length, size, first in zip(shape, patch, before, strict=True)]
    padded = np.pad(image, [*zip(before, after, strict=True), (0, 0)])
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n * preprocess.sigma)) ** 2) for n in patch]
    weights = np.einsum("d,h,w->dhw", *axes)[..., None]
    sums: np.ndarray | float = 0.0
    total = np.zeros((*padded.shape[:3], 1))
    corners = (starts(max(*pair), pair[1], preprocess.step) for pair in zip(shape, patch, strict=True))
    for corner in itertools.product(*corners):
        there = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
        made = network(padded[there][None])[0]
        if isinstance(sums, float):
            sums = np.zeros((*padded.shape[:3], made.shape[-1]))
        sums[there] += made * weights
        total[there] += weights
    inside = tuple(slice(first, first + n) for first, n in zip(before, shape, strict=True))
    mean = (sums / total)[inside].astype(np.float32)
    return np.stack(list(grid.restore([np.moveaxis(mean, -1, 0)])))


PREPROCESSES = [
    VolumePreprocess((2.5, 1.0, 1.2), (4, 8, 8), HU),
    VolumePreprocess((3.1, 1.7, 1.9), (3, 6, 5), Intensity("percentiles")),
    VolumePreprocess((2.0, 0.8, 0.9), (32, 8, 40), Intensity("z_score"), step=0.3),
    VolumePreprocess((None, 1.5, 1.5), (1, 8, 8), Intensity("z_score"), step=1.0),
]


@pytest.mark.parametrize("preprocess", PREPROCESSES)
def test_a_walk_gives_what_the_whole_volume_gives(preprocess: VolumePreprocess) -> None:
    slices = noise()
    found = judged(predictor((preprocess, lopsided), labels=TWO), slices)
    expected = by_the_whole(preprocess, lopsided, slices)
    np.testing.assert_allclose(np.stack([one.probabilities_KHW for one in found]), expected, atol=2e-6)
    ordered = np.sort(expected, axis=1)
    sure = ordered[:, -1] - ordered[:, -2] > 1e-5
    assert sure.mean() > 0.99
    masks = np.stack([one.mask for one in found])
    assert masks.dtype == np.uint8
    assert set(np.unique(masks)) == {0, 1, 2}
    assert np.array_equal(masks[sure], expected.argmax(axis=1)[sure])


def test_masks_do_not_depend_on_threads_company_or_the_order_of_slices() -> None:
    preprocess, labels = VolumePreprocess((2.0, 1.3, 1.3), (4, 8, 8)), Labels(("a", "b"))
    slices, others = noise(), noise(12, seed=6)
    alone = [mask.tobytes() for mask in predictor((preprocess, lopsided), labels=labels, threads=1).predict(slices)]
    assert len(set(alone)) == len(slices)
    together = predictor((preprocess, lopsided), labels=labels, threads=3)
    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(together.predict, [slices, others, slices, others, slices]))
    for masks in every[::2]:
        assert [mask.tobytes() for mask in masks] == alone
    order = np.random.default_rng(1).permutation(len(slices))
    mixed = together.predict([slices[number] for number in order])
    assert [mask.tobytes() for mask in mixed] == [alone[number] for number in order]


@pytest.mark.parametrize("mirror", ["columns", "both", "all"])
def test_mirror_images_are_averaged(mirror: Mirror) -> None:
    preprocess, slices = VolumePreprocess((2.5, 1.0, 1.2), (4, 8, 8), HU), noise()
    axes = {"columns": (3,), "both": (2, 3), "all": (1, 2, 3)}[mirror]
    flips = [some for count in range(len(axes) + 1) for some in itertools.combinations(axes, count)]

    def averaged(image_NDHWC: np.ndarray) -> np.ndarray:
        return np.mean([np.flip(lopsided(np.flip(image_NDHWC, flip)), flip) for flip in flips], axis=0)

    found = judged(predictor((preprocess, lopsided), labels=TWO, mirror=mirror), slices)
    expected = by_the_whole(preprocess, averaged, slices)
    np.testing.assert_allclose(np.stack([one.probabilities_KHW for one in found]), expected, atol=2e-6)
    assert not np.allclose(expected, by_the_whole(preprocess, lopsided, slices), atol=1e-3)


def test_models_of_several_grids_are_averaged_on_the_slices() -> None:
    one, other = PREPROCESSES[:2]
    slices, labels = noise(), Labels(("a", "b"))
    found = judged(predictor((one, lopsided), (other, lopsided), labels=labels), slices)
    each = [by_the_whole(preprocess, lopsided, slices) for preprocess in (one, other)]
    np.testing.assert_allclose(np.stack([one.probabilities_KHW for one in found]), np.mean(each, axis=0), atol=2e-6)
    for number, judgement in enumerate(found):
        assert len(judgement.members) == 2
        for member, probabilities in zip(judgement.members, each, strict=True):
            assert np.mean(member != probabilities[number].argmax(axis=0)) < 1e-2
    with pytest.raises(ValueError, match="same classes"):
        VolumePredictor(
            [Bundle(Network(b"", b""), one, Labels((name,)), 0.5, "", b"") for name in "ab"],
            [Compiled(bright, None, "numpy")] * 2,
        )


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("spacing_mm", [(1.5, 1.5, 1.5), (1.0, 1.3, 1.3), (3.0, 0.9, 0.9)])
def test_an_ellipsoid_comes_back_where_it_was(name: str, spacing_mm: tuple[float, float, float]) -> None:
    """Within 1 % of its volume and a twentieth of a pixel of its place, whatever way the stack lies.

    Straight lines between samples cut its curve off: by 1 % where they are an eighth of its half axis long.
    """
    slices, ellipsoid = STACKS[name](), Ellipsoid()
    masks = predictor((VolumePreprocess(spacing_mm, (8, 24, 24), HU), share)).predict(slices)
    truth = ellipsoid.measure(slices, [ellipsoid.inside(slice) for slice in slices])
    found = ellipsoid.measure(slices, masks)
    assert found.volume_ml == pytest.approx(truth.volume_ml, rel=0.01)
    assert np.abs(found.centre_mm - truth.centre_mm).max() < 0.05 * 1.25


def test_a_slice_that_cannot_be_decoded_is_a_row_and_bridged() -> None:
    preprocess, slices = VolumePreprocess((2.5, 1.0, 1.2), (4, 8, 8), HU), noise()
    found = predictor((preprocess, bright))
    broken = Reject(Reason.DECODE_FAILED, "why")
    given = [broken if number in (3, 8) else slice for number, slice in enumerate(slices)]
    made = dict(found.judge_series(given))
    assert made[3] == made[8] == broken
    rest = [number for number in range(len(slices)) if number not in (3, 8)]
    expected = found.predict([slices[number] for number in rest])
    for number, mask in zip(rest, expected, strict=True):
        assert np.array_equal(made[number].mask, mask)


def test_what_refuses_a_whole_series() -> None:
    preprocess, slices = VolumePreprocess((2.5, 1.0, 1.2), (4, 8, 8), HU), noise()
    found = predictor((preprocess, bright))

    def reasons(given: list[Slice | Reject]) -> list[str]:
        made = dict(found.judge_series(given))
        return [one.reason.value if isinstance(one, Reject) else "ok" for _, one in sorted(made.items())]

    away, broken = Reject(Reason.READ_FAILED, "x"), Reject(Reason.CORRUPT, "y")
    assert reasons([*slices[:3], away, broken]) == ["read_failed"] * 4 + ["corrupt"]
    assert reasons([*slices[:3], slices[2]]) == ["series_duplicates"] * 4
    assert reasons([Slice(slices[0].stored, 1.0, 0.0, None)]) == ["needs_neighbours"]
    assert reasons([broken, broken]) == ["corrupt"] * 2
    assert reasons([]) == []
    alone = found.judge_alone(slices[0])
    assert alone.reason == Reason.NEEDS_NEIGHBOURS
    assert found.judge_alone(broken) is broken
    with pytest.raises(ValueError, match="series_duplicates"):
        found.predict([slices[0], slices[0]])


def test_a_defect_of_ours_costs_this_series_only() -> None:
    def failing(image_NDHWC: np.ndarray) -> np.ndarray:
        raise RuntimeError("secret")

    found = predictor((VolumePreprocess((2.5, 1.0, 1.2), (4, 8, 8), HU), failing))
    broken = Reject(Reason.CORRUPT, "y")
    made = dict(found.judge_series([*noise(3), broken]))
    assert made == {**dict.fromkeys(range(3), Reject(Reason.INTERNAL, "RuntimeError")), 3: broken}


def test_windows_with_nothing_run_in_bfloat16_alone() -> None:
    """What stands for bfloat16 is off by a little, as that is; the exact pass is where it finds something."""
    slices = [Slice(np.full((32, 32), -500, np.int16), 1.0, 0.0, None, place(number, 32, 32)) for number in range(16)]
    slices[3].stored[4:8, 4:8] = 900
    exact_windows = []

    def exact(image_NDHWC: np.ndarray) -> np.ndarray:
        exact_windows.append(image_NDHWC.max())
        return bright(image_NDHWC)

    preprocess = VolumePreprocess((2.5, 1.0, 1.2), (4, 8, 8), HU)
    screened = predictor((preprocess, exact), screen=lambda image: bright(image) + np.float32(0.01))
    masks = screened.predict(slices)
    assert all(value > 0.5 for value in exact_windows)
    assert 0 < len(exact_windows) < 40
    plain = predictor((preprocess, bright)).predict(slices)
    assert plain[3].sum() > 8
    assert [mask.tobytes() for mask in masks] == [mask.tobytes() for mask in plain]
