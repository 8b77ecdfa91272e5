"""PNG, JPEG and TIFF images: bytes to stored values, or a reason why not."""

from io import BytesIO

import numpy as np
from PIL import Image

from rayseg.dicom.pixels import luminance
from rayseg.records import Reason, Reject

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
_INTEGER_MODES = {"I;16": np.uint16, "I;16L": np.uint16, "I;16B": np.uint16, "I": np.int32}


def is_image(data: bytes) -> bool:
    """Whether the bytes begin as a PNG, JPEG or TIFF file and are no DICOM object (whose preamble may be a TIFF's)."""
    return data.startswith(_MAGIC) and data[128:132] != b"DICM"


def decode(data: bytes, max_pixels: int, color: bool = False) -> np.ndarray | Reject:
    """Decodes one image; transparency is ignored.

    Colours become their luminance, as those of DICOM objects do, unless `color` is set.

    Args:
        data: the file.
        max_pixels: that it may declare, times channels.
        color: whether other colour images are taken too.

    Returns:
        (rows, columns) uint8, uint16 or int32; of a colour image (rows, columns, 3) uint8, red, green, blue.
    """
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
            channels = len(image.getbands())
            if image.width * image.height * channels > max_pixels:
                return Reject(Reason.TOO_LARGE, "the image's width and height")
            if getattr(image, "n_frames", 1) > 1:
                return Reject(Reason.UNSUPPORTED_MULTIFRAME, "more than one page")
            return _pixels(image, color)
    except Image.DecompressionBombError:
        return Reject(Reason.TOO_LARGE, "the image's width and height")
    except Exception as error:  # of Pillow: beside its own errors whatever spoiled tags make it stumble over
        return Reject(Reason.NOT_AN_IMAGE, type(error).__name__)


def _pixels(image: Image.Image, color: bool) -> np.ndarray | Reject:
    if image.mode in _INTEGER_MODES:
        return np.asarray(image).astype(_INTEGER_MODES[image.mode], copy=False)
    if image.mode in ("L", "LA"):
        return np.asarray(image.getchannel("L"))
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode not in ("RGB", "RGBA", "P", "RGBX"):
        return Reject(Reason.UNSUPPORTED_PIXELS, f"an image of mode {image.mode}")
    channels_HWC = np.asarray(image.convert("RGB"))
    grey = all(np.array_equal(channels_HWC[..., 0], channels_HWC[..., other]) for other in (1, 2))
    return channels_HWC if color and not grey else luminance(channels_HWC)
