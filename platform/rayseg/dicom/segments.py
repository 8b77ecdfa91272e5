"""DICOM segmentations of any maker as labels: what their segments have in the plane of one slice.

Frames say by name which images they are of. Those that name none (some makers segment a volume of their own) are of the
slice whose pixels they lie upon, in the same frame of reference.
"""

import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
import rle
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder

from rayseg.dicom.reading import Header
from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject

SOP_CLASSES = (str(uid.SegmentationStorage), "1.2.840.10008.5.1.4.1.1.66.7")  # the other: Label Map Segmentation
_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"  # Deflated Image Frame Compression
_MAX_PIXELS = 2**26  # of a frame


@dataclass(frozen=True, eq=False)
class _Segmentation:
    """A segmentation's data set, and where to find what."""

    dataset: Dataset
    labels: dict[int, str]  # SegmentLabel by SegmentNumber
    # By source instance: own frame, segment (None: a label map), and the frames of the source (empty: all of it)
    frames: dict[str, list[tuple[int, int | None, frozenset[int]]]] = field(repr=False)
    sources: frozenset[str] = field(repr=False)  # instances that it says it is of, in a frame or not
    unnamed: list[tuple[int, int | None]] = field(repr=False)  # own frame, segment: of the frames that name no source
    corners_mm: np.ndarray = field(repr=False)  # float64 (unnamed, 3, 3), see `planes.corners_mm`

    def naming(self, header: Header) -> list[tuple[int, int | None]]:
        """Own frame and segment of the frames that name the slice."""
        return [
            (index, number)
            for index, number, of_frames in self.frames.get(header.sop_instance_uid, [])
            if header.frame is None or not of_frames or header.frame in of_frames
        ]

    def upon(self, header: Header) -> tuple[list[tuple[int, int | None]], bool]:
        """The same of the unnamed frames that lie upon the slice, and whether any has its grid, upon it or beside."""
        image_mm = planes.corners_mm(header.geometry)
        spaces = {header.frame_of_reference_uid, self.dataset.get("FrameOfReferenceUID")} - {None, ""}
        if image_mm is None or not self.unnamed or len(spaces) > 1:
            return [], False
        most_mm = planes.tolerance_mm(header.geometry)
        here = planes.apart_mm(image_mm, self.corners_mm) <= most_mm
        alike = planes.apart_mm(image_mm - image_mm[:1], self.corners_mm - self.corners_mm[:, :1]) <= most_mm
        return [self.unnamed[place] for place in np.flatnonzero(here)], bool(alike.any())


