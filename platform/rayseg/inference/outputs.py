"""What is written of a segmented series: a file, or several, for each profile that is asked for."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pydicom
from PIL import Image
from scipy import ndimage

from rayseg.dicom import report, segmentation
from rayseg.dicom.reading import Header
from rayseg.inference import exports
from rayseg.inference.stack import Stack, stack
from rayseg.inference.volume import volume_ml
from rayseg.records import Reason, Reject
from rayseg.tracking.registry import ModelVersion

# DICOM Segmentations (binary, label map, probabilities), a structured report about the first of these, a NIfTI volume
# in the source's frame, surfaces in patient millimetres, and pictures of the slices with something found.
Profile = Literal["seg", "seg-labelmap", "seg-fractional", "report", "nifti", "stl", "glb", "overlays"]
SEGMENTATIONS: dict[str, segmentation.Kind] = {
    "seg": "BINARY",
    "seg-labelmap": "LABELMAP",
    "seg-fractional": "FRACTIONAL",
}
_SUFFIXES = {
    "seg": ".dcm",
    "seg-labelmap": ".labelmap.dcm",
    "seg-fractional": ".fractional.dcm",
    "report": ".report.dcm",
    "nifti": ".nii.gz",
    "stl": ".stl",
    "glb": ".glb",
}


@dataclass(frozen=True)
class File:
    """A file of a series: `name` below the run's folder begins with the series' key."""

    profile: str
    name: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, eq=False)
class Segmented:
    """The slices of a series that have a mask, in the manifest's order."""

    series_key: str
    sources: Sequence[pydicom.Dataset]  # without pixels
    headers: Sequence[Header]
    masks: Sequence[np.ndarray]  # uint8 label maps (rows, columns)
    probabilities: Sequence[np.ndarray] | None  # uint8 (rows, columns, classes), 255 is certain; where asked for
    pictures: Sequence[tuple[int, bytes]]  # number of a slice in the manifest's order, PNG; where asked for


def files(
    series: Segmented, profiles: Sequence[str], labels: tuple[str, ...], model: ModelVersion
) -> list[File] | Reject:
    """The files of all profiles, or why one of them cannot be made: then none is to be written."""
    made: list[File] = []
    volume: Stack | Reject | None = None
    for profile in profiles:
        if profile == "overlays":
            made += [File(profile, f"{series.series_key}/{number:05d}.png", png) for number, png in series.pictures]
            continue
        if profile in SEGMENTATIONS:
            data = _segmentation(series, SEGMENTATIONS[profile], labels, model)
        else:
            if volume is None:
                volume = stack(series.masks, [header.geometry for header in series.headers])
            if isinstance(volume, Reject):
                return Reject(volume.reason, f"{profile}: {volume.detail}")
            data = _of_volume(profile, series, volume, labels, model, made)
        if isinstance(data, Reject):
            return Reject(data.reason, f"{profile}: {data.detail}")
        made.append(File(profile, f"{series.series_key}{_SUFFIXES[profile]}", data))
    return made


def overlay_png(grey_HW: np.ndarray, mask: np.ndarray) -> bytes:
    """A slice, uint8, with the outlines of what was found, as PNG."""
    picture_HWC = np.repeat(grey_HW[..., np.newaxis], 3, axis=-1)
    for number in np.unique(mask[mask > 0]):
        inside = mask == number
        outline = inside & ~ndimage.binary_erosion(inside)
        picture_HWC[outline] = exports.colour(int(number))
    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, format="PNG")
    return buffer.getvalue()


def _segmentation(
    series: Segmented, kind: segmentation.Kind, labels: tuple[str, ...], model: ModelVersion
) -> bytes | Reject:
    return segmentation.encode(
        series.sources,
        series.masks,
        labels,
        model.name,
        model.version,
        model.digest,
        kind=kind,
        frames=[header.frame for header in series.headers],
        probabilities=series.probabilities,
    )


def _of_volume(
    profile: str,
    series: Segmented,
    volume: Stack,
    labels: tuple[str, ...],
    model: ModelVersion,
    made: Sequence[File],
) -> bytes | Reject:
    if profile == "nifti":
        return exports.nifti(volume, labels)
    meshes = exports.surfaces(volume, labels)
    if profile == "stl":
        return exports.stl(meshes)
    if profile == "glb":
        return exports.glb(meshes)
    assert profile == "report"
    about = next((file.data for file in made if file.profile in SEGMENTATIONS), None)
    if about is None:
        return Reject(Reason.WRITE_FAILED, "a report is about a segmentation, named before it")
    geometries = [header.geometry for header in series.headers]
    measured = [
        report.Measured(
            volume_ml([int(np.count_nonzero(mask == number)) for mask in series.masks], geometries),
            exports.max_diameter_mm(meshes[name]) if name in meshes else None,
        )
        for number, name in enumerate(labels, start=1)
    ]
    return report.encode(about, labels, measured, model.name, model.version)
