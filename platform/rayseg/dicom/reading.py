"""Bytes to slices with their geometry and identity, or a reason why not. Nothing here raises on any bytes.

Tolerated: no preamble, no file meta information, no transfer syntax (the encoding is then guessed as pydicom does),
missing optional attributes, overlays (ignored), odd tails after the pixel data. Each frame of a multi-frame object is a
slice. Colours are read as their luminance. `layout` takes the data set's word on the pixel data, `pixels` decodes it,
`tables` are palettes and modality LUTs, and `image_files` reads PNG, JPEG and TIFF.

Limits against objects that ask for more than they are worth: MAX_PIXELS of a frame, MAX_FRAMES, the inflated bytes of a
deflated data set (`parsing`), and scans and tiles of a codestream (`codestreams`). Only the frame asked for is decoded,
so these bound memory (some 10 bytes a pixel) and, as no decoder can be stopped from within its process, time too: the
slowest needs 0.1 microseconds a pixel, 7 s for the largest frame.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
from pydicom import uid

from rayseg.dicom import image_files, layout, mosaic, pixels, traits, volumes
from rayseg.dicom.parsing import PIXEL_TAGS, Elements, Parsed, frame_elements, parse, silence_libraries
from rayseg.dicom.voxels import Volume
from rayseg.geometry.grid import Geometry
from rayseg.geometry.planes import is_orthonormal
from rayseg.records import Reason, Reject

MAX_PIXELS = 2**26  # rows * columns * samples that a frame may declare: 8192 x 8192 grey pixels
MAX_FRAMES = 2**14

_Decoded = tuple[np.ndarray, float, float]  # a volume as `volumes.image` gives it

# Storage classes with pixels that are no source image.
_NO_SOURCE_IMAGE = {
    str(uid.SegmentationStorage): "Segmentation Storage",
    "1.2.840.10008.5.1.4.1.1.66.7": "Label Map Segmentation Storage",
    str(uid.VLWholeSlideMicroscopyImageStorage): "VL Whole Slide Microscopy Image Storage: tiles, no slices",
    str(uid.RTDoseStorage): "RT Dose Storage",
    str(uid.ParametricMapStorage): "Parametric Map Storage",
}
# A CT without an intercept has no HU (type 1 in PS3.3 C.8.2.1 and C.8.15.3.10); elsewhere stored values are values.
_IN_HU = {str(uid.CTImageStorage), str(uid.EnhancedCTImageStorage), str(uid.LegacyConvertedEnhancedCTImageStorage)}
_LEGACY_MR = str(uid.LegacyConvertedEnhancedMRImageStorage)


@dataclass(frozen=True)
class Header:
    """What an object says of itself. The identities must not be logged or stored as they are: see `pseudonyms`."""

    sop_class_uid: str  # empty where the object has none
    sop_instance_uid: str = field(repr=False)
    series_instance_uid: str = field(repr=False)
    study_instance_uid: str = field(repr=False)
    patient_id: str = field(repr=False)  # empty where the object has none
    frame_of_reference_uid: str | None = field(repr=False)
    modality: str  # upper case; empty where the object has none, or no code string
    transfer_syntax_uid: str
    instance_number: int | None
    geometry: Geometry
    frame: int | None = None  # of a multi-frame object, from 0; None where the object is one image
    localizer: bool = False  # a scout view: no part of a stack
    scanner: str = ""  # Manufacturer and ManufacturerModelName, empty where the object has neither
    body_part: str = ""  # BodyPartExamined, likewise
    issuer_of_patient_id: str = field(default="", repr=False)  # empty where the object has none
    # What may tell it from other volumes of its series, see `traits.read`; `read_headers` alone looks for it.
    traits: str = field(default="", compare=False)

    @property
    def slice_uid(self) -> str:
        """What names the slice among all others: the SOP Instance UID, with `#frame` of a multi-frame object."""
        return slice_uid(self.sop_instance_uid, self.frame)


@dataclass(frozen=True, eq=False)
class Slice:
    """One image, grey unless colours were asked for.

    stored: (rows, columns) uint8, int16, uint16 or int32, larger is brighter (MONOCHROME1 comes inverted), unused bits
        removed. Pixels of the padding value or range hold the smallest real value. May be read-only. Of a colour image
        (rows, columns, 3) uint8: red, green, blue. Of a volume of fractions float32, all of them finite.
    header: None for image files.
    geometry: where the slice of a volume lies; a DICOM object's header has it, other image files have none.
    is_colour: whether `stored` is the luminance of a DICOM object's colours: of all its type's values, no measurement.
    """

    stored: np.ndarray
    rescale_slope: float
    rescale_intercept: float
    header: Header | None
    geometry: Geometry | None = None
    is_colour: bool = False

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


def slice_uid(sop_instance_uid: str, frame: int | None) -> str:
    """See `Header.slice_uid`."""
    return sop_instance_uid if frame is None else f"{sop_instance_uid}#{frame}"


@dataclass(frozen=True, eq=False)
class Inspected:
    """A DICOM image object, inspected but not decoded."""

    parsed: Parsed
    elements: Elements
    layout: pixels.Layout
    frames: int
    grouped: bool  # it has functional groups (enhanced)

    @property
    def _in_hu(self) -> bool:
        sop_class_uid = _sop_class_uid(self.parsed, self.elements)
        return sop_class_uid in _IN_HU if sop_class_uid else self.elements.text("Modality") == "CT"

    def values(self, frame: int | None, with_traits: bool = False) -> tuple[Header, float, float] | Reject:
        """Header, rescale slope and intercept of a frame."""
        dataset = self.parsed.dataset
        elements = Elements(dataset, frame_elements(dataset, frame or 0, with_traits) if self.grouped else {})
        kinds = elements.text("FrameType"), self.elements.text("ImageType")
        slices_are_frames = self.grouped and self.frames > 1 and elements.text("SOPClassUID") != _LEGACY_MR
        private = self.elements.raw(mosaic.TAGS) if mosaic.NUMBER in dataset else {}
        if refusal := mosaic.refusal(kinds, private, slices_are_frames):
            return refusal
        slope, intercept = elements.number("RescaleSlope", 1.0), elements.number("RescaleIntercept", 0.0)
        if not self.layout.is_rescaled:
            slope, intercept = 1.0, 0.0
        elif intercept is None or (self._in_hu and not elements.has("RescaleIntercept")):
            return Reject(Reason.MISSING_ATTRIBUTE, "RescaleIntercept")
        if slope is None or slope == 0:
            return Reject(Reason.MISSING_ATTRIBUTE, "RescaleSlope")
        header = Header(
            sop_class_uid=elements.text("SOPClassUID"),
            sop_instance_uid=elements.text("SOPInstanceUID"),
            series_instance_uid=elements.text("SeriesInstanceUID"),
            study_instance_uid=elements.text("StudyInstanceUID"),
            patient_id=elements.text("PatientID"),
            frame_of_reference_uid=elements.text("FrameOfReferenceUID") or None,
            modality=_code_string(elements.text("Modality")),
            transfer_syntax_uid=self.parsed.transfer_syntax_uid,
            instance_number=elements.integer("InstanceNumber", None),
            # Of several frames without functional groups none is known to lie where the object says.
            geometry=_geometry(elements, self.layout.rows, self.layout.columns, placed=self.grouped or frame is None),
            frame=frame,
            localizer="LOCALIZER" in "\\".join(kinds).split("\\"),
            scanner=" ".join(f"{elements.text('Manufacturer')} {elements.text('ManufacturerModelName')}".split()),
            body_part=_code_string(elements.text("BodyPartExamined")),
            issuer_of_patient_id=elements.text("IssuerOfPatientID"),
            traits=traits.read(elements.raw(traits.TAGS)) if with_traits else "",
        )
        return header, slope, intercept


def read_headers(data: bytes, object_bytes: int | None = None) -> list[Header] | Reject:
    """Reads a DICOM object's header, without its pixel data, from all of the object or from its beginning.

    Args:
        data: the object, or a prefix of it. A Reject from a prefix is provisional: read the whole object.
        object_bytes: the whole object's size where known; one that is too small for its pixels is then TRUNCATED.

    Returns:
        One header a frame; a single one, whose `frame` is None, where the object is one image.
    """
    try:
        silence_libraries()
        opened = _open(data, True)
        if isinstance(opened, Reject):
            return opened
        if object_bytes is not None and object_bytes - opened.parsed.pixel_offset < _least_bytes(opened):
            return Reject(Reason.TRUNCATED, "PixelData: fewer bytes than Rows and Columns need")
        headers = []
        for frame in [None] if opened.frames == 1 else range(opened.frames):
            values = opened.values(frame, with_traits=True)
            if isinstance(values, Reject):
                return values
            headers.append(values[0])
        return headers
    except Exception as error:
        return Reject(Reason.INTERNAL, type(error).__name__)


def read_header(data: bytes, object_bytes: int | None = None) -> Header | Reject:
    """As `read_headers` for an object of one image; UNSUPPORTED_MULTIFRAME for one of several."""
    headers = read_headers(data, object_bytes)
    if isinstance(headers, Reject):
        return headers
    return headers[0] if len(headers) == 1 else Reject(Reason.UNSUPPORTED_MULTIFRAME, "NumberOfFrames")


def read_slice(data: bytes, frame: int | None = None, color: bool = False) -> Slice | Reject:
    """Reads one image, see `Source`: who wants several slices of an object opens that once."""
    return Source(data, color).slice(frame)


def read_slices(data: bytes, frames: Sequence[int | None], color: bool = False) -> Iterator[Slice | Reject]:
    """Reads several frames of one object, each when it is asked for; parses the object once. See `Source`."""
    return map(Source(data, color).slice, frames)


class Source:
    """An object's slices: parsed once, when the first is asked for. A volume that was decoded is held.

    A DICOM object or, by its first bytes, a PNG, JPEG or TIFF file or a NIfTI, NRRD or MetaImage volume. It is for one
    thread.
    """

    def __init__(self, data: bytes, color: bool = False) -> None:
        """`data` is the whole object.

        `color`: whether the colours of an image file are wanted; else, and for DICOM, they become their luminance.
        """
        self._data, self._color = data, color
        self._decoded: tuple[int, _Decoded | Reject] | None = None  # of the file's volumes the one that was read last

    def slice(self, frame: int | None) -> Slice | Reject:
        """One image: `frame` of an object of several, from 0; None of an object of one, else UNSUPPORTED_MULTIFRAME."""
        opened = self._opened
        try:
            if isinstance(opened, Volume):
                return self._of_volume(opened, frame)
            if isinstance(opened, Inspected):
                return self._of_object(opened, frame)
            absent = Reject(Reason.MISSING_ATTRIBUTE, "NumberOfFrames")
            return opened if frame is None or isinstance(opened, Reject) else absent
        except Exception as error:
            return Reject(Reason.INTERNAL, type(error).__name__)

    @cached_property
    def _opened(self) -> Slice | Inspected | Volume | Reject:
        try:
            if volumes.is_volume(self._data):
                return volumes.read_header(self._data)
            silence_libraries()
            if not image_files.is_image(self._data):
                return _open(self._data)
            stored = image_files.decode(self._data, MAX_PIXELS, self._color)
            return stored if isinstance(stored, Reject) else Slice(stored, 1.0, 0.0, None)
        except Exception as error:
            return Reject(Reason.INTERNAL, type(error).__name__)

    @cached_property
    def _pixels(self) -> pixels.PixelData:
        assert isinstance(self._opened, Inspected)
        return pixel_data(self._opened)

    def _of_volume(self, volume: Volume, frame: int | None) -> Slice | Reject:
        """An axial slice."""
        numbers = volume.numbers(frame)
        if isinstance(numbers, Reject):
            return numbers
        number, index = numbers
        if self._decoded is None or self._decoded[0] != number:
            self._decoded = None
            self._decoded = number, volumes.image(self._data, number)
        image = self._decoded[1]
        if isinstance(image, Reject):
            return image
        stored_SHW, slope, intercept = image
        return Slice(stored_SHW[index], slope, intercept, None, Geometry(**volume.place(index)))

    def _of_object(self, opened: Inspected, frame: int | None) -> Slice | Reject:
        if frame is None and opened.frames > 1:
            return Reject(Reason.UNSUPPORTED_MULTIFRAME, "NumberOfFrames")
        if frame is not None and not (opened.frames > 1 and 0 <= frame < opened.frames):
            return Reject(Reason.MISSING_ATTRIBUTE, "NumberOfFrames")
        values = opened.values(frame)
        if isinstance(values, Reject):
            return values
        stored = self._pixels.frame(frame or 0)
        if isinstance(stored, Reject):
            return stored
        header, slope, intercept = values
        return Slice(stored, slope, intercept, header, is_colour=opened.layout.is_colour)


def pixel_data(opened: Inspected) -> pixels.PixelData:
    """All of its frames, not decoded."""
    parsed = opened.parsed
    return pixels.PixelData(parsed.data, parsed.pixel_offset, parsed.pixel_bytes, opened.frames, opened.layout)


def _least_bytes(opened: Inspected) -> int:
    """The fewest bytes that the object's pixel data can take; 0 where that is not known (a deflated data set)."""
    if opened.parsed.transfer_syntax_uid == uid.DeflatedExplicitVRLittleEndian:
        return 0
    if opened.parsed.transfer_syntax_uid not in pixels.NATIVE:
        return 8 * opened.frames  # an item each
    needed = opened.layout.native_bytes(opened.frames)
    return needed if needed <= opened.parsed.pixel_bytes else 2**63


