"""Codestreams to component values, by the fastest right decoder, and by the next one where that does not do.

Milliseconds for a 512x512 CT of 12 bits where nothing else is said, best of 12 side by side on one machine, and how
many files of pydicom's and of the corpus in ../shared/data are read as other decoders read them:

| | taken | others | right |
|---|---|---|---|
| RLE | pylibjpeg-rle 0.34 | imagecodecs 0.50, pydicom 6.5 | 8 of 8 |
| JPEG baseline | libjpeg-turbo 0.4 | Pillow 0.6 | 14 of 14 |
| JPEG extended | libjpeg-turbo 1.9 | pylibjpeg-libjpeg 5.5, Pillow 8 bits only | 2 of 2, the other 1 |
| JPEG lossless | libjpeg-turbo 3.2 | jpegsof3 5.3, GDCM 5.6, pylibjpeg-libjpeg 13 | 4 of 4 |
| JPEG-LS | CharLS of imagecodecs 5.7 | pyjpegls 5.7, GDCM 7.4, pylibjpeg-libjpeg 21 | 8 of 8 |
| JPEG 2000 | OpenJPEG of imagecodecs 29 | of pylibjpeg 29, GDCM 28, Pillow 32 | 16 of 16 |
| HTJ2K, reversible (640x480 colours) | OpenJPH 9.4 | OpenJPEG 22 | 1 of 1 |
| HTJ2K, irreversible (the same) | OpenJPEG 16 | OpenJPH 6.7, 0.3 % of the pixels wrong | 1 of 1 |

Not taken: pylibjpeg-libjpeg, which is under the GPL and wrong for lossless JPEG that relies on the low bits; and GDCM,
which is not faster and mixes what the data set says into what the codestream does.
"""

from collections.abc import Callable

import imagecodecs
import numpy as np
from rle import rle

from rayseg.dicom.codestreams import END_OF_IMAGE, Codestream
from rayseg.records import Reason, Reject

_TAILS = (b"\0" * 64, b"\x55" * 64, b"\xaa" * 64)
_MORE_THAN_THE_IMAGE = ("still contains encoded data", "missing End Of Image")  # what CharLS says of stray bytes


def decode(stream: Codestream, luma_first: bool, luma: bool) -> np.ndarray | Reject:
    """Decodes a codestream that `Codestream.refusal` has nothing against.

    Args:
        stream: what to decode.
        luma_first: whether the first of three components is the luminance. They are given as they are stored.
        luma: whether that one is enough.

    Returns:
        (rows, columns) or (rows, columns, 3) integers, as wide as the precision needs; of no sign but for JPEG 2000.
    """
    refused = ""
    for decoder in _DECODERS[stream.kind]:
        try:
            values = decoder(stream, luma_first, luma)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            refused = refused or type(error).__name__
            continue
        if values is None:
            continue
        if isinstance(values, Reject):
            return values
        if values.shape[:2] != (stream.rows, stream.columns) or values.dtype.kind not in "iu":
            return Reject(Reason.DECODE_FAILED, f"{stream.kind}: not one image of Rows and Columns")
        return values
    return Reject(Reason.DECODE_FAILED, f"{stream.kind}: {refused}")


def decode_rle(codestream: bytes, pixels: int, bits: int) -> np.ndarray | Reject:
    """The bytes of an RLE frame (PS3.5 annex G), its samples one after the other, as little endian words."""
    try:
        return np.frombuffer(rle.decode_frame(codestream, pixels, bits, "<"), np.uint8)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it panics with one that is no Exception
        return Reject(Reason.DECODE_FAILED, f"RLE Lossless: {type(error).__name__}")


def _jpeg(stream: Codestream, luma_first: bool, luma: bool) -> np.ndarray | Reject:
    """Any JPEG. Whatever its scan headers say of a sequential one is not looked at."""
    space = out = None
    if stream.components == 3:  # named, so that none is converted
        space = out = "YCBCR" if luma_first else "RGB"
        if luma_first and luma and not stream.lossless:
            out = "GRAYSCALE"
    if stream.data.rfind(END_OF_IMAGE, stream.scan) >= 0:
        values = imagecodecs.jpeg8_decode(stream.data, colorspace=space, outcolorspace=out)
    else:
        # What is missing becomes grey without a word: so nothing that follows may change the image.
        data = stream.data.removesuffix(b"\0").rstrip(b"\xff")  # without the padding of an odd length
        values, *others = (
            imagecodecs.jpeg8_decode(data + tail + END_OF_IMAGE, colorspace=space, outcolorspace=out) for tail in _TAILS
        )
        if stream.parts > 1 or not all(np.array_equal(values, other) for other in others):
            return Reject(Reason.DECODE_FAILED, "JPEG: the codestream ends within the image")
    return _low_bits(values, stream) if stream.lossless else values


def _low_bits(values: np.ndarray, stream: Codestream) -> np.ndarray | Reject:
    """Sums of lossless JPEG are modulo 2^16 (ITU-T T.81 H.1.2.1); some encoders rely on the low bits of each sample.

    That is the same where the prediction is one neighbour, or a sum of neighbours, and not where it is halved.
    """
    most = (1 << stream.precision) - 1
    if most >= np.iinfo(values.dtype).max or values.max() <= most:
        return values
    if stream.predictor > 4:
        return Reject(
            Reason.UNSUPPORTED_PIXELS, "JPEG lossless: differences that rely on low bits, and selection value"
        )
    return values & most


def _jpeg_by_sample(stream: Codestream, luma_first: bool, luma: bool) -> np.ndarray | None:
    """Lossless JPEG of 8 bits whose prediction is halved: the one decoder that cuts each sample to its bits at once."""
    of_kind = stream.lossless and stream.precision == 8 and stream.predictor > 4
    if not of_kind or stream.transform or stream.restarts:  # it does not know these
        return None
    return imagecodecs.jpegsof3_decode(stream.data)


def _jpeg_ls(stream: Codestream, luma_first: bool, luma: bool) -> np.ndarray | Reject:
    """Bytes between the image and its end marker are left out, where the decoder says that the image is whole.

    Without an end marker it is not decoded: CharLS may look for one for minutes.
    """
    end = stream.data.rfind(END_OF_IMAGE, stream.scan)
    if end < 0:
        return Reject(Reason.DECODE_FAILED, "JPEG-LS: the codestream has no end marker")
    try:
        return imagecodecs.jpegls_decode(stream.data)
    except imagecodecs.JpeglsError as error:
        if not any(text in str(error) for text in _MORE_THAN_THE_IMAGE):
            raise
        refusal = error
    for stray in (1, 2):
        try:
            return imagecodecs.jpegls_decode(stream.data[: end - stray] + END_OF_IMAGE)
        except imagecodecs.JpeglsError:
            continue
    raise refusal


def _jpeg_2000(stream: Codestream, luma_first: bool, luma: bool) -> np.ndarray:
    return imagecodecs.jpeg2k_decode(stream.data)


def _htj2k(stream: Codestream, luma_first: bool, luma: bool) -> np.ndarray | None:
    """Of the reversible wavelet only: of the other one it lets values beyond the precision wrap around."""
    return imagecodecs.htj2k_decode(stream.data) if stream.lossless else None


_DECODERS: dict[str, tuple[Callable[[Codestream, bool, bool], np.ndarray | Reject | None], ...]] = {
    "JPEG": (_jpeg_by_sample, _jpeg),
    "JPEG-LS": (_jpeg_ls,),
    "JPEG 2000": (_jpeg_2000,),
    "HTJ2K": (_htj2k, _jpeg_2000),
}
