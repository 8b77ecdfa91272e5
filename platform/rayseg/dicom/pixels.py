"""Pixel data to stored values, a frame at a time: native data by hand, codestreams by `decoders`."""

import dataclasses
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.pixels import convert_color_space

from rayseg.dicom import codestreams, decoders, fragments
from rayseg.dicom.codestreams import Codestream
from rayseg.records import Reason, Reject

# Whether the values are big endian, by uncompressed transfer syntax.
NATIVE = {
    str(uid.ImplicitVRLittleEndian): False,
    str(uid.ExplicitVRLittleEndian): False,
    str(uid.DeflatedExplicitVRLittleEndian): False,
    str(uid.ExplicitVRBigEndian): True,
}
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"  # Deflated Image Frame Compression (PS3.5 A.4.15): zlib's raw format
# Those whose frames are words, of which the data set says how they lie and what they are.
OF_WORDS = {*NATIVE, DEFLATED_FRAMES, str(uid.RLELossless)}
# Those whose frames say it themselves (PS3.5 8.2).
OF_CODESTREAMS = {
    str(syntax)
    for syntax in (
        *(uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1),
        *(uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000),
        *(uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
    )
}

GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
LUMA_FIRST = ("YBR_FULL", "YBR_FULL_422")  # the first component is the luminance
COLOUR = ("RGB", "YBR_ICT", "YBR_RCT", *LUMA_FIRST)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a frame lies in its bytes (PS3.5 section 8.1.1) and how its words become grey values.

    Of codestreams, which say more and count, it is what the data set claims.
    """

    transfer_syntax_uid: str
    rows: int
    columns: int
    samples: int  # a pixel: 1, or 3 of a colour
    photometric_interpretation: str  # one of GREY or COLOUR
    planar: bool  # colours one plane after the other
    bits_allocated: int  # 1, 8, 16 or 32, of words
    bits_stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None  # unsigned 16-bit words: the padding value and its range's other end
    words_swapped: bool  # the values are an OW's: 8-bit ones are swapped in pairs where big endian (PS3.5 A.3)
    table: np.ndarray | None = None  # grey values of all stored values: of a palette, or of a modality LUT
    table_first: int = 0  # the stored value of its first one

    @property
    def is_rescaled(self) -> bool:
        """Whether slope and intercept hold: colours are colours, and a modality LUT stands instead of them."""
        return self.samples == 1 and self.table is None

    @property
    def is_colour(self) -> bool:
        """Whether the grey values are luminances."""
        return self.samples > 1 or self.photometric_interpretation == "PALETTE COLOR"

    @property
    def is_halved(self) -> bool:
        """Whether two pixels share their colour differences: RLE has none of these, a codestream says it itself."""
        of_native_words = self.transfer_syntax_uid in NATIVE or self.transfer_syntax_uid == DEFLATED_FRAMES
        return of_native_words and self.photometric_interpretation == "YBR_FULL_422"

    @property
    def frame_bits(self) -> int:
        """Bits of a frame where it is not compressed."""
        samples = 2 if self.is_halved else self.samples
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
        decoded = self._words(index, colours=False)
        if isinstance(decoded, Reject):
            return decoded
        words, layout = decoded
        if layout.samples > 1:
            return _narrow(words)
        stored = _stored_bits(words, layout)
        padded = _padded(words, stored, layout)
        bits, signed = layout.bits_stored, layout.signed
        if layout.table is not None:
            stored = np.take(layout.table, stored.astype(np.int32) - layout.table_first, mode="clip")
            bits, signed = stored.dtype.itemsize * 8, stored.dtype.kind == "i"
        if layout.photometric_interpretation == "MONOCHROME1":
            stored = -1 - stored if signed else (2**bits - 1) - stored
        if padded is not None:
            smallest = np.min(stored, where=~padded, initial=np.iinfo(stored.dtype).max)
            stored = np.where(padded, smallest, stored)
        return _narrow(stored)

    def stored(self, index: int) -> np.ndarray | Reject:
        """Decodes one frame to its values as they are: not inverted, no padding, no table.

        Returns:
            (rows, columns), or (rows, columns, 3) red, green, blue, in one of the types of `frame`.
        """
        decoded = self._words(index, colours=True)
        if isinstance(decoded, Reject):
            return decoded
        words, layout = decoded
        return _narrow(words if layout.samples > 1 else _stored_bits(words, layout))

    @cached_property
    def _fragments(self) -> list[list[fragments.Span]] | Reject:
        return fragments.split(self.data, self.offset, self.frames)

    def _words(self, index: int, colours: bool) -> tuple[np.ndarray, Layout] | Reject:
        """Words of one sample (rows, columns), and their layout.

        Colours, where they are asked for, are (rows, columns, 3) red, green, blue, else their luminance.
        """
        if self.layout.transfer_syntax_uid in NATIVE:
            words = self._native(index)
        else:
            if isinstance(self._fragments, Reject):
                return self._fragments
            frame = b"".join([self.data[start:stop] for start, stop in self._fragments[index]])
            if self.layout.transfer_syntax_uid in OF_CODESTREAMS:
                return _decoded(frame, self.layout, colours)
            unpack = _inflated if self.layout.transfer_syntax_uid == DEFLATED_FRAMES else _unpacked
            words = unpack(frame, self.layout)
        if isinstance(words, Reject):
            return words
        of_pixels = (_colours if colours else _grey)(words, self.layout)
        return of_pixels if isinstance(of_pixels, Reject) else (of_pixels, self.layout)

    def _native(self, index: int) -> np.ndarray | Reject:
        """The allocated words as they are, flat, in native byte order, a view of the data where possible."""
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
        return _words(value, start, first_bit % 8, layout, big_endian)


def _words(data: bytes | np.ndarray, start: int, first_bit: int, layout: Layout, big_endian: bool) -> np.ndarray:
    """The frame's samples as a flat array; `first_bit` of the byte at `start` is the first where they have one bit."""
    count = layout.frame_bits // layout.bits_allocated
    if layout.bits_allocated == 1:
        some = np.frombuffer(data, "u1", (first_bit + count + 7) // 8, start)
        return np.unpackbits(some, bitorder="little")[first_bit : first_bit + count]
    kind = "i" if layout.signed else "u"
    words = np.frombuffer(data, f"{'>' if big_endian else '<'}{kind}{layout.bits_allocated // 8}", count, start)
    return words.astype(words.dtype.newbyteorder("="), copy=False)


def _is_planar(layout: Layout) -> bool:
    return layout.planar or layout.transfer_syntax_uid == uid.RLELossless  # which is always so (PS3.5 G.2)


def _grey(words: np.ndarray, layout: Layout) -> np.ndarray:
    """Flat samples as one value a pixel, (rows, columns)."""
    size = layout.rows, layout.columns
    if layout.is_halved:  # two Y, then Cb and Cr of both (PS3.3 C.7.6.3.1.2)
        return words.reshape(-1, 4)[:, :2].reshape(size)
    if layout.samples == 1:
        return words.reshape(size)
    colours_HWC = np.moveaxis(words.reshape(3, *size), 0, -1) if _is_planar(layout) else words.reshape(*size, 3)
    return colours_HWC[..., 0] if layout.photometric_interpretation in LUMA_FIRST else luminance(colours_HWC)


def _colours(words: np.ndarray, layout: Layout) -> np.ndarray | Reject:
    """Flat samples as (rows, columns), or (rows, columns, 3) red, green, blue."""
    size = layout.rows, layout.columns
    if layout.samples == 1:
        return words.reshape(size)
    if layout.is_halved:
        quads = words.reshape(-1, 4)
        pairs = [np.stack([quads[:, place], quads[:, 2], quads[:, 3]], axis=-1) for place in (0, 1)]
        colours_HWC = np.stack(pairs, axis=1).reshape(*size, 3)
    else:
        colours_HWC = np.moveaxis(words.reshape(3, *size), 0, -1) if _is_planar(layout) else words.reshape(*size, 3)
    return _rgb(colours_HWC) if layout.photometric_interpretation in LUMA_FIRST else colours_HWC


def _rgb(colours_HWC: np.ndarray) -> np.ndarray | Reject:
    """Of luminance and colour differences (PS3.3 C.7.6.3.1.2)."""
    if colours_HWC.dtype != np.uint8:
        return Reject(Reason.UNSUPPORTED_PIXELS, "PhotometricInterpretation: colour differences of more than 8 bits")
    return convert_color_space(np.ascontiguousarray(colours_HWC), "YBR_FULL", "RGB")


def luminance(colours: np.ndarray) -> np.ndarray:
    """0.299 red + 0.587 green + 0.114 blue (ITU-R BT.601), rounded: equal channels stay the same. (..., 3) to (...)."""
    wide: np.ndarray[Any, np.dtype[Any]] = colours.astype(np.uint64 if colours.dtype.itemsize > 2 else np.uint32)
    grey = (wide[..., 0] * 299 + wide[..., 1] * 587 + wide[..., 2] * 114 + 500) // 1000
    return grey.astype(colours.dtype)


def _inflated(frame: bytes, layout: Layout) -> np.ndarray | Reject:
    """The flat words of a frame that is deflated by itself, as little endian ones."""
    wanted = layout.native_bytes(1)
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(frame, wanted)
    except zlib.error:
        return Reject(Reason.DECODE_FAILED, "Deflated Image Frame Compression: error")
    if len(inflated) < wanted:
        return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than Rows and Columns need")
    return _words(inflated, 0, 0, layout, big_endian=False)


def _unpacked(frame: bytes, layout: Layout) -> np.ndarray | Reject:
    """The flat words of an RLE frame, one sample after the other."""
    refusal = fragments.rle_refusal(frame, layout.samples * layout.bits_allocated // 8)
    data = refusal or decoders.decode_rle(frame, layout.rows * layout.columns, layout.bits_allocated)
    return data if isinstance(data, Reject) else _words(data, 0, 0, layout, big_endian=False)


def _decoded(frame: bytes, layout: Layout, colours: bool) -> tuple[np.ndarray, Layout] | Reject:
    """A codestream's words, and the layout by what it declares."""
    stream = codestreams.read(frame)
    if isinstance(stream, Reject):
        return stream
    refusal = stream.refusal(layout.rows, layout.columns, layout.samples)
    if refusal is not None:
        return refusal
    luma_first = stream.luma_first
    if luma_first is None:  # it says nothing, so the data set does; YBR_ICT and YBR_RCT are of JPEG 2000
        of_jpeg = stream.kind in ("JPEG", "JPEG-LS") and layout.photometric_interpretation.startswith("YBR")
        luma_first = of_jpeg or layout.photometric_interpretation in LUMA_FIRST
    words = decoders.decode(stream, luma_first, luma=not colours)
    if isinstance(words, Reject):
        return words
    if layout.samples == 1:
        return _of_stream(words, stream, layout)
    if colours:
        rgb_HWC = _rgb(words) if luma_first else words
        return rgb_HWC if isinstance(rgb_HWC, Reject) else (rgb_HWC, layout)
    if words.ndim == 3:
        words = words[..., 0] if luma_first else luminance(words)
    return words, layout


def _of_stream(words: np.ndarray, stream: Codestream, layout: Layout) -> tuple[np.ndarray, Layout]:
    """Numbers of as many bits as the codestream has, or of more where the data set says so.

    A JPEG 2000 codestream says whether they have a sign. Others, and one without, hold two's complements where
    PixelRepresentation is 1: of the precision in a JPEG, in JPEG-LS and JPEG 2000 of BitsStored if that is more, as
    GDCM and DCMTK have it.
    """
    bits, signed = max(stream.precision, layout.bits_stored), stream.signed or layout.signed
    if bits > words.dtype.itemsize * 8:
        words = words.astype(f"{words.dtype.kind}{2 if bits <= 16 else 4}")
    if signed and not stream.signed:
        width = words.dtype.itemsize * 8
        unused = width - (stream.precision if stream.kind == "JPEG" else bits)
        words = np.right_shift(np.left_shift(words, unused).view(f"i{width // 8}"), unused)
    of_stream = dataclasses.replace(layout, bits_allocated=bits, bits_stored=bits, high_bit=bits - 1, signed=signed)
    return words, of_stream


def _stored_bits(words: np.ndarray, layout: Layout) -> np.ndarray:
    """Removes what stands above and below the stored bits (overlays of old objects, too) and extends the sign."""
    unused = layout.bits_allocated - layout.bits_stored
    if not unused:
        return words
    above = layout.bits_allocated - 1 - layout.high_bit
    if not above:
        return np.right_shift(words, unused)
    moved = np.left_shift(words, above)
    return np.right_shift(moved, unused, out=moved)


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
