"""Encapsulated pixel data (PS3.5 A.4): the bytes of each frame, and what its codestream asks of a decoder.

A decoder allocates and works by what the codestream declares, not by what the data set does, and nothing in this
process can stop it once it runs: so what it would have to do is checked before.
"""

import struct
from itertools import pairwise

from rayseg.records import Reason, Reject

MAX_SCANS = 64  # of a JPEG, each a pass over the whole image; progressive ones have about ten
MAX_TILES = 1024  # of a JPEG 2000, kilobytes each to a decoder; with tiles of 256 x 256 they make the largest frame

_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_SIZ = b"\xff\x4f\xff\x51"  # how a JPEG 2000 codestream begins: SOC and SIZ
_END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"

Span = tuple[int, int]


def split(data: bytes, offset: int, frames: int) -> list[list[Span]] | Reject:
    """Walks the items of the pixel data whose value lies at `offset`.

    Returns:
        For each frame the (start, stop) of its fragments in `data`. TRUNCATED where an item ends beyond the object or
        no delimiter follows; CORRUPT where there is anything but items, or fragments that belong to no frame for sure.
    """
    position, found = offset, []
    while data[position : position + 4] == _ITEM and position + 8 <= len(data):
        stop = position + 8 + struct.unpack_from("<L", data, position + 4)[0]
        found.append((position + 8, stop))
        position = stop
    if position + 4 > len(data):
        return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than its items announce")
    if data[position : position + 4] != _DELIMITER or len(found) < 2:
        return Reject(Reason.CORRUPT, "PixelData: not a sequence of fragments")
    (table_start, table_stop), *fragments = found
    if frames == 1:
        return [fragments]
    if len(fragments) == frames:  # by far the most common; the extended offset table demands it
        return [[fragment] for fragment in fragments]
    table = data[table_start : table_stop - (table_stop - table_start) % 4]
    firsts = _by_table(fragments, table, frames) or _by_marker(data, fragments, frames)
    if firsts is None:
        return Reject(Reason.CORRUPT, "PixelData: not as many frames as NumberOfFrames says")
    return [fragments[first:end] for first, end in pairwise([*firsts, len(fragments)])]


def _by_table(fragments: list[Span], table: bytes, frames: int) -> list[int] | None:
    """The first fragment of each frame by the basic offset table, which counts from the first fragment's item."""
    origin = fragments[0][0]
    places = {start - origin: place for place, (start, _) in enumerate(fragments)}
    firsts = [places.get(offset, -1) for (offset,) in struct.iter_unpack("<L", table)]
    ascending = all(a < b for a, b in pairwise(firsts))
    return firsts if len(firsts) == frames and firsts[0] == 0 and ascending else None


def _by_marker(data: bytes, fragments: list[Span], frames: int) -> list[int] | None:
    """The same by the marker at the end of a JPEG or JPEG 2000 codestream, perhaps with a byte of padding after it."""
    lasts = [
        place for place, (start, stop) in enumerate(fragments) if _END_OF_IMAGE in data[max(start, stop - 4) : stop]
    ]
    whole = len(lasts) == frames and lasts[-1] == len(fragments) - 1
    return [0, *(last + 1 for last in lasts[:-1])] if whole else None


def rle_refusal(codestream: bytes, segments: int) -> Reject | None:
    """Why an RLE frame (PS3.5 annex G) is not to be decoded, or None: the decoder panics on a header that misleads."""
    if len(codestream) < 64:
        return Reject(Reason.DECODE_FAILED, "PixelData: no RLE header")
    found, *offsets = struct.unpack_from("<16L", codestream)
    if found != segments:
        return Reject(Reason.DECODE_FAILED, "PixelData: not as many RLE segments as pixels have bytes")
    if offsets[0] < 64 or any(a >= b for a, b in pairwise([*offsets[:segments], len(codestream)])):
        return Reject(Reason.DECODE_FAILED, "PixelData: RLE segments that do not follow each other")
    return None


def refusal(codestream: bytes, rows: int, columns: int, samples: int) -> Reject | None:
    """Why a JPEG, JPEG-LS or JPEG 2000 codestream is not to be decoded, or None.

    DECODE_FAILED where it is none, or has not the size or the number of components that the data set says; TOO_LARGE
    for more scans or tiles than MAX_SCANS and MAX_TILES.
    """
    declared: tuple[int, int, int] | None
    siz = codestream.find(_SIZ)  # perhaps in a JP2 wrapper
    if siz >= 0 and len(codestream) >= siz + 42:
        (x_end, y_end, x_start, y_start, width, height, tiles_x, tiles_y, components) = struct.unpack_from(
            ">8LH", codestream, siz + 8
        )  # ISO 15444-1 A.5.1
        declared = (y_end - y_start, x_end - x_start, components)
        many = "tiles" if _tiles(x_end - tiles_x, width) * _tiles(y_end - tiles_y, height) > MAX_TILES else None
    else:
        declared = _start_of_frame(codestream)
        many = "scans" if codestream.count(_START_OF_SCAN) > MAX_SCANS else None
    if declared is None:
        return Reject(Reason.DECODE_FAILED, "PixelData: no image header in the codestream")
    if declared[:2] != (rows, columns):
        return Reject(Reason.DECODE_FAILED, "PixelData: the codestream has not the size of Rows and Columns")
    if declared[2] != samples:
        return Reject(Reason.DECODE_FAILED, "PixelData: the codestream has not SamplesPerPixel components")
    return Reject(Reason.TOO_LARGE, f"PixelData: {many} of the codestream") if many else None


def _tiles(extent: int, size: int) -> int:
    return -(-extent // size) if size else MAX_TILES + 1


def _start_of_frame(codestream: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components of a JPEG or JPEG-LS codestream."""
    position = 2
    while codestream[:2] == b"\xff\xd8" and position + 10 <= len(codestream) and codestream[position] == 0xFF:
        marker = codestream[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, components = struct.unpack_from(">HHB", codestream, position + 5)
            return rows, columns, components
        else:
            position += 2 + struct.unpack_from(">H", codestream, position + 2)[0]
    return None
