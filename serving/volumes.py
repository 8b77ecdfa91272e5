"""A series and its masks as a viewer wants them: two NIfTI volumes on one grid, in one answer with the figures."""

import gzip
import json
from collections.abc import Sequence

import httpx
import nibabel as nib
import numpy as np

from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import stack
from rayseg.inference.exports import set_place
from rayseg.inference.sources import geometry
from rayseg.records import Reject
from serving.answers import FORM, NIFTI
from serving.findings import Found, SeriesAnswer

# One boundary for all: equal series give equal bytes. No image has it by chance.
MEDIA_TYPE = f"{FORM}; boundary=rayseg-9b1f63ad4c0e47d8a52e71c8d06f3ab5"
# Half the size at 100 MB/s: more would take longer than the network that it spares.
_COMPRESSION = 1


def volumes(slices: Sequence[Slice], masks: Sequence[np.ndarray]) -> tuple[bytes, bytes]:
    """Image and mask as gzipped NIfTI-1, (columns, rows, slices), ascending along the normal of the planes.

    Of a NIfTI volume too, whatever way it is stored: so slices of the answer are those of the volumes.

    Of a tilted series the grid is sheared, as `exports.nifti` has it: sform says so, and qform has the code 0.

    The image has the modality's values (HU of CT), the mask class indices. Where no matrix says where the slices lie,
    as they lie at uneven distances or have no place at all, sform and qform have the code 0, pixdim is the best that is
    known (1 where nothing is), and descrip says why; the slices keep the order in which they are given then.

    Args:
        slices: of one series, in order; of equal size, as a series' verdict lets them pass.
        masks: uint8 (rows, columns), of the same slices.
    """
    geometries = [geometry(slice) for slice in slices]
    image_SHW, slope, intercept = _values(slices)
    # The same places give the same order and affine to both.
    placed, placed_masks = stack(list(image_SHW), geometries), stack(masks, geometries)
    affine = placed if isinstance(placed, Reject) else placed.affine_lps()
    if isinstance(placed, Reject) or isinstance(placed_masks, Reject) or isinstance(affine, Reject):
        assert isinstance(affine, Reject)
        header = _header(image_SHW.shape)
        header.set_qform(np.diag([*_steps_mm(geometries), 1.0]), code=0)  # first: sets pixdim, too
        header.set_sform(header.get_qform(), code=0)
        header["descrip"] = affine.detail.encode("ascii", "replace")[:79]
        return _encode(header, image_SHW, slope, intercept), _encode(header, np.stack(masks), 1.0, 0.0)
    header = _header(image_SHW.shape)
    set_place(header, affine, placed.tolerance_mm)
    return _encode(header, placed.masks, slope, intercept), _encode(header, placed_masks.masks, 1.0, 0.0)


def view(found: Found, answer: SeriesAnswer) -> bytes:
    """All that a viewer needs (RFC 7578): `answer` (JSON), `image` and `mask` (gzipped NIfTI), and `numbers`.

    The last is a JSON list: which slice of the series each of the volumes is; those without a mask are left out.
    A browser takes the form apart by itself (`Response.formData()`), so a series is sent and segmented once.
    """
    numbers = set(found.numbers)
    read = [one for number, one in enumerate(found.series.slices(color=False)) if number in numbers]
    slices = [one for one in read if isinstance(one, Slice)]
    assert len(slices) == len(read), "what has a mask was read before"
    image, mask = volumes(slices, found.masks)
    parts = {
        "answer": ("answer.json", answer.model_dump_json().encode(), "application/json"),
        "numbers": ("numbers.json", json.dumps(list(found.numbers)).encode(), "application/json"),
        "image": ("image.nii.gz", image, NIFTI),
        "mask": ("mask.nii.gz", mask, NIFTI),
    }
    # Of a request that goes nowhere: httpx has the encoding for no other use.
    body: bytes = httpx.Request("POST", "http://localhost", files=parts, headers={"content-type": MEDIA_TYPE}).read()
    return body


def _values(slices: Sequence[Slice]) -> tuple[np.ndarray, float, float]:
    """The slices as one array (slices, rows, columns), and what makes values of it: as stored where all agree."""
    scales = {(slice.stored.dtype, slice.rescale_slope, slice.rescale_intercept) for slice in slices}
    if len(scales) > 1:
        return np.stack([slice.values() for slice in slices]), 1.0, 0.0
    ((_, slope, intercept),) = scales
    return np.stack([slice.stored for slice in slices]), slope, intercept


def _steps_mm(geometries: Sequence[Geometry]) -> tuple[float, float, float]:
    """Between columns, rows and slices, as well as it is known."""
    rows_mm, columns_mm = geometries[0].pixel_spacing_mm or (1.0, 1.0)
    positions_mm = [one.image_position_mm for one in geometries if one.image_position_mm is not None]
    if len(positions_mm) == len(geometries) > 1:
        steps_mm = float(np.median(np.linalg.norm(np.diff(np.array(positions_mm), axis=0), axis=1)))
    else:
        steps_mm = geometries[0].slice_thickness_mm or 1.0
    return columns_mm, rows_mm, steps_mm or 1.0


def _header(shape_SHW: tuple[int, ...]) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_shape(shape_SHW[::-1])
    header.set_xyzt_units("mm")
    return header


def _encode(header: nib.Nifti1Header, values_SHW: np.ndarray, slope: float, intercept: float) -> bytes:
    """The file byte by byte: nibabel would scale integers anew."""
    header = header.copy()
    values_SHW = np.ascontiguousarray(values_SHW, values_SHW.dtype.newbyteorder("<"))
    header.set_data_dtype(values_SHW.dtype)
    header["magic"], header["vox_offset"] = b"n+1", 352
    header["scl_slope"], header["scl_inter"] = slope, intercept
    # Slices of rows in C order are what the format calls columns first; four zero bytes: no extensions.
    return gzip.compress(header.binaryblock + bytes(4) + values_SHW.tobytes(), _COMPRESSION, mtime=0)
