"""MetaImage volumes (.mha): what their headers say, by https://itk.org/Wiki/ITK/MetaIO/Documentation.

As ITK reads them: Offset and TransformMatrix are in DICOM's coordinates (LPS), and AnatomicalOrientation, which only
tells of them, is not looked at.
"""

import math
import re
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from rayseg.dicom import voxels
from rayseg.dicom.voxels import Volume
from rayseg.records import Reason, Reject

_BEGINNING = re.compile(rb"\s*(ObjectType|NDims|Comment|ObjectSubType|TransformType|Name|ID)\s*=")
_MOST_BYTES = 2**16
_LINE = re.compile(rb"[ \t]*([A-Za-z_][\w\[\]]*)[ \t]*=[ \t]*([^\r\n]*?)[ \t]*\r?\n")
_DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # of 4 bytes everywhere
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_POSITION = ("Offset", "Position", "Origin")
_TURN = ("TransformMatrix", "Rotation", "Orientation")


def is_metaimage(data: bytes) -> bool:
    """Whether the bytes, which may be a file's beginning, are those of a MetaImage, or of its header alone."""
    return _BEGINNING.match(data[:256]) is not None and b"NDims" in data[:4096]


@lru_cache(maxsize=2)  # of an image and its labels, whose slices come one after the other
def read_header(data: bytes) -> Volume | Reject:
    """The header, from the file or its beginning, whatever the number of volumes."""
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        line = _LINE.match(data, start, start + _MOST_BYTES)
        if line is None:
            return Reject(Reason.TRUNCATED, "MetaImage header")
        fields[line[1].decode()] = line[2].decode("ascii", "replace")
        start = line.end()
    if fields["ElementDataFile"].upper() != "LOCAL":
        detail = "MetaImage: a header whose values lie in another file (.mhd): save it as .mha"
        return Reject(Reason.UNSUPPORTED_PIXELS, detail)
    try:
        return _volume(fields, start)
    except (ValueError, KeyError, IndexError) as error:
        return Reject(Reason.CORRUPT, f"MetaImage: {type(error).__name__}")


def read_volume(data: bytes, number: int | None = None) -> Volume | Reject:
    """The header of a file of one volume, or of several where `number`, from 0, chooses one."""
    return voxels.chosen(read_header(data), number)


def image(data: bytes, number: int = 0) -> tuple[np.ndarray, float, float] | Reject:
    """Volume `number` of the file as `voxels.image` gives it."""
    return voxels.image(data, read_volume(data, number), number)


def labels(data: bytes) -> np.ndarray | Reject:
    """A label volume as `voxels.labels` gives it."""
    return voxels.labels(data, read_header(data))


def _volume(fields: Mapping[str, str], start: int) -> Volume | Reject:
    sizes = [int(size) for size in fields["DimSize"].split()]
    axes = int(fields["NDims"])
    if len(sizes) != axes or axes not in (2, 3, 4) or min(sizes) < 1:
        return Reject(Reason.CORRUPT, "MetaImage: NDims, DimSize")
    channels = int(fields.get("ElementNumberOfChannels", 1))
    if fields["ElementType"] not in _DTYPES or channels < 1 or (channels > 1 and axes == 4):
        return Reject(Reason.UNSUPPORTED_PIXELS, "MetaImage: ElementType, ElementNumberOfChannels")
    stored = (sizes[0], sizes[1], sizes[2] if axes > 2 else 1)
    if math.prod(stored) * channels > voxels.MAX_VOXELS:
        return Reject(Reason.TOO_LARGE, "MetaImage: DimSize, ElementNumberOfChannels")
    big = _is_true(fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")))
    deflated = _is_true(fields.get("CompressedData", "False"))
    text = not deflated and not _is_true(fields.get("BinaryData", "True"))
    affine, placed = _affine(fields, axes)
    turned = voxels.turned(affine, stored)
    if turned is None:
        return Reject(Reason.CORRUPT, "MetaImage: TransformMatrix, Offset or ElementSpacing")
    return Volume(
        kind="MetaImage",
        dtype=np.dtype((">" if big else "<") + _DTYPES[fields["ElementType"]]),
        stored=stored,
        orientation=turned[0],
        affine=turned[1],
        placed=placed,
        start=start,
        encoding="deflated" if deflated else "text" if text else "raw",
        count=channels * (sizes[3] if axes == 4 else 1),
        interleaved=channels > 1,
    )


def _affine(fields: Mapping[str, str], axes: int) -> tuple[np.ndarray, bool]:
    """To millimetres of DICOM's coordinates, and whether the header says so."""
    affine = np.eye(4)
    position = next((_numbers(fields[name], axes) for name in _POSITION if name in fields), None)
    turn = next((_numbers(fields[name], axes * axes) for name in _TURN if name in fields), None)
    spacing = next((_numbers(fields[name], axes) for name in ("ElementSpacing", "ElementSize") if name in fields), None)
    kept = min(axes, 3)
    if turn is not None:  # the direction of one axis after the other
        affine[:kept, :kept] = turn.reshape(axes, axes).T[:kept, :kept]
    if spacing is not None:
        affine[:kept, :kept] *= spacing[:kept]
    if position is not None:
        affine[:kept, 3] = position[:kept]
    return affine, axes > 2 and position is not None and turn is not None


def _numbers(text: str, count: int) -> np.ndarray:
    numbers = np.array([float(word) for word in text.split()])
    if len(numbers) != count:
        raise ValueError(f"{count} numbers expected")
    return numbers


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("true", "1", "yes")
