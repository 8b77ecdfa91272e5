"""NIfTI volumes as axial slices: however a volume is stored, its slices lie as those of DICOM, at the same places."""

import gzip
import itertools
import math
import struct
from collections.abc import Callable
from typing import Any

import nibabel
import numpy as np
import pytest

from rayseg.data.labels import Labels
from rayseg.data.masks import truth
from rayseg.data.preprocess import Preprocess
from rayseg.data.samples import make
from rayseg.dicom import nifti
from rayseg.dicom.reading import Slice, read_slice, read_slices
from rayseg.records import Reason, Reject

# Type codes of nifti1.h
CODES = {"uint8": 2, "int16": 4, "int32": 8, "float32": 16, "float64": 64, "int8": 256, "uint16": 512, "int64": 1024}
SHAPE = (5, 4, 3)  # to the left, back and head


def encoded(
    values: np.ndarray,
    affine: np.ndarray | None = None,
    order: str = "<",
    slope: float = 0.0,
    intercept: float = 0.0,
    spacing: tuple[float, float, float] = (1, 1, 1),
    qform: tuple[float, ...] | None = None,
    handedness: float = 1.0,
    **dim: Any,
) -> bytes:
    """A NIfTI-1 file by the fields of nifti1.h; `affine` is the sform, `qform` b, c, d and the offsets."""
    header = bytearray(352)
    struct.pack_into(order + "i", header, 0, 348)
    dimensions = dim.get("dim", (values.ndim, *values.shape))
    struct.pack_into(order + "8h", header, 40, *dimensions, *[1] * (8 - len(dimensions)))
    struct.pack_into(order + "2h", header, 70, dim.get("datatype", CODES[values.dtype.name]), values.dtype.itemsize * 8)
    struct.pack_into(order + "4f", header, 76, handedness, *spacing)
    struct.pack_into(order + "3f", header, 108, 352, slope, intercept)
    if qform is not None:
        struct.pack_into(order + "h6f", header, 252, 1, *([0] * 6))
        struct.pack_into(order + "6f", header, 256, *qform)
    if affine is not None:
        struct.pack_into(order + "h", header, 254, 1)
        struct.pack_into(order + "12f", header, 280, *np.asarray(affine, float)[:3].ravel())
    header[344:348] = b"n+1\0"
    return bytes(header) + values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")


def slices_of(data: bytes) -> list[np.ndarray]:
    volume = nifti.read_volume(data)
    assert isinstance(volume, nifti.Volume), volume
    found = list(read_slices(data, range(volume.slices)))
    assert all(isinstance(slice, Slice) for slice in found), found
    return [slice.values() for slice in found if isinstance(slice, Slice)]


# The volume in left, back, head; each voxel has its own value.
TRUE = np.arange(math.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
SPACING = (0.5, 0.75, 4.0)
ORIGIN = np.array([-11.0, 7.0, 30.0])  # of voxel (0, 0, 0), in DICOM's coordinates
STORAGES = list(itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)))


