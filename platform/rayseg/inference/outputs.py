"""What is written of a segmented series: a file, or several, for each profile that is asked for."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import pydicom
import trimesh
from PIL import Image
from scipy import ndimage

from rayseg import config as configuration
from rayseg.data.conformal import VolumeErrors
from rayseg.dicom import report, segmentation
from rayseg.dicom.sources import KEYWORDS
from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import Places, Stack, stack
from rayseg.geometry.upright import upright
from rayseg.geometry.volume import volume_ml, voxels_mm3
from rayseg.inference import exports, volume
from rayseg.inference.lesions import lesions
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import mask_png
from rayseg.inference.quality import Look
from rayseg.models.engine import Engine
from rayseg.records import QualityFlag, Reason, Reject
from rayseg.tracking.version import ModelVersion

# DICOM Segmentations (binary, label map, probabilities), a structured report about the first of these, a NIfTI volume
# on the source's own grid, and one with right angles where that is sheared, surfaces in patient millimetres, label maps
# of the slices as PNG, and pictures of those with something found.
Profile = Literal[
    "seg", "seg-labelmap", "seg-fractional", "report", "nifti", "nifti-upright", "stl", "glb", "png", "overlays"
]
Kind = Literal["dicom", "volume", "image"]  # of a series: DICOM instances, a volume in one file, one image file
SEGMENTATIONS: dict[str, segmentation.Kind] = {
    "seg": "BINARY",
    "seg-labelmap": "LABELMAP",
    "seg-fractional": "FRACTIONAL",
}
DICOM = (*SEGMENTATIONS, "report")
PICTURES = ("png", "overlays")  # a file a slice, wherever that lies
_SUFFIXES = {
    "seg": ".dcm",
    "seg-labelmap": ".labelmap.dcm",
    "seg-fractional": ".fractional.dcm",
    "report": ".report.dcm",
    "nifti": ".nii.gz",
    "nifti-upright": ".upright.nii.gz",
    "stl": ".stl",
    "glb": ".glb",
}


@dataclass(frozen=True)
class File:
    """A file of a series: `name` below the run's folder begins with the series' key."""

    profile: str
    name: str
    data: bytes = field(repr=False)
    warning: str | None = None  # what its users should know


@dataclass(frozen=True, eq=False)
class Segmented:
    """The slices of a series that have a mask, in the manifest's order."""

    series_key: str
    kind: Kind
    numbers: Sequence[int]  # of the slices among all of the series that the manifest accepts
    frames: Sequence[int | None]  # of multi-frame objects and volumes
    geometries: Sequence[Geometry]
    masks: Sequence[np.ndarray]  # uint8 label maps (rows, columns)
    looks: Sequence[Look]
    sources: Sequence[pydicom.Dataset] = ()  # of DICOM, without pixels
    volume: bytes | None = None  # `volume.header` of a NIfTI volume
    probabilities: Sequence[np.ndarray] | None = None  # uint8 (rows, columns, classes), 255 is certain; if asked for
    pictures: Sequence[tuple[int, bytes]] = ()  # number of a slice, PNG; where asked for
    errors: VolumeErrors = VolumeErrors()  # noqa: RUF009, it is frozen


def settings_digest(postprocess: Postprocess, engine: Engine, mirror: str | None) -> str:
    """Of what decides about a mask beside the model: part of the UIDs of its files."""
    return configuration.digest([configuration.plain(postprocess), configuration.plain(engine), mirror])


def without_pixels(data: bytes) -> pydicom.Dataset | Reject:
    """What files take of the data set of an object that was read already."""
    return read_head(data)[0]


def read_head(data: bytes) -> tuple[pydicom.Dataset | Reject, int]:
    """What files take of the data set of an object that was read already, and how many of its bytes say that.

    Those at its beginning, up to the pixels: read alone they give the same.
    """
    buffer = io.BytesIO(data)
    try:
        dataset = pydicom.dcmread(buffer, stop_before_pixels=True, force=True, specific_tags=[*KEYWORDS])
        dataset.buffer = None  # it would hold all of `data`
        return dataset, min(buffer.tell(), len(data))
    except Exception as error:  # ours has read it
        return Reject(Reason.INTERNAL, type(error).__name__), len(data)


def lacking(
    profile: str, kind: Kind, where: Callable[[], Places | Reject], before: Mapping[str, Reject | None]
) -> Reject | None:
    """Why a profile cannot be made of a series, as far as headers tell: None where it can.

    Args:
        profile: one of `Profile`.
        kind: of the series.
        where: its slices lie; asked where that matters.
        before: what this gave of the profiles named before.
    """
    if profile in PICTURES or (kind, profile) == ("volume", "nifti"):
        return None
    if profile in DICOM:
        if kind != "dicom":
            return Reject(Reason.NOT_DICOM, "a DICOM file refers to DICOM instances, and this is none")
        if profile in SEGMENTATIONS:
            return None
        about = [reject for name, reject in before.items() if name in SEGMENTATIONS]
        if all(about):
            reason = about[0].reason if about and about[0] else Reason.WRITE_FAILED
            return Reject(reason, "there is no segmentation for it to be about")
    elif kind == "image":
        return Reject(Reason.MISSING_ATTRIBUTE, "an image file does not say where it lies")
    places = where()
    if isinstance(places, Reject):
        return places
    affine = places.affine_lps() if profile.startswith("nifti") else None
    return affine if isinstance(affine, Reject) else None


