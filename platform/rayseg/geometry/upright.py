"""A stack whose slices lie straight behind one another, for readers that know no others."""

import dataclasses

import numpy as np

from rayseg.geometry import planes
from rayseg.geometry.stack import Stack


def upright(stack: Stack) -> Stack:
    """The same slices on a grid with right angles, wide enough for all of them.

    Planes and pixels stay as they are. Within its plane each slice is moved by less than a pixel, so that it lies by
    whole rows and columns beside the first one, and has background around it. Only readers that cannot say where the
    slices of a tilted stack lie need this: a voxel is up to half a pixel from its place, in rows and in columns.
    """
    normal = planes.normal(np.concatenate([stack.row_mm, stack.column_mm]))
    off_mm = stack.positions_mm - stack.positions_mm[0]
    behind_mm = np.outer(off_mm @ normal, normal)
    axes = np.column_stack([stack.column_mm, stack.row_mm])
    (moved, *_) = np.linalg.lstsq(axes, (off_mm - behind_mm).T, rcond=None)
    shifts = np.rint(moved.T).astype(int)  # (slices, 2), in rows and in columns
    shifts -= (first := shifts.min(axis=0))
    count, rows, columns = stack.masks.shape
    more_rows, more_columns = shifts.max(axis=0)
    masks = np.zeros((count, rows + more_rows, columns + more_columns), np.uint8)
    for mask, place, (down, right) in zip(masks, stack.masks, shifts, strict=True):
        mask[down : down + rows, right : right + columns] = place
    positions_mm = stack.positions_mm[0] + behind_mm + axes @ first
    beyond_mm = normal * (stack.beyond_mm @ normal)
    return dataclasses.replace(stack, masks=masks, positions_mm=positions_mm, beyond_mm=beyond_mm)
