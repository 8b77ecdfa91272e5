"""Distances between the surfaces of two masks of one image, a volume or a plane. numpy and scipy only.

The surface of a mask are its voxels with a neighbour across a face (a pixel: across an edge) that is not of it; beyond
the image nothing is of it. So do MONAI, MedPy and SimpleITK's label contours. Distances are Euclidean, from the centre
of each surface voxel of one mask to the nearest of the other, in the unit of the places: slices may lie at any
distances and be shifted against each other (gaps, gantry tilt). Definitions are those of Maier-Hein, Reinke et al.
2024, Metrics reloaded (doi:10.1038/s41592-023-02151-z).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

_ROUNDING = 1e-6  # of distances: five pixels of 0.4 mm are within 2 mm


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an image lie: voxel (k, row, column) is at origins[k] + row * down + column * right.

    origins: (slices, 3). A plane has one slice.
    down, right: (3,), from one row or column to the next.
    unit: `mm`, or `px` where nothing is known of the pixels' size.
    """

    origins: np.ndarray
    down: np.ndarray
    right: np.ndarray
    unit: str

    def places(self, voxels: np.ndarray) -> np.ndarray:
        """Float (voxels, 3), of indices (voxels, 3)."""
        slices, rows, columns = voxels.T
        return self.origins[slices] + rows[:, np.newaxis] * self.down + columns[:, np.newaxis] * self.right


@dataclass(frozen=True)
class Distances:
    """From each surface voxel of one mask to the nearest of the other, both ways."""

    to_truth: np.ndarray  # from the prediction
    to_prediction: np.ndarray  # from the truth

    @property
    def hd95(self) -> float:
        """The greater of the two 95th percentiles (numpy's, interpolated), the robust Hausdorff distance."""
        return float(max(np.percentile(self.to_truth, 95), np.percentile(self.to_prediction, 95)))

    @property
    def assd(self) -> float:
        """The mean of all distances of both ways, the average symmetric surface distance."""
        return float(np.concatenate([self.to_truth, self.to_prediction]).mean())

    def nsd(self, tolerance: float) -> float:
        """The share of all surface voxels that lie within the tolerance, the normalised surface distance.

        After Nikolov et al. 2021 (doi:10.2196/26151), who weigh surface elements by their area; here each counts once,
        as in MONAI.
        """
        return float((np.concatenate([self.to_truth, self.to_prediction]) <= tolerance + _ROUNDING).mean())


def distances(prediction: np.ndarray, truth: np.ndarray, grid: Grid) -> Distances | None:
    """Of two bool masks (slices, rows, columns) on one grid; None where either is empty."""
    if not prediction.any() or not truth.any():
        return None
    predicted, true = (grid.places(surface(mask)) for mask in (prediction, truth))
    return Distances(KDTree(true).query(predicted)[0], KDTree(predicted).query(true)[0])


def surface(mask: np.ndarray) -> np.ndarray:
    """Indices (voxels, 3) of the surface of a mask (slices, rows, columns); of a single slice its outline."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    part = mask[box]
    connected = ndimage.generate_binary_structure(3, 1)
    if len(mask) == 1:  # above and below a plane there is nothing to tell
        connected[[0, 2]] = False
    inside = ndimage.binary_erosion(part, connected)
    return np.argwhere(part & ~inside) + [side.start for side in box]


def together(values: Sequence[float]) -> float | None:
    """The mean over a case's images; None without any."""
    return float(np.mean(values)) if values else None
