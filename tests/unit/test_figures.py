"""Pictures: decoded again with Pillow, and looked at where the marks must be."""

import io

import numpy as np
import pytest
from PIL import Image

from rayseg.tracking.figures import PREDICTION, TRUTH, agreement, curves, overlay, reliability


def decode(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(picture: np.ndarray, color: str, tolerance: int = 30) -> np.ndarray:
    return (np.abs(picture - list(bytes.fromhex(color[1:]))) < tolerance).all(axis=2)


def test_overlay_marks_truth_and_prediction_on_the_right_half_where_they_are() -> None:
    image = np.full((64, 64), 90, np.uint8)
    truth, prediction = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    truth[8:24, 8:24] = 1  # upper left
    prediction[40:60, 40:60] = 2  # lower right
    picture = decode(overlay(image, truth, prediction, "patient 1"))
    legend, body = picture[:40], picture[50:]  # below the line of title and legend
    assert near(legend, TRUTH).any()
    half = body.shape[1] // 2
    for color, where in ((TRUTH, (0.25, 0.25)), (PREDICTION, (0.78, 0.78))):
        rows, columns = np.nonzero(near(body, color))
        assert rows.size > 20
        assert columns.min() > half  # the left half shows the slice as it is
        assert np.allclose([rows.mean() / body.shape[0], (columns.mean() - half) / half], where, atol=0.08)


def test_overlay_shows_a_single_pixel_at_the_edge_and_an_empty_mask_shows_none() -> None:
    image, empty = np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8)
    corner = empty.copy()
    corner[0, 0] = 1
    with_pixel, without = (decode(overlay(image, None, mask, ""))[40:] for mask in (corner, empty))
    assert near(with_pixel, PREDICTION).any()
    assert not near(without, PREDICTION).any()
    assert not near(without, TRUTH).any()


def test_overlay_of_wide_images_with_values_beyond_8_bit_keeps_their_shape() -> None:
    image = np.linspace(-1000, 3000, 40 * 80).reshape(40, 80).astype(np.float32)
    picture = decode(overlay(image, None, np.zeros((40, 80), bool), "wide"))
    assert picture.shape[1] > 2 * picture.shape[0]
    assert picture.max() > 240


def test_overlay_is_the_same_bytes_each_time() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert overlay(image, image > 9, image > 99, "t") == overlay(image, image > 9, image > 99, "t")


def test_curves_draw_what_there_is_and_leave_out_what_is_missing() -> None:
    history = [
        {"epoch": 1, "train/loss": 1.0, "val/loss": 1.1, "val/dice_pooled": None, "seconds": 3.0},
        {"epoch": 2, "train/loss": 0.5, "val/loss": 0.7, "val/dice_pooled": 0.4, "seconds": 3.0},
    ]
    drawn = decode(curves(history))  # type: ignore[arg-type]
    half = drawn.shape[1] // 2
    assert near(drawn[:, :half], "#2266aa").any()  # train loss
    assert not near(drawn[:, half:], "#2266aa").any()  # no train Dice is known
    assert near(drawn[:, half:], "#d1610c").any()
    assert decode(curves([])).shape == drawn.shape


def rows_of(picture: np.ndarray, color: str) -> list[float]:
    """Heights, from the top, of the horizontal lines of that colour, solid or dashed."""
    found = np.flatnonzero(near(picture, color, 60).mean(axis=1) > 0.3)
    return [float(run.mean()) for run in np.split(found, np.flatnonzero(np.diff(found) > 2) + 1) if run.size]


def test_agreement_shows_a_point_a_case_between_the_limits_and_the_bias() -> None:
    mean, difference = np.array([10.0, 20, 30, np.nan]), np.array([-4.0, 0, 8, 1])
    picture = decode(agreement(mean, difference, [-8, 2, 12], "mL"))
    upper, bias, lower = rows_of(picture, "#d1610c")
    assert bias - upper == pytest.approx(lower - bias, abs=2)  # 10 mL on each side
    columns = np.flatnonzero(near(picture, "#679bd0").sum(axis=0) > 2)
    points = np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)
    assert len(points) == 3  # the case without a number has none
    assert len(rows_of(decode(agreement(mean, difference, [2], "px")), "#d1610c")) == 1


def test_reliability_shows_how_far_probabilities_are_from_the_diagonal() -> None:
    places = np.arange(0.05, 1, 0.1)
    pixels = np.full(10, 1000.0)

    def blue(share: np.ndarray) -> np.ndarray:
        picture = decode(reliability({"a": np.stack([pixels, pixels * places, pixels * share], axis=1)}))
        return np.argwhere(near(picture, "#2266aa"))[:, 0]

    assert blue(places**3).mean() > blue(places).mean() + 20  # lower in the picture: less often than it says
    some = np.stack([pixels * (places > 0.5), pixels * places, pixels], axis=1)
    assert decode(reliability({"a": some, "b": some})).std() > 0  # bins may be empty, classes several
