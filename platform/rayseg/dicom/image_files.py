"""PNG, JPEG and TIFF images: bytes to stored values, or a reason why not. Masks may be BMP, too.

One reader for images and masks. Values are those that the file stores: 16 bits stay 16 bits, transparency, gamma and
colour profiles do not count. Two things are about how a picture is meant to be seen, and are done: it is turned upright
as its Orientation says (Exif in PNG and JPEG, the tag in TIFF), as programs do in which masks are drawn, and where
white is zero (TIFF) the values of images are turned over.
"""

import numpy as np

from rayseg.dicom import bmp, jpeg, png, raster, tiff
from rayseg.dicom.pixels import luminance
from rayseg.dicom.raster import Raster
from rayseg.records import Reason, Reject

_MAGIC = (png.MAGIC, jpeg.MAGIC, *tiff.MAGIC)


def is_image(data: bytes) -> bool:
    """Whether the bytes begin as a PNG, JPEG or TIFF file and are no DICOM object (whose preamble may be a TIFF's)."""
    return data.startswith(_MAGIC) and data[128:132] != b"DICM"


def is_mask(data: bytes) -> bool:
    """As `is_image`, or as a BMP file."""
    return is_image(data) or (data.startswith(bmp.MAGIC) and data[128:132] != b"DICM")


def size(data: bytes) -> tuple[int, int] | None:
    """Rows and columns of an upright image, from its file or the beginning of it; None where that does not tell."""
    if data.startswith(tiff.MAGIC):
        return tiff.size(data)
    header = png.head(data) if data.startswith(png.MAGIC) else jpeg.head(data)
    if header is None or not header.rows or not header.columns:
        return None
    return raster.shown_size(header.rows, header.columns, header.orientation)


def decode(data: bytes, max_pixels: int, color: bool = False) -> np.ndarray | Reject:
    """Decodes one image; transparency is ignored.

    Colours become their luminance, as those of DICOM objects do, unless `color` is set. Greys of fewer than 8 bits are
    spread over 0 to 255.

    Args:
        data: the file.
        max_pixels: that it may declare, times channels.
        color: whether other colour images are taken too.

    Returns:
        (rows, columns) uint8, int16, uint16 or int32, float32 of floating point, where what is not finite is the
        smallest finite value; of a colour image (rows, columns, 3) uint8, red, green, blue, of 16 bits the nearest.
    """
    decoded = _read(data, max_pixels, mask=False)
    shown = _shown(decoded) if isinstance(decoded, Raster) else decoded
    if isinstance(shown, Reject):
        return shown
    if shown.ndim == 2:
        return _floats(shown) if shown.dtype.kind == "f" else _integers(shown)
    if not color:
        return luminance(shown)
    channels_HWC = eight_bits(shown)
    grey = all(np.array_equal(channels_HWC[..., 0], channels_HWC[..., other]) for other in (1, 2))
    return luminance(channels_HWC) if grey else channels_HWC


def decode_mask(data: bytes, max_pixels: int, by_value: bool) -> tuple[np.ndarray, bool] | Reject:
    """Decodes one mask; transparency is ignored.

    Args:
        data: the file.
        max_pixels: that it may declare, times channels.
        by_value: whether numbers are wanted as they are stored: indices of a palette, 0 and 1 of one bit, and not the
            colours and greys that they show, 0 and 255 of one bit.

    Returns:
        Integers (rows, columns), or uint8 or uint16 colours (rows, columns, 3), and whether compression was lossy.
        Floating point is taken where all values are whole numbers.
    """
    decoded = _read(data, max_pixels, mask=True)
    if isinstance(decoded, Reject):
        return decoded
    values = decoded.samples if by_value else _shown(decoded)
    if isinstance(values, Reject):
        return values
    if values.dtype.kind == "f":
        whole = np.isfinite(values).all() and (values == np.rint(values)).all()
        if not whole or float(np.abs(values).max()) >= 2**31:
            return Reject(Reason.UNSUPPORTED_PIXELS, f"{values.dtype.name} with other than whole numbers")
        values = values.astype(np.int32)
    numbers = _integers(values) if values.ndim == 2 else values
    return numbers if isinstance(numbers, Reject) else (numbers, decoded.lossy)


def eight_bits(colours_HWC: np.ndarray) -> np.ndarray:
    """uint8 of colours of 8 or 16 bits: the nearest of the 256 values that 16 bits spread over their range."""
    if colours_HWC.dtype == np.uint8:
        return colours_HWC
    assert colours_HWC.dtype == np.uint16
    return ((colours_HWC.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _read(data: bytes, max_pixels: int, mask: bool) -> Raster | Reject:
    try:
        if data.startswith(tiff.MAGIC):
            return tiff.read(data, max_pixels, mask)
        if data.startswith(png.MAGIC):
            return png.read(data, max_pixels)
        return bmp.read(data, max_pixels) if data.startswith(bmp.MAGIC) else jpeg.read(data, max_pixels)
    except Exception as error:  # of the decoders: beside their own errors whatever spoiled tags make them stumble over
        return Reject(Reason.NOT_AN_IMAGE, type(error).__name__)


def _shown(decoded: Raster) -> np.ndarray | Reject:
    """Greys or colours as they are meant to be seen."""
    if decoded.palette is not None:
        return raster.colours(decoded.samples, decoded.palette)
    samples = decoded.samples
    if decoded.bits >= 8:
        return samples
    most = 2**decoded.bits - 1
    if 255 % most == 0:
        return samples * np.uint8(255 // most)
    return np.take((np.arange(256) * 255 // most).astype(np.uint8), samples)


def _integers(values: np.ndarray) -> np.ndarray | Reject:
    """The values as uint8, int16, uint16 or int32."""
    if values.dtype in (np.uint8, np.int16, np.uint16, np.int32):
        return values
    if values.dtype == np.int8:
        return values.astype(np.int16)
    if int(values.max()) >= 2**31 or int(values.min()) < -(2**31):
        return Reject(Reason.UNSUPPORTED_PIXELS, f"{values.dtype.name} with values beyond 32 bits with sign")
    return values.astype(np.int32)


def _floats(values: np.ndarray) -> np.ndarray | Reject:
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    finite = np.isfinite(values)
    if finite.all():
        return values
    if not finite.any():
        return Reject(Reason.UNSUPPORTED_PIXELS, "floating point without a finite value")
    return np.where(finite, values, values.min(where=finite, initial=np.float32(np.inf)))