def of_slice(data: bytes, header: Header) -> list[tuple[int, str, np.ndarray]] | Reject:
    """The segments in the plane of a slice, in the order of their numbers.

    A fractional segment is where its value is at least half of the largest possible one.

    Args:
        data: BINARY, FRACTIONAL or LABELMAP.
        header: of the slice.

    Returns:
        SegmentNumber, SegmentLabel and bool (rows, columns) of each segment with a frame there; NO_MASK where the
        object neither refers to the slice's instance nor has a frame upon it, or refers to it but has all of its
        frames on other grids.
    """
    found = _indexed(data)
    if isinstance(found, Reject):
        return found
    upon, alike = found.upon(header)
    frames = [*found.naming(header), *upon]
    if not frames and header.sop_instance_uid not in found.sources:
        return Reject(Reason.NO_MASK, "the segmentation does not refer to the image")
    if not frames and found.unnamed and not alike:
        return Reject(Reason.NO_MASK, "the segmentation's frames name no image and lie on another grid than this one")
    inside: dict[int, np.ndarray] = {}
    for index, number in frames:
        values = _frame(found.dataset, index)
        if isinstance(values, Reject):
            return values
        if number is None:
            planes = {int(value): values == value for value in np.unique(values) if value}
        else:
            least = 1
            if found.dataset.SegmentationType == "FRACTIONAL":
                least = max(1, -(-int(found.dataset.MaximumFractionalValue) // 2))
            planes = {number: values >= least}
        for segment, plane in planes.items():
            inside[segment] = inside[segment] | plane if segment in inside else plane
    return [(number, found.labels.get(number, ""), inside[number]) for number in sorted(inside)]


@lru_cache(maxsize=4)
def _indexed(data: bytes) -> _Segmentation | Reject:
    """Kept for some objects: one segmentation is the mask of all slices of a series."""
    dataset = pydicom.dcmread(BytesIO(data), force=True)
    kind = dataset.get("SegmentationType")
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        return Reject(Reason.UNSUPPORTED_PIXELS, "mask: SegmentationType")
    if dataset.Rows * dataset.Columns > _MAX_PIXELS:
        return Reject(Reason.TOO_LARGE, f"mask of {dataset.Rows} x {dataset.Columns} pixels")
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frames: dict[str, list[tuple[int, int | None, frozenset[int]]]] = defaultdict(list)
    unnamed, corners_mm = [], []
    for index, groups in enumerate(dataset.get("PerFrameFunctionalGroupsSequence") or []):
        number = None
        if kind != "LABELMAP":
            identification = groups.get("SegmentIdentificationSequence") or shared.get("SegmentIdentificationSequence")
            number = int(identification[0].ReferencedSegmentNumber)
        derivations = groups.get("DerivationImageSequence") or shared.get("DerivationImageSequence") or []
        sources = [source for derivation in derivations for source in derivation.get("SourceImageSequence") or []]
        for source in sources:
            numbers = source.get("ReferencedFrameNumber") or []
            of_frames = [numbers] if isinstance(numbers, int) else numbers
            frames[str(source.ReferencedSOPInstanceUID)].append(
                (index, number, frozenset(int(one) - 1 for one in of_frames))
            )
        corners = None if sources else planes.corners_mm(_geometry(dataset, groups, shared))
        if corners is not None:
            unnamed.append((index, number))
            corners_mm.append(corners)
    if not frames and not unnamed:
        return Reject(Reason.MISSING_ATTRIBUTE, "mask: no frame names a source image or tells where it lies")
    listed = {
        str(instance.ReferencedSOPInstanceUID)
        for series in dataset.get("ReferencedSeriesSequence") or []
        for instance in series.get("ReferencedInstanceSequence") or []
    }
    labels = {int(segment.SegmentNumber): str(segment.SegmentLabel) for segment in dataset.get("SegmentSequence") or []}
    sources_named = frozenset(listed | frames.keys())
    return _Segmentation(dataset, labels, dict(frames), sources_named, unnamed, np.array(corners_mm))


def _geometry(dataset: Dataset, groups: Dataset, shared: Dataset) -> Geometry:
    """Where a frame lies, by its own functional groups or the shared ones (PS3.3 C.7.6.16.2)."""

    def numbers(sequence: str, keyword: str) -> Any:
        items = groups.get(sequence) or shared.get(sequence) or [Dataset()]
        values = items[0].get(keyword)
        return None if not values else tuple(float(value) for value in values)

    return Geometry(
        rows=dataset.Rows,
        columns=dataset.Columns,
        pixel_spacing_mm=numbers("PixelMeasuresSequence", "PixelSpacing"),
        image_position_mm=numbers("PlanePositionSequence", "ImagePositionPatient"),
        image_orientation=numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
    )


def _frame(dataset: Dataset, index: int) -> np.ndarray | Reject:
    """One frame's values, uint8 or uint16 (rows, columns)."""
    syntax = dataset.file_meta.TransferSyntaxUID
    rows, columns, bits = dataset.Rows, dataset.Columns, dataset.BitsAllocated
    pixels = rows * columns
    # pydicom decodes neither deflated frames, nor single bits in RLE, nor native frames that begin within a byte.
    data: bytes | None = None
    skipped = 0
    if syntax == _DEFLATED_FRAMES:
        encoded = get_frame(dataset.PixelData, index, number_of_frames=int(dataset.NumberOfFrames))
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(encoded, -(-pixels * bits // 8))
    elif bits == 1 and syntax == uid.RLELossless:
        encoded = get_frame(dataset.PixelData, index, number_of_frames=int(dataset.NumberOfFrames))
        data = bytes(rle.decode_pixel_data(encoded, version=2, rows=1, columns=-(-pixels // 8), bits_allocated=8))
    elif bits == 1 and not syntax.is_encapsulated:
        first, skipped = divmod(index * pixels, 8)
        data = dataset.PixelData[first : first + -(-(skipped + pixels) // 8)]
        if dataset["PixelData"].VR == "OW" and not syntax.is_little_endian:
            return Reject(Reason.UNSUPPORTED_TRANSFER_SYNTAX, "mask: single bits in big endian words")
    if data is not None:
        words = np.frombuffer(data, "<u2" if bits == 16 else np.uint8)
        flat = (np.unpackbits(words, bitorder="little") if bits == 1 else words)[skipped : skipped + pixels]
        if len(flat) < pixels:
            return Reject(Reason.TRUNCATED, "mask: a frame has fewer bytes than Rows and Columns need")
        return flat.reshape(rows, columns)
    try:
        values, _ = get_decoder(syntax).as_array(dataset, index=index, raw=True)
    except NotImplementedError:
        return Reject(Reason.UNSUPPORTED_TRANSFER_SYNTAX, "mask")
    return values