def stored(axes: tuple[int, ...], flips: tuple[bool, ...]) -> tuple[np.ndarray, np.ndarray]:
    """TRUE with its axes in another order and direction, and the affine that says so, in NIfTI's coordinates."""
    values = TRUE.transpose(axes)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    affine[:3, 3] = ORIGIN
    for place, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[axis, place] = -SPACING[axis] if flip else SPACING[axis]
        if flip:
            affine[axis, 3] += SPACING[axis] * (SHAPE[axis] - 1)
    values = values[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return values, np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize(("axes", "flips"), STORAGES)
def test_in_whatever_order_the_axes_are_stored_the_slices_and_their_places_are_the_same(
    axes: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    data = encoded(*stored(axes, flips))
    found = slices_of(data)
    assert len(found) == SHAPE[2]
    volume = nifti.read_volume(data)
    assert isinstance(volume, nifti.Volume)
    for index, plane in enumerate(found):
        assert np.array_equal(plane, TRUE[:, :, index].T)  # rows to the back, columns to the left
        place = volume.place(index)
        assert (place["rows"], place["columns"]) == (SHAPE[1], SHAPE[0])
        assert place["pixel_spacing_mm"] == pytest.approx([SPACING[1], SPACING[0]])
        assert place["slice_thickness_mm"] == pytest.approx(SPACING[2])
        assert place["image_position_mm"] == pytest.approx([*ORIGIN[:2], ORIGIN[2] + index * SPACING[2]])
        assert place["image_orientation"] == pytest.approx([1, 0, 0, 0, 1, 0])


def test_a_marked_voxel_of_a_tilted_volume_comes_back_at_the_place_that_the_affine_says() -> None:
    random = np.random.default_rng(4)
    for _ in range(40):
        # Well below 45 degrees, where it is no question which axis runs along which.
        turn, _ = np.linalg.qr(np.eye(3) + 0.35 * random.normal(size=(3, 3)))
        turn = turn * np.sign(np.diag(turn)) if random.random() < 0.5 else turn
        axes, flips = STORAGES[random.integers(len(STORAGES))]
        values, affine = stored(axes, flips)
        affine[:3, :3] = turn @ affine[:3, :3]
        affine = affine.astype(np.float32).astype(float)
        marked = np.zeros_like(values)
        corner = tuple(int(random.choice([0, size - 1])) for size in values.shape)
        marked[corner] = 1
        data = encoded(marked, affine)
        expected = np.diag([-1, -1, 1, 1]) @ affine @ (*corner, 1)
        volume = nifti.read_volume(data)
        assert isinstance(volume, nifti.Volume)
        ((index, row, column),) = np.argwhere(slices_of(data))
        place = volume.place(int(index))
        along_row, along_column = np.reshape(place["image_orientation"], (2, 3))
        between_rows, between_columns = place["pixel_spacing_mm"]
        # PS3.3 C.7.6.2.1.1
        position = place["image_position_mm"] + along_row * between_columns * column + along_column * between_rows * row
        assert position == pytest.approx(expected[:3], abs=1e-4)


def test_a_quaternion_says_the_place_where_no_affine_does() -> None:
    values, _ = stored((0, 1, 2), (False, False, False))
    half = math.sqrt(0.5)
    # By nifti1.h: b = c = 0 and d = sqrt(1/2) turn by 90 degrees about z, so i runs to the front and j to the left.
    data = encoded(values, qform=(0, 0, half, 1, 2, 3), spacing=SPACING)
    volume = nifti.read_volume(data)
    assert isinstance(volume, nifti.Volume)
    assert np.array_equal(slices_of(data)[1], values[::-1, :, 1])
    assert volume.place(0)["pixel_spacing_mm"] == pytest.approx([SPACING[0], SPACING[1]])
    # Row 0 is the most frontal, i = 4: at y = 2 + 4 * 0.5 to the front, x = 1 to the right.
    assert volume.place(0)["image_position_mm"] == pytest.approx([-1, -4, 3])
    # A negative pixdim[0] turns the third axis round.
    feet_last = encoded(values, qform=(0, 0, half, 1, 2, 3), spacing=SPACING, handedness=-1.0)
    assert np.array_equal(slices_of(feet_last)[0], values[::-1, :, 2])


def test_without_any_place_columns_run_to_the_left_as_stored() -> None:
    values, _ = stored((0, 1, 2), (False, False, False))
    assert np.array_equal(slices_of(encoded(values))[0], values[:, ::-1, 0].T)  # to the left, and to the front


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", sorted(CODES))
def test_every_type_and_byte_order_compressed_or_not(dtype: str, order: str) -> None:
    values, affine = stored((0, 1, 2), (False, False, False))
    data = encoded((values + 3).astype(dtype), affine, order, slope=2.0, intercept=-5.0)
    for file in (data, gzip.compress(data)):
        assert np.allclose(slices_of(file)[1], (TRUE[:, :, 1].T + 3) * 2 - 5, atol=2e-3)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "int64"])
def test_a_label_volume_is_the_mask_of_each_slice_though_it_is_stored_otherwise(dtype: str) -> None:
    labels = Labels(("edema", "core"), values={1: "core", 2: "edema", 4: "core"})
    values, affine = stored((2, 0, 1), (True, False, True))
    marks = np.choose(values % 4, [0, 1, 2, 4]).astype(dtype)
    data = gzip.compress(encoded(marks, affine))
    for index in range(SHAPE[2]):
        classes = truth([(data, None)], SHAPE[1::-1], labels, None, index)
        assert np.array_equal(classes, np.choose(TRUE[:, :, index].T % 4, [0, 2, 1, 2]))
    for other in (None, SHAPE[2]):
        refused = truth([(data, None)], SHAPE[1::-1], labels, None, other)
        assert isinstance(refused, Reject)
        assert refused.reason == Reason.MASK_MISMATCH


def moved(affine: np.ndarray, by_mm: tuple[float, float, float]) -> np.ndarray:
    changed = affine.copy()
    changed[:3, 3] += by_mm
    return changed


def scaled(affine: np.ndarray) -> np.ndarray:
    return affine @ np.diag([1.2, 1, 1, 1])


