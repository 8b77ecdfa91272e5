"""Masks on the network's grid: where the image lies, by a filter that is worked out here by hand, and by SimpleITK."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from rayseg.config import plain
from rayseg.data.preprocess import Preprocess
from rayseg.data.resampling import resized
from rayseg.evaluation.evaluate import _doubts
from rayseg.tracking.bundle import decide
from rayseg.tracking.version import ModelVersion

COLOURS = {(255, 0, 0): 1, (0, 0, 255): 2, (255, 255, 0): 3, (0, 255, 255): 4, (0, 255, 0): 5}


def triangle(before: int, after: int) -> np.ndarray:
    """Weights (after, before) of a triangle about each new pixel's centre, as wide as the scale when shrinking."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale
    distances = np.abs(np.arange(before) + 0.5 - centres[:, np.newaxis])
    weights = np.clip(1 - distances / max(1.0, scale), 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def shares(mask: np.ndarray, height: int, width: int, classes: int) -> np.ndarray:
    """Of each class, the background first, in each new pixel; float64 (classes + 1, height, width)."""
    down, along = triangle(mask.shape[0], height), triangle(mask.shape[1], width)
    return np.stack([down @ (mask == value) @ along.T for value in range(classes + 1)])


@st.composite
def masks(draw: st.DrawFn, most: int = 90) -> np.ndarray:
    """Rectangles and disks of three classes, none to six of them, also over each other and over the border."""
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most))
    mask = np.zeros((rows, columns), np.uint8)
    rr, cc = np.mgrid[:rows, :columns]
    for _ in range(draw(st.integers(0, 6))):
        row, column = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
        across, value = draw(st.integers(1, 30)), draw(st.integers(1, 3))
        if draw(st.booleans()):
            mask[row : row + across, column : column + draw(st.integers(1, 30))] = value
        else:
            mask[(rr - row) ** 2 + (cc - column) ** 2 <= (across / 2) ** 2] = value
    return mask


@settings(max_examples=300, deadline=None)
@given(masks(), st.integers(1, 70), st.integers(1, 70))
def test_the_class_with_the_greatest_share_wins(mask: np.ndarray, height: int, width: int) -> None:
    share_KHW = shares(mask, height, width, 3)
    made = resized(mask, height, width)
    assert (made.shape, made.dtype) == ((height, width), np.uint8)
    given_HW = np.take_along_axis(share_KHW, made[np.newaxis].astype(int), axis=0)[0]
    assert (given_HW >= share_KHW.max(axis=0) - 1e-3).all()
    # Where shares are equal, the higher class: foreground before background.
    equal_KHW = share_KHW >= share_KHW.max(axis=0) - 1e-9
    highest_HW = 3 - np.argmax(equal_KHW[::-1], axis=0)
    clear_HW = np.sort(share_KHW, axis=0)[-1] - np.where(equal_KHW, -1, share_KHW).max(axis=0) > 1e-3
    assert np.array_equal(made[clear_HW], highest_HW[clear_HW])


def test_a_tie_goes_to_the_foreground_and_to_the_higher_class() -> None:
    half = np.repeat(np.uint8([[0, 2, 0, 0]]), 4, axis=0)  # shares of 3/7 and 1/8 where 4 columns become 2
    assert resized(half, 4, 2).tolist() == [[0, 0]] * 4
    edge = np.repeat(np.uint8([[0, 0, 0, 2, 2, 2]]), 6, axis=0)  # the middle of three pixels is half of each
    assert resized(edge, 3, 3).tolist() == [[0, 2, 2]] * 3
    assert resized(edge[:, ::-1].copy(), 3, 3).tolist() == [[2, 2, 0]] * 3
    assert resized(np.where(edge > 0, edge, 5).astype(np.uint8), 3, 3).tolist() == [[5, 5, 2]] * 3


@settings(max_examples=200, deadline=None)
@given(masks(), st.integers(1, 60), st.integers(1, 60))
def test_a_mirrored_mask_is_the_mask_mirrored(mask: np.ndarray, height: int, width: int) -> None:
    """Which no filter passes that samples beside the centre."""
    made = resized(mask, height, width)
    for axis in (0, 1):
        assert np.array_equal(resized(np.ascontiguousarray(np.flip(mask, axis)), height, width), np.flip(made, axis))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(10, 20), st.booleans())
