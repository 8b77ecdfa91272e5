"""What is done to the masks of a whole series after the model: small lesions, holes, all but the largest."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

_EVERYWHERE = np.ones((3, 3, 3), bool)  # across faces, edges and corners


@dataclass(frozen=True)
class Postprocess:
    """Steps in this order, for each class by itself; as it stands nothing is done."""

    fill_holes: bool = False  # background that a class encloses within its slice becomes of the class
    largest_only: bool = False  # only the class's lesion of the greatest volume is kept
    min_lesion_mm3: float = 0.0  # smaller lesions are left out

    def __post_init__(self) -> None:
        if not self.min_lesion_mm3 >= 0:
            raise ValueError(f"segment.postprocess.min_lesion_mm3: 0 or more expected, got {self.min_lesion_mm3}")

    def apply(self, masks_SHW: np.ndarray, voxels_mm3: np.ndarray | None) -> np.ndarray:
        """The label maps after all steps.

        Args:
            masks_SHW: uint8, the slices in the order of their planes. A lesion is what is connected across faces, edges
                or corners of voxels, neighbouring slices counting as neighbours whatever lies between them.
            voxels_mm3: float64 (S,), the volume that a pixel of each slice stands for; None where it is not known.

        Raises:
            ValueError: `min_lesion_mm3` is asked for and volumes are not known.
        """
        if self.min_lesion_mm3 and voxels_mm3 is None:
            raise ValueError("segment.postprocess.min_lesion_mm3: the series' positions give no volumes")
        made: np.ndarray = masks_SHW.copy()
        for number in np.unique(masks_SHW[masks_SHW > 0]):
            before_SHW = made == number
            kept_SHW = self._of_class(before_SHW, voxels_mm3)
            made[before_SHW & ~kept_SHW] = 0
            made[kept_SHW & (made == 0)] = number
        return made

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
