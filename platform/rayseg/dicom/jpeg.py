"""JPEG files (ISO/IEC 10918-1): their samples, by libjpeg-turbo through imagecodecs."""

from dataclasses import dataclass

import imagecodecs
import numpy as np

from rayseg.dicom import raster
from rayseg.dicom.raster import Raster
from rayseg.records import Reason, Reject

MAGIC = b"\xff\xd8\xff"
_ALONE = {0x00, 0x01, *range(0xD0, 0xD9), 0xFF}  # markers without a segment, and what is none
_MAX_SEGMENTS = 2**16
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_SCAN, _END, _APP1, _APP14 = 0xDA, 0xD9, 0xE1, 0xEE


@dataclass(frozen=True)
class Head:
    """What the segments before the first scan say."""

    rows: int
    columns: int
    bits: int
    components: int
    frame: int  # its marker's second byte: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, 0xC3 lossless, ...
    orientation: int
    adobe: bool  # inks are stored inverted where Adobe's marker is there
    scan: int  # where it begins; -1 where the beginning of the file does not reach it

    @property
    def lossless(self) -> bool:
        """Whether the samples are as they were before compression."""
        return self.frame in _LOSSLESS


def head(jpeg: bytes) -> Head | None:
    """Walks the segments of a file, or of its beginning; None where there is no frame header in it."""
    at, frame, orientation, adobe, scan = 2, None, 1, False, -1
    for _ in range(_MAX_SEGMENTS):
        at = jpeg.find(b"\xff", at)
        if at < 0 or at + 4 > len(jpeg):
            break
        marker = jpeg[at + 1]
        if marker in _ALONE:
            at += 1 if marker in (0x00, 0xFF) else 2
            continue
        if marker in (_SCAN, _END):
            scan = at if marker == _SCAN else -1
            break
        length = int.from_bytes(jpeg[at + 2 : at + 4])
        body = jpeg[at + 4 : at + 2 + length]
        if marker in _FRAMES and len(body) >= 6 and frame is None:
            frame = (int.from_bytes(body[1:3]), int.from_bytes(body[3:5]), body[0], body[5], marker)
        elif marker == _APP1 and body.startswith(b"Exif\0\0") and orientation == 1:
            orientation = raster.exif_orientation(body)
        elif marker == _APP14 and body.startswith(b"Adobe"):
            adobe = True
        at += 2 + max(length, 2)
    return None if frame is None else Head(*frame, orientation, adobe, scan)


def is_whole(jpeg: bytes, header: Head) -> bool:
    """Whether the file has an end after its scans; decoders fill with grey what is missing."""
    return header.scan >= 0 and jpeg.find(b"\xff\xd9", header.scan) >= 0


def read(jpeg: bytes, max_pixels: int) -> Raster | Reject:
    """Decodes a file; its colour profile does not count."""
    header = head(jpeg)
    if header is None or header.scan < 0 or not header.rows or not header.columns:
        return Reject(Reason.NOT_AN_IMAGE, "JPEG: no frame or no scan")
    if header.rows * header.columns * header.components > max_pixels:
        return Reject(Reason.TOO_LARGE, "the image's width and height")
    if header.components not in (1, 3, 4) or (header.components > 1 and header.bits != 8):
        return Reject(Reason.UNSUPPORTED_PIXELS, f"a JPEG of {header.components} samples of {header.bits} bits")
    if not is_whole(jpeg, header):
        return Reject(Reason.NOT_AN_IMAGE, "JPEG: no end")
    decoded = imagecodecs.jpeg8_decode(jpeg)
    assert decoded.shape[:2] == (header.rows, header.columns)
    if header.components == 4:
        decoded = raster.of_cmyk(np.invert(decoded) if header.adobe else decoded)
    return Raster(raster.upright(decoded, header.orientation), header.bits, lossy=not header.lossless)
