"""Label maps on another grid: each class by the filter that images go through, and of these the greatest."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from rayseg.geometry.axes import Weights, plane

# Shares are compared as whole multiples of one in so many: a tie in exact numbers stays one whatever float32 leaves. A
# prime, as shares that tie are fractions of scales, and must not lie halfway between two multiples.
_STEPS = 4099


@dataclass(frozen=True)
class _Part:
    """Of one axis what of the new grid a foreground reaches, and the source pixels that this is made of.

    Both begin and end where pixels of the two grids do, so that a part has the very filter of the whole, bit for bit:
    Pillow takes the ends of a box as float32, which holds whole numbers only without rounding.
    """

    source: slice
    target: slice
    begin: float  # where the target begins and ends, in pixels of the source's part
    end: float

    @classmethod
    def of(cls, before: int, after: int, first: int, last: int) -> "_Part":
        """Of a foreground in the pixels [first, last) of an axis of `before` pixels that becomes one of `after`."""
        periods = math.gcd(before, after)
        step = before // periods
        reach = math.ceil(max(1.0, before / after)) + 1  # pixels that the filter looks at beyond a new pixel's centre
        target = max(0, (first - reach) // step), min(periods, -(-(last + reach) // step))
        margin = -(-reach // step)
        source = max(0, target[0] - margin), min(periods, target[1] + margin)
        new = after // periods
        return cls(
            slice(source[0] * step, source[1] * step),
            slice(target[0] * new, target[1] * new),
            (target[0] - source[0]) * step,
            (target[1] - source[0]) * step,
        )


def resized(mask_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """A label map on a grid of another size over the same area: uint8 (height, width).

    Every class, the background among them, is a picture of zeros and ones. Pillow's bilinear filter, a triangle that
    widens with the scale when shrinking, gives the share that each has of a new pixel. The greatest share wins; of
    equal ones the higher class, so foreground before background, as where classes of masks overlap. Pixel centres lie
    at half-integers in both grids and the filter is even, so labels are not shifted.

    Args:
        mask_HW: uint8 (rows, columns), any values, 0 is the background.
        height: of the new grid.
        width: of the new grid.
    """
    assert mask_HW.dtype == np.uint8
    made_HW = np.zeros((height, width), np.uint8)
    left, top, columns, rows = cv2.boundingRect(np.ascontiguousarray(mask_HW))
    if not columns:
        return made_HW
    down = _Part.of(mask_HW.shape[0], height, top, top + rows)
    along = _Part.of(mask_HW.shape[1], width, left, left + columns)
    part_HW = mask_HW[down.source, along.source]
    shares = {
        value: _shares(part_HW == value, down, along)
        for value in np.flatnonzero(cv2.calcHist([part_HW], [0], None, [256], [0, 256])).tolist()
        if value
    }
    winner_HW = _greatest(shares, (down.target.stop - down.target.start, along.target.stop - along.target.start))
    made_HW[down.target, along.target] = winner_HW
    return made_HW


def class_shares(mask_HW: np.ndarray, down: Weights, along: Weights) -> dict[int, np.ndarray]:
    """What each class but the background has of the pixels of a grid, float32 (height, width), by class.

    Args:
        mask_HW: uint8 (rows, columns).
        down: weights along a column.
        along: weights along a row.
    """
    assert mask_HW.dtype == np.uint8
    present = cv2.calcHist([np.ascontiguousarray(mask_HW)], [0], None, [256], [0, 256])
    return {
        value: plane((mask_HW == value).astype(np.float32), down, along)
        for value in np.flatnonzero(present).tolist()
        if value
    }


def stacked(
    of_slices: Iterable[dict[int, np.ndarray]], normal: Weights, shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """The label maps of a series on another grid, slice by slice in order: uint8 (height, width).

    As `resized`, in three dimensions and by the weights that the images have. It holds the shares in those slices that
    a new one needs.

    Args:
        of_slices: the `class_shares` of each slice, in order along the normal.
        normal: weights along that axis.
        shape: height and width.
    """
    for parts in normal.gather(of_slices):
        together: dict[int, np.ndarray] = {}
        for of_slice, weight in parts:
            for value, share in of_slice.items():
                together[value] = together[value] + share * weight if value in together else share * weight
        yield _greatest(dict(sorted(together.items())), shape)


def _greatest(shares: dict[int, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The class with the greatest share, uint8; 0 where the background has it. Shares come in ascending order."""
    winner_HW = np.zeros(shape, np.uint8)
    if not shares:
        return winner_HW
    greatest = np.rint((1 - sum(shares.values())) * _STEPS)  # the background's
    for value, share in shares.items():
        steps = np.rint(share * _STEPS)
        winner_HW[steps >= greatest] = value
        greatest = np.maximum(steps, greatest)
    return winner_HW


def _shares(inside_HW: np.ndarray, down: "_Part", along: "_Part") -> np.ndarray:
    """Of a class, in the new pixels of a part; float32."""
    size = along.target.stop - along.target.start, down.target.stop - down.target.start
    box = (along.begin, down.begin, along.end, down.end)
    picture = Image.fromarray(inside_HW.astype(np.float32))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box))
