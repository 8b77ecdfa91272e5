"""TIFF and BigTIFF files: the samples of their one image as they are stored, by tifffile; the rest is refused by name.

Read are greys, palettes, colours, CMYK and JPEG's YCbCr, in strips, tiles or planes, of either byte order, in the
compressions of `_COMPRESSIONS`. Reduced copies of the image (NewSubfileType, SubIFDs) are no pages of its own.
"""

import logging
import re
from io import BytesIO
from math import prod

import numpy as np
from tifffile import TiffFile, TiffPage

from rayseg.dicom import jpeg, raster
from rayseg.dicom.raster import Raster
from rayseg.records import Reason, Reject

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of TIFF and of BigTIFF

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would tell what stands in tags

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_SAMPLES = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_JPEG = 7
_FAX = {2, 3, 4}
# None, CCITT RLE, T.4 and T.6, LZW, JPEG, Deflate (twice), PackBits, LZMA, Zstandard: what is decoded into memory of a
# size that is known before.
_COMPRESSIONS = {1, *_FAX, 5, _JPEG, 8, 32946, 32773, 34925, 50000}
_OLD_SUBFILE, _PHOTOMETRIC, _ORIENTATION, _INK_SET, _STK_PLANES = 255, 262, 274, 332, 33629
_MAX_REDUCED = 100
_MAX_SEGMENTS = 2**18


def size(tiff: bytes) -> tuple[int, int] | None:
    """Rows and columns of the upright image, from the file or its beginning; None where that does not tell."""
    try:
        with TiffFile(BytesIO(tiff)) as file:
            pages = _pages(file)
            if isinstance(pages, Reject):
                return None
            return raster.shown_size(pages[0].imagelength, pages[0].imagewidth, _orientation(pages[0]))
    except Exception:  # of tifffile: whatever spoiled or cut tags make it stumble over
        return None


def read(tiff: bytes, max_pixels: int, mask: bool = False) -> Raster | Reject:
    """Decodes a file of one image; transparency and colour profiles do not count.

    Where white is zero the values of an image are turned over: the largest is the brightest. Of a mask see
    `_turned_over`.
    """
    with TiffFile(BytesIO(tiff)) as file:
        pages = _pages(file)
        if isinstance(pages, Reject):
            return pages
        if len(pages) > 1:
            return Reject(Reason.UNSUPPORTED_MULTIFRAME, "a TIFF of more than one page")
        if _next_page_is_cut(file, tiff):
            return Reject(Reason.TRUNCATED, "TIFF: a page lies beyond the end")
        page = pages[0]
        refused = _too_large(page, max_pixels) or _unsupported(page)
        if refused is not None:
            return refused
        lossy = _is_lossy(page, tiff) if page.compression == _JPEG else False
        if isinstance(lossy, Reject):
            return lossy
        turned_over = _turned_over(page, mask)
        return turned_over if isinstance(turned_over, Reject) else _raster(page, turned_over, lossy)


def _pages(file: TiffFile) -> list[TiffPage] | Reject:
    """The page of the file, or two of those of a file of several; reduced copies do not count."""
    pages: list[TiffPage] = []
    reduced: list[TiffPage] = []
    for page in file.pages:
        assert isinstance(page, TiffPage)
        (reduced if _is_reduced(page) else pages).append(page)
        if len(pages) > 1:
            return pages
        if len(reduced) > _MAX_REDUCED:
            return Reject(Reason.TOO_LARGE, "TIFF: pages")
    if not pages and not any(page.subifds for page in reduced):  # of nothing: the writer did not mean it
        return reduced[:2] or Reject(Reason.NOT_AN_IMAGE, "TIFF: no page")
    return pages or Reject(Reason.UNSUPPORTED_PIXELS, "TIFF: the image lies in a SubIFD")


def _is_reduced(page: TiffPage) -> bool:
    """Whether the page is a smaller copy of another one, or says where another one is transparent (TIFF 6.0)."""
    return bool(page.subfiletype & 0b101) or page.tags.valueof(_OLD_SUBFILE) == 2


