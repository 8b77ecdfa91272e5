"""NRRD volumes (.nrrd, .seg.nrrd): what their headers say, by https://teem.sourceforge.net/nrrd/format.html.

pynrrd reads the fields; the values are read as those of other volumes are, as many bytes as the header says.
"""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from nrrd import read_header as read_fields

from rayseg.dicom import voxels
from rayseg.dicom.voxels import Volume
from rayseg.records import Reason, Reject

_MAGIC = b"NRRD000"
_END = re.compile(rb"\r?\n\r?\n")
_TYPES = {
    "int8": ("signed char", "int8_t"),
    "uint8": ("uchar", "unsigned char", "uint8_t"),
    "int16": ("short", "short int", "signed short", "signed short int", "int16_t"),
    "uint16": ("ushort", "unsigned short", "unsigned short int", "uint16_t"),
    "int32": ("int", "signed int", "int32_t"),
    "uint32": ("uint", "unsigned int", "uint32_t"),
    "int64": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64_t"),
    "uint64": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64_t"),
    "float32": ("float",),
    "float64": ("double",),
}
_DTYPES = {name: dtype for dtype, names in _TYPES.items() for name in (dtype, *names)}
_ENCODINGS: dict[str, Literal["raw", "deflated", "text"]] = {
    "raw": "raw",
    **dict.fromkeys(("gzip", "gz"), "deflated"),
    **dict.fromkeys(("text", "txt", "ascii"), "text"),
}
# Of the axes of a space, as DICOM has them: its name, or the letters of it; `-time` adds an axis that is none in space.
_TO_LPS = {
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1, -1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1, -1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps"), (1, 1, 1)),
}
_UNITS_MM = {"": 1.0, "mm": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3, "µm": 1e-3, "μm": 1e-3}
_IN_SPACE = {"domain", "space", "???", "none"}  # kinds of axes, where no directions tell


def is_nrrd(data: bytes) -> bool:
    """Whether the bytes, which may be a file's beginning, are those of an NRRD file, or of its header alone."""
    return data.startswith(_MAGIC)


@lru_cache(maxsize=2)  # of an image and its labels, whose slices come one after the other
def read_header(data: bytes) -> Volume | Reject:
    """The header, from the file or its beginning, whatever the number of volumes."""
    end = _END.search(data)
    lines = data[: end.start() if end else len(data)].decode("utf-8", "replace").split("\n")
    if any(re.match(r"data ?file *:", line) for line in lines):
        return Reject(Reason.UNSUPPORTED_PIXELS, "NRRD: a header whose values lie in another file: save it as one file")
    if end is None:
        return Reject(Reason.TRUNCATED, "NRRD header")
    try:
        return _volume(read_fields([line + "\n" for line in lines]), data, end.end())
    except Exception as error:  # what pynrrd raises on fields that mean nothing, and what is absent
        return Reject(Reason.CORRUPT, f"NRRD: {type(error).__name__}")


def read_volume(data: bytes, number: int | None = None) -> Volume | Reject:
    """The header of a file of one volume, or of several where `number`, from 0, chooses one."""
    return voxels.chosen(read_header(data), number)


def image(data: bytes, number: int = 0) -> tuple[np.ndarray, float, float] | Reject:
    """Volume `number` of the file as `voxels.image` gives it."""
    return voxels.image(data, read_volume(data, number), number)


def labels(data: bytes) -> np.ndarray | Reject:
    """A label volume as `voxels.labels` gives it."""
    return voxels.labels(data, read_header(data))


