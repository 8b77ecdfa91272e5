"""What a JPEG, JPEG-LS or JPEG 2000 codestream declares: it counts, and not what the data set says of it.

PS3.5 8.2.1 to 8.2.4 and A.4: the codestream says how many components there are, how they lie, how wide they are and,
for JPEG 2000, whether they have a sign. Its kind is told by its own first bytes, whatever the transfer syntax.

A decoder allocates and works by what the codestream declares, and nothing in this process can stop it once it runs: so
what it would have to do is checked before.
"""

import struct
from dataclasses import dataclass
from typing import Literal

from rayseg.records import Reason, Reject

MAX_SCANS = 64  # of a JPEG, each a pass over the whole image; progressive ones have about ten
MAX_TILES = 1024  # of a JPEG 2000, kilobytes each to a decoder; with tiles of 256 x 256 they make the largest frame

END_OF_IMAGE = b"\xff\xd9"  # of JPEG and JPEG-LS; JPEG 2000 has the same
_START_OF_IMAGE, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"
_SIZ = b"\xff\x4f\xff\x51"  # how a JPEG 2000 codestream begins: SOC and SIZ
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_NO_HEADER = Reject(Reason.DECODE_FAILED, "PixelData: no image header in the codestream")

Kind = Literal["JPEG", "JPEG-LS", "JPEG 2000", "HTJ2K"]


@dataclass(frozen=True, eq=False)
class Codestream:
    """A codestream without a wrapper, and its header."""

    data: bytes
    kind: Kind
    rows: int
    columns: int
    components: int
    precision: int  # bits of a component
    signed: bool  # of JPEG 2000; the others code no signs
    luma_first: bool | None  # of three: luminance and colour differences, or red, green and blue; None where not told
    parts: int  # scans of a JPEG, tiles of a JPEG 2000
    scan: int = 0  # where the first scan of a JPEG begins
    lossless: bool = False  # a JPEG of differences (ITU-T T.81 annex H), a JPEG 2000 of the reversible wavelet
    predictor: int = 0  # of such a one: the selection value of its first scan,
    transform: int = 0  # and its point transform
    restarts: bool = False  # a JPEG with a restart interval

    def refusal(self, rows: int, columns: int, samples: int) -> Reject | None:
        """Why it is not to be decoded as one frame of this size and number of samples, or None."""
        if (self.rows, self.columns) != (rows, columns):
            return Reject(Reason.DECODE_FAILED, "PixelData: the codestream has not the size of Rows and Columns")
        if self.components != samples:
            return Reject(Reason.DECODE_FAILED, "PixelData: the codestream has not SamplesPerPixel components")
        if self.signed and samples > 1:
            return Reject(Reason.UNSUPPORTED_PIXELS, "PixelData: the codestream has colours with a sign")
        if self.kind in ("JPEG", "JPEG-LS"):
            return Reject(Reason.TOO_LARGE, "PixelData: scans of the codestream") if self.parts > MAX_SCANS else None
        return Reject(Reason.TOO_LARGE, "PixelData: tiles of the codestream") if self.parts > MAX_TILES else None


def read(data: bytes) -> Codestream | Reject:
    """Reads the header; DECODE_FAILED where there is none."""
    try:
        if data.startswith(_START_OF_IMAGE):
            return _jpeg(data)
        if data.startswith(_JP2):
            data = _contents(data)  # PS3.5 A.4.4 has no wrapper, some writers have one
        return _jpeg_2000(data) if data.startswith(_SIZ) else _NO_HEADER
    except (struct.error, IndexError):
        return _NO_HEADER


def _jpeg(data: bytes) -> Codestream | Reject:
    """Of JPEG (ITU-T T.81 annex B) and JPEG-LS (T.87 annex C): the markers up to the first scan."""
    frame, ids, factors = None, b"", set[int]()
    jfif = restarts = False
    adobe: int | None = None
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0:
            return _NO_HEADER
        marker = data[position + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # none, one without a segment, or a fill byte
            position += 1 if marker == 0xFF else 2
            continue
        (size,) = struct.unpack_from(">H", data, position + 2)
        segment, here = data[position + 4 : position + 2 + size], position
        position += 2 + size
        if marker == 0xDA:
            break
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            if frame is not None:
                return Reject(Reason.DECODE_FAILED, "PixelData: two images in one codestream")
            frame = (marker, *struct.unpack_from(">BHHB", segment))
            ids, factors = segment[6::3], set(segment[7::3])
        elif marker == 0xE0:
            jfif = jfif or segment.startswith(b"JFIF\0")
        elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
            adobe = segment[11]
        elif marker == 0xDD:
            restarts = any(segment)
    if frame is None:
        return _NO_HEADER
    marker, precision, rows, columns, components = frame
    jpeg_ls, lossless = marker == 0xF7, marker in (0xC3, 0xC7, 0xCB, 0xCF)
    luma_first: bool | None = None
    if components != 3 or jpeg_ls:
        pass
    elif adobe == 0 or ids in (b"RGB", b"rgb"):
        luma_first = False
    elif adobe == 1 or (jfif and not lossless) or len(factors) > 1:  # JFIF knows no lossless JPEG
        luma_first = True
    return Codestream(
        data=data,
        kind="JPEG-LS" if jpeg_ls else "JPEG",
        rows=rows,
        columns=columns,
        components=components,
        precision=precision,
        signed=False,
        luma_first=luma_first,
        parts=data.count(_START_OF_SCAN, here),
        scan=here,
        lossless=lossless,
        predictor=segment[-3],
        transform=segment[-1] & 15,
        restarts=restarts,
    )


def _contents(data: bytes) -> bytes:
    """The codestream of a JP2 file (ISO 15444-1 annex I); empty where it has none."""
    position = 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">L4s", data, position)
        head = 16 if size == 1 else 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, position + 8)
        stop = position + size if size else len(data)
        if kind == b"jp2c":
            return data[position + head : stop]
        if size < head and size:
            break
        position = stop
    return b""


def _jpeg_2000(data: bytes) -> Codestream | Reject:
    """ISO 15444-1 annex A: the image's size, components and tiles, and in COD whether they are transformed."""
    (size, capabilities, x_end, y_end, x_start, y_start, width, height, tiles_x, tiles_y, components) = (
        struct.unpack_from(">HH8LH", data, 4)
    )
    depths = {tuple(data[42 + 3 * number : 45 + 3 * number]) for number in range(min(components, 4))}
    if len(depths) > 1 and len({depth for depth, _, _ in depths}) > 1:
        return Reject(Reason.UNSUPPORTED_PIXELS, "PixelData: components of different depth")
    depth = data[42]
    # Decoders make components of fewer samples red, green and blue, too.
    transformed, reversible = len(depths) > 1, False
    position = 4 + size
    while data[position : position + 1] == b"\xff" and position + 14 <= len(data):  # up to the first tile
        if data[position + 1] == 0x90:
            break
        if data[position + 1] == 0x52:  # COD
            transformed, reversible = transformed or data[position + 8] == 1, data[position + 13] == 1
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return Codestream(
        data=data,
        kind="HTJ2K" if capabilities & 0x4000 else "JPEG 2000",
        rows=y_end - y_start,
        columns=x_end - x_start,
        components=components,
        precision=(depth & 0x7F) + 1,
        signed=depth >= 0x80,
        luma_first=False if components == 3 and transformed else None,
        lossless=reversible,
        parts=_tiles(x_end - tiles_x, width) * _tiles(y_end - tiles_y, height),
    )


def _tiles(extent: int, size: int) -> int:
    return -(-extent // size) if size else MAX_TILES + 1
