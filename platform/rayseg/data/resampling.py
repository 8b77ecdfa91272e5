"""Label maps on another grid: each class by the filter that images go through, and of these the greatest."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

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
    greatest = np.rint((1 - sum(shares.values())) * _STEPS)  # the background's
    winner_HW = np.zeros(greatest.shape, np.uint8)
    for value, share in shares.items():
        steps = np.rint(share * _STEPS)
        winner_HW[steps >= greatest] = value
        greatest = np.maximum(steps, greatest)
    made_HW[down.target, along.target] = winner_HW
    return made_HW


def _shares(inside_HW: np.ndarray, down: "_Part", along: "_Part") -> np.ndarray:
    """Of a class, in the new pixels of a part; float32."""
    size = along.target.stop - along.target.start, down.target.stop - down.target.start
    box = (along.begin, down.begin, along.end, down.end)
    picture = Image.fromarray(inside_HW.astype(np.float32))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box))
