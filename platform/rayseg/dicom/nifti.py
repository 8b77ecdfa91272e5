"""NIfTI-1 volumes (.nii, .nii.gz) as axial slices that lie as those of DICOM do: rows to the back, columns to the left.

https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h says how; where a file gives no place, nibabel's rules hold.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from rayseg.records import Reason, Reject

_HEADER_BYTES = 352
_MAX_VOXELS = 2**29
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8"}
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI's coordinates run to the right and the front


@dataclass(frozen=True, eq=False)
class Volume:
    """What a header says; `order` and `flipped` turn the stored axes into left, back, head."""

    dtype: np.dtype
    shape: tuple[int, int, int]  # as stored
    offset: int
    slope: float
    intercept: float
    order: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    affine: np.ndarray  # of the turned axes, to millimetres of DICOM's patient coordinates; float64 (4, 4)

    @property
    def slices(self) -> int:
        """How many axial slices there are."""
        return self.shape[self.order[2]]

    def place(self, index: int) -> dict[str, Any]:
        """Where axial slice `index`, counted from the feet, lies: the columns of a manifest that say so."""
        steps = self.affine[:3, :3]
        lengths = np.linalg.norm(steps, axis=0)
        along_row, along_column = steps[:, 0] / lengths[0], steps[:, 1] / lengths[1]
        return {
            "rows": self.shape[self.order[1]],
            "columns": self.shape[self.order[0]],
            "pixel_spacing_mm": [float(lengths[1]), float(lengths[0])],
            "slice_thickness_mm": float(lengths[2]),
            "image_position_mm": (self.affine @ (0, 0, index, 1))[:3].tolist(),
            "image_orientation": [*along_row.tolist(), *along_column.tolist()],
        }


def is_nifti(data: bytes) -> bool:
    """Whether the bytes, which may be a file's beginning, are those of a single-file NIfTI-1 volume."""
    return _beginning(data)[344:348] == b"n+1\0"


def read_volume(data: bytes) -> Volume | Reject:
    """The header, from the file or its beginning."""
    header = _beginning(data)
    if len(header) < _HEADER_BYTES:
        return Reject(Reason.TRUNCATED, "NIfTI header")
    order = "<" if struct.unpack_from("<i", header)[0] == 348 else ">"
    if struct.unpack_from(order + "i", header)[0] != 348:
        return Reject(Reason.CORRUPT, "NIfTI: sizeof_hdr")
    dimensions = struct.unpack_from(order + "8h", header, 40)
    if not 2 <= dimensions[0] <= 7 or min(dimensions[1 : dimensions[0] + 1]) < 1:
        return Reject(Reason.CORRUPT, "NIfTI: dim")
    if math.prod(dimensions[4 : dimensions[0] + 1]) > 1:
        return Reject(Reason.UNSUPPORTED_MULTIFRAME, "NIfTI: several volumes in one file")
    shape = (dimensions[1], dimensions[2], dimensions[3] if dimensions[0] > 2 else 1)
    if math.prod(shape) > _MAX_VOXELS:
        return Reject(Reason.TOO_LARGE, "NIfTI: dim")
    datatype = struct.unpack_from(order + "h", header, 70)[0]
    if datatype not in _TYPES:
        return Reject(Reason.UNSUPPORTED_PIXELS, "NIfTI: datatype")
    affine = _affine(header, order, shape)
    offset, slope, intercept = struct.unpack_from(order + "3f", header, 108)
    if affine is None or not _HEADER_BYTES <= offset < 2**24:
        return Reject(Reason.CORRUPT, "NIfTI: the affine transform or vox_offset")
    scaled = math.isfinite(slope) and slope != 0 and math.isfinite(intercept)
    return _turned(
        np.dtype(order + _TYPES[datatype]), shape, int(offset), slope if scaled else 1.0, intercept if scaled else 0.0,
        _TO_LPS @ affine,
    )  # fmt: skip


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
    count = math.prod(volume.shape)
    end = volume.offset + count * volume.dtype.itemsize
    content = _inflated(data, end)
    if len(content) < end:
        return Reject(Reason.TRUNCATED, "NIfTI: fewer bytes than dim needs")
    stored = np.frombuffer(content, volume.dtype, count, volume.offset).reshape(volume.shape, order="F")
    turned = stored.transpose(volume.order)[tuple(slice(None, None, -1 if flip else 1) for flip in volume.flipped)]
    values = np.ascontiguousarray(turned.transpose(2, 1, 0)).astype(volume.dtype.newbyteorder("="), copy=False)
    return values, volume.slope, volume.intercept


def _beginning(data: bytes) -> bytes:
    return _inflated(data, _HEADER_BYTES)


def _inflated(data: bytes, length: int) -> bytes:
    """The first `length` bytes of the volume, or as many as there are."""
    if not data.startswith(b"\x1f\x8b"):
        return data[:length]
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, length)
    except zlib.error:
        return b""


def _affine(header: bytes, order: str, shape: tuple[int, int, int]) -> np.ndarray | None:
    """From indices to millimetres to the right, front and head: the sform, else the qform, else spacing alone."""
    spacing = np.abs(struct.unpack_from(order + "3f", header, 80)).astype(np.float64)
    qform_code, sform_code = struct.unpack_from(order + "2h", header, 252)
    affine = np.eye(4)
    if sform_code > 0:
        affine[:3] = np.reshape(struct.unpack_from(order + "12f", header, 280), (3, 4))
    elif qform_code > 0:
        b, c, d = (float(value) for value in struct.unpack_from(order + "3f", header, 256))
        a = math.sqrt(max(0.0, 1.0 - (b * b + c * c + d * d)))
        turn = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        handedness = -1.0 if struct.unpack_from(order + "f", header, 76)[0] < 0 else 1.0
        affine[:3, :3] = turn * (spacing * (1, 1, handedness))
        affine[:3, 3] = struct.unpack_from(order + "3f", header, 268)
    else:  # radiological order, the middle of the volume at the origin
        affine[:3, :3] = np.diag(spacing * (-1, 1, 1))
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    usable = np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 1e-12
    return affine if usable else None


def _turned(
    dtype: np.dtype, shape: tuple[int, int, int], offset: int, slope: float, intercept: float, affine: np.ndarray
) -> Volume:
    """Finds for each of left, back and head the stored axis that runs along it most."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    _, axes = linear_sum_assignment(-np.abs(directions))
    order = (int(axes[0]), int(axes[1]), int(axes[2]))
    flipped = tuple(bool(directions[world, axis] < 0) for world, axis in enumerate(order))
    turn = np.zeros((4, 4))  # from turned indices to stored ones
    turn[3, 3] = 1
    for world, axis in enumerate(order):
        turn[axis, world] = -1 if flipped[world] else 1
        turn[axis, 3] = shape[axis] - 1 if flipped[world] else 0
    return Volume(dtype, shape, offset, slope, intercept, order, (flipped[0], flipped[1], flipped[2]), affine @ turn)