def _volume(fields: Mapping[str, Any], data: bytes, start: int) -> Volume | Reject:
    name = _DTYPES.get(str(fields["type"]).lower())
    if name is None:
        return Reject(Reason.UNSUPPORTED_PIXELS, "NRRD: type")
    encoding = _ENCODINGS.get(str(fields["encoding"]).lower())
    if encoding is None:
        return Reject(Reason.UNSUPPORTED_PIXELS, "NRRD: encoding (raw, gzip or text expected)")
    dtype = np.dtype(name)
    if dtype.itemsize > 1 and encoding != "text":
        dtype = np.dtype({"little": "<", "big": ">"}[str(fields["endian"]).lower()] + dtype.str[1:])
    sizes = [int(size) for size in fields["sizes"]]
    if len(sizes) != fields["dimension"] or min(sizes) < 1:
        return Reject(Reason.CORRUPT, "NRRD: sizes")
    directions = _directions(fields, len(sizes))
    in_space = [place for place, direction in enumerate(directions) if direction is not None]
    first, last = (in_space[0], in_space[-1]) if in_space else (0, 0)
    if len(in_space) not in (2, 3) or last - first + 1 != len(in_space) or (first and last + 1 < len(sizes)):
        return Reject(Reason.UNSUPPORTED_PIXELS, "NRRD: two or three axes in space expected, and others on one side")
    lengths = [sizes[place] for place in in_space] + [1]
    stored = (lengths[0], lengths[1], lengths[2])
    if math.prod(sizes if first else stored) > voxels.MAX_VOXELS:
        return Reject(Reason.TOO_LARGE, "NRRD: sizes")
    affine, placed = _affine(fields, [one for one in directions if one is not None])
    turned = None if affine is None else voxels.turned(affine, stored)
    if turned is None:
        return Reject(Reason.CORRUPT, "NRRD: space directions, space origin or space units")
    lines, skipped = (int(fields.get(f"{what} skip", fields.get(f"{what}skip", 0))) for what in ("line", "byte"))
    for _ in range(lines):
        start = data.index(b"\n", start) + 1
    if skipped < 0:  # the values stand at the end
        start, skipped = max(len(data) - math.prod(sizes) * dtype.itemsize, start), 0
    return Volume(
        kind="NRRD",
        dtype=dtype,
        stored=stored,
        orientation=turned[0],
        affine=turned[1],
        placed=placed,
        start=start,
        skipped=skipped,
        encoding=encoding,
        count=math.prod(sizes) // math.prod(stored),
        interleaved=first > 0,
    )


def _directions(fields: Mapping[str, Any], axes: int) -> list[np.ndarray | None]:
    """Of each axis the way to its next value, in the file's space; None of axes that are none in space."""
    if "space directions" in fields:
        ways = [np.asarray(way, np.float64) for way in fields["space directions"]]
        return [None if np.isnan(way).any() or not way[:3].any() else way[:3] for way in ways]
    kinds = [str(kind).lower() for kind in fields.get("kinds", [])] or ["domain"] * min(axes, 3) + ["list"] * (axes - 3)
    spacings = fields.get("spacings", np.ones(axes))
    directions: list[np.ndarray | None] = [None] * axes
    for number, place in enumerate([place for place, kind in enumerate(kinds) if kind in _IN_SPACE][:3]):
        way = np.zeros(3)
        way[number] = spacings[place] if np.isfinite(spacings[place]) else 1.0
        directions[place] = way
    return directions


def _affine(fields: Mapping[str, Any], directions: list[np.ndarray]) -> tuple[np.ndarray | None, bool]:
    """To millimetres of DICOM's coordinates, and whether the header says so; None where the fields mean nothing."""
    signs = _TO_LPS.get(re.sub("(-time|(?<=^...)t)$", "", str(fields.get("space", "")).lower()))
    origin = fields.get("space origin")
    placed = signs is not None and origin is not None and len(directions[0]) == 3 and "space directions" in fields
    affine = np.eye(4)
    for place, way in enumerate(directions):
        affine[: len(way), place] = way
    if len(directions) == 2:  # one slice
        across = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = across / np.linalg.norm(across)
    if origin is not None:
        affine[: len(origin[:3]), 3] = origin[:3]
    units = [_UNITS_MM.get(str(unit).strip('" ').lower()) for unit in fields.get("space units", [])][:3]
    if None in units:
        return None, False
    for place, (unit, sign) in enumerate(zip([*units, *[1.0] * 3][:3], signs or (1, 1, 1), strict=True)):
        assert unit is not None
        affine[place] *= unit * sign
    return affine, placed
