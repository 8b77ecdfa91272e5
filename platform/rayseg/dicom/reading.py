"""Bytes to a slice with its geometry and identity, or a reason why not. Nothing here raises on any bytes.

Tolerated: no preamble, no file meta information, no transfer syntax (the encoding is then guessed as pydicom does),
missing optional attributes, overlays (ignored), odd tails after the pixel data. `pixels` decodes the pixel data and
`image_files` reads PNG, JPEG and TIFF.
"""

import math
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from pydicom import uid

from rayseg.dicom import image_files, pixels
from rayseg.dicom.parsing import PIXEL_TAGS, Elements, Parsed, parse, silence_libraries
from rayseg.records import Reason, Reject

MAX_PIXELS = 2**27  # rows * columns * samples * frames that an object may declare: 256 MiB of 16-bit values

# Storage classes with pixels that are no source image.
_NO_SOURCE_IMAGE = {
    str(uid.SegmentationStorage): "Segmentation Storage",
    "1.2.840.10008.5.1.4.1.1.66.7": "Label Map Segmentation Storage",
    str(uid.RTDoseStorage): "RT Dose Storage",
    str(uid.ParametricMapStorage): "Parametric Map Storage",
}


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
    """One image, grey unless colours were asked for.

    stored: (rows, columns) uint8, int16, uint16 or int32, larger is brighter (MONOCHROME1 comes inverted), unused bits
        removed. Pixels of the padding value or range hold the smallest real value. May be read-only. Of a colour image
        (rows, columns, 3) uint8: red, green, blue.
    header: None for image files.
    """

    stored: np.ndarray
    rescale_slope: float
    rescale_intercept: float
    header: Header | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.stored.shape[0], self.stored.shape[1]

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
        silence_libraries()
        parsed = parse(data)
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


def read_slice(data: bytes, color: bool = False) -> Slice | Reject:
    """Reads one image: a DICOM object or, by its first bytes, a PNG, JPEG or TIFF file.

    `color` says whether a colour PNG, JPEG or TIFF file is wanted as such; grey ones stay grey.
    """
    try:
        silence_libraries()
        if image_files.is_image(data):
            stored = image_files.decode(data, MAX_PIXELS, color)
            return stored if isinstance(stored, Reject) else Slice(stored, 1.0, 0.0, None)
        parsed = parse(data)
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


def _inspect(parsed: Parsed) -> _Image | Reject:
    """Makes the header and decides from it alone whether the object is an image that we read."""
    elements = Elements(parsed.dataset)
    sop_class_uid = elements.text("SOPClassUID")
    if sop_class_uid in _NO_SOURCE_IMAGE:
        return Reject(Reason.UNSUPPORTED_SOP_CLASS, _NO_SOURCE_IMAGE[sop_class_uid])
    if parsed.pixel_tag is None:
        return Reject(Reason.NO_PIXELS)
    if PIXEL_TAGS[parsed.pixel_tag] != "PixelData":
        return Reject(Reason.UNSUPPORTED_PIXELS, PIXEL_TAGS[parsed.pixel_tag])
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


def _layout(parsed: Parsed, elements: Elements, rows: int, columns: int) -> pixels.Layout | Reject:
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


def _geometry(elements: Elements, rows: int, columns: int) -> Geometry:
    spacing = cast(tuple[float, float] | None, elements.numbers("PixelSpacing", 2))
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
        image_position_mm=cast(tuple[float, float, float] | None, position),
        image_orientation=cast(tuple[float, float, float, float, float, float] | None, orientation),
    )


def _is_orthonormal(row: tuple[float, ...], column: tuple[float, ...]) -> bool:
    product = sum(a * b for a, b in zip(row, column, strict=True))
    lengths = math.hypot(*row), math.hypot(*column)
    return abs(product) < 0.01 and all(abs(length - 1.0) < 0.01 for length in lengths)
