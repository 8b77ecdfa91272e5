"""NIfTI volumes (.nii, .nii.gz): what their headers say, by nifti1.h and nibabel.

Of the two places that a header may give, the sform is taken where it has a code, else the qform, as nibabel does.
Without either, columns are taken for running to the left and rows to the front, as in ANALYZE, around the middle.
"""

import math
import struct
from functools import lru_cache

import numpy as np
from nibabel import Nifti1Header, Nifti2Header
from nibabel.nifti1 import data_type_codes

from rayseg.dicom import voxels
from rayseg.dicom.voxels import GZIP, Volume, inflated
from rayseg.records import Reason, Reject

_HEADERS = {b"n+1\0": (344, 352, Nifti1Header), b"n+2\0": (4, 544, Nifti2Header)}  # magic: its place, bytes before data
_PAIRS = {b"ni1\0": 344, b"ni2\0": 4}
_MAGICS = (*((place, magic) for magic, (place, _, _) in _HEADERS.items()), *((at, one) for one, at in _PAIRS.items()))
_ANALYZE = {struct.pack(order + "i", 348) for order in "<>"}  # what NIfTI-1 begins with, too
_BEGINNING = 544
_MAX_OFFSET = 2**31  # extensions come before the values
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI's coordinates run to the right and the front
_UNITS_MM = {1: 1e3, 3: 1e-3}  # the lower bits of xyzt_units: metres, micrometres; else millimetres, or not said
_QUATERNION = 1.01  # the longest that rounding makes of one


def is_nifti(data: bytes) -> bool:
    """Whether the bytes, which may be a file's beginning, are those of a NIfTI volume, its header, or ANALYZE's."""
    beginning = _beginning(data)
    if any(beginning.startswith(magic, place) for place, magic in _MAGICS):
        return True
    return len(beginning) >= 348 and beginning[:4] in _ANALYZE


def read_header(data: bytes) -> Volume | Reject:
    """The header, from the file or its beginning, whatever the number of volumes."""
    return _read(_beginning(data), data.startswith(GZIP))


@lru_cache(maxsize=2)  # of an image and its labels, whose slices come one after the other
def _read(beginning: bytes, compressed: bool) -> Volume | Reject:
    form, size = None, 0
    for magic, (place, least, its_form) in _HEADERS.items():
        if beginning.startswith(magic, place):
            form, size = its_form, least
    if form is None and any(beginning.startswith(magic, place) for magic, place in _PAIRS.items()):
        return Reject(Reason.UNSUPPORTED_PIXELS, "NIfTI: a header without its image (.hdr, .img): save it as .nii")
    if form is None and beginning[:4] in _ANALYZE:
        return Reject(Reason.UNSUPPORTED_PIXELS, "ANALYZE 7.5, which does not say what is left: save it as .nii")
    if form is None or len(beginning) < size:
        return Reject(Reason.TRUNCATED, "NIfTI header")
    try:
        # By its bytes: `from_fileobj` would want the extensions, too.
        return _volume(form(beginning[: form.sizeof_hdr], check=False), size, compressed)
    except Exception as error:  # nibabel raises several types on headers that mean nothing
        return Reject(Reason.CORRUPT, f"NIfTI: {type(error).__name__}")


def read_volume(data: bytes, number: int | None = None) -> Volume | Reject:
    """The header of a file of one volume, or of several where `number`, from 0, chooses one."""
    return voxels.chosen(read_header(data), number)


def image(data: bytes, number: int = 0) -> tuple[np.ndarray, float, float] | Reject:
    """Volume `number` of the file as `voxels.image` gives it."""
    return voxels.image(data, read_volume(data, number), number)


def labels(data: bytes) -> np.ndarray | Reject:
    """A label volume as `voxels.labels` gives it."""
    return voxels.labels(data, read_header(data))


def _beginning(data: bytes) -> bytes:
    return bytes(inflated(data, 0, _BEGINNING)) if data.startswith(GZIP) else data[:_BEGINNING]


def _volume(header: Nifti1Header, least: int, compressed: bool) -> Volume | Reject:
    dimensions = [int(value) for value in header["dim"]]
    if not 2 <= dimensions[0] <= 7 or min(dimensions[1 : min(dimensions[0], 3) + 1]) < 1:
        return Reject(Reason.CORRUPT, "NIfTI: dim")
    count = math.prod(max(size, 1) for size in dimensions[4 : dimensions[0] + 1])
    stored = (dimensions[1], dimensions[2], dimensions[3] if dimensions[0] > 2 else 1)
    if math.prod(stored) > voxels.MAX_VOXELS:
        return Reject(Reason.TOO_LARGE, "NIfTI: dim")
    code = int(header["datatype"])
    dtype = header.get_data_dtype() if code in data_type_codes.dtype else None
    if dtype is None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        name = data_type_codes.label[code] if dtype is not None else "unknown"
        return Reject(Reason.UNSUPPORTED_PIXELS, f"NIfTI: datatype {name}")
    offset = float(header["vox_offset"])
    if not least <= offset <= _MAX_OFFSET:
        return Reject(Reason.CORRUPT, "NIfTI: vox_offset")
    header.set_data_shape(stored)
    affine, placed = _affine(header)
    turned = voxels.turned(_TO_LPS @ affine, stored)
    if turned is None:
        return Reject(Reason.CORRUPT, "NIfTI: the affine transform (sform or qform)")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = math.isfinite(slope) and slope != 0 and math.isfinite(intercept)
    return Volume(
        kind="NIfTI",
        dtype=dtype,
        stored=stored,
        orientation=turned[0],
        affine=turned[1],
        placed=placed,
        start=0 if compressed else int(offset),
        skipped=int(offset) if compressed else 0,
        encoding="deflated" if compressed else "raw",
        count=count,
        slope=slope if scaled else 1.0,
        intercept=intercept if scaled else 0.0,
    )


def _affine(header: Nifti1Header) -> tuple[np.ndarray, bool]:
    """To millimetres of NIfTI's coordinates, and whether the header says where they lie."""
    # As nifti1_io reads what should not occur: a factor of neither 1 nor -1, spacings that are 0 or negative.
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    header["pixdim"][1:4] = [abs(spacing) or 1 for spacing in header["pixdim"][1:4].tolist()]
    affine, _ = header.get_sform(coded=True)
    if affine is None and header["qform_code"] > 0:
        vector = np.array([float(header[name]) for name in ("quatern_b", "quatern_c", "quatern_d")])
        length = float(np.linalg.norm(vector))
        if 1 < length < _QUATERNION:
            header["quatern_b"], header["quatern_c"], header["quatern_d"] = vector / length
        affine = header.get_qform()
    placed = affine is not None
    affine = np.array(affine if placed else header.get_base_affine(), np.float64)
    affine[:3] *= _UNITS_MM.get(int(header["xyzt_units"]) % 8, 1.0)
    return affine, placed
