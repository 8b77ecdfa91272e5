"""BMP files: indices of palettes as they are stored; colours by imagecodecs."""

import struct

import imagecodecs
import numpy as np

from rayseg.dicom.raster import Raster
from rayseg.records import Reason, Reject

MAGIC = b"BM"
_RGB, _RLE8, _RLE4, _FIELDS = range(4)
_MAX_RUN_LENGTH_PIXELS = 2**22  # they are decoded one run after the other


def read(bmp: bytes, max_pixels: int) -> Raster | Reject:
    """Decodes a file with an information header; transparency does not count."""
    if len(bmp) < 54:
        return Reject(Reason.NOT_AN_IMAGE, "BMP: header")
    offset, size, columns, height, _, bits, compression = struct.unpack("<10xIIiiHHI", bmp[:34])
    colours = int.from_bytes(bmp[46:50], "little")
    rows = abs(height)
    if size < 40 or columns < 1 or not rows:
        return Reject(Reason.UNSUPPORTED_PIXELS, "BMP: header")
    if rows * columns * (1 if bits <= 8 else 3) > max_pixels:
        return Reject(Reason.TOO_LARGE, "the image's width and height")
    if (bits, compression) in ((16, _RGB), (24, _RGB), (32, _RGB), (16, _FIELDS), (32, _FIELDS)):
        return Raster(np.ascontiguousarray(imagecodecs.bmp_decode(bmp)[..., :3]), 8)
    if (bits, compression) in ((1, _RGB), (4, _RGB), (8, _RGB)):
        indices = _unpacked(bmp[offset:], rows, columns, bits)
    elif (bits, compression) in ((8, _RLE8), (4, _RLE4)):
        if rows * columns > _MAX_RUN_LENGTH_PIXELS:
            return Reject(Reason.TOO_LARGE, "BMP: run lengths of so many pixels")
        # No more than two bytes a pixel and four a row are needed.
        indices = _run_lengths(bmp[offset : offset + 4 * (rows + 1) * (columns + 1)], rows, columns, bits)
    else:
        return Reject(Reason.UNSUPPORTED_PIXELS, f"BMP: {bits} bits, compression {compression}")
    entries = bmp[14 + size : 14 + size + 4 * min(colours or 2**bits, 2**bits)]
    palette = np.frombuffer(entries[: len(entries) // 4 * 4], np.uint8).reshape(-1, 4)[:, 2::-1]
    # The lowest row comes first, where the height is not negative.
    return Raster(np.ascontiguousarray(indices[::-1] if height > 0 else indices), bits, palette)


def _unpacked(data: bytes, rows: int, columns: int, bits: int) -> np.ndarray:
    """Rows of whole 32-bit words, the first pixel in the highest bits."""
    stride = (columns * bits + 31) // 32 * 4
    lines = np.frombuffer(data, np.uint8, rows * stride).reshape(rows, stride)
    if bits == 8:
        return lines[:, :columns]
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    return ((lines[..., np.newaxis] >> shifts) & np.uint8(2**bits - 1)).reshape(rows, -1)[:, :columns]


def _run_lengths(data: bytes, rows: int, columns: int, bits: int) -> np.ndarray:
    """RLE8 and RLE4: (count, value), (0, count of values that follow), (0, 0) next row, (0, 1) end, (0, 2) a move."""
    indices = np.zeros((rows, columns), np.uint8)
    at, row, column = 0, 0, 0

    def pixels(values: bytes, count: int) -> np.ndarray:
        packed = np.frombuffer(values, np.uint8)
        if bits == 4:
            packed = np.stack([packed >> 4, packed & 15], axis=-1).ravel()
        return np.resize(packed, count)

    while True:
        if row > rows:
            raise ValueError("a row beyond the image")
        count, value = data[at], data[at + 1]  # an IndexError where the end is missing
        at += 2
        if count == 0 and value == 0:
            row, column = row + 1, 0
            continue
        if count == 0 and value == 1:
            break
        if count == 0 and value == 2:
            column, row, at = column + data[at], row + data[at + 1], at + 2
            continue
        length = 1 if count else (value * bits + 7) // 8
        run = pixels(data[at - 1 : at] if count else data[at : at + length], count or value)
        at += 0 if count else length + length % 2
        if row >= rows or column + len(run) > columns:
            raise ValueError("a run beyond the image")
        indices[row, column : column + len(run)] = run
        column += len(run)
    return indices
