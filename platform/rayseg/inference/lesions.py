"""Lesions: connected parts of a class in a stack of masks, and how large they are."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from rayseg.geometry.stack import Stack

_EVERYWHERE = np.ones((3, 3, 3), bool)  # across faces, edges and corners, as in scores and postprocessing


@dataclass(frozen=True, eq=False)
class Lesion:
    """What is connected across faces, edges or corners of voxels."""

    value: int  # of its class in the masks
    pixels: int
    slices: slice
    inside: np.ndarray  # bool (slices, rows, columns), the box around it

    def volume_ml(self, voxels_mm3: np.ndarray) -> float:
        """By the volume that a pixel of each slice of the stack stands for (`geometry.volume.voxels_mm3`)."""
        pixels = np.count_nonzero(self.inside, axis=(1, 2))
        return float(pixels @ voxels_mm3[self.slices]) / 1000

    def diameter_mm(self, place: Stack) -> float:
        """The greatest distance between two points of its surface.

        The maximum 3D diameter of the IBSI reference manual (arXiv:1612.07003, code L0JK). Marching cubes would put its
        vertices halfway between a voxel of the lesion and one beside it that is not: these are found without making
        triangles of them. Where rows and columns begin does not change a distance.
        """
        padded_SHW = np.pad(self.inside, 1)
        points = []
        for axis in range(3):
            for step in (-1, 1):
                edge_SHW = padded_SHW & ~np.roll(padded_SHW, -step, axis)
                halfway = np.argwhere(edge_SHW).astype(float)
                halfway[:, axis] += step / 2
                points.append(halfway)
        voxels = np.concatenate(points) + np.array([self.slices.start - 1, 0, 0])
        points_mm = place.points_mm(voxels)
        return float(pdist(points_mm[ConvexHull(points_mm).vertices]).max())


def lesions(masks_SHW: np.ndarray, value: int) -> Iterator[Lesion]:
    """The lesions of the class that the masks, uint8 (slices, rows, columns) in order, name by this value."""
    where = ndimage.find_objects((masks_SHW == value).view(np.uint8))
    if not where:
        return
    corner = where[0][0].start
    labels_SHW, _ = ndimage.label(masks_SHW[where[0]] == value, _EVERYWHERE)
    for number, extents in enumerate(ndimage.find_objects(labels_SHW), start=1):
        inside_SHW = labels_SHW[extents] == number
        slices = slice(extents[0].start + corner, extents[0].stop + corner)
        yield Lesion(value, int(np.count_nonzero(inside_SHW)), slices, inside_SHW)
