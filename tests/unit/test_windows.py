import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from rayseg.geometry.windows import Windows, gaussian, starts


def test_windows_are_evenly_spread() -> None:
    assert starts(100, 40, 0.5) == [0, 20, 40, 60]
    assert starts(101, 40, 0.5) == [0, 15, 30, 46, 61]
    assert starts(40, 40, 0.5) == starts(7, 40, 0.5) == [0]
    assert starts(80, 40, 1.0) == [0, 40]
    for length, patch, step in itertools.product((41, 64, 97, 300), (8, 33, 40), (0.25, 0.5, 1.0)):
        found = starts(length, patch, step)
        assert found[0] == 0
        assert found[-1] == length - patch
        assert np.diff(found).min() >= 1
        assert np.diff(found).max() <= np.ceil(step * patch)


def test_the_weight_is_a_gaussian() -> None:
    weights = gaussian(8, 0.125)
    assert weights[3] == weights[4] == pytest.approx(np.exp(-0.125))
    assert weights[0] == weights[7] == pytest.approx(np.exp(-0.5 * 3.5**2))
    assert gaussian(1, 0.125).tolist() == [1.0]


SHAPES = [((20, 17, 13), (8, 6, 5)), ((5, 17, 3), (8, 6, 5)), ((9, 9, 9), (1, 6, 9)), ((3, 4, 5), (8, 6, 5))]


@pytest.mark.parametrize("step", [0.5, 0.3, 1.0])
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_means_are_those_of_sums_over_the_whole_volume(
    shape: tuple[int, int, int], patch: tuple[int, int, int], step: float
) -> None:
    """As sliding window inference is usually written: the whole volume padded, window by window, divided once.

    What stands for a network gives each voxel another value in each window.
    """
    generator = np.random.default_rng(2)
    image = generator.random((*shape, 1)).astype(np.float32)
    windows = Windows(shape, patch, step=step, padding=-7.0)
    before = [max(0, size - length) // 2 for length, size in zip(shape, patch, strict=True)]
    after = [max(0, size - length) - first for length, size, first in zip(shape, patch, before, strict=True)]
    padded = np.pad(image, [*zip(before, after, strict=True), (0, 0)], constant_values=-7.0)
    places = np.stack(np.meshgrid(*map(np.arange, patch), indexing="ij"), -1).astype(np.float32)

    def network(window: np.ndarray) -> np.ndarray:
        return np.concatenate([window * places.sum(-1, keepdims=True), np.full_like(window, window.mean())], -1)

    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in patch]
    weights = np.einsum("d,h,w->dhw", *axes)[..., None]
    sums, total = np.zeros((*padded.shape[:3], 2)), np.zeros((*padded.shape[:3], 1))
    count = 0
    for corner in itertools.product(*(starts(max(*pair), pair[1], step) for pair in zip(shape, patch, strict=True))):
        there = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
        sums[there] += network(padded[there]) * weights
        total[there] += weights
        count += 1
    expected = (sums / total)[tuple(slice(first, first + n) for first, n in zip(before, shape, strict=True))]
    assert len(windows) == count
    found = np.stack(list(windows.means(windows.weighed(network(one)) for one in windows.patches(image))))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_only_slices_that_windows_touch_are_held() -> None:
    """Of the image no slice is taken before its window, and a slice's mean comes before the next row of windows."""
    windows = Windows((100, 6, 6), (10, 6, 6))
    taken = 0

    def slices() -> Iterator[np.ndarray]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield np.zeros((6, 6, 1), np.float16)

    seen = []
    for number, _ in enumerate(windows.means(map(windows.weighed, windows.patches(slices())))):
        seen.append(taken - number)
    assert len(seen) == 100
    assert max(seen) == 10
