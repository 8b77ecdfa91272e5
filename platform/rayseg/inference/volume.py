"""A NIfTI volume as a series: its slices, decoded once, and the mask that goes back onto its own voxel grid.

Slices come in the order and on the axes of `dicom.nifti`, whatever way the volume is stored; a mask is turned back.
"""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
from nibabel import Nifti1Header, Nifti2Header
from nibabel.orientations import apply_orientation, ornt_transform

from rayseg.dicom import nifti
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject

_HEADER_BYTES = 544  # of NIfTI-2; of NIfTI-1 348 and what follows
_NIFTI_2 = b"n+2\0"
_AS_READ = np.array([[0, 1], [1, 1], [2, 1]])  # the axes that slices come in: columns, rows, slices
_FLAG_BYTES = 4  # behind the header: zeros, there are no extensions


def slices(data: bytes, frames: Sequence[int | None]) -> Iterator[Slice | Reject]:
    """Axial slices of a NIfTI volume, by number from 0; None for the only one.

    `reading.read_slices` gives the same, but remembers one volume for all threads of a process.
    """
    image, volume = nifti.image(data), nifti.read_volume(data)
    for frame in frames:
        number = frame or 0
        if isinstance(image, Reject):
            yield image
        elif isinstance(volume, Reject):
            yield volume
        elif frame is None and len(image[0]) > 1:
            yield Reject(Reason.UNSUPPORTED_MULTIFRAME, "a NIfTI volume of several slices")
        elif not 0 <= number < len(image[0]):
            yield Reject(Reason.MISSING_ATTRIBUTE, "NIfTI: dim")
        else:
            stored_SHW, slope, intercept = image
            yield Slice(stored_SHW[number], slope, intercept, None, Geometry(**volume.place(number)))


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
        frames: which slices these are, as `slices` counts them.
        labels: the classes' names.
    """
    volume = nifti.read_volume(of)
    if isinstance(volume, Reject):
        return volume
    columns, rows, count = volume.shape
    masks_SHW = np.zeros((count, rows, columns), np.uint8)
    for frame, one in zip(frames, masks, strict=True):
        masks_SHW[frame or 0] = one
    back = ornt_transform(_AS_READ, volume.orientation)
    stored = apply_orientation(masks_SHW.transpose(2, 1, 0), back)
    assert stored.shape == volume.stored
    made = (Nifti2Header if of[4:8] == _NIFTI_2 else Nifti1Header).from_fileobj(BytesIO(of), check=False)
    whole = made.get_data_shape()
    for name, (kind, _) in made.structarr.dtype.fields.items():
        if kind.kind == "S" and name != "magic":
            made[name] = b""
    made.set_data_dtype(np.uint8)
    if np.prod(whole) != stored.size:
        made.set_data_shape(volume.stored)
    made["scl_slope"], made["scl_inter"] = 1, 0
    made["cal_min"], made["cal_max"] = 0, len(labels)
    made["descrip"] = _described(labels)
    made["vox_offset"] = len(made.binaryblock) + _FLAG_BYTES
    return gzip.compress(made.binaryblock + bytes(_FLAG_BYTES) + stored.tobytes(order="F"), mtime=0)


def _described(labels: Sequence[str]) -> bytes:
    """What the file says of itself (`descrip`), as `exports.nifti` does."""
    return f"rayseg, research only: {', '.join(labels)}".encode("ascii", "replace")[:79]