def _open(data: bytes, with_traits: bool = False) -> Inspected | Reject:
    """Decides from the data set alone whether the object is an image that we read."""
    parsed = parse(data, with_traits)
    if isinstance(parsed, Reject):
        return parsed
    elements = Elements(parsed.dataset)
    sop_class_uid = _sop_class_uid(parsed, elements)
    if sop_class_uid in _NO_SOURCE_IMAGE:
        return Reject(Reason.UNSUPPORTED_SOP_CLASS, _NO_SOURCE_IMAGE[sop_class_uid])
    image = inspect(parsed, elements)
    if isinstance(image, Reject):
        return image
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):  # of which keys are made
        if not elements.text(keyword):
            return Reject(Reason.MISSING_ATTRIBUTE, keyword)
    return image


def _sop_class_uid(parsed: Parsed, elements: Elements) -> str:
    """Of the data set, else of the file meta information; empty where neither tells."""
    return elements.text("SOPClassUID") or str(parsed.dataset.file_meta.get("MediaStorageSOPClassUID") or "")


def inspect(parsed: Parsed, elements: Elements) -> Inspected | Reject:
    """The image of an object, whatever class it is of."""
    if parsed.pixel_tag is None:
        return Reject(Reason.NO_PIXELS)
    if PIXEL_TAGS[parsed.pixel_tag] != "PixelData":
        return Reject(Reason.UNSUPPORTED_PIXELS, PIXEL_TAGS[parsed.pixel_tag])
    for keyword in ("Rows", "Columns"):
        if elements.integer(keyword, 0) < 1:
            return Reject(Reason.MISSING_ATTRIBUTE, keyword)
    samples, frames = elements.integer("SamplesPerPixel", 1), max(elements.integer("NumberOfFrames", 1), 1)
    if elements.integer("Rows", 0) * elements.integer("Columns", 0) * max(samples, 1) > MAX_PIXELS:
        return Reject(Reason.TOO_LARGE, "Rows, Columns, SamplesPerPixel")
    if frames > MAX_FRAMES:
        return Reject(Reason.TOO_LARGE, "NumberOfFrames")
    of_frames = layout.read(parsed, elements)
    if isinstance(of_frames, Reject):
        return of_frames
    grouped = elements.has("SharedFunctionalGroupsSequence") or elements.has("PerFrameFunctionalGroupsSequence")
    return Inspected(parsed, elements, of_frames, frames, grouped)


def _code_string(text: str) -> str:
    """The text where it is of VR CS but for its case (PS3.5 6.2), else nothing: free text could be an identity."""
    return text.upper() if re.fullmatch(r"[A-Z0-9 _]{1,16}", text.upper()) else ""


def _geometry(elements: Elements, rows: int, columns: int, placed: bool) -> Geometry:
    spacing = cast(tuple[float, float] | None, elements.numbers("PixelSpacing", 2))
    thickness = elements.number("SliceThickness", None)
    position = elements.numbers("ImagePositionPatient", 3) if placed else None
    orientation = elements.numbers("ImageOrientationPatient", 6) if placed else None
    if orientation is not None and not is_orthonormal(orientation):
        orientation = None
    return Geometry(
        rows=rows,
        columns=columns,
        pixel_spacing_mm=spacing if spacing is not None and min(spacing) > 0 else None,
        slice_thickness_mm=thickness if thickness is not None and thickness > 0 else None,
        image_position_mm=cast(tuple[float, float, float] | None, position),
        image_orientation=cast(tuple[float, float, float, float, float, float] | None, orientation),
    )
