"""NIfTI volumes (.nii, .nii.gz) as axial slices that lie as those of DICOM do: rows to the back, columns to the left.

nibabel says what a header means, how the stored axes are turned, and which place holds where a file gives none.
"""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from nibabel import Nifti1Header, Nifti2Header, imageglobals
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from rayseg.records import Reason, Reject

_HEADERS = {b"n+1\0": (344, 352, Nifti1Header), b"n+2\0": (4, 544, Nifti2Header)}  # magic: its place, bytes before data
_BEGINNING = 544
_MAX_VOXELS = 2**29
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI's coordinates run to the right and the front
# The header is checked here, by reasons; nibabel would log what it mends.
imageglobals.error_level, imageglobals.log_level = 100, 100


@dataclass(frozen=True, eq=False)
class Volume:
    """What a header says; `orientation`, as nibabel has it, turns the stored axes into left, back, head."""

    dtype: np.dtype
    stored: tuple[int, int, int]  # shape
    offset: int
    slope: float
    intercept: float
    orientation: np.ndarray
    affine: np.ndarray  # of the turned axes, to millimetres of DICOM's patient coordinates; float64 (4, 4)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the turned axes: columns, rows, slices."""
        of_axis = dict(zip(self.orientation[:, 0].astype(int).tolist(), self.stored, strict=True))
        return of_axis[0], of_axis[1], of_axis[2]

    @property
    def slices(self) -> int:
        """How many axial slices there are."""
        return self.shape[2]

    def place(self, index: int) -> dict[str, Any]:
        """Where axial slice `index`, counted from the feet, lies: columns of a manifest, and values of a `Geometry`."""
        steps = self.affine[:3, :3]
        lengths = np.linalg.norm(steps, axis=0)
        along_row, along_column = steps[:, 0] / lengths[0], steps[:, 1] / lengths[1]
        return {
            "rows": self.shape[1],
            "columns": self.shape[0],
            "pixel_spacing_mm": (float(lengths[1]), float(lengths[0])),
            "slice_thickness_mm": float(lengths[2]),
            "image_position_mm": tuple((self.affine @ (0, 0, index, 1))[:3].tolist()),
            "image_orientation": (*along_row.tolist(), *along_column.tolist()),
        }


def is_nifti(data: bytes) -> bool:
    """Whether the bytes, which may be a file's beginning, are those of a single-file NIfTI volume."""
    beginning = _inflated(data, _BEGINNING)
    return any(beginning[place : place + 4] == magic for magic, (place, _, _) in _HEADERS.items())


@lru_cache(maxsize=2)  # of an image and its labels, whose slices come one after the other
def read_volume(data: bytes) -> Volume | Reject:
    """The header, from the file or its beginning."""
    beginning = _inflated(data, _BEGINNING)
    size, form = next(
        ((size, form) for magic, (place, size, form) in _HEADERS.items() if beginning[place : place + 4] == magic),
        (0, None),
    )
    if form is None or len(beginning) < size:
        return Reject(Reason.TRUNCATED, "NIfTI header")
    try:
        header = form.from_fileobj(BytesIO(beginning), check=False)
        dimensions = [int(value) for value in header["dim"]]
        if not 2 <= dimensions[0] <= 7 or min(dimensions[1 : dimensions[0] + 1]) < 1:
            return Reject(Reason.CORRUPT, "NIfTI: dim")
        if math.prod(dimensions[4 : dimensions[0] + 1]) > 1:
            return Reject(Reason.UNSUPPORTED_MULTIFRAME, "NIfTI: several volumes in one file")
        shape = (dimensions[1], dimensions[2], dimensions[3] if dimensions[0] > 2 else 1)
        if math.prod(shape) > _MAX_VOXELS:
            return Reject(Reason.TOO_LARGE, "NIfTI: dim")
        try:
            dtype = header.get_data_dtype()
        except KeyError:
            dtype = np.dtype("V1")
        if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype == np.uint64:
            return Reject(Reason.UNSUPPORTED_PIXELS, "NIfTI: datatype")
        header.set_data_shape(shape)
        affine = _TO_LPS @ header.get_best_affine()
        offset = float(header["vox_offset"])
        if not (np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 1e-12 and size <= offset < 2**24):
            return Reject(Reason.CORRUPT, "NIfTI: the affine transform or vox_offset")
        slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
        scaled = math.isfinite(slope) and slope != 0 and math.isfinite(intercept)
        orientation = io_orientation(affine)
        if np.isnan(orientation).any():
            return Reject(Reason.CORRUPT, "NIfTI: the affine transform or vox_offset")
        turned = affine @ inv_ornt_aff(orientation, shape)
    except Exception as error:  # nibabel raises several types on headers that mean nothing
        return Reject(Reason.CORRUPT, f"NIfTI: {type(error).__name__}")
    return Volume(
        dtype, shape, int(offset), slope if scaled else 1.0, intercept if scaled else 0.0, orientation, turned
    )


