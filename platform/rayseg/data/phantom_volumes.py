"""Phantom volumes in one file each: the examples of bundles of volumes, which go where no patient's picture may."""

import gzip

import nibabel as nib
import numpy as np

from rayseg.data.volume import VolumePreprocess

# Of the patch's extent, along the normal, the rows and the columns: one window, and several along the normal.
_EXTENTS = ((0.8, 0.7, 0.8), (1.6, 0.8, 0.7))
_COARSER = 1.15  # than the network's grid, so that resampling is part of what is verified
_SLICES_MM = 5.0  # apart, where the network takes slices as they are
_NOISE = 0.1  # of the contrast
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def of_bundle(preprocess: VolumePreprocess) -> list[bytes]:
    """NIfTI volumes (gzipped, int16), the first of them the example: the same for the same spacing, patch and levels.

    Each is an ellipsoid with a brighter one within, in noise. They are as large as little more than a patch, whatever
    the network: a bundle is verified in seconds.
    """
    return [_volume(number, extent, preprocess) for number, extent in enumerate(_EXTENTS)]


def _volume(seed: int, extent: tuple[float, float, float], preprocess: VolumePreprocess) -> bytes:
    depth_mm, row_mm, column_mm = preprocess.spacing_mm
    along = 1.0 if depth_mm is None else _COARSER
    spacing_mm = np.array([depth_mm or _SLICES_MM, row_mm, column_mm]) * (along, _COARSER, _COARSER)
    shape = tuple(
        max(2, round(share * size / coarser))
        for share, size, coarser in zip(extent, preprocess.patch, (along, _COARSER, _COARSER), strict=True)
    )
    places = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    radius = np.linalg.norm(np.stack(places), axis=0)
    within = np.linalg.norm(np.stack(places) - np.array([0.1, 0.2, -0.2])[:, None, None, None], axis=0)
    inside = np.clip(4 * (0.8 - radius), 0, 1) + np.clip(4 * (0.4 - within), 0, 1)
    noise = np.random.default_rng(seed).normal(0, _NOISE, shape)
    mean, deviation = preprocess.intensity.mean, preprocess.intensity.deviation
    level, contrast = (100.0, 100.0) if mean is None or deviation is None else (mean - deviation, deviation)
    values = np.clip(np.rint(level + contrast * (inside + noise)), -32000, 32000).astype(np.int16)
    affine = _LPS_TO_RAS @ np.diag([*spacing_mm[::-1], 1.0])
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm")
    image = nib.Nifti1Image(values.transpose(2, 1, 0), affine, header)
    return gzip.compress(image.to_bytes(), mtime=0)
