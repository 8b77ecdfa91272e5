"""Augmentation of patches: what is drawn, how often, and that image and mask stay together."""

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from rayseg.data.augment import generator
from rayseg.data.volume_augment import Drawn, VolumeAugment

PATCH = (16, 24, 20)
ISOTROPIC = (1.0, 1.0, 1.0)
KINDS = ("rotate", "scale", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")
QUIET: dict[str, Any] = {"mirror": (0, 0, 0), **{f"{kind}_probability": 0 for kind in KINDS}}


def only(**values: Any) -> VolumeAugment:
    """Nothing but this."""
    return VolumeAugment(**{**QUIET, **values})


def patch_of(
    augment: VolumeAugment,
    image: np.ndarray,
    mask: np.ndarray,
    first: tuple[int, int, int],
    patch: tuple[int, int, int] = PATCH,
    spacing_mm: tuple[float, float, float] = ISOTROPIC,
    name: str = "0",
) -> tuple[np.ndarray, np.ndarray, Drawn]:
    """A patch out of a whole volume, 0 beyond it."""
    drawn = augment.draw(generator(1, 0, name), patch, spacing_mm)
    begin, size = drawn.region(first, patch)
    margin = 60
    box = tuple(slice(low + margin, low + margin + count) for low, count in zip(begin, size, strict=True))
    whole = [np.pad(array, margin)[box] for array in (image, mask)]
    return *drawn.apply(whole[0], whole[1], first, patch), drawn


def volume(shape: tuple[int, int, int] = (40, 50, 45)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    image = ndimage.gaussian_filter(rng.standard_normal(shape), 2)
    return (image / image.std()).astype(np.float16), (image > image.std()).astype(np.uint8)


def crop(array: np.ndarray, first: tuple[int, int, int]) -> np.ndarray:
    return array[tuple(slice(low, low + count) for low, count in zip(first, PATCH, strict=True))]


def test_with_everything_off_the_patch_is_the_volume_s() -> None:
    image, mask = volume()
    found = patch_of(only(), image, mask, (5, 6, 7))
    assert np.array_equal(found[0], crop(image, (5, 6, 7)))
    assert np.array_equal(found[1], crop(mask, (5, 6, 7)))
    assert found[0].dtype == np.float16


@pytest.mark.parametrize("axis", range(3))
def test_mirrors_turn_one_axis_round(axis: int) -> None:
    image, mask = volume()
    mirror = tuple(float(axis == one) for one in range(3))
    found = patch_of(only(mirror=mirror), image, mask, (5, 6, 7))
    assert np.array_equal(found[0], np.flip(crop(image, (5, 6, 7)), axis))
    assert np.array_equal(found[1], np.flip(crop(mask, (5, 6, 7)), axis))


def test_each_transform_comes_as_often_as_it_should() -> None:
    augment, count = VolumeAugment(), 4000
    drawn = [augment.draw(generator(1, 0, str(number)), PATCH, ISOTROPIC) for number in range(count)]
    shares = {kind: np.mean([kind in one.strengths for one in drawn]) for kind in KINDS[2:]}
    # Isensee et al. 2021, supplementary note 4, for one modality.
    expected = {"noise": 0.15, "blur": 0.1, "brightness": 0.15, "contrast": 0.15, "low_resolution": 0.125}
    expected |= {"gamma_inverted": 0.15, "gamma": 0.15}
    for kind, probability in expected.items():
        assert shares[kind] == pytest.approx(probability, abs=4 * (probability / count) ** 0.5), kind
    # A turn in 0.2, another size in 0.2, one of them in 0.36; and each axis mirrored in half.
    assert np.mean([one.moves for one in drawn]) == pytest.approx(0.36, abs=0.03)
    assert np.mean([one.signs for one in drawn], axis=0) == pytest.approx([0, 0, 0], abs=0.07)
    determinants = np.array([abs(np.linalg.det(one.matrix)) for one in drawn])
    scaled = determinants[np.abs(determinants - 1) > 1e-9] ** (-1 / 3)
    assert len(scaled) / count == pytest.approx(0.2, abs=0.03)
    assert (scaled.min(), scaled.max()) == (pytest.approx(0.7, abs=0.01), pytest.approx(1.4, abs=0.01))
    assert scaled.mean() == pytest.approx(1.05, abs=0.03)  # evenly


@pytest.mark.parametrize(
    ("patch", "greatest"),
    [
        ((40, 56, 40), (30, 30, 30)),
        ((16, 100, 120), (180, 0, 0)),
        ((16, 100, 200), (180, 0, 0)),
        ((1, 100, 160), (15, 0, 0)),
    ],
)
def test_angles_follow_the_patch_s_shape(patch: tuple[int, int, int], greatest: tuple[int, int, int]) -> None:
    """nnU-Net's rule."""
    augment = only(rotate_probability=1)
    angles = []
    for number in range(300):
        matrix = augment.draw(generator(1, 0, str(number)), patch, ISOTROPIC).matrix
        assert np.allclose(matrix @ matrix.T, np.eye(3))
        angles.append(np.degrees(np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1, 1))))
        if not greatest[1]:
            assert np.allclose(matrix[0], [1, 0, 0])
    if not greatest[1]:
        assert 0.95 * greatest[0] < max(angles) <= greatest[0] + 1e-6
    else:
        assert max(angles) > 30  # several axes at once


