"""Label images: what a mask file holds, and which of its values mean which class."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rayseg.records import Reason, Reject

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_SHOWN_AS = {"P": "RGB", "PA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "1": "L", "LA": "L"}
_MAX_PIXELS = 2**26  # declared; 8192 x 8192, far above any slice


@dataclass(frozen=True)
class Labels:
    """The classes of a label map. Binary for now: one name, and a mask value above `threshold` is that class.

    `threshold` of 127 takes the noise of JPEG masks away; 0 takes every value but 0.
    """

    names: tuple[str, ...] = ("lesion",)
    threshold: int = 0

    def __post_init__(self) -> None:
        if len(self.names) != 1 or not self.names[0]:
            raise ValueError(f"labels.names: exactly one name expected (binary segmentation), got {list(self.names)}")
        if not 0 <= self.threshold <= 254:
            raise ValueError(f"labels.threshold: 0..254 expected, got {self.threshold}")

    def apply(self, mask: np.ndarray) -> np.ndarray:
        """Mask values (any shape) as uint8 class indices: 0 background, 1 the class."""
        return (mask > self.threshold).astype(np.uint8)


def read_mask(data: bytes) -> np.ndarray | Reject:
    """A mask image file (PNG, JPEG, TIFF, BMP) as uint8 (rows, columns).

    Colours become their largest channel and palettes the colours that they show, so that black is 0 and a colour-coded
    class is not; transparency is left out; bilevel images give 0 and 255; deeper values are clipped to 0..255.
    """
    if not data:
        return Reject(Reason.EMPTY_OBJECT, "mask")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                return Reject(Reason.TOO_LARGE, f"mask of {image.height} x {image.width} pixels")
            values = np.asarray(image.convert(_SHOWN_AS[image.mode]) if image.mode in _SHOWN_AS else image)
    except Image.DecompressionBombError:
        return Reject(Reason.TOO_LARGE, "mask")
    except Exception as error:  # Pillow's decoders raise a dozen types on bad bytes
        return Reject(Reason.NOT_AN_IMAGE, f"mask: {type(error).__name__}")
    if values.dtype.kind not in "iu":
        return Reject(Reason.UNSUPPORTED_PIXELS, f"mask of {values.dtype.name}")
    if values.ndim == 3:
        values = values[..., :3].max(axis=2)
    return np.clip(values, 0, 255).astype(np.uint8)
