"""Volumes of files that are no DICOM: their axes turned to lie as DICOM's do, their values in the types of a slice.

An axial slice lies as those of DICOM: rows to the back, columns to the left, slices from feet to head. `nifti`, `nrrd`
and `metaimage` read headers, and `volumes` chooses between them.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from rayseg.records import Reason, Reject

MAX_VOXELS = 2**29  # of one volume
GZIP = b"\x1f\x8b"
_CHUNK = 2**18
_BLOCK = 2**12
_MOST = float(np.finfo(np.float32).max)
_ROUNDING = 1e-3  # of labels that are fractions
_FLAT = 1e-6  # of a voxel's volume against that of a box with its sides


@dataclass(frozen=True, eq=False)
class Volume:
    """What a header says; `orientation`, as nibabel has it, turns the stored axes into left, back, head.

    A file may hold several volumes (`count`) of one grid. Numbers of frames go on from one to the next: frame
    `number * slices + index` is slice `index` of volume `number`.
    """

    kind: str  # of the file: NIfTI, NRRD or MetaImage
    dtype: np.dtype  # as stored, with its byte order
    stored: tuple[int, int, int]  # shape, first axis fastest
    orientation: np.ndarray
    affine: np.ndarray  # of the turned axes, to millimetres of DICOM's patient coordinates (LPS); float64 (4, 4)
    placed: bool  # whether the file says so; else position and directions are a guess, good for distances only
    start: int  # of the values in the file, in bytes
    skipped: int = 0  # bytes before the values once what follows `start` is inflated
    encoding: Literal["raw", "deflated", "text"] = "raw"
    count: int = 1
    interleaved: bool = False  # the values of all volumes stand together, voxel by voxel
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the turned axes: columns, rows, slices."""
        of_axis = dict(zip(self.orientation[:, 0].astype(int).tolist(), self.stored, strict=True))
        return of_axis[0], of_axis[1], of_axis[2]

    @property
    def slices(self) -> int:
        """How many axial slices one volume has."""
        return self.shape[2]

    @property
    def inflated_bytes(self) -> int:
        """What must be inflated, and lies in memory, to read the first volume."""
        size = math.prod(self.stored) * self.dtype.itemsize
        return self.skipped + size * (self.count if self.interleaved else 1)

    def numbers(self, frame: int | None) -> tuple[int, int] | Reject:
        """Which volume of the file a frame is in, and which slice of it; None is the only frame of a file."""
        if frame is None and self.slices * self.count > 1:
            return Reject(Reason.UNSUPPORTED_MULTIFRAME, f"a {self.kind} volume of several slices")
        if not 0 <= (frame or 0) < self.slices * self.count:
            return Reject(Reason.MISSING_ATTRIBUTE, f"{self.kind}: fewer slices")
        return divmod(frame or 0, self.slices)

    def place(self, index: int) -> dict[str, Any]:
        """Where axial slice `index`, counted from the feet, lies: columns of a manifest, and values of a `Geometry`."""
        steps = self.affine[:3, :3]
        lengths = np.sqrt((steps * steps).sum(axis=0))
        along_row, along_column = steps[:, 0] / lengths[0], steps[:, 1] / lengths[1]
        return {
            "rows": self.shape[1],
            "columns": self.shape[0],
            "pixel_spacing_mm": (float(lengths[1]), float(lengths[0])),
            "slice_thickness_mm": float(lengths[2]),
            "image_position_mm": tuple((self.affine @ (0, 0, index, 1))[:3].tolist()),
            "image_orientation": (*along_row.tolist(), *along_column.tolist()),
        }


