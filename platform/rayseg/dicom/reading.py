"""Bytes to a slice with its geometry and identity, or a reason why not. Nothing here raises on any bytes.

Tolerated: no preamble, no file meta information, no transfer syntax (the encoding is then guessed as pydicom does),
missing optional attributes, overlays (ignored), odd tails after the pixel data. `pixels` decodes the pixel data and
`image_files` reads PNG, JPEG and TIFF.
"""

import logging
import math
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from typing import TypeVar

import numpy as np
from pydicom import config as pydicom_config
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag

from rayseg.dicom import image_files, pixels
from rayseg.records import Reason, Reject

# pydicom writes attribute values, identities among them, into its warnings: neither checked nor told here.
pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

MAX_PIXELS = 2**27  # rows * columns * samples * frames that an object may declare: 256 MiB of 16-bit values
_MAX_INFLATED_BYTES = 2**28 + 2**24  # of a deflated data set: the largest pixel data and a generous header

_PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_KEYWORDS = {
    0x00080016: "SOPClassUID",
    0x00080018: "SOPInstanceUID",
    0x00080060: "Modality",
    0x00100020: "PatientID",
    0x00180050: "SliceThickness",
    0x0020000D: "StudyInstanceUID",
    0x0020000E: "SeriesInstanceUID",
    0x00200013: "InstanceNumber",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00200052: "FrameOfReferenceUID",
    0x00280002: "SamplesPerPixel",
    0x00280004: "PhotometricInterpretation",
    0x00280008: "NumberOfFrames",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280030: "PixelSpacing",
    0x00280100: "BitsAllocated",
    0x00280101: "BitsStored",
    0x00280102: "HighBit",
    0x00280103: "PixelRepresentation",
    0x00280120: "PixelPaddingValue",
    0x00280121: "PixelPaddingRangeLimit",
    0x00281052: "RescaleIntercept",
    0x00281053: "RescaleSlope",
    0x00283000: "ModalityLUTSequence",
    0x52009229: "SharedFunctionalGroupsSequence",
    0x52009230: "PerFrameFunctionalGroupsSequence",
}
_TAGS = {keyword: tag for tag, keyword in _KEYWORDS.items()}

# Storage classes with pixels that are no source image.
_NO_SOURCE_IMAGE = {
    str(uid.SegmentationStorage): "Segmentation Storage",
    "1.2.840.10008.5.1.4.1.1.66.7": "Label Map Segmentation Storage",
    str(uid.RTDoseStorage): "RT Dose Storage",
    str(uid.ParametricMapStorage): "Parametric Map Storage",
}

DefaultT = TypeVar("DefaultT")


@dataclass(frozen=True)
class Geometry:
    """Where the slice's pixels lie. What the object lacks, or says in an unusable way, is None."""

    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None = None  # between rows, between columns
    slice_thickness_mm: float | None = None
    image_position_mm: tuple[float, float, float] | None = None  # centre of the first pixel, patient coordinates
    image_orientation: tuple[float, float, float, float, float, float] | None = None  # along a row, along a column


@dataclass(frozen=True)
class Header:
    """What an object says of itself. The identities must not be logged or stored as they are: see `pseudonyms`."""

    sop_class_uid: str
    sop_instance_uid: str = field(repr=False)
    series_instance_uid: str = field(repr=False)
    study_instance_uid: str = field(repr=False)
    patient_id: str = field(repr=False)  # empty where the object has none
    frame_of_reference_uid: str | None = field(repr=False)
    modality: str  # empty where the object has none
    transfer_syntax_uid: str
    instance_number: int | None
    geometry: Geometry


@dataclass(frozen=True, eq=False)
class Slice:
    """One grey image.

    stored: (rows, columns) uint8, int16, uint16 or int32, larger is brighter (MONOCHROME1 comes inverted), unused bits
        removed. Pixels of the padding value or range hold the smallest real value. May be read-only.
    header: None for image files.
    """

    stored: np.ndarray
    rescale_slope: float
    rescale_intercept: float
    header: Header | None

    def values(self) -> np.ndarray:
        """Returns float32 (rows, columns): stored values times slope plus intercept; HU for CT."""
        if self.stored.dtype.itemsize > 2:  # float32 holds 24 bits of an integer
            wide = self.stored.astype(np.float64) * self.rescale_slope + self.rescale_intercept
            return wide.astype(np.float32)
        values = self.stored.astype(np.float32)
        if self.rescale_slope != 1.0:
            values *= np.float32(self.rescale_slope)
        if self.rescale_intercept != 0.0:
            values += np.float32(self.rescale_intercept)
        return values