@lru_cache(maxsize=1)  # its slices come one after the other
def image(data: bytes) -> tuple[np.ndarray, float, float] | Reject:
    """The volume as (slices, rows, columns) uint8, int16, uint16 or int32, with its rescale slope and intercept.

    Values of other types are spread over 16 bits, from the least of the volume to its greatest; what is no number
    becomes the least.
    """
    found = _values(data)
    if isinstance(found, Reject):
        return found
    values, slope, intercept = found
    if values.dtype.name in ("uint8", "int16", "uint16", "int32"):
        return values, slope, intercept
    if values.dtype == np.int8:
        return values.astype(np.int16), slope, intercept
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return Reject(Reason.UNSUPPORTED_PIXELS, "NIfTI: no finite value")
    low, high = float(values.min(where=finite, initial=np.inf)), float(values.max(where=finite, initial=-np.inf))
    step = (high - low) / 65535 or 1.0
    stored = np.rint((np.where(finite, values, low) - low) / step).astype(np.uint16)
    return stored, step * slope, low * slope + intercept


@lru_cache(maxsize=1)
def labels(data: bytes) -> np.ndarray | Reject:
    """The volume as (slices, rows, columns) integers; values that are none are refused."""
    found = _values(data)
    if isinstance(found, Reject):
        return found
    values, slope, intercept = found
    if values.dtype.kind in "iu" and (slope, intercept) == (1.0, 0.0):
        return values
    exact = values.astype(np.float64) * slope + intercept
    rounded = np.rint(exact)
    if not np.allclose(exact, rounded, rtol=0, atol=1e-3) or np.abs(rounded).max() >= 2**31:
        return Reject(Reason.UNSUPPORTED_PIXELS, "mask: NIfTI values that are no integers")
    return rounded.astype(np.int32)


def _values(data: bytes) -> tuple[np.ndarray, float, float] | Reject:
    """The stored values as (slices, rows, columns), slope and intercept."""
    volume = read_volume(data)
    if isinstance(volume, Reject):
        return volume
    count = math.prod(volume.stored)
    end = volume.offset + count * volume.dtype.itemsize
    content = _inflated(data, end)
    if len(content) < end:
        return Reject(Reason.TRUNCATED, "NIfTI: fewer bytes than dim needs")
    stored = np.frombuffer(content, volume.dtype, count, volume.offset).reshape(volume.stored, order="F")
    turned = apply_orientation(stored, volume.orientation)
    values = np.ascontiguousarray(turned.transpose(2, 1, 0)).astype(volume.dtype.newbyteorder("="), copy=False)
    return values, volume.slope, volume.intercept


def _inflated(data: bytes, length: int) -> bytes:
    """The first `length` bytes of the volume, or as many as there are."""
    if not data.startswith(b"\x1f\x8b"):
        return data[:length]
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, length)
    except zlib.error:
        return b""
