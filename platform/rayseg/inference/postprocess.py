"""What is done to the masks of a whole series after the model: small lesions, holes, all but the largest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rayseg.inference.packed import Packed

_EVERYWHERE = np.ones((3, 3, 3), bool)  # across faces, edges and corners


@dataclass(frozen=True)
class Postprocess:
    """Steps in this order, for each class by itself; as it stands nothing is done."""

    fill_holes: bool = False  # background that a class encloses within its slice becomes that class
    largest_only: bool = False  # keeps only the class's lesion of the greatest volume
    min_lesion_mm3: float = 0.0  # leaves smaller lesions out

    def __post_init__(self) -> None:
        if not self.min_lesion_mm3 >= 0:
            raise ValueError(f"segment.postprocess.min_lesion_mm3: 0 or more expected, got {self.min_lesion_mm3}")

    def check(self, voxels_mm3: np.ndarray | None) -> None:
        """Raises ValueError where `min_lesion_mm3` is asked for and a series' volumes are not known."""
        if self.min_lesion_mm3 and voxels_mm3 is None:
            raise ValueError("segment.postprocess.min_lesion_mm3: the series' positions give no volumes")

    def apply(self, masks: Sequence[np.ndarray], voxels_mm3: np.ndarray | None) -> Packed:
        """The label maps after all steps; memory is taken for the box around all foreground only.

        Args:
            masks: uint8 (rows, columns), the slices in the order of their planes. A lesion is what is connected across
                faces, edges or corners of voxels, neighbouring slices counting as neighbours whatever lies between.
            voxels_mm3: float64 (S,), the volume that a pixel of each slice stands for; None where it is not known.

        Raises:
            ValueError: as `check` does.
        """
        self.check(voxels_mm3)
        around = _around(masks)
        if around is None:
            return Packed(masks)
        slices, box = around
        inside_SHW = np.stack([masks[number][box] for number in slices])
        weights_S = None if voxels_mm3 is None else voxels_mm3[slices.start : slices.stop]
        made_SHW = self._apply(inside_SHW, weights_S)
        packed = Packed()
        for number, mask in enumerate(masks):
            after = mask.copy()
            if number in slices:
                after[box] = made_SHW[number - slices.start]
            packed.append(after)
        return packed

    def _apply(self, masks_SHW: np.ndarray, voxels_mm3: np.ndarray | None) -> np.ndarray:
        cleaned: np.ndarray = masks_SHW.copy()
        for number in np.unique(masks_SHW[masks_SHW > 0]):
            before_SHW = cleaned == number
            kept_SHW = self._of_class(before_SHW, voxels_mm3)
            cleaned[before_SHW & ~kept_SHW] = 0
            cleaned[kept_SHW & (cleaned == 0)] = number
        return cleaned

    def _of_class(self, inside_SHW: np.ndarray, voxels_mm3: np.ndarray | None) -> np.ndarray:
        if self.fill_holes:
            inside_SHW = np.stack([ndimage.binary_fill_holes(inside_HW) for inside_HW in inside_SHW])
        if not (self.largest_only or self.min_lesion_mm3):
            return inside_SHW
        labels_SHW, count = ndimage.label(inside_SHW, _EVERYWHERE)
        weights_S = np.ones(len(inside_SHW)) if voxels_mm3 is None else voxels_mm3
        sizes = sum(
            np.bincount(labels_HW.ravel(), minlength=count + 1) * weight
            for labels_HW, weight in zip(labels_SHW, weights_S, strict=True)
        )
        keep = np.asarray(sizes) >= self.min_lesion_mm3
        keep[0] = False
        if self.largest_only and count:
            largest = 1 + int(np.argmax(np.asarray(sizes)[1:]))  # the first of equals
            keep &= np.arange(count + 1) == largest
        kept: np.ndarray = keep[labels_SHW]
        return kept


def _around(masks: Sequence[np.ndarray]) -> tuple[range, tuple[slice, slice]] | None:
    """The slices from the first to the last with foreground, and the box that has all of it; None without any."""
    boxes = []
    for number, mask in enumerate(masks):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            boxes.append((number, rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    if not boxes:
        return None
    numbers, tops, bottoms, lefts, rights = zip(*boxes, strict=True)
    box = slice(int(min(tops)), int(max(bottoms))), slice(int(min(lefts)), int(max(rights)))
    return range(numbers[0], numbers[-1] + 1), box