def _next_page_is_cut(file: TiffFile, tiff: bytes) -> bool:
    at, width = file.pages.next_page_offset, file.tiff.offsetsize
    if at is None:
        return False
    return int.from_bytes(tiff[at : at + width], "little" if file.byteorder == "<" else "big") >= len(tiff)


def _orientation(page: TiffPage) -> int:
    return raster.valid_orientation(page.tags.valueof(_ORIENTATION))


def _photometric(page: TiffPage) -> int:
    """The tag, or what readers take where it is missing."""
    if _PHOTOMETRIC in page.tags:
        return int(page.photometric)
    return _RGB if page.samplesperpixel in (3, 4) else _BLACK_IS_ZERO


def _segments(page: TiffPage) -> list[tuple[int, int]]:
    """Where the strips or tiles begin, and their bytes."""
    return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def _segment_pixels(page: TiffPage) -> int:
    return page.tilelength * page.tilewidth if page.is_tiled else page.rowsperstrip * page.imagewidth


def _too_large(page: TiffPage, max_pixels: int) -> Reject | None:
    if not (page.imagelength > 0 and page.imagewidth > 0 and page.samplesperpixel > 0):
        return Reject(Reason.NOT_AN_IMAGE, "TIFF: ImageLength, ImageWidth, SamplesPerPixel")
    if page.imagelength * page.imagewidth * page.samplesperpixel > max_pixels:
        return Reject(Reason.TOO_LARGE, "the image's width and height")
    if page.is_tiled and not (page.tilelength > 0 and page.tilewidth > 0):
        return Reject(Reason.NOT_AN_IMAGE, "TIFF: TileLength, TileWidth")
    if _segment_pixels(page) * page.samplesperpixel > max_pixels or prod(page.chunked) > _MAX_SEGMENTS:
        return Reject(Reason.TOO_LARGE, "TIFF: strips or tiles")
    return None


def _unsupported(page: TiffPage) -> Reject | None:
    """Why the page is not read: several images in one page, or another kind of pixels."""
    if page.imagedepth > 1 or _planes(page) > 1:
        return Reject(Reason.UNSUPPORTED_MULTIFRAME, "a TIFF of several images in one page")
    refused = _kind(page)
    if refused:
        return Reject(Reason.UNSUPPORTED_PIXELS, f"TIFF: {refused}")
    if not len(page.dataoffsets) == len(page.databytecounts) == prod(page.chunked):
        return Reject(Reason.NOT_AN_IMAGE, "TIFF: strips or tiles are missing")
    if not all(at > 0 and count > 0 for at, count in _segments(page)):
        return Reject(Reason.UNSUPPORTED_PIXELS, "TIFF: strips or tiles without data")
    if any(at + count > page.parent.filehandle.size for at, count in _segments(page)):
        return Reject(Reason.TRUNCATED, "TIFF: a strip or tile ends beyond the end")
    if page.is_contiguous and sum(page.databytecounts) < page.nbytes:
        return Reject(Reason.TRUNCATED, "TIFF: strips or tiles are too short")
    return None


def _planes(page: TiffPage) -> int:
    """How many images stand behind one another in one page, by the conventions of ImageJ, tifffile and MetaMorph."""
    planes = 1
    if page.imagej_description is not None:
        said = re.search(r"^images=(\d{1,9})$", page.imagej_description, re.MULTILINE)
        planes = int(said[1]) if said else 1
    elif page.shaped_description is not None:
        said = re.search(r"shape\W*([\d, ]{1,99})", page.shaped_description)
        planes = prod(int(length) for length in re.findall(r"\d{1,9}", said[1])) // page.size if said else 1
    elif page.is_stk and _STK_PLANES in page.tags:
        planes = page.tags[_STK_PLANES].count
    # Other software keeps what was said of a stack when it writes one image of it.
    there = page.is_contiguous and page.dataoffsets[0] + planes * page.nbytes <= page.parent.filehandle.size
    return planes if there else 1


