"""How far the members of an ensemble agree: the mean of the Dice between each two of their masks.

The best simple detector of failed segmentations in the benchmark of Zenk et al. 2025 (doi:10.1016/j.media.2024.103392).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True, eq=False)
class Agreement:
    """Pixels of masks; those of several slices add up, so that a series has the Dice of its volumes.

    sizes: int64 (members, classes), of each member's mask.
    shared: int64 (pairs, classes), of both masks of each pair, in the order of `itertools.combinations`.
    """

    sizes: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(cls, masks: Sequence[np.ndarray], classes: int) -> "Agreement":
        """Of two or more uint8 label maps (rows, columns) with the values 0 to `classes`."""
        return cls(
            np.stack([_counts(mask, classes) for mask in masks]),
            np.stack([_counts(np.where(one == other, one, 0), classes) for one, other in combinations(masks, 2)]),
        )

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.sizes + other.sizes, self.shared + other.shared)

    @property
    def dice(self) -> float:
        """The mean over pairs and classes of 2 * shared / (one + other), 0 to 1.

        Two masks without the class agree that there is none: 1. One with and one without: 0.
        """
        ends = np.array(list(combinations(range(len(self.sizes)), 2)))
        wholes = self.sizes[ends[:, 0]] + self.sizes[ends[:, 1]]
        return float(np.where(wholes > 0, 2 * self.shared / np.maximum(wholes, 1), 1.0).mean())


def _counts(mask: np.ndarray, classes: int) -> np.ndarray:
    counts: np.ndarray = np.bincount(mask.ravel(), minlength=classes + 1)[1:].astype(np.int64)
    return counts
