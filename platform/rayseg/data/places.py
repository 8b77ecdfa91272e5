"""Places: where in a volume the classes are, a bounded sample of the voxels of each."""

import numpy as np

MOST = 1024  # voxels of a class that are kept
_PRUNED = 8  # times as many are gathered before the rest is left out
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class Places:
    """Gathers voxels plane by plane: of each class those whose numbers have the least hashes.

    That is a sample as good as a random one, and a function of the label map alone.
    """

    def __init__(self, classes: int) -> None:
        """`classes` without the background."""
        self.counts = np.zeros(classes + 1, np.int64)  # voxels of each class, the background's not counted
        self._voxels: list[list[np.ndarray]] = [[] for _ in range(classes)]

    def add(self, depth: int, mask_HW: np.ndarray) -> None:
        """Plane `depth` of the volume: uint8 classes."""
        inside = np.flatnonzero(mask_HW)
        if not len(inside):
            return
        labels = mask_HW.ravel()[inside]
        self.counts += np.bincount(labels, minlength=len(self.counts))
        voxels = depth * mask_HW.size + inside
        for value in np.flatnonzero(np.bincount(labels)).tolist():
            of_class = self._voxels[value - 1]
            of_class.append(voxels[labels == value])
            if sum(map(len, of_class)) > _PRUNED * MOST:
                of_class[:] = [_least(np.concatenate(of_class))]

    def voxels(self) -> list[np.ndarray]:
        """Of each class the voxels, int64 numbers in C order, ascending; MOST at most."""
        return [np.sort(_least(np.concatenate(one))) if one else np.zeros(0, np.int64) for one in self._voxels]


def _least(voxels: np.ndarray) -> np.ndarray:
    """Those with the least hashes (splitmix64; Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195)."""
    if len(voxels) <= MOST:
        return voxels
    with np.errstate(over="ignore"):
        mixed = (voxels.astype(np.uint64) + np.uint64(1)) * _MIX[0]
        for shift, factor in zip(_SHIFTS, _MIX[1:], strict=False):
            mixed = (mixed ^ (mixed >> shift)) * factor
        mixed ^= mixed >> _SHIFTS[2]
    return voxels[np.argpartition(mixed, MOST)[:MOST]]
