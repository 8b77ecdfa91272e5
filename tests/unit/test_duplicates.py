"""Near-duplicates: one picture in two costumes is found, two slices are not one, and none is missed for speed."""

import csv
import io
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayseg.data import phantom
from rayseg.data.duplicates import MOST_BITS, fingerprint, near_duplicates
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice, read_slice

RNG = np.random.default_rng(2)


def head(patient: int, k: int = 4, window: str = "brain") -> np.ndarray:
    """A phantom's slice as prepared, (128, 128, 1)."""
    hu, _ = phantom.render(phantom.head(0, patient, 10), k, 128)
    return prepared(np.rint(hu).astype(np.int16), Preprocess(size=(128, 128), window=window, percentiles=None))


def prepared(stored: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    return preprocess.apply(Slice(stored=stored, rescale_slope=1.0, rescale_intercept=0.0, header=None))


def bits(first: bytes, second: bytes) -> int:
    return (int.from_bytes(first) ^ int.from_bytes(second)).bit_count()


def as_jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


COSTUMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "jpeg": as_jpeg,
    "noise": lambda image: np.clip(image + RNG.normal(0, 3, image.shape), 0, 255).astype(np.uint8),
    "gamma": lambda image: (255 * (image / 255) ** 0.9).astype(np.uint8),
    "contrast": lambda image: np.clip((image.astype(float) - 6) * 1.06, 0, 255).astype(np.uint8),
    "half the size": lambda image: np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BOX)),
}


@pytest.mark.parametrize("costume", COSTUMES)
def test_a_picture_in_another_costume_is_the_same(costume: str) -> None:
    for patient in range(5):
        image = head(patient)
        print_, other = fingerprint(image), fingerprint(COSTUMES[costume](image[..., 0])[..., None])
        assert print_ is not None
        assert other is not None
        assert bits(print_, other) <= MOST_BITS


@pytest.mark.parametrize("window", ["brain", "bone"])
def test_slices_of_different_patients_are_not(window: str) -> None:
    prints, patients = [], []
    for patient in range(5):
        for k in range(0, 10, 2):
            prints.append(fingerprint(head(patient, k, window)))
            patients.append(str(patient))
    assert None not in prints
    assert near_duplicates(prints, patients) == []


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64), np.uint8), np.full((64, 64), 200, np.uint8), RNG.integers(0, 9, (64, 64)).astype(np.uint8)],
)
def test_air_has_no_fingerprint(image: np.ndarray) -> None:
    assert fingerprint(image[..., None]) is None
    table = image.copy()
    table[60, 4:60] = 90  # the table under the patient
    assert fingerprint(table[..., None]) is None


def test_air_stretched_to_noise_is_nobodys_duplicate() -> None:
    prints = [
        fingerprint(prepared(RNG.integers(-1010, -990, (96, 96)).astype(np.int16), Preprocess((64, 64))))
        for _ in range(20)
    ]
    assert near_duplicates(prints, [str(number) for number in range(20)]) == []


def test_every_channel_counts() -> None:
    image = np.concatenate([head(0), head(1), head(2)], axis=-1)
    alone = fingerprint(image[..., :1])
    together = fingerprint(image)
    assert alone is not None
    assert together is not None
    assert bits(alone, together) > MOST_BITS


def test_all_pairs_are_found_and_no_others() -> None:
    base = RNG.integers(0, 256, (40, 72), np.uint8)
    rows = [base[number % 40].copy() for number in range(400)]
    for number, row in enumerate(rows):  # up to 24 bits flipped in each
        for bit in RNG.choice(576, 1 + number % 24, replace=False):
            row[bit // 8] ^= np.uint8(1 << bit % 8)
    prints = [None if number % 13 == 0 else row.tobytes() for number, row in enumerate(rows)]
    parts = [("train", "val", "test")[RNG.integers(3)] for _ in rows]
    expected = {
        (i, j, bits(prints[i], prints[j]))
        for i, j in combinations(range(400), 2)
        if prints[i] and prints[j] and parts[i] != parts[j] and bits(prints[i], prints[j]) <= MOST_BITS
    }
    assert len(expected) > 100
    assert set(near_duplicates(prints, parts)) == expected


def test_differences_spread_over_all_bits_are_found_too() -> None:
    """However the bits are mixed, as many differing ones as are allowed leave one of the bands equal."""
    bands = np.array_split(np.random.default_rng(0).permutation(576), MOST_BITS + 1)
    for equal in range(MOST_BITS + 1):
        first = RNG.integers(0, 2, 576).astype(np.uint8)
        second = first.copy()
        for number, band in enumerate(bands):
            second[band[0]] ^= number != equal
        prints = [np.packbits(signs).tobytes() for signs in (first, second)]
        assert near_duplicates(prints, ["train", "val"]) == [(0, 1, MOST_BITS)]
        second[bands[equal][0]] ^= 1
        assert near_duplicates([prints[0], np.packbits(second).tobytes()], ["train", "val"]) == []


def test_of_equal_pictures_one_a_part_is_named() -> None:
    print_ = fingerprint(head(3))
    found = near_duplicates([print_] * 3000 + [None], ["train"] * 2000 + ["val"] * 1001)
    assert found == [(0, 2000, 0)]
    assert near_duplicates([print_, print_], ["val", "val"]) == []
    assert near_duplicates([None, None], ["val", "train"]) == []
    assert near_duplicates([], []) == []


def test_real_slices_of_different_patients_are_not_one(shared_data: Path) -> None:
    folder = shared_data / "brain-tumor-mri"
    rows = list(csv.DictReader((folder / "groups.csv").read_text().splitlines()))
    prints = []
    for row in rows:
        slice = read_slice((folder / "images" / row["file"]).read_bytes())
        assert isinstance(slice, Slice)
        prints.append(fingerprint(Preprocess(size=(128, 128)).apply(slice)))
    assert prints.count(None) == 0
    assert near_duplicates(prints, [row["group"] for row in rows]) == []
