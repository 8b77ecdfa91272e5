"""Pixel data of a segmentation, made of one frame after the other: never are all of them in memory as arrays."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders import RLELosslessEncoder


def fill_pixels(segmentation: Dataset, places: Mapping[str, int], pixels: Sequence[np.ndarray]) -> None:
    """Puts pixels in place of those of a segmentation that was made of stand-ins of one pixel each.

    Args:
        segmentation: uncompressed; LABELMAP and FRACTIONAL become RLE compressed. Its frames say by a SOP Instance UID
            of which slice they are, and of which segment, but for LABELMAP.
        places: for each of these UIDs where its slice is in `pixels`.
        pixels: uint8 (rows, columns), or (rows, columns, segments) of FRACTIONAL.
    """
    segmentation.Rows, segmentation.Columns = pixels[0].shape[:2]
    frames = _frames(segmentation, places, pixels)
    if segmentation.BitsAllocated == 1:
        data = b"".join(_packed(frames))
    else:
        data = encapsulate([*map(_compressed, frames)])
        segmentation.file_meta.TransferSyntaxUID = uid.RLELossless
    segmentation.PixelData = data + b"\0" * (len(data) % 2)
    segmentation["PixelData"].VR = "OB"


def _frames(segmentation: Dataset, places: Mapping[str, int], pixels: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Each frame in the order of the functional groups, uint8 (rows, columns)."""
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        derivation = (groups.get("DerivationImageSequence") or shared.DerivationImageSequence)[0]
        of_slice = pixels[places[derivation.SourceImageSequence[0].ReferencedSOPInstanceUID]]
        if segmentation.SegmentationType == "LABELMAP":
            yield of_slice
            continue
        number = (groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence)[0]
        segment = number.ReferencedSegmentNumber
        yield of_slice[..., segment - 1] if of_slice.ndim == 3 else (of_slice == segment).astype(np.uint8)


def _packed(frames: Iterable[np.ndarray]) -> Iterator[bytes]:
    """Bits, the first of a byte the lowest; a frame begins where the one before ends, within a byte if need be."""
    rest = np.zeros(0, np.uint8)
    for frame in frames:
        bits = np.concatenate([rest, frame.ravel()])
        whole = len(bits) // 8 * 8
        yield np.packbits(bits[:whole], bitorder="little").tobytes()
        rest = bits[whole:]
    yield np.packbits(rest, bitorder="little").tobytes()


def _compressed(frame: np.ndarray) -> bytes:
    return _encoded(frame) if frame.any() else _nothing(*frame.shape)


@lru_cache(maxsize=8)
def _nothing(rows: int, columns: int) -> bytes:
    """An empty frame, which most are, and which takes as long as any other."""
    return _encoded(np.zeros((rows, columns), np.uint8))


def _encoded(frame: np.ndarray) -> bytes:
    # By name: pydicom would take GDCM where it is installed, whose RLE encoder ends the process at odd sizes.
    return RLELosslessEncoder.encode(
        np.ascontiguousarray(frame),
        encoding_plugin="pylibjpeg",
        rows=frame.shape[0],
        columns=frame.shape[1],
        number_of_frames=1,
        samples_per_pixel=1,
        bits_allocated=8,
        bits_stored=8,
        pixel_representation=0,
        photometric_interpretation="MONOCHROME2",
    )
