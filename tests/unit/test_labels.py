"""Mask files become label maps; bytes that are no mask become a reason."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from rayseg.data.labels import Labels, read_mask
from rayseg.records import Reason, Reject


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


VALUES = np.array([[0, 1, 2], [127, 128, 255]], np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP"])
def test_grey_values_are_kept(file_format: str) -> None:
    mask = read_mask(encoded(Image.fromarray(VALUES), file_format))
    assert isinstance(mask, np.ndarray)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, VALUES)


def test_a_bilevel_mask_is_0_and_255() -> None:
    assert np.array_equal(read_mask(encoded(Image.fromarray(VALUES > 100))), (VALUES > 100) * 255)


def test_a_16_bit_mask_is_clipped_not_wrapped() -> None:
    # 256 and 65535 would wrap to 0 and 255; both are foreground.
    assert read_mask(encoded(Image.fromarray(np.array([[0, 7, 256, 65535]], np.uint16)))).tolist() == [[0, 7, 255, 255]]


def test_any_colour_is_foreground_and_transparency_does_not_count() -> None:
    colours = np.array([[[0, 0, 0, 255], [255, 0, 0, 255], [0, 0, 9, 0]]], np.uint8)
    assert read_mask(encoded(Image.fromarray(colours))).tolist() == [[0, 255, 9]]


def test_a_palette_counts_by_the_colours_it_shows() -> None:
    image = Image.fromarray(np.array([[5, 6]], np.uint8), "L").convert("P")
    image.putdata([5, 6])
    image.putpalette([0, 0, 0] * 6 + [200, 10, 10])  # index 5 shows black, index 6 red
    assert read_mask(encoded(image)).tolist() == [[0, 200]]


def test_a_threshold_takes_jpeg_noise_away() -> None:
    rr, cc = np.mgrid[:64, :64]
    truth = (((rr - 30) ** 2 + (cc - 35) ** 2 < 15**2) * 255).astype(np.uint8)
    noisy = read_mask(encoded(Image.fromarray(truth), "JPEG", quality=75))
    assert len(np.unique(noisy)) > 2  # the noise is there
    classes = Labels(threshold=127).apply(noisy)
    assert classes.dtype == np.uint8
    assert np.array_equal(classes, truth // 255)
    assert Labels(threshold=0).apply(noisy).sum() > classes.sum() + 100


def test_a_threshold_is_the_last_value_of_the_background() -> None:
    assert Labels().apply(VALUES).tolist() == [[0, 1, 1], [1, 1, 1]]
    assert Labels(threshold=127).apply(VALUES).tolist() == [[0, 0, 0], [0, 1, 1]]


def test_bytes_that_are_no_mask_are_rejected() -> None:
    good = encoded(Image.fromarray(np.tile(VALUES, (50, 50))))
    for data, reason in [
        (b"", Reason.EMPTY_OBJECT),
        (b"not an image", Reason.NOT_AN_IMAGE),
        (good[: len(good) // 2], Reason.NOT_AN_IMAGE),
        (encoded(Image.fromarray(VALUES.astype(np.float32)), "TIFF"), Reason.UNSUPPORTED_PIXELS),
    ]:
        mask = read_mask(data)
        assert isinstance(mask, Reject)
        assert mask.reason == reason


@pytest.mark.parametrize("side", [9_000, 20_000])  # over our limit, over Pillow's
def test_a_declared_size_over_the_limit_is_refused_before_decoding(side: int) -> None:
    huge = bytearray(encoded(Image.fromarray(VALUES)))
    huge[16:24] = side.to_bytes(4) + side.to_bytes(4)  # width and height in the PNG's IHDR
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4)
    mask = read_mask(bytes(huge))
    assert isinstance(mask, Reject)
    assert mask.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("names", [(), ("a", "b"), ("",)])
def test_labels_are_binary_for_now(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"labels\.names: exactly one"):
        Labels(names=names)


def test_a_threshold_of_255_would_leave_nothing() -> None:
    with pytest.raises(ValueError, match=r"labels\.threshold: 0\.\.254"):
        Labels(threshold=255)
