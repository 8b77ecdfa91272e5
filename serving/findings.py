"""What the masks of a series become on the wire: figures of volumes and lesions, DICOM SEG, NIfTI, GLB."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

from rayseg import config
from rayseg.data.conformal import VolumeErrors
from rayseg.dicom import nifti
from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import stack
from rayseg.geometry.upright import upright
from rayseg.geometry.volume import volume_ml, voxels_mm3
from rayseg.inference import exports, outputs, quality, volume
from rayseg.inference.lesions import Lesion as Connected
from rayseg.inference.lesions import lesions as lesions_of
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.quality import Look
from rayseg.records import QualityFlag, Reason, Reject
from rayseg.tracking.version import ModelVersion
from serving.answers import DICOM, FORM, GLB, NIFTI, Quality
from serving.messages import Masked, ModelInfo
from serving.upload import Series

MOST_LESIONS = 100
_INTERVAL = (
    "of the 95 % interval, by patients of validation; null where they are too few, or the client chose the threshold"
)

Grid = Literal["source", "upright"]  # of a NIfTI volume


class LabelVolume(BaseModel):
    """One foreground class of a series."""

    value: int = Field(description="the masks' value for this class")
    name: str
    pixels: int
    volume_ml: float | None = Field(description="null where the positions tell no volume")
    volume_low_ml: float | None = Field(description=_INTERVAL)
    volume_high_ml: float | None = Field(description="its other end")


class Lesion(BaseModel):
    """What is connected across faces, edges or corners of voxels."""

    label: str
    pixels: int
    volume_ml: float | None
    area_mm2: float | None = Field(description="on the slice with most of it")
    slices: tuple[int, int] = Field(description="first and last slice, from 0 in the order of the series")
    max_diameter_mm: float | None = Field(description="maximum 3D diameter (IBSI L0JK)")


class SeriesAnswer(BaseModel):
    """The JSON answer of `POST /v1/segment` for a series."""

    rows: int
    columns: int
    slices: int = Field(description="with a mask")
    foreground_pixels: int
    volume_ml: float | None = Field(description="of the foreground; null where the positions tell no volume")
    volume_low_ml: float | None = Field(description=_INTERVAL)
    volume_high_ml: float | None = Field(description="its other end")
    labels: list[LabelVolume]
    lesions: list[Lesion] = Field(description=f"the largest first, {MOST_LESIONS} at most")
    lesion_count: int
    quality: Quality
    rejected: dict[str, int] = Field(description="objects and slices without a mask, by reason")
    detail: str = Field(description="what was found in the series: gaps, uneven distances, tilt, what was left out")
    model: str
    version: str
    digest: str
    engine: str
    timings_ms: dict[str, float] = Field(description="receive: body; segment: decoding and model; total")


@dataclass(frozen=True, eq=False)
class Found:
    """The slices of a series that have a mask, in order."""

    series: Series
    model: ModelInfo
    threshold: float | None  # that a client asked for
    numbers: Sequence[int]  # of the series' slices
    masks: Sequence[np.ndarray]  # uint8 label maps (rows, columns)
    looks: Sequence[Look]
    rejected: dict[str, int]

    @property
    def of_nifti(self) -> bool:
        """Whether what was sent is a NIfTI volume."""
        return self.series.headers is None and nifti.is_nifti(self.series.objects[0])

    @property
    def geometries(self) -> list[Geometry]:
        """Of each slice; of an image file that has none, its size."""
        known = [self.series.geometries[number] for number in self.numbers]
        return [one or Geometry(*mask.shape) for one, mask in zip(known, self.masks, strict=True)]

    @property
    def flags(self) -> dict[QualityFlag, str]:
        """As the bulk job has them."""
        foreground = [int(np.count_nonzero(mask)) for mask in self.masks]
        return quality.judge(self.model.range, self.looks, volume_ml(foreground, self.geometries))


def found(
    series: Series, model: ModelInfo, threshold: float | None, masks: Sequence[Masked | Reject]
) -> Found | Reject:
    """The slices that have a mask; as the bulk job a reject where there are none."""
    rejects = [mask for mask in masks if isinstance(mask, Reject)]
    if len(rejects) == len(masks):
        first = rejects[0]
        return Reject(
            first.reason, f"none of {len(masks)} slices can be used; the first: {first.detail or first.reason}"
        )
    rejected = Counter(series.left_out) + Counter(reject.reason.value for reject in rejects)
    usable = {number: mask for number, mask in enumerate(masks) if not isinstance(mask, Reject)}
    return Found(
        series,
        model,
        threshold,
        list(usable),
        [one.mask for one in usable.values()],
        [one.look for one in usable.values()],
        dict(sorted(rejected.items())),
    )


def encode(kind: str, found: Found, grid: Grid = "source") -> bytes | Reject:
    """The series as DICOM SEG, gzipped NIfTI or GLB; a reject where it lacks what the format must state.

    The NIfTI of a NIfTI volume is on the volume's own grid: voxel by voxel its mask. Where an upright `grid` is wanted
    it is on one with right angles, as `nifti-upright` of the bulk job.
    """
    if kind == DICOM:
        return _dicom_seg(found)
    if kind == NIFTI and grid == "source" and found.of_nifti:
        frames = [found.series.places[number][1] for number in found.numbers]
        return volume.mask(volume.header(found.series.objects[0]), found.masks, frames, found.model.labels)
    placed = stack(found.masks, found.geometries)
    if isinstance(placed, Reject):
        return placed
    if kind == NIFTI:
        return exports.nifti(placed if grid == "source" else upright(placed), found.model.labels)
    assert kind == GLB
    return exports.glb(exports.surfaces(placed, found.model.labels))


def warning(kind: str, found: Found, grid: Grid = "source") -> str | None:
    """What who reads the answer should know, as the bulk job's ledger has it; None where it is nothing.

    The volumes of a viewer's form are on the series' own grid whatever was sent.
    """
    as_it_lies = kind == NIFTI and grid == "source" and not found.of_nifti
    placed = stack(found.masks, found.geometries) if as_it_lies or kind == FORM else None
    if placed is None or isinstance(placed, Reject):
        return None
    text = exports.nifti_warning(placed)
    return text and f"{text}: application/nifti with grid=upright"


def measure(found: Found, timings_ms: dict[str, float]) -> SeriesAnswer:
    """Volumes and lesions."""
    model, geometries, masks_SHW = found.model, found.geometries, np.stack(found.masks)
    counts = np.stack([np.bincount(mask.ravel(), minlength=len(model.labels) + 1) for mask in masks_SHW])

    # A mask by another threshold has other errors.
    errors = model.volumes if found.threshold is None else VolumeErrors()

    def volume(pixels: np.ndarray, value: int | None = None) -> dict[str, float | None]:
        exact_ml = volume_ml(pixels.tolist(), geometries)
        interval = errors.of_foreground(exact_ml) if value is None else errors.of_class(value, exact_ml)
        return {
            "volume_ml": _rounded(exact_ml),
            "volume_low_ml": _rounded(None if interval is None else interval.low_ml),
            "volume_high_ml": _rounded(None if interval is None else interval.high_ml),
        }

    classes = range(1, len(model.labels) + 1)
    lesions = sorted((one for value in classes for one in lesions_of(masks_SHW, value)), key=lambda one: -one.pixels)
    return SeriesAnswer(
        rows=masks_SHW.shape[1],
        columns=masks_SHW.shape[2],
        slices=len(masks_SHW),
        foreground_pixels=int(counts[:, 1:].sum()),
        **volume(counts[:, 1:].sum(axis=1)),
        labels=[
            LabelVolume(value=value, name=name, pixels=int(counts[:, value].sum()), **volume(counts[:, value], value))
            for value, name in enumerate(model.labels, start=1)
        ],
        lesions=_with_diameters(found, masks_SHW, lesions[:MOST_LESIONS]),
        lesion_count=len(lesions),
        quality=Quality.of(found.flags, found.looks),
        rejected=found.rejected,
        detail=found.series.detail,
        model=model.name,
        version=model.version,
        digest=model.digest,
        engine=model.engine,
        timings_ms=timings_ms,
    )


def _dicom_seg(found: Found) -> bytes | Reject:
    if found.series.headers is None:
        return Reject(Reason.MISSING_ATTRIBUTE, "an image file or volume is no DICOM instance: ask for another format")
    places = [found.series.places[number] for number in found.numbers]
    datasets = {index: outputs.without_pixels(found.series.objects[index]) for index, _ in places}
    sources = []
    for index, _ in places:
        source = datasets[index]
        if isinstance(source, Reject):
            return source
        sources.append(source)
    model = found.model
    settings = outputs.settings_digest(Postprocess(), model.settings, None)
    if found.threshold is not None:  # another mask, so another name
        settings = config.digest([settings, found.threshold])
    frames = [frame for _, frame in places]
    encoded, refused = outputs.files(
        outputs.Segmented("", "dicom", found.numbers, frames, found.geometries, found.masks, found.looks, sources),
        ("seg",),
        model.labels,
        ModelVersion(model.name, model.version, "", model.run_id, model.digest),
        found.flags,
        settings,
        model.engine,
    )
    return refused["seg"] if refused else encoded[0].data


def _with_diameters(found: Found, masks_SHW: np.ndarray, lesions: Sequence[Connected]) -> list[Lesion]:
    geometries = found.geometries
    voxels = voxels_mm3(geometries)
    placed = stack(found.masks, geometries)
    answers = []
    for lesion in lesions:
        pixels = np.count_nonzero(lesion.inside, axis=(1, 2))
        spacing = geometries[lesion.slices.start].pixel_spacing_mm
        answers.append(
            Lesion(
                label=found.model.labels[lesion.value - 1],
                pixels=lesion.pixels,
                volume_ml=None if voxels is None else _rounded(lesion.volume_ml(voxels)),
                area_mm2=None if spacing is None else round(int(pixels.max()) * spacing[0] * spacing[1], 3),
                slices=(found.numbers[lesion.slices.start], found.numbers[lesion.slices.stop - 1]),
                max_diameter_mm=None if isinstance(placed, Reject) else round(lesion.diameter_mm(placed), 2),
            )
        )
    return answers


def _rounded(volume: float | None) -> float | None:
    return None if volume is None else round(volume, 4)