@dataclass(frozen=True)
class _Parsed:
    """A data set up to its pixel data; `data` is the object's bytes, inflated where they were deflated."""

    data: bytes
    dataset: Dataset
    transfer_syntax_uid: str
    pixel_tag: int | None
    pixel_vr: str | None
    pixel_offset: int
    pixel_bytes: int


@dataclass(frozen=True)
class _Image:
    header: Header
    layout: pixels.Layout
    rescale_slope: float
    rescale_intercept: float


def read_header(data: bytes, object_bytes: int | None = None) -> Header | Reject:
    """Reads a DICOM object's header, without its pixel data, from all of the object or from its beginning.

    Args:
        data: the object, or a prefix of it. A Reject from a prefix is provisional: read the whole object.
        object_bytes: the whole object's size where known; one that is too small for its pixels is then TRUNCATED.
    """
    try:
        _silence()
        parsed = _parse(data)
        if isinstance(parsed, Reject):
            return parsed
        image = _inspect(parsed)
        if isinstance(image, Reject):
            return image
        if object_bytes is not None and parsed.transfer_syntax_uid in pixels.NATIVE:
            deflated = parsed.transfer_syntax_uid == uid.DeflatedExplicitVRLittleEndian
            held = min(parsed.pixel_bytes, object_bytes - parsed.pixel_offset)
            if not deflated and held < image.layout.frame_bytes:
                return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than Rows and Columns need")
        return image.header
    except Exception as error:
        return Reject(Reason.INTERNAL, type(error).__name__)


def read_slice(data: bytes) -> Slice | Reject:
    """Reads one grey image: a DICOM object or, by its first bytes, a PNG, JPEG or TIFF file."""
    try:
        _silence()
        if image_files.is_image(data):
            stored = image_files.decode(data, MAX_PIXELS)
            return stored if isinstance(stored, Reject) else Slice(stored, 1.0, 0.0, None)
        parsed = _parse(data)
        if isinstance(parsed, Reject):
            return parsed
        image = _inspect(parsed)
        if isinstance(image, Reject):
            return image
        stored = pixels.decode(parsed.data, parsed.pixel_offset, parsed.pixel_bytes, image.layout)
        if isinstance(stored, Reject):
            return stored
        return Slice(stored, image.rescale_slope, image.rescale_intercept, image.header)
    except Exception as error:
        return Reject(Reason.INTERNAL, type(error).__name__)


def _silence() -> None:
    # Put in place at each call, as test runners replace all filters; adding one filter is safe between threads, which
    # `warnings.catch_warnings` is not.
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)|PIL(\.|$)|openjpeg(\.|$)|libjpeg(\.|$)")


def _parse(data: bytes) -> _Parsed | Reject:
    """Walks the data set up to its pixel data, keeping the elements named in `_KEYWORDS`."""
    if not data:
        return Reject(Reason.EMPTY_OBJECT)
    part10 = data[128:132] == b"DICM"
    if not part10 and not _begins_with_element(data):
        return Reject(Reason.NOT_DICOM)
    deflated = part10 and data.find(uid.DeflatedExplicitVRLittleEndian.encode(), 132, 1024) >= 0
    if deflated:
        inflated = _inflate(data)
        if isinstance(inflated, Reject):
            return inflated
        data = inflated

    stream = BytesIO(data)
    last = [0, 0, 0]  # tag, value offset and value length of the element seen last
    last_vr: list[str | None] = [None]

    def at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
        last[:] = tag, stream.tell(), length
        last_vr[0] = vr
        return tag in _PIXEL_TAGS

    try:
        dataset = read_partial(stream, at_pixels, force=True, specific_tags=list(_KEYWORDS))
    except Exception as error:
        if stream.tell() >= len(data):
            return Reject(Reason.TRUNCATED, "the data set ends within an element")
        return Reject(Reason.CORRUPT, type(error).__name__)
    tag, offset, length = last
    found = tag in _PIXEL_TAGS
    plausible = "SOPClassUID" in dataset or (found and "Rows" in dataset)
    if not part10 and not plausible:
        return Reject(Reason.NOT_DICOM)
    if not found and (stream.tell() > len(data) or any(data[offset + length :]) or not plausible):
        return Reject(Reason.TRUNCATED, "the data set ends within an element or before its first attributes")
    transfer_syntax_uid = str(dataset.file_meta.get("TransferSyntaxUID") or "")
    if not transfer_syntax_uid:
        implicit, little = dataset.original_encoding
        guessed = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        transfer_syntax_uid = str(guessed if little else uid.ExplicitVRBigEndian)
    return _Parsed(
        data=data,
        dataset=dataset,
        transfer_syntax_uid=str(uid.DeflatedExplicitVRLittleEndian) if deflated else transfer_syntax_uid,
        pixel_tag=tag if found else None,
        pixel_vr=last_vr[0],
        pixel_offset=offset,
        pixel_bytes=length,
    )


