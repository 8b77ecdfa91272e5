"""Pixel data to stored values: native data by hand, compressed data by each transfer syntax's fastest decoder."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder

from rayseg.records import Reason, Reject

# Whether the values are big endian, by uncompressed transfer syntax.
NATIVE = {
    str(uid.ImplicitVRLittleEndian): False,
    str(uid.ExplicitVRLittleEndian): False,
    str(uid.DeflatedExplicitVRLittleEndian): False,
    str(uid.ExplicitVRBigEndian): True,
}

# The plug-in of pydicom that decodes a 512x512 12-bit frame fastest (milliseconds each, best of 25, one core), among
# those that need no system library. All lossless ones give equal values.
DECODERS = {
    str(uid.RLELossless): "pylibjpeg",  # 0.4; pydicom 3.1
    str(uid.JPEGBaseline8Bit): "pillow",  # 0.4; pylibjpeg 1.7
    str(uid.JPEGExtended12Bit): "pylibjpeg",  # 4.3, the only one
    str(uid.JPEGLossless): "pylibjpeg",  # 9.1, the only one
    str(uid.JPEGLosslessSV1): "pylibjpeg",  # 9.1, the only one
    str(uid.JPEGLSLossless): "pyjpegls",  # 4.2; pylibjpeg 16
    str(uid.JPEGLSNearLossless): "pyjpegls",  # 4.2; pylibjpeg 16
    str(uid.JPEG2000Lossless): "pylibjpeg",  # 23; pillow 23
    str(uid.JPEG2000): "pylibjpeg",  # 23; pillow 23
    str(uid.HTJ2KLossless): "pylibjpeg",  # 2.7, the only one
    str(uid.HTJ2KLosslessRPCL): "pylibjpeg",  # 2.7, the only one
    str(uid.HTJ2K): "pylibjpeg",  # 2.7, the only one
}

_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


@dataclass(frozen=True)
class Layout:
    """How one frame of one grey sample a pixel lies in its bytes (PS3.5 section 8.1.1)."""

    transfer_syntax_uid: str
    rows: int
    columns: int
    bits_allocated: int  # 8, 16 or 32
    bits_stored: int
    high_bit: int
    signed: bool
    inverted: bool  # MONOCHROME1: the smallest value is white
    padding: tuple[int, int] | None  # unsigned 16-bit words: the padding value and its range's other end
    words_swapped: bool  # the values are an OW's: 8-bit ones are swapped in pairs where big endian (PS3.5 A.3)

    @property
    def frame_bytes(self) -> int:
        """Bytes of the frame where it is not compressed."""
        return self.rows * self.columns * self.bits_allocated // 8


def decode(data: bytes, offset: int, length: int, layout: Layout) -> np.ndarray | Reject:
    """Decodes the pixel data whose value lies at `offset` in `data` and announces `length` bytes.

    Returns:
        (rows, columns) uint8, int16, uint16 or int32; MONOCHROME1 inverted (largest stored value minus value, minus one
        minus value where signed), pixels in the padding range set to the smallest value outside it. May be read-only.
    """
    native = layout.transfer_syntax_uid in NATIVE
    words = _native(data, offset, length, layout) if native else _encapsulated(data, offset, layout)
    if isinstance(words, Reject):
        return words
    stored = _stored_bits(words, layout) if native else words
    padded = _padded(words, stored, layout)
    if layout.inverted:
        stored = -1 - stored if layout.signed else (2**layout.bits_stored - 1) - stored
    if padded is not None:
        smallest = np.min(stored, where=~padded, initial=np.iinfo(stored.dtype).max)
        stored = np.where(padded, smallest, stored)
    if stored.dtype == np.int8:
        return stored.astype(np.int16)
    if stored.dtype == np.uint32:
        if stored.max() > np.iinfo(np.int32).max:
            return Reject(Reason.UNSUPPORTED_PIXELS, "PixelData: values beyond 31 bits")
        return stored.astype(np.int32)
    return stored


def _native(data: bytes, offset: int, length: int, layout: Layout) -> np.ndarray | Reject:
    """The allocated words as they are, in native byte order, a view of `data` where possible."""
    if length == 0xFFFFFFFF:
        return Reject(Reason.CORRUPT, "PixelData: undefined length in an uncompressed transfer syntax")
    if min(length, len(data) - offset) < layout.frame_bytes:
        return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than Rows and Columns need")
    big_endian = NATIVE[layout.transfer_syntax_uid]
    count = layout.rows * layout.columns
    if big_endian and layout.words_swapped and layout.bits_allocated == 8:
        pairs = np.frombuffer(data, "u1", min(length, len(data) - offset) // 2 * 2, offset).reshape(-1, 2)
        words = pairs[:, ::-1].reshape(-1)[:count].view("i1" if layout.signed else "u1")
    else:
        kind = "i" if layout.signed else "u"
        words = np.frombuffer(data, f"{'>' if big_endian else '<'}{kind}{layout.bits_allocated // 8}", count, offset)
    return words.astype(words.dtype.newbyteorder("="), copy=False).reshape(layout.rows, layout.columns)


def _stored_bits(words: np.ndarray, layout: Layout) -> np.ndarray:
    """Removes what stands above and below the stored bits and extends the sign."""
    above, unused = layout.bits_allocated - 1 - layout.high_bit, layout.bits_allocated - layout.bits_stored
    if not unused:
        return words
    return np.right_shift(np.left_shift(words, above) if above else words, unused)


def _padded(words: np.ndarray, stored: np.ndarray, layout: Layout) -> np.ndarray | None:
    """Where the padding range is (bool), or None where nowhere or everywhere.

    A padding value may lie outside the stored bits (-2000 among 12-bit values), so the words count too.
    """
    if layout.padding is None:
        return None
    low, high = sorted(_signed_word(end) if layout.signed else end for end in layout.padding)
    padded = _within(words, low, high)
    if stored is not words:
        padded |= _within(stored, low, high)
    return padded if padded.any() and not padded.all() else None


def _within(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return values == low if low == high else (values >= low) & (values <= high)


def _signed_word(value: int) -> int:
    return value - 2**16 if value >= 2**15 else value


def _encapsulated(data: bytes, offset: int, layout: Layout) -> np.ndarray | Reject:
    items = _items(data, offset)
    if isinstance(items, Reject):
        return items
    first, end = items
    size = _codestream_size(data[first : first + 4096])
    if size is not None and size != (layout.rows, layout.columns):
        return Reject(Reason.DECODE_FAILED, "PixelData: the compressed image has not the size of Rows and Columns")
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "pixel_representation": int(layout.signed),
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_stored,
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
    }
    syntax = layout.transfer_syntax_uid
    try:
        stored, _ = get_decoder(uid.UID(syntax)).as_array(data[offset:end], decoding_plugin=DECODERS[syntax], **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the RLE plug-in panics with one that is no Exception
        return Reject(Reason.DECODE_FAILED, f"{uid.UID(syntax).name}: {type(error).__name__}")
    if stored.shape != (layout.rows, layout.columns) or stored.dtype.kind not in "iu":
        return Reject(Reason.DECODE_FAILED, f"{uid.UID(syntax).name}: not one grey image of Rows and Columns")
    return stored


def _items(data: bytes, offset: int) -> tuple[int, int] | Reject:
    """Walks the items of encapsulated pixel data (PS3.5 A.4): where the first fragment starts and where all end.

    An item beyond the object's end, or no delimiter, is TRUNCATED; anything but items is CORRUPT.
    """
    position, values = offset, []
    while data[position : position + 4] == _ITEM and position + 8 <= len(data):
        values.append(position + 8)
        position += 8 + struct.unpack_from("<L", data, position + 4)[0]
    if position + 4 > len(data):
        return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than its items announce")
    if data[position : position + 4] != _DELIMITER or len(values) < 2:
        return Reject(Reason.CORRUPT, "PixelData: not a sequence of fragments")
    return values[1], position


def _codestream_size(codestream: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 codestream declares; None where it is none or none is found.

    Decoders allocate by these, not by the data set, so they are compared before.
    """
    siz = codestream.find(b"\xff\x4f\xff\x51", 0, 512)  # SOC and SIZ, perhaps in a JP2 wrapper (ISO 15444-1 A.5.1)
    if siz >= 0 and len(codestream) >= siz + 24:
        x_end, y_end, x_start, y_start = struct.unpack_from(">4L", codestream, siz + 8)
        return y_end - y_start, x_end - x_start
    if codestream[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 9 <= len(codestream) and codestream[position] == 0xFF:
        marker = codestream[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # a start of frame
            rows, columns = struct.unpack_from(">HH", codestream, position + 5)
            return rows, columns
        else:
            position += 2 + struct.unpack_from(">H", codestream, position + 2)[0]
    return None
