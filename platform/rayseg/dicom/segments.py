"""DICOM segmentations of any maker as labels: what their segments have in the plane of one source instance."""

import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO

import numpy as np
import pydicom
import rle
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder

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


def of_instance(
    data: bytes, sop_instance_uid: str, frame: int | None = None
) -> list[tuple[int, str, np.ndarray]] | Reject:
    """The segments in the plane of a source instance, or of one of its frames, in the order of their numbers.

    A fractional segment is where its value is at least half of the largest possible one.

    Args:
        data: BINARY, FRACTIONAL or LABELMAP, whose frames name their source images.
        sop_instance_uid: of the source instance.
        frame: of a source of several frames, from 0.

    Returns:
        SegmentNumber, SegmentLabel and bool (rows, columns) of each segment with a frame there; NO_MASK where the
        object does not refer to the instance.
    """
    found = _indexed(data)
    if isinstance(found, Reject):
        return found
    if sop_instance_uid not in found.sources:
        return Reject(Reason.NO_MASK, "the segmentation does not refer to the image")
    inside: dict[int, np.ndarray] = {}
    for index, number, of_frames in found.frames.get(sop_instance_uid, []):
        if frame is not None and of_frames and frame not in of_frames:
            continue
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
    for index, groups in enumerate(dataset.get("PerFrameFunctionalGroupsSequence") or []):
        number = None
        if kind != "LABELMAP":
            identification = groups.get("SegmentIdentificationSequence") or shared.get("SegmentIdentificationSequence")
            number = int(identification[0].ReferencedSegmentNumber)
        for derivation in groups.get("DerivationImageSequence") or shared.get("DerivationImageSequence") or []:
            for source in derivation.get("SourceImageSequence") or []:
                numbers = source.get("ReferencedFrameNumber") or []
                of_frames = [numbers] if isinstance(numbers, int) else numbers
                frames[str(source.ReferencedSOPInstanceUID)].append(
                    (index, number, frozenset(int(one) - 1 for one in of_frames))
                )
    if not frames:
        return Reject(Reason.MISSING_ATTRIBUTE, "mask: no frame has a DerivationImageSequence with a source image")
    listed = {
        str(instance.ReferencedSOPInstanceUID)
        for series in dataset.get("ReferencedSeriesSequence") or []
        for instance in series.get("ReferencedInstanceSequence") or []
    }
    labels = {int(segment.SegmentNumber): str(segment.SegmentLabel) for segment in dataset.get("SegmentSequence") or []}
    return _Segmentation(dataset, labels, dict(frames), frozenset(listed | frames.keys()))


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
