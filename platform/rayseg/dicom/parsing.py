"""A DICOM object's data set up to its pixel data: found, inflated, walked, and its elements as plain values."""

import logging
import math
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

from pydicom import config as pydicom_config
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag

from rayseg.dicom import mosaic, traits
from rayseg.records import Reason, Reject

# These libraries write attribute values, identities among them, into logs and warnings (see `silence_libraries`).
pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
logging.getLogger("highdicom").setLevel(logging.CRITICAL)
_TALKATIVE = r"(pydicom|highdicom|PIL|tifffile|imagecodecs|openjpeg|rle|jpeg_ls)(\.|$)"
_SILENT = ("ignore", None, Warning, re.compile(_TALKATIVE), 0)

# At the top, before the pixels; objects have some hundred. A gigabyte of zeros, a megabyte in a zip, is 134 million.
_MAX_ELEMENTS = 20_000
_MAX_INFLATED_BYTES = 2**28 + 2**24  # of a deflated data set: the largest pixel data and a generous header

PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_KEYWORDS = {
    0x00080008: "ImageType",
    0x00080016: "SOPClassUID",
    0x00080018: "SOPInstanceUID",
    0x00080060: "Modality",
    0x00080070: "Manufacturer",
    0x00081090: "ManufacturerModelName",
    0x00100020: "PatientID",
    0x00100021: "IssuerOfPatientID",
    0x00180015: "BodyPartExamined",
    0x00180050: "SliceThickness",
    0x0020000D: "StudyInstanceUID",
    0x0020000E: "SeriesInstanceUID",
    0x00200013: "InstanceNumber",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00200052: "FrameOfReferenceUID",
    0x00280002: "SamplesPerPixel",
    0x00280004: "PhotometricInterpretation",
    0x00280006: "PlanarConfiguration",
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
    0x00281101: "RedPaletteColorLookupTableDescriptor",
    0x00281102: "GreenPaletteColorLookupTableDescriptor",
    0x00281103: "BluePaletteColorLookupTableDescriptor",
    0x00281201: "RedPaletteColorLookupTableData",
    0x00281202: "GreenPaletteColorLookupTableData",
    0x00281203: "BluePaletteColorLookupTableData",
    0x00281221: "SegmentedRedPaletteColorLookupTableData",
    0x00281222: "SegmentedGreenPaletteColorLookupTableData",
    0x00281223: "SegmentedBluePaletteColorLookupTableData",
    0x00283000: "ModalityLUTSequence",
    0x52009229: "SharedFunctionalGroupsSequence",
    0x52009230: "PerFrameFunctionalGroupsSequence",
}
_FRAME_TYPE = 0x00089007
_TAGS = {keyword: tag for tag, keyword in _KEYWORDS.items()} | {"FrameType": _FRAME_TYPE}

_TAGS_OF_SLICES = [*_KEYWORDS, *mosaic.TAGS]
_TAGS_OF_SERIES = [*{*_TAGS_OF_SLICES, *traits.TAGS}]  # more time: for who asks how slices belong together

# Functional groups (PS3.3 C.7.6.16) that say where a frame lies and what its values mean: what is taken from each.
_GROUPS = {
    0x00189226: (_FRAME_TYPE,),  # MRImageFrameTypeSequence
    0x00189329: (_FRAME_TYPE,),  # CTImageFrameTypeSequence
    0x00209113: (_TAGS["ImagePositionPatient"],),  # PlanePositionSequence
    0x00209116: (_TAGS["ImageOrientationPatient"],),  # PlaneOrientationSequence
    0x00289110: (_TAGS["PixelSpacing"], _TAGS["SliceThickness"]),  # PixelMeasuresSequence
    0x00289145: (_TAGS["RescaleIntercept"], _TAGS["RescaleSlope"]),  # PixelValueTransformationSequence
}
_GROUPS_OF_SERIES = _GROUPS | traits.GROUPS

DefaultT = TypeVar("DefaultT")


