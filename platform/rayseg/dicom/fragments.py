"""Encapsulated pixel data (PS3.5 A.4): the bytes of each frame, and whether an RLE frame is one."""

import struct
from itertools import pairwise

from rayseg.records import Reason, Reject

_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_END_OF_IMAGE = b"\xff\xd9"

Span = tuple[int, int]


def split(data: bytes, offset: int, frames: int) -> list[list[Span]] | Reject:
    """Walks the items of the pixel data whose value lies at `offset`.

    Returns:
        For each frame the (start, stop) of its fragments in `data`. TRUNCATED where an item ends beyond the object or
        no delimiter follows; CORRUPT where there is anything but items, or fragments that belong to no frame for sure.
    """
    position, items = offset, []
    while data[position : position + 4] == _ITEM and position + 8 <= len(data):
        stop = position + 8 + struct.unpack_from("<L", data, position + 4)[0]
        items.append((position + 8, stop))
        position = stop
    if position + 4 > len(data):
        return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than its items announce")
    if data[position : position + 4] != _DELIMITER or len(items) < 2:
        return Reject(Reason.CORRUPT, "PixelData: not a sequence of fragments")
    (table_start, table_stop), *fragments = items
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
    count, *offsets = struct.unpack_from("<16L", codestream)
    if count != segments:
        return Reject(Reason.DECODE_FAILED, "PixelData: not as many RLE segments as pixels have bytes")
    if offsets[0] < 64 or any(a >= b for a, b in pairwise([*offsets[:segments], len(codestream)])):
        return Reject(Reason.DECODE_FAILED, "PixelData: RLE segments that do not follow each other")
    return None