def _kind(page: TiffPage) -> str:
    """What of the pixels is not read; nothing where all is."""
    photometric, bits, samples = _photometric(page), page.bitspersample, page.samplesperpixel
    if photometric not in _SAMPLES:
        return f"PhotometricInterpretation {photometric}"
    if page.compression not in _COMPRESSIONS:
        return f"Compression {int(page.compression)} {getattr(page.compression, 'name', '')}".strip()
    if photometric == _YCBCR and page.compression != _JPEG:
        return "YCbCr without JPEG"
    if not isinstance(bits, int):
        return "samples of different bits"
    if page.dtype is None or page.dtype.kind not in "biuf":
        return f"samples of {bits} bits, SampleFormat {page.sampleformat}"
    colours, unsigned = _SAMPLES[photometric], page.dtype.kind in "bu"
    extra = page.extrasamples
    # One sample more than colours have is taken as alpha, as all readers do; of greys it could be anything.
    alpha = all(kind in (1, 2) for kind in extra) or (photometric == _RGB and samples == 4)
    if samples < colours or (samples > colours and not (len(extra) in (0, samples - colours) and alpha)):
        return f"{samples} samples a pixel"
    if samples > colours and not extra and photometric != _RGB:
        return f"{samples} samples a pixel"
    if colours > 1 and not (unsigned and bits in (8, 16)):
        return f"{samples} samples of {bits} bits, SampleFormat {page.sampleformat}"
    if photometric == _CMYK and (bits != 8 or page.tags.valueof(_INK_SET, 1) != 1):
        return "inks other than CMYK of 8 bits"
    if photometric == _PALETTE and not (unsigned and bits <= 16 and page.colormap is not None):
        return "a palette of other than unsigned integers, or without colours"
    if photometric == _WHITE_IS_ZERO and page.dtype.kind == "f":
        return "floating point with white as zero"
    return ""


def _is_lossy(page: TiffPage, tiff: bytes) -> bool | Reject:
    """Whether any of the page's JPEGs is lossy, once they are whole and no larger than their strips or tiles."""
    lossy = False
    for at, count in _segments(page):
        data = tiff[at : at + count]
        header = jpeg.head(data)
        if header is None or header.rows * header.columns > _segment_pixels(page):
            return Reject(Reason.NOT_AN_IMAGE, "TIFF: JPEG of another size than its strip or tile")
        if not jpeg.is_whole(data, header):
            return Reject(Reason.NOT_AN_IMAGE, "TIFF: JPEG without an end")
        lossy |= not header.lossless
    return lossy


def _turned_over(page: TiffPage, mask: bool) -> bool | Reject:
    """Whether the values are to be turned over.

    Of masks that are no faxes nobody knows: ImageJ, and tifffile for truth values, store what they mean and call it
    white-is-zero; others store it turned over, so that it shows what they mean.
    """
    if _photometric(page) != _WHITE_IS_ZERO:
        return False
    if not mask or page.compression in _FAX:
        return True
    if page.is_imagej or (page.bitspersample == 1 and page.software.startswith("tifffile")):
        return False
    return Reject(Reason.UNSUPPORTED_PIXELS, "TIFF: a mask with white as zero; save it with black as zero")


def _raster(page: TiffPage, turned_over: bool, lossy: bool) -> Raster:
    photometric, bits = _photometric(page), page.bitspersample
    decoded = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # (planes, rows, columns, samples)
    colours = _SAMPLES[photometric]
    planar = decoded.shape[0] > 1
    samples = np.moveaxis(decoded[:colours, ..., 0], 0, -1) if planar else decoded[0, ..., :colours]
    if colours == 1:
        samples = samples[..., 0]
    kind = np.dtype(np.uint8) if samples.dtype.kind == "b" else samples.dtype.newbyteorder("=")
    samples = samples.astype(kind, copy=False)
    if turned_over:
        samples = ~samples if samples.dtype.kind == "i" else samples.dtype.type(2**bits - 1) - samples
    if photometric == _CMYK:
        samples = raster.of_cmyk(samples)
    palette = None
    if photometric == _PALETTE:
        table = np.asarray(page.colormap).T
        # By the standard 16 bits, of which the upper 8 are kept; some writers fill 8 only.
        palette = (table >> 8 if int(table.max()) > 255 else table).astype(np.uint8)
    return Raster(raster.upright(samples, _orientation(page)), bits, palette, lossy)