@dataclass(frozen=True)
class Parsed:
    """A data set up to its pixel data; `data` is the object's bytes, inflated where they were deflated."""

    data: bytes
    dataset: Dataset
    transfer_syntax_uid: str
    pixel_tag: int | None
    pixel_vr: str | None
    pixel_offset: int
    pixel_bytes: int


def silence_libraries() -> None:
    """Keeps warnings of the DICOM and image libraries, which quote attribute values, out of the process's output.

    Called at each entry, as test runners and others replace all filters; adding a filter is safe between threads, which
    `warnings.catch_warnings` is not.
    """
    if _SILENT not in warnings.filters:
        warnings.filterwarnings("ignore", module=_TALKATIVE)


def parse(data: bytes, with_traits: bool = False) -> Parsed | Reject:
    """Walks the data set up to its pixel data, keeping the elements of `_KEYWORDS` and `mosaic`, and of `traits`."""
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

    stream = _Stream(data)
    tag, vr, offset, length, kept = 0, None, 0, 0, 0  # of the element seen last, and how many of ours were seen

    def at_pixels(element_tag: BaseTag, element_vr: str | None, element_length: int) -> bool:
        nonlocal tag, vr, offset, length, kept
        stream.seen()
        tag, vr, offset, length = element_tag, element_vr, stream.tell(), element_length
        kept += tag in _KEYWORDS
        return tag in PIXEL_TAGS

    tags = _TAGS_OF_SERIES if with_traits else _TAGS_OF_SLICES
    try:
        dataset = read_partial(stream, at_pixels, force=True, specific_tags=tags)
    except Exception as error:
        if stream.elements > _MAX_ELEMENTS:
            return Reject(Reason.CORRUPT, f"more than {_MAX_ELEMENTS} elements")
        if stream.tell() >= len(data):
            return Reject(Reason.TRUNCATED, "the data set ends within an element")
        return Reject(Reason.CORRUPT, type(error).__name__)
    has_pixels = tag in PIXEL_TAGS
    if not part10 and not ("SOPClassUID" in dataset or (has_pixels and "Rows" in dataset)):
        return Reject(Reason.NOT_DICOM)
    # pydicom gives no elements at all where it ran out of bytes in a value of undefined length.
    lost = kept > 0 and len(dataset) == 0
    cut = length != 0xFFFFFFFF and (offset + length > len(data) or any(data[offset + length :]))
    if not has_pixels and (tag == 0 or lost or cut):
        return Reject(Reason.TRUNCATED, "the data set ends within an element or before its first one")
    transfer_syntax_uid = str(dataset.file_meta.get("TransferSyntaxUID") or "")
    if not transfer_syntax_uid:
        implicit, little = dataset.original_encoding
        guessed = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        transfer_syntax_uid = str(guessed if little else uid.ExplicitVRBigEndian)
    return Parsed(
        data=data,
        dataset=dataset,
        transfer_syntax_uid=str(uid.DeflatedExplicitVRLittleEndian) if deflated else transfer_syntax_uid,
        pixel_tag=tag if has_pixels else None,
        pixel_vr=vr,
        pixel_offset=offset,
        pixel_bytes=length,
    )


class _Stream(BytesIO):
    """Bytes that raise where too many elements are read from them.

    pydicom tells of those of the data set; of the groups 0000 and 0002 before it, it reads as many as there are.
    """

    elements = 0
    _in_data_set = False

    def seen(self) -> None:
        """Counts an element of the data set."""
        self._in_data_set = True
        self._count()

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any stream."""
        if not self._in_data_set:
            self._count()  # two reads or more an element
        return super().read(size)

    def _count(self) -> None:
        self.elements += 1
        if self.elements > _MAX_ELEMENTS:
            raise ValueError


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


def frame_elements(dataset: Dataset, frame: int, with_traits: bool = False) -> dict[int, RawDataElement]:
    """What the functional groups say of one frame, the frame's own groups above those that all frames share."""
    elements: dict[int, RawDataElement] = {}
    wanted = _GROUPS_OF_SERIES if with_traits else _GROUPS
    for keyword, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        for groups in sequence_item(dataset, _TAGS[keyword], index):
            for sequence in wanted.keys() & groups.keys():
                elements |= _of_group(groups, sequence, wanted)
    return elements


