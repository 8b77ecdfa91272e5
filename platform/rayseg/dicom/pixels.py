"""Pixel data to stored values, a frame at a time: native data by hand, the others by each syntax's fastest decoder."""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder

from rayseg.dicom import fragments
from rayseg.records import Reason, Reject

# Whether the values are big endian, by uncompressed transfer syntax.
NATIVE = {
    str(uid.ImplicitVRLittleEndian): False,
    str(uid.ExplicitVRLittleEndian): False,
    str(uid.DeflatedExplicitVRLittleEndian): False,
    str(uid.ExplicitVRBigEndian): True,
}

# The plug-in of pydicom that decodes each syntax fastest, among those that need no system library: milliseconds of one
# core (AMD EPYC, best of 25) for a 512x512 CT of 12 bits where nothing else is said. All lossless ones agree.
DECODERS = {
    str(uid.RLELossless): "pylibjpeg",  # 0.8; pydicom 13
    str(uid.JPEGBaseline8Bit): "pillow",  # 0.4; pylibjpeg 1.7 (8 bits)
    str(uid.JPEGExtended12Bit): "pylibjpeg",  # 1.7 (1024x256); pillow reads 8 bits only
    str(uid.JPEGLossless): "pylibjpeg",  # 8.5, the only one
    str(uid.JPEGLosslessSV1): "pylibjpeg",  # 8.5, the only one
    str(uid.JPEGLSLossless): "pyjpegls",  # 3.2; pylibjpeg 12
    str(uid.JPEGLSNearLossless): "pyjpegls",  # 3.4; pylibjpeg 10
    str(uid.JPEG2000Lossless): "pylibjpeg",  # 17; pillow 18
    str(uid.JPEG2000): "pylibjpeg",  # 10; pillow 11 (8 to 1)
    str(uid.HTJ2KLossless): "pylibjpeg",  # 12, the only one (640x480 colours)
    str(uid.HTJ2KLosslessRPCL): "pylibjpeg",  # 12, the only one
    str(uid.HTJ2K): "pylibjpeg",  # 12, the only one
}
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"  # Deflated Image Frame Compression (PS3.5 A.4.15): zlib's raw format

GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
LUMA_FIRST = ("YBR_FULL", "YBR_FULL_422")  # the first component is the luminance
COLOUR = ("RGB", "YBR_ICT", "YBR_RCT", *LUMA_FIRST)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a frame lies in its bytes (PS3.5 section 8.1.1) and how its words become grey values."""

    transfer_syntax_uid: str
    rows: int
    columns: int
    samples: int  # a pixel: 1, or 3 of a colour
    photometric_interpretation: str  # one of GREY or COLOUR
    planar: bool  # colours one plane after the other
    bits_allocated: int  # 1, 8, 16 or 32
    bits_stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None  # unsigned 16-bit words: the padding value and its range's other end
    words_swapped: bool  # the values are an OW's: 8-bit ones are swapped in pairs where big endian (PS3.5 A.3)
    table: np.ndarray | None = None  # grey values of all stored values, from the smallest on: palette, modality LUT

    @property
    def frame_bits(self) -> int:
        """Bits of a frame where it is not compressed."""
        samples = 2 if self.photometric_interpretation == "YBR_FULL_422" else self.samples
        return self.rows * self.columns * samples * self.bits_allocated

    def native_bytes(self, frames: int) -> int:
        """Bytes of so many frames where they are not compressed."""
        return (frames * self.frame_bits + 7) // 8


@dataclass(frozen=True, eq=False)
class PixelData:
    """The pixel data whose value lies at `offset` in `data` and announces `length` bytes."""

    data: bytes
    offset: int
    length: int
    frames: int
    layout: Layout

    def frame(self, index: int) -> np.ndarray | Reject:
        """Decodes one frame and no other.

        Returns:
            (rows, columns) uint8, int16, uint16 or int32. Colours are their luminance (ITU-R BT.601, as the Y of YBR).
            MONOCHROME1 is inverted (largest stored value minus value, minus one minus value where signed); pixels in
            the padding range are set to the smallest value outside it. May be read-only.
        """
        layout = self.layout
        words = self._native(index) if layout.transfer_syntax_uid in NATIVE else self._compressed(index)
        if isinstance(words, Reject):
            return words
        if layout.samples > 1:
            return _narrow(words)
        stored = _stored_bits(words, layout)
        padded = _padded(words, stored, layout)
        bits, signed = layout.bits_stored, layout.signed
        if layout.table is not None:
            stored = np.take(layout.table, stored.astype(np.int32) - _smallest(layout), mode="clip")
            bits, signed = stored.dtype.itemsize * 8, False
        if layout.photometric_interpretation == "MONOCHROME1":
            stored = -1 - stored if signed else (2**bits - 1) - stored
        if padded is not None:
            smallest = np.min(stored, where=~padded, initial=np.iinfo(stored.dtype).max)
            stored = np.where(padded, smallest, stored)
        return _narrow(stored)

    @cached_property
    def _fragments(self) -> list[list[fragments.Span]] | Reject:
        return fragments.split(self.data, self.offset, self.frames)

    def _native(self, index: int) -> np.ndarray | Reject:
        """The allocated words as they are, in native byte order, a view of the data where possible."""
        layout = self.layout
        if self.length == 0xFFFFFFFF:
            return Reject(Reason.CORRUPT, "PixelData: undefined length in an uncompressed transfer syntax")
        held = min(self.length, len(self.data) - self.offset)
        if held < layout.native_bytes(self.frames):
            return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than Rows and Columns need")
        first_bit = index * layout.frame_bits
        start, stop = first_bit // 8, (first_bit + layout.frame_bits + 7) // 8
        big_endian = NATIVE[layout.transfer_syntax_uid]
        value: bytes | np.ndarray = self.data
        start += self.offset
        stop += self.offset
        if big_endian and layout.words_swapped and layout.bits_allocated <= 8:
            odd = (start - self.offset) % 2
            pairs = np.frombuffer(self.data, "u1", min((stop - start + odd + 1), held) // 2 * 2, start - odd)
            value, start = np.ascontiguousarray(pairs.reshape(-1, 2)[:, ::-1]).reshape(-1), odd
        return _grey(_words(value, start, first_bit % 8, layout, big_endian), layout)

    def _compressed(self, index: int) -> np.ndarray | Reject:
        if isinstance(self._fragments, Reject):
            return self._fragments
        layout, syntax = self.layout, self.layout.transfer_syntax_uid
        codestream = b"".join([self.data[start:stop] for start, stop in self._fragments[index]])
        if syntax == DEFLATED_FRAMES:
            return _inflated(codestream, layout)
        if syntax == uid.RLELossless:
            refusal = fragments.rle_refusal(codestream, layout.samples * layout.bits_allocated // 8)
        else:
            refusal = fragments.refusal(codestream, layout.rows, layout.columns, layout.samples)
        return refusal or _decoded(codestream, layout)


def _words(data: bytes | np.ndarray, start: int, first_bit: int, layout: Layout, big_endian: bool) -> np.ndarray:
    """The frame's samples as a flat array; `first_bit` of the byte at `start` is the first where they have one bit."""
    count = layout.frame_bits // layout.bits_allocated
    if layout.bits_allocated == 1:
        some = np.frombuffer(data, "u1", (first_bit + count + 7) // 8, start)
        return np.unpackbits(some, bitorder="little")[first_bit : first_bit + count]
    kind = "i" if layout.signed else "u"
    words = np.frombuffer(data, f"{'>' if big_endian else '<'}{kind}{layout.bits_allocated // 8}", count, start)
    return words.astype(words.dtype.newbyteorder("="), copy=False)


def _grey(words: np.ndarray, layout: Layout) -> np.ndarray:
    """Flat samples as one value a pixel, (rows, columns)."""
    size = layout.rows, layout.columns
    if layout.photometric_interpretation == "YBR_FULL_422":  # two Y, then Cb and Cr of both (PS3.3 C.7.6.3.1.2)
        return words.reshape(-1, 4)[:, :2].reshape(size)
    if layout.samples == 1:
        return words.reshape(size)
    colours_HWC = np.moveaxis(words.reshape(3, *size), 0, -1) if layout.planar else words.reshape(*size, 3)
    return colours_HWC[..., 0] if layout.photometric_interpretation in LUMA_FIRST else luminance(colours_HWC)


def luminance(colours: np.ndarray) -> np.ndarray:
    """0.299 red + 0.587 green + 0.114 blue (ITU-R BT.601), rounded: equal channels stay the same. (..., 3) to (...)."""
    wide: np.ndarray[Any, np.dtype[Any]] = colours.astype(np.uint64 if colours.dtype.itemsize > 2 else np.uint32)
    grey = (wide[..., 0] * 299 + wide[..., 1] * 587 + wide[..., 2] * 114 + 500) // 1000
    return grey.astype(colours.dtype)


def _inflated(codestream: bytes, layout: Layout) -> np.ndarray | Reject:
    """The words of a frame that is deflated by itself, as little endian ones."""
    wanted = layout.native_bytes(1)
    try:
        frame = zlib.decompressobj(-zlib.MAX_WBITS).decompress(codestream, wanted)
    except zlib.error:
        return Reject(Reason.DECODE_FAILED, "Deflated Image Frame Compression: error")
    if len(frame) < wanted:
        return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than Rows and Columns need")
    return _grey(_words(frame, 0, 0, layout, big_endian=False), layout)


def _decoded(codestream: bytes, layout: Layout) -> np.ndarray | Reject:
    """The frame as its decoder gives it, colours as their luminance."""
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples,
        "photometric_interpretation": layout.photometric_interpretation if layout.samples > 1 else "MONOCHROME2",
        "pixel_representation": int(layout.signed),
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_stored,
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
        "correct_unused_bits": False,  # `_stored_bits` does it, with regard to HighBit
    }
    if layout.samples > 1:
        options["planar_configuration"] = int(layout.planar)
    syntax = uid.UID(layout.transfer_syntax_uid)
    even = codestream + b"\0" * (len(codestream) % 2)
    alone = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0" + len(even).to_bytes(4, "little") + even
    try:
        frame, told = get_decoder(syntax).as_array(alone, raw=True, decoding_plugin=DECODERS[syntax], **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the RLE plug-in panics with one that is no Exception
        return Reject(Reason.DECODE_FAILED, f"{syntax.name}: {type(error).__name__}")
    if frame.shape[:2] != (layout.rows, layout.columns) or frame.dtype.kind not in "iu":
        return Reject(Reason.DECODE_FAILED, f"{syntax.name}: not one image of Rows and Columns")
    if layout.samples == 1:
        return frame
    return frame[..., 0] if told["photometric_interpretation"] in LUMA_FIRST else luminance(frame)


def _stored_bits(words: np.ndarray, layout: Layout) -> np.ndarray:
    """Removes what stands above and below the stored bits (overlays of old objects, too) and extends the sign."""
    unused = layout.bits_allocated - layout.bits_stored
    if not unused:
        return words
    in_place = layout.transfer_syntax_uid not in DECODERS or layout.transfer_syntax_uid == uid.RLELossless
    # The others' codestreams hold numbers, not words in which a HighBit could lie.
    above = layout.bits_allocated - 1 - layout.high_bit if in_place else unused
    return np.right_shift(np.left_shift(words, above) if above else words, unused)


def _smallest(layout: Layout) -> int:
    return -(2 ** (layout.bits_stored - 1)) if layout.signed else 0


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


def _narrow(stored: np.ndarray) -> np.ndarray | Reject:
    """As one of the types of `Slice.stored`."""
    if stored.dtype == np.int8:
        return stored.astype(np.int16)
    if stored.dtype == np.uint32:
        if stored.max() > np.iinfo(np.int32).max:
            return Reject(Reason.UNSUPPORTED_PIXELS, "PixelData: values beyond 31 bits")
        return stored.astype(np.int32)
    return stored
