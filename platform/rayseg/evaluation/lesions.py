"""Lesions found and missed. A lesion is a connected component of a mask. numpy and scipy only."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Lesions:
    """Numbers of lesions of one or several images; they add up.

    A true lesion is found where at least one of its voxels is predicted; a predicted one is false where it has no true
    voxel. Components are joined across faces, edges and corners (26 neighbours in a volume, 8 in a plane).
    """

    true: int = 0
    found: int = 0
    predicted: int = 0
    false: int = 0

    def __add__(self, other: "Lesions") -> "Lesions":
        return Lesions(
            self.true + other.true,
            self.found + other.found,
            self.predicted + other.predicted,
            self.false + other.false,
        )

    @property
    def f1(self) -> float | None:
        """2 found / (2 found + false + missed); None where there is no lesion, true or predicted."""
        whole = self.found + self.false + self.true
        return 2 * self.found / whole if whole else None


def lesions(prediction: np.ndarray, truth: np.ndarray) -> Lesions:
    """Of two bool masks (slices, rows, columns) of one image; (1, rows, columns) is a plane."""
    everywhere = np.ones((3, 3, 3), bool)
    true_labels, true = ndimage.label(truth, everywhere)
    predicted_labels, predicted = ndimage.label(prediction, everywhere)
    both = truth & prediction
    found, right = (len(np.unique(labels[both])) for labels in (true_labels, predicted_labels))
    return Lesions(true, found, predicted, predicted - right)
