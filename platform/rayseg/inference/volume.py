"""The mask of a NIfTI volume, on the voxel grid of the very file.

Slices come in the order and on the axes of `dicom.voxels`, whatever way the volume is stored; a mask is turned back.
"""

import gzip
import zlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from nibabel import Nifti1Header, Nifti2Header
from nibabel.orientations import apply_orientation, ornt_transform

from rayseg.dicom import nifti
from rayseg.records import Reject

_HEADER_BYTES = 544  # of NIfTI-2; of NIfTI-1 348 and what follows
_NIFTI_2 = b"n+2\0"
_AS_READ = np.array([[0, 1], [1, 1], [2, 1]])  # the axes that slices come in: columns, rows, slices
_FLAG_BYTES = 4  # behind the header: zeros, there are no extensions


def header(data: bytes) -> bytes:
    """What `mask` needs of a NIfTI file: its header, not compressed."""
    if not data.startswith(b"\x1f\x8b"):
        return data[:_HEADER_BYTES]
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as file:
            return file.read(_HEADER_BYTES)
    except (OSError, EOFError, zlib.error):
        return b""


def mask(of: bytes, masks: Sequence[np.ndarray], frames: Sequence[int | None], labels: Sequence[str]) -> bytes | Reject:
    """The label maps as a gzipped NIfTI volume, uint8, on the very grid of the volume that they are of.

    Shape, axes, affine (sform, qform and their codes) and units are the source's, so that voxel [i, j, k] of the mask
    is that of the image; texts and extensions are not taken over, they may identify. Of a file of several volumes the
    mask is one. Equal masks give equal bytes.

    Args:
        of: the source's `header`.
        masks: uint8 (rows, columns), of some slices; the others have no foreground.
        frames: which slices these are, as `voxels.Volume` counts them.
        labels: the classes' names.
    """
    volume = nifti.read_header(of)
    if isinstance(volume, Reject):
        return volume
    columns, rows, count = volume.shape
    masks_SHW = np.zeros((count, rows, columns), np.uint8)
    for frame, one in zip(frames, masks, strict=True):
        masks_SHW[(frame or 0) % count] = one
    back = ornt_transform(_AS_READ, volume.orientation)
    stored = apply_orientation(masks_SHW.transpose(2, 1, 0), back)
    assert stored.shape == volume.stored
    form = Nifti2Header if of[4:8] == _NIFTI_2 else Nifti1Header
    header_of_mask = form(of[: form.sizeof_hdr], check=False)  # without extensions, which `from_fileobj` would want
    whole = header_of_mask.get_data_shape()
    for name, (kind, _) in header_of_mask.structarr.dtype.fields.items():
        if kind.kind == "S" and name != "magic":
            header_of_mask[name] = b""
    header_of_mask.set_data_dtype(np.uint8)
    if np.prod(whole) != stored.size:
        header_of_mask.set_data_shape(volume.stored)
    header_of_mask["scl_slope"], header_of_mask["scl_inter"] = 1, 0
    header_of_mask["cal_min"], header_of_mask["cal_max"] = 0, len(labels)
    header_of_mask["descrip"] = _described(labels)
    header_of_mask["vox_offset"] = len(header_of_mask.binaryblock) + _FLAG_BYTES
    return gzip.compress(header_of_mask.binaryblock + bytes(_FLAG_BYTES) + stored.tobytes(order="F"), mtime=0)


def _described(labels: Sequence[str]) -> bytes:
    """What the file says of itself (`descrip`), as `exports.nifti` does."""
    return f"rayseg, research only: {', '.join(labels)}".encode("ascii", "replace")[:79]