def turned(affine: np.ndarray, stored: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The orientation of a volume and its affine after turning, from the affine of the stored axes (to LPS, mm).

    None where the affine has no volume or no numbers.
    """
    # In plain numbers: numpy takes ten times as long for nine of them, and a catalog reads many headers.
    (a, b, c), (d, e, f), (g, h, i) = affine[:3, :3].tolist()
    volume = abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
    box = math.hypot(a, d, g) * math.hypot(b, e, h) * math.hypot(c, f, i)
    if not volume > _FLAT * box or not np.isfinite(affine).all():
        return None
    orientation = io_orientation(affine)
    if np.isnan(orientation).any():
        return None
    return orientation, affine @ inv_ornt_aff(orientation, stored)


def chosen(volume: Volume | Reject, number: int | None) -> Volume | Reject:
    """The header where it is of one volume, or has the volume `number`, from 0."""
    if isinstance(volume, Reject):
        return volume
    if number is None and volume.count > 1:
        detail = f"{volume.kind}: {volume.count} volumes or channels: keep one, or choose by layout.volume (from 0)"
        return Reject(Reason.UNSUPPORTED_MULTIFRAME, detail)
    if not 0 <= (number or 0) < volume.count:
        return Reject(Reason.MISSING_ATTRIBUTE, f"layout.volume: the file has {volume.count}, counted from 0")
    return volume


def image(data: bytes, volume: Volume | Reject, number: int) -> tuple[np.ndarray, float, float] | Reject:
    """A volume as (slices, rows, columns) uint8, int16, uint16, int32 or float32, with rescale slope and intercept.

    Integers keep their values; where the range of 32 or 64 bits does not fit int32 it is moved there, and where it is
    wider than that they become float32, as all fractions do. In each slice what is no number is the least of the
    slice, as padding is in DICOM, and what is infinite the least or greatest. A volume without numbers is refused.
    """
    if isinstance(volume, Reject):
        return volume
    lying = _values(data, volume, number)
    if isinstance(lying, Reject):
        return lying
    dtype = lying.dtype.newbyteorder("=")
    if dtype.name in ("uint8", "int16", "uint16", "int32"):
        return np.ascontiguousarray(lying, dtype), volume.slope, volume.intercept
    if dtype == np.int8:
        return np.ascontiguousarray(lying, np.int16), volume.slope, volume.intercept
    if dtype.kind in "iu":
        least, greatest = int(lying.min()), int(lying.max())
        moved = 0 if least >= -(2**31) and greatest < 2**31 else int(float(least + 2**31))  # a float, as intercept
        if least - moved >= -(2**31) and greatest - moved < 2**31:
            # The difference is right modulo 2**64, which is all that is left of it in int32.
            stored = lying.astype(np.uint64) - np.uint64(moved % 2**64) if moved else lying
            return np.ascontiguousarray(stored.astype(np.int32)), volume.slope, moved * volume.slope + volume.intercept
    return _fractions(lying, volume)


def labels(data: bytes, volume: Volume | Reject) -> np.ndarray | Reject:
    """A label volume as integers (slices, rows, columns), after slope and intercept; what is no integer is refused."""
    if isinstance(volume, Reject):
        return volume
    if volume.count > 1:
        detail = f"mask: {volume.count} volumes or layers in one {volume.kind} file: save them as one label map"
        return Reject(Reason.UNSUPPORTED_MULTIFRAME, detail)
    lying = _values(data, volume, 0)
    if isinstance(lying, Reject):
        return lying
    if lying.dtype.kind in "iu" and (volume.slope, volume.intercept) == (1.0, 0.0):
        return np.ascontiguousarray(lying, lying.dtype.newbyteorder("="))
    marks = np.empty(lying.shape, np.int32)
    for index, plane in enumerate(lying):
        exact = plane.astype(np.float64) * volume.slope + volume.intercept
        within = np.abs(exact) < 2**31  # not what is no number either
        rounded = np.rint(exact)
        if not within.all() or np.abs(exact - rounded).max() > _ROUNDING:
            return Reject(Reason.UNSUPPORTED_PIXELS, f"mask: {volume.kind} values that are no integers")
        marks[index] = rounded
    return marks


def _fractions(lying: np.ndarray, volume: Volume) -> tuple[np.ndarray, float, float] | Reject:
    """As float32, a slice at a time: no copy of the whole is made but the one that is returned."""
    stored = np.empty(lying.shape, np.float32)
    empty = []
    for index, plane in enumerate(lying):
        numbers = plane[np.isfinite(plane)]
        if not numbers.size:
            empty.append(index)
            continue
        if numbers.size < plane.size:
            least = numbers.min() if volume.slope > 0 else numbers.max()
            plane = np.clip(np.where(np.isnan(plane), least, plane), numbers.min(), numbers.max())
        stored[index] = np.clip(plane, -_MOST, _MOST)  # float64 holds more
    if len(empty) == len(stored):
        return Reject(Reason.UNSUPPORTED_PIXELS, f"{volume.kind}: no finite value")
    if empty:
        others = np.delete(stored, empty, axis=0)
        stored[empty] = others.min() if volume.slope > 0 else others.max()
    return stored, volume.slope, volume.intercept


def _values(data: bytes, volume: Volume, number: int) -> np.ndarray | Reject:
    """One volume of the file as it is stored: (slices, rows, columns), a view of the file's type."""
    voxels = math.prod(volume.stored)
    together = voxels * (volume.count if volume.interleaved else 1)
    first = 0 if volume.interleaved else number * voxels
    begin, length = volume.skipped + first * volume.dtype.itemsize, together * volume.dtype.itemsize
    content = memoryview(data)[volume.start :]
    if volume.encoding == "text":
        try:  # without a count: with one, numpy makes up what is missing
            flat = np.fromstring(bytes(content), volume.dtype.newbyteorder("="), sep=" ")[first : first + together]
        except ValueError:
            return Reject(Reason.CORRUPT, f"{volume.kind}: values that are no numbers")
    else:
        if volume.encoding == "raw":
            content = content[begin : begin + length]
        else:
            content = memoryview(inflated(content, begin, length))
        flat = np.frombuffer(content, volume.dtype, len(content) // volume.dtype.itemsize)
    if len(flat) < together:
        return Reject(Reason.TRUNCATED, f"{volume.kind}: fewer values than its header says, or damaged ones")
    if volume.interleaved:
        flat = flat.reshape(-1, volume.count)[:, number]
    stored = flat.reshape(volume.stored[::-1]).T  # the first axis is the fastest
    lying: np.ndarray = apply_orientation(stored, volume.orientation).transpose(2, 1, 0)
    return lying


def inflated(data: bytes | memoryview, begin: int, length: int) -> bytes | bytearray:
    """`length` bytes from `begin` on of what was deflated (zlib, or gzip in one or more members), or what there is.

    Nothing where the check sum after these bytes is wrong.
    """
    content, view, position, passed = bytearray(), memoryview(data), 0, 0
    # All at once is the fastest, but what a member leaves is copied: after the first, a piece of the file at a time.
    fed_bytes = len(view) if length > _CHUNK else _BLOCK
    try:
        while len(content) < length and position < len(view):
            stream = zlib.decompressobj(32 + zlib.MAX_WBITS)  # zlib or gzip, as the first bytes say
            while len(content) < length and not stream.eof:
                skips = passed < begin
                fed = view[position : position + (_CHUNK if skips else fed_bytes)]
                piece = stream.decompress(fed, min(begin - passed, _CHUNK) if skips else length - len(content))
                if not fed and not piece:
                    return content
                rest = stream.unused_data if stream.eof else stream.unconsumed_tail
                position += len(fed) - len(rest)
                passed += len(piece) if skips else 0
                if len(piece) == length and not skips:
                    return piece if _is_whole(stream, rest) else b""
                content += b"" if skips else piece
            fed_bytes = _CHUNK
    except zlib.error:  # a damaged end, or none of a member: what stands before it is whole
        return content
    return content if len(content) < length or _is_whole(stream, view[position:]) else b""


def _is_whole(stream: Any, rest: bytes | memoryview) -> bool:
    """Whether the check sum is right, where it follows soon."""
    try:
        return stream.eof or stream.decompress(rest[:_BLOCK], _BLOCK) is not None
    except zlib.error:
        return False
