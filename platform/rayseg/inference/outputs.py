"""What is written of a segmented series: a file, or several, for each profile that is asked for."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pydicom
from PIL import Image
from scipy import ndimage

from rayseg import config as configuration
from rayseg.dicom import report, segmentation
from rayseg.dicom.reading import Header
from rayseg.dicom.sources import KEYWORDS
from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import Stack, stack
from rayseg.geometry.volume import volume_ml, voxels_mm3
from rayseg.inference import exports
from rayseg.inference.lesions import lesions
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.quality import Look
from rayseg.models.engine import Engine
from rayseg.records import QualityFlag, Reason, Reject
from rayseg.tracking.version import ModelVersion

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
    looks: Sequence[Look]
    probabilities: Sequence[np.ndarray] | None  # uint8 (rows, columns, classes), 255 is certain; where asked for
    pictures: Sequence[tuple[int, bytes]]  # number of a slice in the manifest's order, PNG; where asked for


def settings_digest(postprocess: Postprocess, engine: Engine, mirror: str | None) -> str:
    """Of what decides about a mask beside the model: part of the UIDs of its files."""
    return configuration.digest([configuration.plain(postprocess), configuration.plain(engine), mirror])


def without_pixels(data: bytes) -> pydicom.Dataset | Reject:
    """What files take of the data set of an object that was read already."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True, specific_tags=[*KEYWORDS])
        dataset.buffer = None  # it would hold all of `data`
        return dataset
    except Exception as error:  # ours has read it
        return Reject(Reason.INTERNAL, type(error).__name__)


def files(
    series: Segmented,
    profiles: Sequence[str],
    labels: tuple[str, ...],
    model: ModelVersion,
    flags: Mapping[QualityFlag, str],
    settings: str,
    engine: str,
) -> list[File] | Reject:
    """The files of all profiles, or why one of them cannot be made: then none is to be written.

    The DICOM objects have the flags that `quality.judge` gives.
    """
    made: list[File] = []
    volume: Stack | Reject | None = None
    for profile in profiles:
        if profile == "overlays":
            made += [File(profile, f"{series.series_key}/{number:05d}.png", png) for number, png in series.pictures]
            continue
        if profile in SEGMENTATIONS:
            data = _segmentation(series, SEGMENTATIONS[profile], labels, model, flags, settings, engine)
        else:
            if volume is None:
                volume = stack(series.masks, [header.geometry for header in series.headers])
            if isinstance(volume, Reject):
                return Reject(volume.reason, f"{profile}: {volume.detail}")
            data = _of_volume(profile, series, volume, labels, model, made, flags)
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
    series: Segmented,
    kind: segmentation.Kind,
    labels: tuple[str, ...],
    model: ModelVersion,
    flags: Mapping[QualityFlag, str],
    settings: str,
    engine: str,
) -> bytes | Reject:
    return segmentation.encode(
        series.sources,
        series.masks,
        labels,
        model.name,
        model.version,
        model.digest,
        kind=kind,
        settings=settings,
        engine=engine,
        frames=[header.frame for header in series.headers],
        probabilities=series.probabilities,
        flags=flags,
    )


def _is_label_map(file: File) -> bool:
    return SEGMENTATIONS[file.profile] == "LABELMAP"


def _of_volume(
    profile: str,
    series: Segmented,
    volume: Stack,
    labels: tuple[str, ...],
    model: ModelVersion,
    made: Sequence[File],
    flags: Mapping[QualityFlag, str],
) -> bytes | Reject:
    if profile == "nifti":
        return exports.nifti(volume, labels)
    if profile == "stl":
        return exports.stl(exports.surfaces(volume, labels))
    if profile == "glb":
        return exports.glb(exports.surfaces(volume, labels))
    assert profile == "report"
    # Of one that older readers know as a segmentation, too, where there is one: dcmtk 3.6.7 knows no label maps.
    segmentations = sorted((file for file in made if file.profile in SEGMENTATIONS), key=_is_label_map)
    about = next((file.data for file in segmentations), None)
    if about is None:
        return Reject(Reason.WRITE_FAILED, "a report is about a segmentation, named before it")
    geometries = [header.geometry for header in series.headers]
    measured = [_measured(number, series.masks, volume, geometries) for number in range(1, len(labels) + 1)]
    return report.encode(about, labels, measured, model.name, model.version, list(flags))


def _measured(
    value: int, masks: Sequence[np.ndarray], volume: Stack, geometries: Sequence[Geometry]
) -> report.Measured:
    """Of a class: its volume, and the lesion that is the largest by volume, by voxels where there is none."""
    whole_ml = volume_ml([int(np.count_nonzero(mask == value)) for mask in masks], geometries)
    voxels = voxels_mm3(sorted(geometries, key=planes.along_normal_mm))  # the stack's order
    largest = max(
        lesions(volume.masks, value),
        key=lambda one: one.pixels if voxels is None else one.volume_ml(voxels),
        default=None,
    )
    if largest is None:
        return report.Measured(whole_ml, None)
    lesion_ml = None if voxels is None else largest.volume_ml(voxels)
    return report.Measured(whole_ml, report.Lesion(lesion_ml, largest.diameter_mm(volume)))