@example(2, 1, 16, False)
@example(1, 2, 9, False)
def test_a_disk_stays_where_it_is(shrink: int, enlarge: int, across: int, between: bool) -> None:
    """On the mean over all its places between the pixels of the new grid, where what the rim does cancels out."""
    assume(np.gcd(shrink, enlarge) == 1)
    across = max(across, 3 * shrink)
    side = (across // shrink + 6) * shrink
    rr, cc = np.mgrid[:side, :side]
    shifts = []
    for down in range(shrink):
        for along in range(shrink):
            centre = np.array([down, along]) + side // 2 - between / 2
            mask = ((rr - centre[0]) ** 2 + (cc - centre[1]) ** 2 <= across**2 / 4).astype(np.uint8)
            after = side // shrink * enlarge
            # From pixel centres of one grid to those of the other.
            there = (np.array(ndimage.center_of_mass(resized(mask, after, after))) + 0.5) * side / after - 0.5
            shifts.append(there - ndimage.center_of_mass(mask))
    assert np.abs(np.mean(shifts, axis=0)).max() < 1e-6


def itk_planes(mask: np.ndarray, classes: int) -> list[sitk.Image]:
    return [sitk.GetImageFromArray((mask == value).astype(np.float64)) for value in range(classes + 1)]


@settings(max_examples=60, deadline=None)
@given(masks(40), st.integers(1, 4), st.integers(0, 3))
def test_enlarging_is_simpleitks_linear_interpolation(mask: np.ndarray, factor: int, more: int) -> None:
    height, width = mask.shape[0] * factor + more, mask.shape[1] * factor + more
    spacing = mask.shape[1] / width, mask.shape[0] / height
    shares_KHW = np.stack(
        [
            sitk.GetArrayFromImage(
                sitk.Resample(
                    plane, (width, height), sitk.Transform(), sitk.sitkLinear,
                    tuple(step / 2 - 0.5 for step in spacing), spacing, (1, 0, 0, 1), 0.0, sitk.sitkFloat64,
                )
            )
            for plane in itk_planes(mask, 3)
        ]
    )  # fmt: skip
    made = resized(mask, height, width)
    won_HW = np.take_along_axis(shares_KHW, made[np.newaxis].astype(int), axis=0)[0]
    assert (won_HW >= shares_KHW.max(axis=0) - 1e-3).all()


def real_masks(shared_data: Path, name: str) -> Iterator[np.ndarray]:
    """Of brain-tumor-mri (256 x 256, one class) one in 16; of hemorrhage-ct (512 x 512, five classes) all."""
    files = sorted((shared_data / name / "masks").glob("*.png"))
    for file in files[:: 16 if name == "brain-tumor-mri" else 1]:
        with Image.open(file) as image:
            if name == "brain-tumor-mri":
                yield (np.asarray(image.convert("L")) > 127).astype(np.uint8)
                continue
            colours = np.asarray(image.convert("RGB"))
        mask = np.zeros(colours.shape[:2], np.uint8)
        for colour, value in COLOURS.items():
            mask[(colours == colour).all(axis=-1)] = value
        yield mask


@pytest.mark.parametrize(
    ("name", "side", "ceiling", "of_nearest"),
    [("brain-tumor-mri", 128, 0.974, 0.970), ("hemorrhage-ct", 256, 0.970, 0.965)],
)
def test_real_labels_stay_in_place_and_come_back(
    name: str, side: int, ceiling: float, of_nearest: float, shared_data: Path
) -> None:
    """Perfect labels on the network's grid, brought back as predictions are: what no model can do better than."""
    classes = 1 if name == "brain-tumor-mri" else 5
    pooled, shift = {}, {}
    for mask_filter in ("image", "nearest"):
        preprocess = Preprocess(size=(side, side), mask_filter=mask_filter)
        both, whole, shifts = 0, 0, []
        for mask in real_masks(shared_data, name):
            labels = preprocess.apply_mask(mask)
            channels = range(1, 2) if classes == 1 else range(classes + 1)
            planes = [preprocess.restore((labels == value).astype(np.float32), *mask.shape) for value in channels]
            restored = decide(np.stack(planes), 0.5)
            for value in range(1, classes + 1):
                true, back = mask == value, restored == value
                both, whole = both + 2 * int((true & back).sum()), whole + int(true.sum() + back.sum())
                # Piece by piece: a small one that is lost, far from the others, moves the centre of all.
                pieces, count = ndimage.label(true, np.ones((3, 3)))
                for piece in (pieces == number for number in range(1, count + 1)):
                    near = back & ndimage.binary_dilation(piece, iterations=3)
                    if piece.sum() >= 100 and near.any():
                        shifts.append(np.argwhere(near).mean(axis=0) - np.argwhere(piece).mean(axis=0))
        pooled[mask_filter], shift[mask_filter] = both / whole, np.mean(shifts, axis=0)
    assert pooled["image"] > ceiling
    assert pooled["nearest"] == pytest.approx(of_nearest, abs=0.001)
    assert np.abs(shift["image"]).max() < 0.02
    assert (shift["nearest"] < -0.45).all()


def test_labels_lie_where_simpleitk_has_them(shared_data: Path) -> None:
    """Means over blocks of 2 x 2 pixels: another filter, with the same centre."""
    ours, theirs = [], []
    for mask in real_masks(shared_data, "brain-tumor-mri"):
        binned = sitk.GetArrayFromImage(sitk.BinShrink(itk_planes(mask, 1)[1], (2, 2)))
        ours.append(ndimage.center_of_mass(resized(mask, 128, 128)))
        theirs.append(ndimage.center_of_mass(binned))
    assert np.abs(np.mean(np.array(ours) - theirs, axis=0)).max() < 0.01


@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (3, 7), (512, 512)])
def test_masks_without_foreground_and_of_odd_shapes(shape: tuple[int, int]) -> None:
    preprocess = Preprocess(size=(16, 16))
    assert not preprocess.apply_mask(np.zeros(shape, np.uint8)).any()
    full = preprocess.apply_mask(np.full(shape, 255, np.uint8))
    image = preprocess.restore(np.float32(full == 255), *shape)
    assert (image == 1).all()


def test_a_strided_and_read_only_mask_is_fine() -> None:
    mask = np.random.default_rng(0).integers(0, 4, (60, 80), np.uint8)[::2, ::-2]
    mask.setflags(write=False)
    assert np.array_equal(resized(mask, 17, 23), resized(mask.copy(), 17, 23))


def test_an_evaluation_tells_of_a_model_that_was_trained_on_shifted_labels() -> None:
    version = ModelVersion("m", "1", "models:/m/1", "run", "d" * 64)
    plain_of = {one: {"preprocess": plain(Preprocess(mask_filter=one))} for one in ("image", "nearest")}
    before: dict = {"preprocess": {"size": [64, 64]}}
    assert _doubts([version], [plain_of["image"]]) == []
    for described in (plain_of["nearest"], before):
        (doubt,) = _doubts([version], [described])
        assert "models:/m/1 was trained on masks with mask_filter nearest" in doubt
