"""PNG files (ISO/IEC 15948): their samples as they are stored, by libpng through imagecodecs."""

import struct
import zlib
from dataclasses import dataclass

import imagecodecs
import numpy as np

from rayseg.dicom import raster
from rayseg.dicom.raster import Raster
from rayseg.records import Reason, Reject

MAGIC = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: grey, colours, palette, grey and alpha, colours and alpha
_PALETTE = 3
_MAX_CHUNKS = 2**18


@dataclass(frozen=True)
class Head:
    """What the chunks say. `data` are places (start, stop) of whole IDAT chunks."""

    rows: int
    columns: int
    bits: int
    colour_type: int
    interlaced: int
    orientation: int
    palette: bytes
    data: list[tuple[int, int]]
    frames: int
    plain: bool  # it has no chunks but IHDR, IDAT and IEND


def head(png: bytes) -> Head | None:
    """Walks the chunks of a file, or of its beginning; None where they do not begin with IHDR."""
    if len(png) < 33 or png[12:16] != b"IHDR":
        return None
    columns, rows, bits, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    at, data, orientation, palette, frames, plain = 33, [], 1, b"", 1, True
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(png):
            break
        length, name = struct.unpack(">I4s", png[at : at + 8])
        body = slice(at + 8, at + 8 + length)
        if name == b"IDAT":
            data.append((at, at + 12 + length))
        elif name == b"IEND":
            break
        elif name == b"PLTE":
            palette = png[body]
        elif name == b"eXIf":
            orientation = raster.exif_orientation(png[body])
        elif name == b"acTL" and length >= 4:
            frames = int.from_bytes(png[at + 8 : at + 12])
        plain &= name == b"IDAT"
        at += 12 + length
    return Head(rows, columns, bits, colour_type, interlaced, orientation, palette, data, frames, plain)


def read(png: bytes, max_pixels: int) -> Raster | Reject:
    """Decodes a file; transparency, gamma and colour profiles do not count."""
    header = head(png)
    if header is None or header.colour_type not in _CHANNELS:
        return Reject(Reason.NOT_AN_IMAGE, "PNG: IHDR")
    if header.rows * header.columns * _CHANNELS[header.colour_type] > max_pixels:
        return Reject(Reason.TOO_LARGE, "the image's width and height")
    if header.frames > 1:
        return Reject(Reason.UNSUPPORTED_MULTIFRAME, "a PNG of several frames")
    if len(header.data) >= _MAX_CHUNKS:
        return Reject(Reason.TOO_LARGE, "PNG: chunks")
    indexed = header.colour_type == _PALETTE
    decoded = imagecodecs.png_decode(png if header.plain and not indexed else _bare(png, header))
    samples = decoded[..., 0] if header.colour_type == 4 else decoded[..., :3] if header.colour_type == 6 else decoded
    if header.bits < 8:  # libpng spreads them over 0 to 255, by repeating their bits
        samples = samples >> np.uint8(8 - header.bits)
    palette = (
        np.frombuffer(header.palette[: len(header.palette) // 3 * 3], np.uint8).reshape(-1, 3) if indexed else None
    )
    return Raster(raster.upright(samples, header.orientation), header.bits, palette)


def _bare(png: bytes, header: Head) -> bytes:
    """The file with its pixels only, a palette's indices as greys: libpng would put transparency and colours in."""
    colour_type = 0 if header.colour_type == _PALETTE else header.colour_type
    ihdr = struct.pack(
        ">4sIIBBBBB", b"IHDR", header.columns, header.rows, header.bits, colour_type, 0, 0, header.interlaced
    )
    pieces = [MAGIC, struct.pack(">I", 13), ihdr, struct.pack(">I", zlib.crc32(ihdr))]
    pieces += [png[start:stop] for start, stop in header.data]
    return b"".join([*pieces, b"\0\0\0\0IEND\xaeB`\x82"])
