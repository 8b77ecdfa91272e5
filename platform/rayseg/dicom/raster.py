"""What image files are decoded to: samples as they are stored, and how they are meant to be seen."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from rayseg.records import Reason, Reject

_ORIENTATION = 0x0112  # TIFF 6.0 section 8, and Exif 2.3 table 4


@dataclass(frozen=True, eq=False)
class Raster:
    """One decoded image, upright.

    samples: (rows, columns) greys or palette indices, or (rows, columns, 3) red, green, blue; integers or floats.
    bits: that a sample has.
    palette: uint8 (entries, 3), the colours of indices; None where the samples are no indices.
    lossy: whether compression may have moved the values.
    """

    samples: np.ndarray
    bits: int
    palette: np.ndarray | None = None
    lossy: bool = False


def exif_orientation(exif: bytes) -> int:
    """The Orientation (1 to 8) of a block of Exif, with or without its `Exif` signature; 1 where it has none."""
    try:
        block = Image.Exif()
        block.load(exif if exif.startswith(b"Exif\0\0") else b"Exif\0\0" + exif)
        return valid_orientation(block.get(_ORIENTATION))
    except Exception:  # whatever a spoiled block makes Pillow stumble over
        return 1


def valid_orientation(value: object) -> int:
    """The value where it is one of 1 to 8, else 1."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """The samples (rows, columns, ...) with their first row on top and first column on the left, as viewers show them.

    Args:
        samples: as stored.
        orientation: 1 to 8, TIFF 6.0 section 8: which sides of the picture the stored row 0 and column 0 are.
    """
    if orientation >= 5:  # row 0 is a side: 5 left and top, 6 right and top, 7 right and bottom, 8 left and bottom
        samples = samples.swapaxes(0, 1)
    down = samples[::-1] if orientation in (3, 4, 7, 8) else samples
    across = down[:, ::-1] if orientation in (2, 3, 6, 7) else down
    return np.ascontiguousarray(across)


def shown_size(rows: int, columns: int, orientation: int) -> tuple[int, int]:
    """Rows and columns of the upright image."""
    return (columns, rows) if orientation >= 5 else (rows, columns)


def of_cmyk(samples: np.ndarray) -> np.ndarray:
    """uint8 (rows, columns, 4) cyan, magenta, yellow, black (255: full ink) to red, green, blue, without a profile."""
    white = 255 - samples.astype(np.uint16)
    return ((white[..., :3] * white[..., 3:] + 127) // 255).astype(np.uint8)


def colours(indices: np.ndarray, palette: np.ndarray) -> np.ndarray | Reject:
    """uint8 (rows, columns, 3) of a palette, or (rows, columns) where all its colours are greys."""
    if int(indices.max()) >= len(palette):
        return Reject(Reason.UNSUPPORTED_PIXELS, "palette: an index without a colour")
    if (palette == palette[:, :1]).all():
        palette = np.ascontiguousarray(palette[:, 0])
    return np.take(palette, indices, axis=0)