def files(
    series: Segmented,
    profiles: Sequence[str],
    labels: tuple[str, ...],
    model: ModelVersion,
    flags: Mapping[QualityFlag, str],
    settings: str,
    engine: str,
) -> tuple[list[File], dict[str, Reject]]:
    """The files of all profiles that can be made, and why others cannot.

    The DICOM objects have the flags that `quality.judge` gives.
    """
    making = _Making(series, labels, model, flags, settings, engine)
    ended: dict[str, Reject | None] = {}
    for profile in profiles:
        try:
            ended[profile] = lacking(profile, series.kind, lambda: making.stack, ended) or making.add(profile)
        except Exception as error:  # a defect of ours must cost this profile only
            ended[profile] = Reject(Reason.INTERNAL, type(error).__name__)
    return making.files, {profile: reject for profile, reject in ended.items() if reject}


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


@dataclass(frozen=True, eq=False)
class _Making:
    """The files of a series in the making: what several are made of is made once, and only where one needs it."""

    series: Segmented
    labels: tuple[str, ...]
    model: ModelVersion
    flags: Mapping[QualityFlag, str]
    settings: str
    engine: str
    files: list[File] = field(default_factory=list)

    @cached_property
    def stack(self) -> Stack | Reject:
        return stack(self.series.masks, self.series.geometries)

    @cached_property
    def meshes(self) -> dict[str, trimesh.Trimesh]:
        return exports.surfaces(self._placed, self.labels)

    @property
    def _placed(self) -> Stack:
        assert isinstance(self.stack, Stack), "`lacking` has seen it"
        return self.stack

    def add(self, profile: str) -> Reject | None:
        """Makes the files of a profile that `lacking` lets pass."""
        series = self.series
        if profile == "overlays":
            self.files.extend(self._of_slice(profile, number, png) for number, png in series.pictures)
            return None
        if profile == "png":
            masks = zip(series.numbers, series.masks, strict=True)
            self.files.extend(self._of_slice(profile, number, mask_png(mask)) for number, mask in masks)
            return None
        data = self._of_series(profile)
        if isinstance(data, Reject):
            return data
        ours = profile == "nifti" and series.volume is None  # its grid, and not a NIfTI source's own header
        warning = exports.nifti_warning(self._placed) if ours else None
        self.files.append(File(profile, f"{series.series_key}{_SUFFIXES[profile]}", data, warning))
        return None

    def _of_slice(self, profile: str, number: int, png: bytes) -> File:
        mask = ".mask" if profile == "png" else ""
        if self.series.kind == "image":
            return File(profile, f"{self.series.series_key}{mask or '.overlay'}.png", png)
        return File(profile, f"{self.series.series_key}/{number:05d}{mask}.png", png)

    def _of_series(self, profile: str) -> bytes | Reject:
        series = self.series
        if profile in SEGMENTATIONS:
            return self._segmentation(SEGMENTATIONS[profile])
        if profile == "nifti":
            if series.volume is not None:
                return volume.mask(series.volume, series.masks, series.frames, self.labels)
            return exports.nifti(self._placed, self.labels)
        if profile == "nifti-upright":
            return exports.nifti(upright(self._placed), self.labels)
        if profile == "stl":
            return exports.stl(self.meshes)
        if profile == "glb":
            return exports.glb(self.meshes)
        assert profile == "report"
        return self._report()

    def _segmentation(self, kind: segmentation.Kind) -> bytes | Reject:
        return segmentation.encode(
            self.series.sources,
            self.series.masks,
            self.labels,
            self.model.name,
            self.model.version,
            self.model.digest,
            kind=kind,
            settings=self.settings,
            engine=self.engine,
            frames=self.series.frames,
            probabilities=self.series.probabilities,
            flags=self.flags,
        )

    def _report(self) -> bytes | Reject:
        # Of one that older readers know as a segmentation, too, where there is one: dcmtk 3.6.7 knows no label maps.
        segmentations = [file for file in self.files if file.profile in SEGMENTATIONS]  # `lacking` has seen one
        about = min(segmentations, key=lambda file: file.profile == "seg-labelmap").data
        measured = [self._measured(value) for value in range(1, len(self.labels) + 1)]
        return report.encode(about, self.labels, measured, self.model.name, self.model.version, list(self.flags))

    def _measured(self, value: int) -> report.Measured:
        """Of a class: its volume, and its largest lesion by volume, by voxels where positions do not give one."""
        masks, geometries, placed = self.series.masks, self.series.geometries, self._placed
        whole_ml = volume_ml([int(np.count_nonzero(mask == value)) for mask in masks], geometries)
        voxels = voxels_mm3([geometries[number] for number in placed.order])
        largest = max(
            lesions(placed.masks, value),
            key=lambda one: one.pixels if voxels is None else one.volume_ml(voxels),
            default=None,
        )
        interval = self.series.errors.of_class(value, whole_ml)
        ends_ml = None if interval is None else (interval.low_ml, interval.high_ml)
        if largest is None:
            return report.Measured(whole_ml, None, ends_ml)
        lesion_ml = None if voxels is None else largest.volume_ml(voxels)
        return report.Measured(whole_ml, report.Lesion(lesion_ml, largest.diameter_mm(placed)), ends_ml)
