"""Volumes of NIfTI, NRRD and MetaImage files by one interface; a file's first bytes say which of them it is."""

from types import ModuleType

import numpy as np

from rayseg.dicom import metaimage, nifti, nrrd
from rayseg.dicom.voxels import Volume
from rayseg.records import Reject


def is_volume(data: bytes) -> bool:
    """Whether the bytes, which may be a file's beginning, are those of a volume, or of one that is refused by name."""
    return _format(data) is not None


def read_header(data: bytes) -> Volume | Reject:
    """The header, from the file or its beginning, whatever the number of volumes; TRUNCATED where it goes on."""
    return _of(data).read_header(data)


def read_volume(data: bytes, number: int | None = None) -> Volume | Reject:
    """As `read_header`, but a file of several volumes is refused unless `number`, from 0, chooses one of them."""
    return _of(data).read_volume(data, number)


def image(data: bytes, number: int = 0) -> tuple[np.ndarray, float, float] | Reject:
    """Volume `number` of the file as (slices, rows, columns), rescale slope and intercept: see `voxels.image`."""
    return _of(data).image(data, number)


def labels(data: bytes) -> np.ndarray | Reject:
    """A label volume as integers (slices, rows, columns), as `voxels.labels` gives it."""
    return _of(data).labels(data)


def _of(data: bytes) -> ModuleType:
    form = _format(data)
    assert form is not None, "`is_volume` is asked first"
    return form


def _format(data: bytes) -> ModuleType | None:
    if nifti.is_nifti(data):
        return nifti
    if nrrd.is_nrrd(data):
        return nrrd
    return metaimage if metaimage.is_metaimage(data) else None