@pytest.mark.parametrize(
    ("change", "apart_mm"),
    [
        (lambda affine: affine, 0.0),
        (lambda affine: moved(affine, (0.1, 0, 0)), 0.0),  # a fifth of the smaller spacing: rounding
        (lambda affine: moved(affine, (0.2, 0, 0)), 0.2),
        (lambda affine: moved(affine, (0.7, 1.05, 0)), 0.361),  # whole pixels alone could be of a part cut out
        (scaled, 0.4),  # 0.5 mm for 4 steps, 20 % longer
    ],
)
def test_a_label_volume_lies_where_its_image_does(change: Callable[[np.ndarray], np.ndarray], apart_mm: float) -> None:
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    affine[:3, 3] = (11, -7, 30)
    image = read_slice(encoded(TRUE, affine), 1)
    assert isinstance(image, Slice)
    labels = encoded((TRUE % 2).astype(np.uint8), change(affine))
    made = make([image], [(labels, None)], Preprocess((4, 4)), Labels(), 1)
    if apart_mm == 0:
        assert isinstance(made, dict)
    else:
        detail = f"the mask's pixels lie {apart_mm:.3g} mm beside the image's"
        assert made == Reject(Reason.MASK_MISMATCH, detail)


def test_labels_without_a_place_do_not_belong_to_an_image_with_one() -> None:
    """They would be turned by another rule than the image: columns stored to the left are taken for right."""
    image = read_slice(encoded(TRUE, np.diag([1.0, 1, 1, 1])), 1)
    assert isinstance(image, Slice)
    made = make([image], [(encoded((TRUE % 2).astype(np.uint8)), None)], Preprocess((4, 4)), Labels(), 1)
    assert isinstance(made, Reject)
    assert made.reason == Reason.MASK_MISMATCH


def test_labels_that_are_no_integers_are_refused() -> None:
    refused = truth([(encoded(np.full(SHAPE, 0.5, np.float32)), None)], SHAPE[1::-1], Labels(), None, 0)
    assert isinstance(refused, Reject)
    assert refused.reason == Reason.UNSUPPORTED_PIXELS


def test_files_that_cannot_be_read_are_rejected() -> None:
    whole = encoded(TRUE, np.eye(4))
    cases = {
        Reason.TRUNCATED: [whole[:-1], gzip.compress(whole)[:60] if len(gzip.compress(whole)) > 400 else whole[:400]],
        Reason.UNSUPPORTED_PIXELS: [encoded(TRUE, datatype=128), encoded(np.full(SHAPE, np.nan))],
        Reason.TOO_LARGE: [encoded(TRUE, dim=(3, 30000, 30000, 2))],
        Reason.CORRUPT: [
            encoded(TRUE, dim=(3, 0, 4, 3)),
            encoded(TRUE, np.zeros((4, 4))),
            encoded(TRUE, np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])),
            encoded(TRUE, dim=(9, 1, 1)),
        ],
    }
    for reason, files in cases.items():
        for data in files:
            found = read_slice(data, 0)
            assert isinstance(found, Reject), reason
            assert found.reason == reason
    several = read_slice(whole)
    assert isinstance(several, Reject)
    assert several.reason == Reason.UNSUPPORTED_MULTIFRAME
    beyond = read_slice(whole, SHAPE[2])
    assert isinstance(beyond, Reject)


def test_nibabel_agrees_about_values_and_places() -> None:
    random = np.random.default_rng(9)
    for number in range(30):
        # Well below 45 degrees, where it is no question which axis runs along which.
        turn, _ = np.linalg.qr(np.eye(3) + 0.15 * random.normal(size=(3, 3)))
        axes, flips = STORAGES[random.integers(len(STORAGES))]
        values, affine = stored(axes, flips)
        affine[:3, :3] = turn @ affine[:3, :3]
        form = nibabel.Nifti2Image if number % 2 else nibabel.Nifti1Image
        image = form(np.ascontiguousarray(values), affine)
        image.set_sform(affine, code=1 if number % 3 else 0)
        image.set_qform(affine, code=0 if number % 3 == 1 else 1)
        if number % 5 == 0:
            image.set_sform(None, code=0)
            image.set_qform(None, code=0)
        data = image.to_bytes()
        read = form.from_bytes(data)
        closest = nibabel.as_closest_canonical(read)  # right, front, head
        expected = closest.get_fdata()[::-1, ::-1]
        volume = nifti.read_volume(data)
        assert isinstance(volume, nifti.Volume)
        for index, plane in enumerate(slices_of(data)):
            assert np.array_equal(plane, expected[:, :, index].T)
            last = (closest.shape[0] - 1, closest.shape[1] - 1, index, 1)
            position = np.diag([-1, -1, 1, 1]) @ closest.affine @ last
            assert volume.place(index)["image_position_mm"] == pytest.approx(position[:3], abs=1e-3)
