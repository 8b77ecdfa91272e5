"""Images pair with masks by path, and what does not pair is told with counts and examples."""

import logging

import pytest

from rayseg.data.layouts import pair, read_groups


def test_pairs_are_paths_equal_but_for_the_suffix() -> None:
    images = ["p1/IM_0001.dcm", "p1/IM_0002.dcm", "p2/IM_0001.dcm", "p.3/noSuffix", "1.2.3.dcm", "1.2.4.dcm"]
    masks = ["1.2.4.png", "p1/IM_0002.png", "p2/IM_0001.png", "p1/IM_0001.png", "p.3/noSuffix.png", "1.2.3.png"]
    assert pair(images, masks) == {
        "p1/IM_0001.dcm": "p1/IM_0001.png",
        "p1/IM_0002.dcm": "p1/IM_0002.png",
        "p2/IM_0001.dcm": "p2/IM_0001.png",
        "p.3/noSuffix": "p.3/noSuffix.png",
        "1.2.3.dcm": "1.2.3.png",
        "1.2.4.dcm": "1.2.4.png",
    }


def test_all_paired_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    pair(["1.png"], ["1.png"])
    assert not caplog.records


def test_part_paired_warns_with_counts_and_three_examples(caplog: pytest.LogCaptureFixture) -> None:
    images = [f"{number}.png" for number in range(6)]
    with caplog.at_level(logging.WARNING):
        assert pair(images, ["0.png", "stray.png"]) == {"0.png": "0.png"}
    message = caplog.text
    assert "1 of 6 images pair with one of 2 masks" in message
    assert "5 images without a mask, as 1.png, 2.png, 3.png;" in message
    assert "1 masks without an image, as stray.png" in message
    assert "4.png" not in message


def test_nothing_paired_is_an_error_that_says_what_was_there() -> None:
    with pytest.raises(
        ValueError, match=r"0 of 2 images .* as a\.png, b\.png.* as mask_a\.png.* equal but for the suffix"
    ):
        pair(["a.png", "b.png"], ["mask_a.png"])


def test_no_masks_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 of 1 images pair with one of 0 masks"):
        pair(["a.png"], [])


def test_two_masks_for_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two masks for one image, as a\.png and a\.jpg"):
        pair(["a.dcm"], ["a.png", "a.jpg"])


def test_groups_are_read() -> None:
    assert read_groups(b"\xef\xbb\xbffile,group\r\n0.png,b1\r\np/1.png,b2\r\n") == {"0.png": "b1", "p/1.png": "b2"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"file,group\n", "has no rows"),
        (b"name,patient\na,b\n", "line 2 lacks a value for file or group"),
        (b"file,group\na.png,\n", "line 2 lacks"),
        (b"file,group\na.png,1\na.png,2\n", "line 3 puts a file into a second group"),
        (b"\xff\xfe\x00", "not a CSV file in UTF-8"),
    ],
)
def test_a_malformed_csv_of_groups_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_groups(data)
