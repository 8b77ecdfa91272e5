"""CT stacks that lie in all kinds of ways through one ellipsoid, whose volume and place are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry

ROWS, COLUMNS = 60, 56
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Measured:
    volume_ml: float
    centre_mm: np.ndarray


@dataclass(frozen=True)
class Ellipsoid:
    """Of +900 HU in -900 HU, with a border as wide as its smaller half axes allow: linear from 1 to 0 across 6 mm."""

    centre_mm: tuple[float, float, float] = (3.0, -2.0, 40.0)
    half_mm: tuple[float, float, float] = (20.0, 16.0, 24.0)

    def share(self, geometry: Geometry) -> np.ndarray:
        """1 inside, 0.5 on the surface, 0 outside; float (rows, columns)."""
        points = points_mm(geometry) - self.centre_mm
        radius = np.linalg.norm(points / self.half_mm, axis=-1)
        return np.clip(0.5 + (1 - radius) * min(self.half_mm) / 6, 0, 1)

    def inside(self, slice: Slice) -> np.ndarray:
        """The true mask."""
        assert slice.geometry is not None
        return (self.share(slice.geometry) >= 0.5).astype(np.uint8)

    def measure(self, slices: Sequence[Slice], masks: Sequence[np.ndarray]) -> Measured:
        """Of masks of the slices, by the distances between them."""
        geometries = [slice.geometry for slice in slices if slice.geometry]
        normal = np.cross(geometries[0].image_orientation[:3], geometries[0].image_orientation[3:])
        along = np.array([np.dot(one.image_position_mm, normal) for one in geometries])
        order = np.argsort(along)
        widths = np.empty(len(along))
        widths[order] = np.gradient(along[order])
        voxels = widths * np.prod(geometries[0].pixel_spacing_mm)
        counts = np.array([mask.sum() for mask in masks])
        sums = sum(
            (
                points_mm(one)[mask > 0].sum(axis=0) * voxel
                for one, mask, voxel in zip(geometries, masks, voxels, strict=True)
            ),
            start=np.zeros(3),
        )
        total = float(counts @ voxels)
        return Measured(total / 1000, sums / total)


def points_mm(geometry: Geometry) -> np.ndarray:
    """Of the pixels' centres, (rows, columns, 3), by PS3.3 C.7.6.2.1.1."""
    along_row, along_column = np.array(geometry.image_orientation).reshape(2, 3)
    rows, columns = np.meshgrid(np.arange(geometry.rows), np.arange(geometry.columns), indexing="ij")
    down_mm, right_mm = geometry.pixel_spacing_mm
    return (
        np.array(geometry.image_position_mm)
        + columns[..., None] * right_mm * along_row
        + rows[..., None] * down_mm * along_column
    )


def _stack(positions_mm: Sequence[np.ndarray], orientation: Sequence[float], spacing_mm=(1.25, 1.25)) -> list[Slice]:
    slices = []
    for position in positions_mm:
        geometry = Geometry(ROWS, COLUMNS, tuple(spacing_mm), 3.0, tuple(position), tuple(orientation))
        stored = np.rint(1800 * Ellipsoid().share(geometry) - 900 + 1024).astype(np.uint16)
        slices.append(Slice(stored, 1.0, -1024.0, None, geometry))
    return slices


def _upright(z_mm: Sequence[float]) -> list[Slice]:
    return _stack([np.array([-31.0, -38.0, z]) for z in z_mm], UPRIGHT)


def _tilted() -> list[Slice]:
    tilt = np.deg2rad(15)
    down = (0.0, np.cos(tilt), -np.sin(tilt))
    return _stack([np.array([-31.0, -36.0, z + 9.0]) for z in np.arange(8, 72, 2.5)], (1.0, 0.0, 0.0, *down))


def _oblique() -> list[Slice]:
    along = np.array([0.9, 0.3, 0.316])
    along /= np.linalg.norm(along)
    down = np.cross([0.1, -0.4, 0.9], along)
    down /= np.linalg.norm(down)
    normal = np.cross(along, down)
    middle = np.array(Ellipsoid().centre_mm) - along * 34 - down * 37
    return _stack([middle + normal * away for away in np.arange(-36, 36, 2.0)], (*along, *down))


STACKS: dict[str, Callable[[], list[Slice]]] = {
    "even": lambda: _upright(np.arange(8, 72, 2.5)),
    "uneven": lambda: _upright(8 + np.cumsum(np.tile([1.5, 2.5, 3.5], 8))),
    "thick": lambda: _upright(np.arange(10, 72, 4.0)),
    "reversed": lambda: _upright(np.arange(72, 8, -2.5)),
    "tilted": _tilted,
    "oblique": _oblique,
}