def test_turns_are_of_millimetres() -> None:
    """In a volume of flat voxels a ball stays a ball."""
    spacing_mm = (1.0, 2.0, 0.5)
    places = np.indices((60, 40, 120)) * np.array(spacing_mm)[:, None, None, None]
    offsets = places - np.array([30, 40, 30])[:, None, None, None]
    ball = (np.square(offsets).sum(0) < 100).astype(np.uint8)
    augment = only(rotate_probability=1, rotate_degrees=(40, 40, 40))
    first = (18, 13, 36)
    for name in "abc":
        _, mask, drawn = patch_of(augment, ball.astype(np.float16), ball, first, (24, 14, 48), spacing_mm, name)
        assert drawn.moves
        found = np.argwhere(mask) * spacing_mm
        for axis in range(3):
            assert np.ptp(found[:, axis]) == pytest.approx(20, abs=2 * spacing_mm[axis] + 0.5)
        assert mask.sum() == pytest.approx(ball.sum(), rel=0.03)


def test_above_1_magnifies() -> None:
    image, _ = volume()
    ball = (np.square(np.indices((40, 50, 45)) - np.array([19.5, 24.5, 22])[:, None, None, None]).sum(0) < 25).astype(
        np.uint8
    )
    augment = only(scale_probability=1, scale=(1.3, 1.3))
    _, found, _ = patch_of(augment, image, ball, (12, 13, 12))
    assert found.sum() / ball.sum() == pytest.approx(1.3**3, rel=0.05)


def test_image_and_mask_stay_together() -> None:
    """Where the image is a smooth picture of its mask it is so after any geometry."""
    _, mask = volume()
    image = mask.astype(np.float16)
    augment = only(mirror=(0.5, 0.5, 0.5), rotate_probability=1, scale_probability=1)
    for number in range(5):
        found = patch_of(augment, image, mask, (12, 13, 12), name=str(number))
        assert np.mean((found[0] > 0.5) == found[1]) > 0.999


def test_nothing_is_lost_at_the_edges_of_a_patch() -> None:
    """A turned patch within the volume has no 0 from beyond: the voxels are the volume's."""
    image = np.full((60, 60, 60), 5, np.float16)
    augment = only(rotate_probability=1, scale_probability=1)
    for number in range(5):
        found = patch_of(augment, image, np.ones(image.shape, np.uint8), (22, 18, 20), name=str(number))
        np.testing.assert_allclose(found[0], 5, rtol=1e-3)
        assert found[1].all()


def test_intensities_change_as_they_are_told() -> None:
    image, mask = volume()
    plain = crop(image, (5, 6, 7)).astype(np.float64)

    def made(**values: Any) -> np.ndarray:
        found = patch_of(only(**values), image, mask, (5, 6, 7))
        assert np.array_equal(found[1], crop(mask, (5, 6, 7)))
        return found[0].astype(np.float64)

    np.testing.assert_allclose(made(brightness_probability=1, brightness=(1.25, 1.25)), plain * 1.25, atol=4e-3)
    contrast = np.clip((plain - plain.mean()) * 1.4 + plain.mean(), plain.min(), plain.max())
    np.testing.assert_allclose(made(contrast_probability=1, contrast=(1.4, 1.4)), contrast, atol=4e-3)
    low, range_ = plain.min(), np.ptp(plain)
    gamma = ((plain - low) / range_) ** 1.5 * range_ + low
    np.testing.assert_allclose(made(gamma_probability=1, gamma=(1.5, 1.5)), gamma, atol=4e-3)
    inverted = plain.max() - ((plain.max() - plain) / range_) ** 1.5 * range_
    np.testing.assert_allclose(made(gamma_inverted_probability=1, gamma=(1.5, 1.5)), inverted, atol=4e-3)
    blurred = ndimage.gaussian_filter(plain, 1.2, mode="mirror", truncate=4)
    np.testing.assert_allclose(made(blur_probability=1, blur=(1.2, 1.2)), blurred, atol=4e-3)
    noise = made(noise_probability=1) - plain
    assert abs(noise.mean()) < 0.02
    assert noise.std() ** 2 < 0.1
    coarse = made(low_resolution_probability=1, low_resolution=(2, 2))
    assert 0.5 < np.corrcoef(coarse.ravel(), plain.ravel())[0, 1] < 0.999
    assert coarse.mean() == pytest.approx(plain.mean(), abs=0.15)


def test_low_resolution_of_a_flat_patch_is_lowered_in_the_plane_only() -> None:
    rng = np.random.default_rng(0)
    planes = np.repeat(np.repeat(rng.standard_normal((4, 1, 1)), 64, 1), 64, 2).astype(np.float16)
    augment = only(low_resolution_probability=1, low_resolution=(2, 2))
    found, _, _ = patch_of(augment, planes, np.zeros(planes.shape, np.uint8), (0, 0, 0), (4, 64, 64))
    np.testing.assert_allclose(found, planes, atol=1e-3)


def test_the_same_patch_is_the_same_and_another_is_another() -> None:
    image, mask = volume()
    found = [patch_of(VolumeAugment(), image, mask, (12, 13, 12), name=name) for name in ("a", "a", "b")]
    assert np.array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[0][0], found[2][0])


def test_turning_one_on_changes_no_other_draw() -> None:
    alone = only(scale_probability=1).draw(generator(1, 0, "x"), PATCH, ISOTROPIC)
    both = only(scale_probability=1, blur_probability=1, noise_probability=1).draw(
        generator(1, 0, "x"), PATCH, ISOTROPIC
    )
    assert np.array_equal(alone.matrix, both.matrix)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rotate_probability": 1.5}, "rotate_probability"),
        ({"mirror": (0, 2, 0)}, "mirror"),
        ({"scale": (1.4, 0.7)}, "scale"),
        ({"low_resolution": (0.5, 1)}, "low_resolution"),
        ({"rotate_degrees": (200, 0, 0)}, "rotate_degrees"),
        ({"noise": -1}, "noise"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"train.patches.augment.{told}"):
        VolumeAugment(**values)
