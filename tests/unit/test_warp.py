"""Image and labels of a patch under one affine map, against scipy class by class."""

import numpy as np
import pytest
from scipy import ndimage

from rayseg.data.warp import reach, warped


def turn(*degrees: float) -> np.ndarray:
    """About the axes of depth, height and width."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        plane = [index for index in range(3) if index != axis]
        one = np.eye(3)
        one[np.ix_(plane, plane)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        matrix = matrix @ one
    return matrix


def blobs(shape: tuple[int, int, int], classes: int) -> np.ndarray:
    noise = np.stack([ndimage.gaussian_filter(np.random.default_rng(n).random(shape), 3) for n in range(classes)])
    return noise.argmax(0).astype(np.uint8)


@pytest.mark.parametrize("matrix", [turn(20, 0, 0), turn(-10, 25, 5) / 1.3, turn(100, 0, 0) / 0.8], ids=str)
def test_it_is_linear_for_the_image_and_for_each_class(matrix: np.ndarray) -> None:
    shape, source = (9, 30, 26), (40, 70, 70)
    image, mask = np.random.default_rng(0).standard_normal(source, np.float32), blobs(source, 4)
    centre = np.array([19.3, 34.75, 34.1])
    assert (reach(matrix, shape) < np.minimum(centre, np.array(source) - 1 - centre)).all()
    found = warped(image, mask, matrix, centre, shape)
    offset = centre - matrix @ ((np.array(shape) - 1) / 2)

    def by_scipy(array: np.ndarray) -> np.ndarray:
        return ndimage.affine_transform(array.astype(np.float64), matrix, offset, shape, order=1)

    np.testing.assert_allclose(found[0], by_scipy(image), atol=2e-6)
    shares = np.stack([by_scipy(mask == value) for value in range(4)])
    clear = np.diff(np.sort(shares, axis=0)[-2:], axis=0)[0] > 1e-3  # of near ties either one may win
    assert clear.mean() > 0.99
    assert np.array_equal(found[1][clear], shares.argmax(0)[clear])


def test_of_equal_shares_the_higher_class_wins() -> None:
    mask = np.zeros((2, 2, 4), np.uint8)
    mask[..., 1:], mask[..., 3] = 2, 1
    image = np.zeros(mask.shape, np.float32)
    _, found = warped(image, mask, np.eye(3), np.array([0.5, 0.5, 1.5]), (1, 1, 3))
    assert found.ravel().tolist() == [2, 2, 2]  # between 0 and 2, 2 and 2, 2 and 1


def test_nothing_moves_by_the_identity() -> None:
    image, mask = np.random.default_rng(1).standard_normal((5, 6, 7), np.float32), blobs((5, 6, 7), 3)
    found = warped(image, mask, np.eye(3), np.array([2.0, 2.5, 3.0]), (5, 6, 7))
    np.testing.assert_allclose(found[0], image, atol=1e-6)
    assert np.array_equal(found[1], mask)


def test_a_quarter_turn_is_exact() -> None:
    image, mask = np.random.default_rng(1).standard_normal((5, 8, 8), np.float32), blobs((5, 8, 8), 3)
    found = warped(image, mask, turn(90, 0, 0), np.array([2.0, 3.5, 3.5]), (5, 8, 8))
    expected = [np.rot90(array, axes=(1, 2)) for array in (image, mask)]
    if not np.allclose(found[0], expected[0], atol=1e-5):  # the other way round
        expected = [np.rot90(array, -1, axes=(1, 2)) for array in (image, mask)]
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    assert np.array_equal(found[1], expected[1])


def test_labels_are_not_shifted_against_the_image() -> None:
    """A ball of intensity 1 and its mask have one centre of mass, whatever turns them."""
    places = np.indices((40, 40, 40)) - 19.5
    ball = (np.square(places - np.array([3, -2, 4])[:, None, None, None]).sum(0) < 36).astype(np.uint8)
    for degrees in ((13, 0, 0), (25, -17, 8)):
        image, mask = warped(ball.astype(np.float32), ball, turn(*degrees), np.full(3, 19.5), (20, 20, 20))
        np.testing.assert_allclose(
            ndimage.center_of_mass(image), ndimage.center_of_mass(mask), atol=0.02, err_msg=str(degrees)
        )
