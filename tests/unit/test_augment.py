"""Augmentation moves image and mask together, by as much as it says, and the same for the same row and epoch."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from rayseg import config
from rayseg.data.augment import Augment, generator

OFF = Augment(flip_horizontal=0, rotate_degrees=0, scale=(1, 1), gamma=(1, 1))
EVERYTHING = Augment(
    flip_horizontal=0.5,
    flip_vertical=0.5,
    transpose=0.5,
    rotate_degrees=40,
    scale=(0.7, 1.4),
    translate=0.1,
    elastic=0.05,
    gamma=(0.6, 1.6),
    brightness=0.3,
    contrast=0.3,
    blur=2,
    low_resolution=0.4,
    bias_field=0.4,
    noise=12,
)
GEOMETRY = replace(EVERYTHING, intensity_probability=0)
Y, X = np.mgrid[:96, :96]


def random_image(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)


def blob(y: float, x: float, sigma: float = 5) -> np.ndarray:
    """A smooth spot, (96, 96, 1)."""
    return np.rint(250 * np.exp(-((Y - y) ** 2 + (X - x) ** 2) / 2 / sigma**2)).astype(np.uint8)[..., np.newaxis]


def centre(image: np.ndarray) -> np.ndarray:
    """(y, x) of the mass, from the middle of the picture."""
    return np.array(ndimage.center_of_mass(image.reshape(96, 96).astype(float))) - 47.5


def image_of(augment: Augment, image: np.ndarray, row: object = 0) -> np.ndarray:
    return augment.apply(image, np.zeros(image.shape[:2], np.uint8), generator(1, 0, str(row)))[0]


def test_with_everything_off_a_sample_is_itself() -> None:
    image, mask = random_image(9, 12, 2), random_image(9, 12)
    made = OFF.apply(image, mask, generator(1, 0, "a"))
    assert made[0] is image
    assert made[1] is mask


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("flips", list(itertools.product([0, 1], repeat=3)))
def test_flips_and_transposition_move_every_pixel_exactly(channels: int, flips: tuple[int, int, int]) -> None:
    image, mask = random_image(24, 24, channels), random_image(24, 24)
    horizontal, vertical, transpose = flips
    augment = replace(OFF, flip_horizontal=horizontal, flip_vertical=vertical, transpose=transpose)
    for made, expected in zip(augment.apply(image, mask, generator(1, 0, "a")), (image, mask), strict=True):
        expected = expected.swapaxes(0, 1) if transpose else expected
        # Which side a picture is turned to does not matter, so long as both flips together reach all of them.
        expected = expected[:, ::-1] if (vertical if transpose else horizontal) else expected
        expected = expected[::-1] if (horizontal if transpose else vertical) else expected
        assert np.array_equal(made, expected)


def test_the_probabilities_of_flips_are_those_asked_for() -> None:
    image, mask = random_image(4, 4, 1), random_image(4, 4)
    augment = replace(OFF, flip_horizontal=0.3)
    flipped = [
        np.array_equal(augment.apply(image, mask, generator(1, 0, str(row)))[1], mask[:, ::-1]) for row in range(2000)
    ]
    assert np.mean(flipped) == pytest.approx(0.3, abs=0.04)  # 4 standard deviations


def test_a_turn_keeps_the_distance_to_the_centre_and_fills_its_range() -> None:
    image = blob(47.5, 75.5)
    angles = []
    for row in range(60):
        offset = centre(image_of(replace(OFF, rotate_degrees=30), image, row))
        assert np.hypot(*offset) == pytest.approx(28, abs=0.1)
        angles.append(np.degrees(np.arctan2(*offset)))
    assert -30.2 < min(angles) < -22
    assert 22 < max(angles) < 30.2


def test_a_scale_is_that_of_an_independent_resampling() -> None:
    image, mask = blob(40, 52, 9), (blob(40, 52, 9)[..., 0] > 100).astype(np.uint8)
    made, made_mask = replace(OFF, scale=(1.3, 1.3)).apply(image, mask, generator(1, 0, "a"))
    expected = ndimage.affine_transform(image[..., 0].astype(float), np.eye(2) / 1.3, 47.5 - 47.5 / 1.3, order=1)
    assert np.abs(made[..., 0] - expected).max() < 2  # OpenCV counts in 1/32 of a pixel
    assert made_mask.sum() == pytest.approx(mask.sum() * 1.69, rel=0.03)


def test_a_shift_stays_within_its_fraction_and_goes_each_way() -> None:
    shifts = np.array([centre(image_of(replace(OFF, translate=0.2), blob(47.5, 47.5), row)) for row in range(80)])
    assert np.abs(shifts).max() < 0.2 * 96 + 0.1
    assert (shifts.min(axis=0) < -15).all()
    assert (shifts.max(axis=0) > 15).all()


@pytest.mark.parametrize("row", range(8))
def test_image_and_mask_move_together_and_the_mask_keeps_its_classes(row: int) -> None:
    disc = (Y - 40) ** 2 + (X - 55) ** 2 < 14**2
    image, mask = (200 * disc).astype(np.uint8)[..., np.newaxis], (2 * disc).astype(np.uint8)
    made, made_mask = GEOMETRY.apply(image, mask, generator(1, 0, str(row)))
    assert set(np.unique(made_mask)) == {0, 2}
    assert np.abs(centre(made) - centre(made_mask)).max() < 0.15
    assert not np.array_equal(made_mask, mask)
    # Every pixel well inside or outside of the disc is so in both: nearest and bilinear are of one map.
    assert ((made[..., 0] > 100) == (made_mask > 0)).mean() > 0.995


def test_what_comes_from_outside_is_background() -> None:
    image, mask = np.full((96, 96, 2), 255, np.uint8), np.ones((96, 96), np.uint8)
    made, made_mask = replace(OFF, scale=(0.5, 0.5)).apply(image, mask, generator(1, 0, "a"))
    inside = (np.abs(Y - 47.5) < 23.5) & (np.abs(X - 47.5) < 23.5)
    outside = (np.abs(Y - 47.5) > 24.6) | (np.abs(X - 47.5) > 24.6)
    assert (made[inside] == 255).all()
    assert (made_mask[inside] == 1).all()
    assert not made[outside].any()
    assert not made_mask[outside].any()


def test_the_greatest_elastic_field_does_not_fold_the_picture() -> None:
    # The value of a pixel tells the column where it comes from.
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256)).copy()
    bends = []
    for row in range(30):
        bent, _ = replace(OFF, elastic=0.07).apply(ramp[..., np.newaxis], ramp, generator(1, 0, str(row)))
        inside = bent[40:-40, 40:-40, 0].astype(int)
        assert np.diff(inside, axis=1).min() >= -1
        bends.append(np.abs(inside - np.arange(40, 216)).max())
    assert 8 < max(bends) <= 0.07 * 256 * 1.3  # the cubic overshoots its nodes a little


def test_gamma_is_one_exponent_between_the_limits() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    exponents = []
    for row in range(60):
        made = image_of(replace(OFF, gamma=(0.7, 1.5)), ramp, row).ravel()
        assert (made[0], made[255]) == (0, 255)
        of_each = np.log(made[64:250] / 255) / np.log(np.arange(64, 250) / 255)
        assert np.ptp(of_each[:100]) < 0.02
        exponents.append(of_each[0])
    assert 0.69 < min(exponents) < 0.78
    assert 1.35 < max(exponents) < 1.51


def test_brightness_multiplies_and_contrast_keeps_the_mean() -> None:
    image = random_image(32, 32, 1) // 4 + 60
    for row in range(20):
        brighter = image_of(replace(OFF, brightness=0.3), image, row) / image
        assert np.ptp(brighter) < 0.02
        assert 0.69 < brighter.mean() < 1.31
        contrast = image_of(replace(OFF, contrast=0.5), image, row).astype(float)
        assert contrast.mean() == pytest.approx(image.mean(), abs=0.3)  # of rounded values
        assert 0.49 < contrast.std() / image.std() < 1.51


def test_a_bias_field_is_a_smooth_factor_within_its_limit_and_the_same_for_all_channels() -> None:
    even = np.full((96, 96, 2), 100, np.uint8)
    shaded, reach = replace(OFF, bias_field=0.5), []
    for row in range(40):
        made = image_of(shaded, even, row)
        factors = np.log(made[..., 0] / 100.0)
        assert np.array_equal(made[..., 0], made[..., 1])
        assert np.abs(factors).max() <= 0.5 + 0.01  # rounding
        assert np.abs(np.diff(factors, axis=0)).max() < 0.09, "96 pixels are four nodes"
        reach.append(np.ptp(factors))
    assert max(reach) > 0.4, "strengths up to the greatest are drawn"
    assert min(reach) < 0.2
    dark = image_of(shaded, np.zeros((8, 8, 1), np.uint8))
    assert not dark.any(), "a factor leaves nothing as nothing"


def test_noise_has_at_most_its_deviation_and_differs_by_channel() -> None:
    image = np.full((64, 64, 5), 120, np.uint8)
    deviations = []
    for row in range(30):
        noise = image_of(replace(OFF, noise=10), image, row) - 120.0
        assert abs(noise.mean()) < 0.5
        deviations.append(noise.std())
        if deviations[-1] > 1:
            assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.1
    assert 8 < max(deviations) < 10.3
    assert min(deviations) < 2


@pytest.mark.parametrize("augment", [replace(OFF, blur=3), replace(OFF, low_resolution=0.3)])
def test_blur_and_low_resolution_smooth_in_place(augment: Augment) -> None:
    spot, rough = blob(40, 60), np.concatenate([random_image(96, 96, 5)] * 2, axis=-1)
    kept = []
    for row in range(20):
        made = image_of(augment, spot, row)
        assert np.abs(centre(made) - centre(spot)).max() < 0.05
        assert made.mean() == pytest.approx(spot.mean(), rel=0.02)
        made = image_of(augment, rough, row)
        assert np.abs(made[..., :5].astype(int) - made[..., 5:]).max() <= 1  # rounding by the number of channels
        kept.append(made.std() / rough.std())
    assert min(kept) < 0.5
    assert min(kept) + 0.3 < max(kept) <= 1


@pytest.mark.parametrize("shape", [(96, 96, 1), (33, 50, 3), (20, 31, 7)])
def test_any_shape_goes_through_everything_without_touching_the_original(shape: tuple[int, int, int]) -> None:
    image, mask = random_image(*shape), random_image(*shape[:2]) // 64
    for array in (image, mask):
        array.setflags(write=False)  # as rows come from Parquet
    for row in range(10):
        made, made_mask = EVERYTHING.apply(image, mask, generator(1, 0, str(row)))
        assert (made.shape, made.dtype, made_mask.shape, made_mask.dtype) == (shape, np.uint8, shape[:2], np.uint8)


def test_a_row_depends_on_seed_epoch_and_row_and_on_nothing_else() -> None:
    image, mask = random_image(32, 32, 1), random_image(32, 32)

    def made(seed: int, epoch: int, row_id: str) -> bytes:
        return b"".join(array.tobytes() for array in EVERYTHING.apply(image, mask, generator(seed, epoch, row_id)))

    keys = [(1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b"), (1, 10, "a"), (11, 0, "a")]
    assert len({made(*key) for key in keys}) == len(keys)
    assert made(1, 0, "a") == made(1, 0, "a")
    # The same in another process, on another day: SHA-256 of "1/2/row" into PCG64, computed apart.
    assert generator(1, 2, "row").integers(2**32) == 2618382412


def test_turning_one_transform_on_does_not_change_the_others() -> None:
    image, mask = random_image(32, 32, 1) // 2 + 40, random_image(32, 32)
    for row in range(10):
        assert np.array_equal(
            EVERYTHING.apply(image, mask, generator(1, 0, str(row)))[1],
            GEOMETRY.apply(image, mask, generator(1, 0, str(row)))[1],
        )
        darker = replace(OFF, brightness=0.2)
        flipped = replace(darker, flip_vertical=1)
        assert np.array_equal(image_of(flipped, image, row), image_of(darker, image, row)[::-1])
        shaded = replace(EVERYTHING, bias_field=0)
        assert np.array_equal(image_of(replace(shaded, bias_field=1e-9), image, row), image_of(shaded, image, row)), (
            "noise and all are drawn as without it"
        )
        noisy, even = replace(OFF, noise=9), np.full((64, 64, 1), 120, np.uint8)
        bent = replace(noisy, elastic=0.01)  # which an even picture shows at its border only
        assert np.array_equal(image_of(bent, even, row)[4:-4, 4:-4], image_of(noisy, even, row)[4:-4, 4:-4])


def test_intensities_hit_independently_with_their_probability() -> None:
    image = random_image(8, 8, 1) // 2 + 40
    gamma = replace(OFF, gamma=(0.5, 0.5), intensity_probability=0.4)
    blur = replace(OFF, blur=3, intensity_probability=0.4)
    hits = np.array(
        [[not np.array_equal(image_of(one, image, row), image) for one in (gamma, blur)] for row in range(1000)]
    )
    assert hits.mean(axis=0) == pytest.approx([0.4, 0.36], abs=0.07)  # a sigma below a third of a pixel does nothing
    assert abs(np.corrcoef(hits.T)[0, 1]) < 0.15


def test_the_configuration_is_plain_and_errors_name_the_key() -> None:
    built = config.build(Augment, {"scale": [0.75, 1.35], "rotate_degrees": 30})
    assert built == Augment(scale=(0.75, 1.35), rotate_degrees=30)
    assert config.build(Augment, config.plain(EVERYTHING)) == EVERYTHING
    for key, value in {
        "flip_horizontal": 1.5,
        "rotate_degrees": -1,
        "translate": 2,
        "elastic": 0.5,
        "low_resolution": 0,
        "noise": -1,
        "bias_field": -0.1,
        "blur": float("nan"),
        "scale": (1.2, 0.8),
        "gamma": (0, 1),
    }.items():
        with pytest.raises(ValueError, match=rf"train\.augment\.{key}: .*expected, got"):
            Augment(**{key: value})