def _of_group(groups: Dataset, sequence: int, wanted: Mapping[int, tuple[int, ...]]) -> dict[int, RawDataElement]:
    """The elements of one functional group, and of groups within it."""
    elements: dict[int, RawDataElement] = {}
    for item in sequence_item(groups, sequence):
        for tag in wanted[sequence]:
            if tag in wanted:
                elements |= _of_group(item, tag, wanted)
            elif tag in item and isinstance(element := item.get_item(tag), RawDataElement):
                elements[tag] = element
    return elements


def sequence_item(dataset: Dataset, tag: int | str, place: int = 0) -> list[Dataset]:
    """The item at `place` of a sequence, by tag or keyword; none where there is no such item or no such sequence."""
    try:
        return list(dataset[tag].value[place : place + 1]) if tag in dataset else []
    except Exception:  # pydicom parses nested sequences when they are asked for, and raises many types
        return []


class Elements:
    """Plain values of a data set's raw elements: an order of magnitude faster than pydicom's, and silent.

    An absent, empty or unusable element gives the default; only `number` tells unusable (None) from absent.
    """

    def __init__(self, dataset: Dataset, of_frame: Mapping[int, RawDataElement] | None = None) -> None:
        """`of_frame`: elements of one frame, which stand for those of the data set."""
        self._dataset = dataset
        self._of_frame = of_frame or {}

    def raw(self, tags: frozenset[int]) -> dict[int, RawDataElement]:
        """Those of some elements that there are, as they are stored."""
        elements = {int(tag): self._dataset.get_item(tag) for tag in tags.intersection(self._dataset.keys())}
        elements |= {tag: element for tag, element in self._of_frame.items() if tag in tags}
        return {tag: element for tag, element in elements.items() if isinstance(element, RawDataElement)}

    def has(self, keyword: str) -> bool:
        """Whether the element is there, empty or not."""
        return _TAGS[keyword] in self._of_frame or _TAGS[keyword] in self._dataset

    def _bytes(self, keyword: str) -> bytes:
        tag = _TAGS[keyword]
        element = self._of_frame.get(tag) or (self._dataset.get_item(tag) if tag in self._dataset else None)
        return element.value or b"" if isinstance(element, RawDataElement) else b""

    def text(self, keyword: str) -> str:
        """Text without padding; empty by default."""
        value, tag = self._bytes(keyword), _TAGS[keyword]
        if value and value.isascii():
            return value.decode("ascii").strip(" \0")
        if tag in self._of_frame or tag not in self._dataset:  # a frame's are code strings, which are ASCII
            return ""
        # By the data set's character set, and then no raw element any more.
        return str(self._dataset[tag].value or "").strip(" \0")

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        """Exactly `count` finite numbers of a decimal string; None by default."""
        parts = self._bytes(keyword).strip(b" \0").split(b"\\")
        try:
            values = tuple(float(part) for part in parts)
        except ValueError:
            return None
        return values if len(values) == count and all(map(math.isfinite, values)) else None

    def number(self, keyword: str, default: DefaultT) -> float | DefaultT | None:
        """One finite number of a decimal string."""
        if not self._bytes(keyword).strip(b" \0"):
            return default
        values = self.numbers(keyword, 1)
        return None if values is None else values[0]

    def integer(self, keyword: str, default: DefaultT) -> int | DefaultT:
        """An unsigned 16-bit word, or an integer string within 32 bits."""
        value = self._bytes(keyword)
        if keyword in ("InstanceNumber", "NumberOfFrames"):  # integer strings; the others are binary
            number = self.number(keyword, None)
            return default if number is None or not -(2**31) <= number < 2**31 else int(number)
        little = self._dataset.get_item(_TAGS[keyword]).is_little_endian if value else True
        return int.from_bytes(value[:2], "little" if little else "big") if len(value) >= 2 else default
