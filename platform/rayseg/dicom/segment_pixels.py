"""Frames of a DICOM segmentation, decoded one at a time."""

import zlib

import numpy as np
import rle
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder

from rayseg.records import Reason, Reject

_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"  # Deflated Image Frame Compression


def read_frame(dataset: Dataset, index: int) -> np.ndarray | Reject:
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
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return Reject(Reason.UNSUPPORTED_TRANSFER_SYNTAX, "mask")
    values, _ = decoder.as_array(dataset, index=index, raw=True)
    return values