def _begins_with_element(data: bytes) -> bool:
    """Whether an object without preamble starts as a data set does: a first group and a plausible VR or length."""
    if len(data) < 8 or data[:2] not in (b"\x00\x00", b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return False
    return data[4:6].isalpha() or int.from_bytes(data[4:8], "little") < len(data)


def _inflate(data: bytes) -> bytes | Reject:
    """Makes a deflated object an explicit little endian one (PS3.5 A.5), within a limit that pydicom does not set."""
    if data[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        return Reject(Reason.MISSING_ATTRIBUTE, "FileMetaInformationGroupLength")
    start = 144 + struct.unpack_from("<L", data, 140)[0]
    deflated_uid, plain_uid = uid.DeflatedExplicitVRLittleEndian.encode(), uid.ExplicitVRLittleEndian.encode()
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        body = inflater.decompress(data[start:], _MAX_INFLATED_BYTES)
    except zlib.error:
        return Reject(Reason.CORRUPT, "the deflated data set cannot be inflated")
    if inflater.unconsumed_tail:
        return Reject(Reason.TOO_LARGE, "the deflated data set")
    return data[:start].replace(deflated_uid, plain_uid.ljust(len(deflated_uid), b"\0")) + body


def _inspect(parsed: _Parsed) -> _Image | Reject:
    """Makes the header and decides from it alone whether the object is an image that we read."""
    elements = _Elements(parsed.dataset)
    sop_class_uid = elements.text("SOPClassUID")
    if sop_class_uid in _NO_SOURCE_IMAGE:
        return Reject(Reason.UNSUPPORTED_SOP_CLASS, _NO_SOURCE_IMAGE[sop_class_uid])
    if parsed.pixel_tag is None:
        return Reject(Reason.NO_PIXELS)
    if _PIXEL_TAGS[parsed.pixel_tag] != "PixelData":
        return Reject(Reason.UNSUPPORTED_PIXELS, _PIXEL_TAGS[parsed.pixel_tag])
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        if elements.integer(keyword, 0) < 1:
            return Reject(Reason.MISSING_ATTRIBUTE, keyword)
    rows, columns = elements.integer("Rows", 0), elements.integer("Columns", 0)
    samples, frames = elements.integer("SamplesPerPixel", 1), elements.integer("NumberOfFrames", 1)
    if rows * columns * max(samples, 1) * max(frames, 1) > MAX_PIXELS:
        return Reject(Reason.TOO_LARGE, "Rows, Columns, SamplesPerPixel, NumberOfFrames")
    if frames > 1:
        return Reject(Reason.UNSUPPORTED_MULTIFRAME, "NumberOfFrames")
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if elements.has(keyword):  # an enhanced object of one frame: its rescale and position lie in here
            return Reject(Reason.UNSUPPORTED_MULTIFRAME, keyword)
    layout = _layout(parsed, elements, rows, columns)
    if isinstance(layout, Reject):
        return layout
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        if not elements.text(keyword):
            return Reject(Reason.MISSING_ATTRIBUTE, keyword)
    slope, intercept = elements.number("RescaleSlope", 1.0), elements.number("RescaleIntercept", 0.0)
    if slope is None or slope == 0:
        return Reject(Reason.MISSING_ATTRIBUTE, "RescaleSlope")
    # A CT without an intercept has no HU (type 1 in PS3.3 C.8.2.1); elsewhere stored values are values.
    if intercept is None or (sop_class_uid == uid.CTImageStorage and not elements.has("RescaleIntercept")):
        return Reject(Reason.MISSING_ATTRIBUTE, "RescaleIntercept")
    header = Header(
        sop_class_uid=sop_class_uid,
        sop_instance_uid=elements.text("SOPInstanceUID"),
        series_instance_uid=elements.text("SeriesInstanceUID"),
        study_instance_uid=elements.text("StudyInstanceUID"),
        patient_id=elements.text("PatientID"),
        frame_of_reference_uid=elements.text("FrameOfReferenceUID") or None,
        modality=elements.text("Modality"),
        transfer_syntax_uid=parsed.transfer_syntax_uid,
        instance_number=elements.integer("InstanceNumber", None),
        geometry=_geometry(elements, rows, columns),
    )
    return _Image(header, layout, slope, intercept)


def _layout(parsed: _Parsed, elements: "_Elements", rows: int, columns: int) -> pixels.Layout | Reject:
    """The pixel data's layout (PS3.5 section 8), where it is one that we decode."""
    if elements.integer("SamplesPerPixel", 1) != 1:
        return Reject(Reason.UNSUPPORTED_PIXELS, "SamplesPerPixel")
    photometric = elements.text("PhotometricInterpretation") or "MONOCHROME2"
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        return Reject(Reason.UNSUPPORTED_PIXELS, "PhotometricInterpretation")
    if elements.has("ModalityLUTSequence"):  # values that are no linear function of the stored ones
        return Reject(Reason.UNSUPPORTED_PIXELS, "ModalityLUTSequence")
    allocated = elements.integer("BitsAllocated", 0)
    if allocated not in (8, 16, 32):
        return Reject(Reason.UNSUPPORTED_PIXELS, "BitsAllocated")
    stored = elements.integer("BitsStored", allocated)
    if not 1 <= stored <= allocated:
        return Reject(Reason.UNSUPPORTED_PIXELS, "BitsStored")
    syntax = parsed.transfer_syntax_uid
    if syntax not in pixels.NATIVE and syntax not in pixels.DECODERS:
        name = uid.UID(syntax).name  # the UID itself where it is not registered: that could be anything
        return Reject(Reason.UNSUPPORTED_TRANSFER_SYNTAX, name if name != syntax else "not a registered one")
    high = elements.integer("HighBit", stored - 1)
    padding = elements.integer("PixelPaddingValue", None)
    limit = elements.integer("PixelPaddingRangeLimit", None)
    return pixels.Layout(
        transfer_syntax_uid=syntax,
        rows=rows,
        columns=columns,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high if stored - 1 <= high < allocated else stored - 1,
        signed=elements.integer("PixelRepresentation", 0) == 1,
        inverted=photometric == "MONOCHROME1",
        padding=None if padding is None else (padding, padding if limit is None else limit),
        words_swapped=parsed.pixel_vr == "OW",
    )


def _geometry(elements: "_Elements", rows: int, columns: int) -> Geometry:
    spacing = elements.numbers("PixelSpacing", 2)
    thickness = elements.number("SliceThickness", None)
    position = elements.numbers("ImagePositionPatient", 3)
    orientation = elements.numbers("ImageOrientationPatient", 6)
    if orientation is not None and not _is_orthonormal(orientation[:3], orientation[3:]):
        orientation = None
    return Geometry(
        rows=rows,
        columns=columns,
        pixel_spacing_mm=spacing if spacing is not None and min(spacing) > 0 else None,
        slice_thickness_mm=thickness if thickness is not None and thickness > 0 else None,
        image_position_mm=position,
        image_orientation=orientation,
    )


def _is_orthonormal(row: tuple[float, ...], column: tuple[float, ...]) -> bool:
    product = sum(a * b for a, b in zip(row, column, strict=True))
    lengths = math.hypot(*row), math.hypot(*column)
    return abs(product) < 0.01 and all(abs(length - 1.0) < 0.01 for length in lengths)


class _Elements:
    """Plain values of a data set's raw elements: an order of magnitude faster than pydicom's, and silent.

    An absent, empty or unusable element gives the default; only `number` tells unusable (None) from absent.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def has(self, keyword: str) -> bool:
        return _TAGS[keyword] in self._dataset

    def _bytes(self, keyword: str) -> bytes:
        if not self.has(keyword):
            return b""
        element = self._dataset.get_item(_TAGS[keyword])
        return element.value or b"" if isinstance(element, RawDataElement) else b""

    def text(self, keyword: str) -> str:
        value = self._bytes(keyword)
        if value.isascii():
            return value.decode("ascii").strip(" \0")
        return str(self._dataset[_TAGS[keyword]].value).strip(" \0")  # by the data set's character set

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        parts = self._bytes(keyword).strip(b" \0").split(b"\\")
        try:
            values = tuple(float(part) for part in parts)
        except ValueError:
            return None
        return values if len(values) == count and all(map(math.isfinite, values)) else None

    def number(self, keyword: str, default: DefaultT) -> float | DefaultT | None:
        if not self._bytes(keyword).strip(b" \0"):
            return default
        values = self.numbers(keyword, 1)
        return None if values is None else values[0]

    def integer(self, keyword: str, default: DefaultT) -> int | DefaultT:
        value = self._bytes(keyword)
        if keyword in ("InstanceNumber", "NumberOfFrames"):  # integer strings; the others are binary
            number = self.number(keyword, None)
            return default if number is None or not -(2**31) <= number < 2**31 else int(number)
        little = self._dataset.get_item(_TAGS[keyword]).is_little_endian if value else True
        return int.from_bytes(value[:2], "little" if little else "big") if len(value) >= 2 else default
