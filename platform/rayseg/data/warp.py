"""Warp: image and label map of a patch under one affine map, interpolated once, from the same eight voxels each.

The image is trilinear. A label map is interpolated likewise class by class, as pictures of zeros and ones, and the
greatest share wins; of equal ones the higher class, as `resampling.resized` has it. So labels move with their image.
Where the eight voxels agree, which is nearly everywhere, there is nothing to share out.
"""

import numpy as np

_AT_ONCE = 2**14  # voxels: what a step makes of them fits into the cache of a core
_STEPS = 4099  # shares are compared as multiples of one in so many, see `resampling`


def reach(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How far from its centre a patch looks, voxels of the source each way along each axis, float64 (3,).

    Args:
        matrix: float64 (3, 3), of an offset from the patch's centre to the offset in the source.
        shape: of the patch (D, H, W).
    """
    reached: np.ndarray = np.abs(matrix) @ ((np.array(shape) - 1) / 2)
    return reached


def warped(
    image_DHW: np.ndarray, mask_DHW: np.ndarray, matrix: np.ndarray, centre: np.ndarray, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A patch of `shape` around `centre`: float32 image and uint8 classes.

    Args:
        image_DHW: float32, at least two voxels along each axis.
        mask_DHW: uint8 of the same shape.
        matrix: float64 (3, 3), as `reach` has it.
        centre: float64 (3,), where in the source the patch's centre lies; `reach` around it must lie in the source.
        shape: of the patch (D, H, W).
    """
    image, mask = np.ascontiguousarray(image_DHW).ravel(), np.ascontiguousarray(mask_DHW).ravel()
    strides = np.array([mask_DHW.shape[1] * mask_DHW.shape[2], mask_DHW.shape[2], 1])
    corners = (np.indices((2, 2, 2)).reshape(3, 8).T @ strides).tolist()
    mixed = _mixed(mask_DHW).ravel()
    present = np.flatnonzero(np.bincount(mask, minlength=2)).tolist() if mixed.any() else []
    new_image, new_mask = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    deep = max(1, _AT_ONCE // (shape[1] * shape[2]))
    for first in range(0, shape[0], deep):
        part = slice(first, min(first + deep, shape[0]))
        place, fractions = _places(matrix, centre, shape, part, mask_DHW.shape)
        new_image[part] = _linear(image, place, corners, fractions)
        new_mask[part] = mask[place]
        if present and len(unsure := np.flatnonzero(mixed[place].ravel())):
            shares = [fraction.ravel()[unsure] for fraction in np.broadcast_arrays(*fractions)]
            new_mask[part].reshape(-1)[unsure] = _winners(mask, place.ravel()[unsure], corners, shares, present)
    return new_image, new_mask


def _places(
    matrix: np.ndarray, centre: np.ndarray, shape: tuple[int, ...], part: slice, source: tuple[int, ...]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Of each voxel of a part the first of its eight source voxels, as a flat index, and how far behind it, by axis."""
    offsets = [np.arange(length) - (length - 1) / 2 for length in shape]
    along = [offsets[0][part, np.newaxis, np.newaxis], offsets[1][:, np.newaxis], offsets[2]]
    place, fractions = np.int32(0), []
    for axis, length in enumerate(source):
        # Exact sums in float64 of the plane and the row: rounding must not depend on where the part begins.
        position = (matrix[axis, 0] * along[0] + centre[axis] + matrix[axis, 1] * along[1]) + matrix[axis, 2] * along[2]
        first = position.astype(np.int32)
        np.clip(first, 0, length - 2, out=first)
        position -= first
        fractions.append(np.clip(position, 0, 1, out=position).astype(np.float32))
        place = place * np.int32(length) + first
    return np.asarray(place), fractions


def _linear(image: np.ndarray, place: np.ndarray, corners: list[int], fractions: list[np.ndarray]) -> np.ndarray:
    """The trilinear values."""
    values = [image[offset:].take(place) for offset in corners]
    for fraction in reversed(fractions):  # of pairs along the last axis, then of these pairs
        for low, high in zip(values[::2], values[1::2], strict=True):
            high -= low
            high *= fraction
            low += high
        values = values[::2]
    return values[0]


def _winners(
    mask: np.ndarray, place: np.ndarray, corners: list[int], fractions: list[np.ndarray], present: list[int]
) -> np.ndarray:
    """The class with the greatest share at each of some places, uint8."""
    weights = np.ones((1, len(place)), np.float32)
    for fraction in fractions:  # corners count along the last axis first
        weights = np.stack([weights * (1 - fraction), weights * fraction], axis=1).reshape(-1, len(place))
    labels = np.stack([mask[offset:].take(place) for offset in corners])
    winner, greatest = np.zeros(len(place), np.uint8), np.full(len(place), -1, np.float32)
    for value in present:
        share = np.rint(np.where(labels == value, weights, 0).sum(axis=0) * _STEPS)
        better = share >= greatest
        winner[better] = value
        greatest = np.maximum(share, greatest)
    return winner


def _mixed(mask_DHW: np.ndarray) -> np.ndarray:
    """Whether the eight voxels from each one on are of several classes."""
    low, high = mask_DHW, mask_DHW
    for axis in range(3):
        ends = np.moveaxis(low, axis, 0), np.moveaxis(high, axis, 0)
        low, high = low.copy(), high.copy()
        first, last = np.moveaxis(low, axis, 0), np.moveaxis(high, axis, 0)
        np.minimum(ends[0][:-1], ends[0][1:], out=first[:-1])
        np.maximum(ends[1][:-1], ends[1][1:], out=last[:-1])
    return low != high
