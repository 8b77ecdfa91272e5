"""What a slice's mask becomes on the wire: the choice by `Accept`, PNG and JSON. Of series: see `findings`."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from rayseg.data.grey import grey
from rayseg.data.preprocess import Preprocess
from rayseg.data.volume import VolumePreprocess
from rayseg.dicom.reading import Slice
from rayseg.geometry.volume import volume_ml
from rayseg.inference import quality
from rayseg.inference.outputs import overlay_png
from rayseg.records import QualityFlag
from serving.messages import ModelInfo, Segmented

JSON, PNG, DICOM = "application/json", "image/png", "application/dicom"
NIFTI, GLB, FORM = "application/nifti", "model/gltf-binary", "multipart/form-data"
KINDS = (JSON, PNG, DICOM, NIFTI, GLB, FORM)


class LabelArea(BaseModel):
    """One foreground class of the mask."""

    value: int = Field(description="the mask's value for this class")
    name: str
    pixels: int
    area_mm2: float | None = Field(description="null where the source tells no pixel spacing")


class Quality(BaseModel):
    """What makes the input or the prediction worth a look; nothing is stopped by it."""

    flags: list[str]
    detail: str | None
    entropy_bits: float | None = Field(description="the mean over the pixels found; null where there are none")
    pairwise_dice: float | None = Field(description="of an ensemble's members, or of mirror images; null of one model")

    @classmethod
    def of(cls, flags: Mapping[QualityFlag, str], looks: Sequence[quality.Look]) -> "Quality":
        """What the bulk job's ledger has."""
        return cls(
            flags=[flag.value for flag in flags],
            detail=quality.describe(flags),
            entropy_bits=_four(quality.entropy(looks)),
            pairwise_dice=_four(quality.pairwise_dice(looks)),
        )


class Preview(BaseModel):
    """Two pictures of equal size, base64: what a viewer lays over each other."""

    slice_png: str = Field(description="the slice in the model's window, 8-bit grey")
    mask_png: str = Field(description="the label map, as `Accept: image/png` gives it")


class ModelAnswer(BaseModel):
    """The JSON answer of `GET /v1/model`."""

    name: str
    version: str
    alias: str | None = Field(description="null where the model was configured by version")
    digest: str
    run_id: str = Field(description="the MLflow run that trained it")
    labels: tuple[str, ...] = Field(description="foreground classes; value i + 1 of a mask is labels[i]")
    preprocess: Preprocess
    threshold: float
    engine: str = Field(description="what runs the network, with its version and precision")


class SegmentAnswer(BaseModel):
    """The JSON answer of `POST /v1/segment`."""

    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None = Field(description="between rows, between columns")
    foreground_pixels: int
    area_mm2: float | None = Field(description="of the foreground; null where the source tells no pixel spacing")
    labels: list[LabelArea]
    quality: Quality
    model: str
    version: str
    digest: str
    engine: str = Field(description="what ran the network, with its version and precision")
    batch_size: int = Field(description="slices at work in the replica at the same time")
    timings_ms: dict[str, float] = Field(
        description="receive: body; segment: model with its queue; forward: decoding and model alone; total"
    )
    preview: Preview | None = Field(default=None, description="with `?preview=true`")


def negotiate(accept: str | None, offers: tuple[str, ...] = KINDS) -> str | None:
    """The offer that the `Accept` header likes best (RFC 9110, 12.5.1); None where it likes none.

    Of ranges that match an offer the most specific one gives its quality; of offers with equal quality the first wins.
    Parameters other than `q` do not narrow a range; a part that cannot be read is passed over.
    """
    if accept is None or not accept.strip():
        return offers[0]
    qualities: dict[str, float] = {}
    for part in accept.lower().split(","):
        media_range, *parameters = (piece.strip() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = -1.0
        if 0 <= quality <= 1:
            qualities[media_range] = max(quality, qualities.get(media_range, 0.0))

    def liking(offer: str) -> float:
        for media_range in (offer, offer.split("/")[0] + "/*", "*/*"):
            if media_range in qualities:
                return qualities[media_range]
        return 0.0

    best = max(offers, key=liking)
    return best if liking(best) > 0 else None


def png(image_HW: np.ndarray) -> bytes:
    """Lossless 8-bit grey PNG of a uint8 image."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def measure(result: Segmented, timings_ms: dict[str, float], preview: Preview | None = None) -> SegmentAnswer:
    """Pixel counts and areas of a mask; areas in mm² where the pixel spacing is known."""
    spacing = result.geometry.pixel_spacing_mm if result.geometry else None
    pixel_mm2 = spacing[0] * spacing[1] if spacing else None
    counts = np.bincount(result.mask.ravel(), minlength=len(result.model.labels) + 1)

    def area(pixels: int) -> float | None:
        return None if pixel_mm2 is None else round(pixels * pixel_mm2, 3)

    labels = [
        LabelArea(value=value, name=name, pixels=int(counts[value]), area_mm2=area(int(counts[value])))
        for value, name in enumerate(result.model.labels, start=1)
    ]
    foreground = int(counts[1:].sum())
    rows, columns = result.mask.shape
    volume = volume_ml([foreground], [result.geometry]) if result.geometry else None
    flags = quality.judge(result.model.range, [result.look], volume)
    return SegmentAnswer(
        rows=rows,
        columns=columns,
        pixel_spacing_mm=spacing,
        foreground_pixels=foreground,
        area_mm2=area(foreground),
        labels=labels,
        quality=Quality.of(flags, [result.look]),
        model=result.model.name,
        version=result.model.version,
        digest=result.model.digest,
        engine=result.model.engine,
        batch_size=result.batch_size,
        timings_ms=timings_ms,
        preview=preview,
    )


def preview(source: Slice, mask: np.ndarray, preprocess: Preprocess | VolumePreprocess) -> Preview:
    """The slice with the model's intensities and its label map, both on the source grid."""
    return Preview(
        slice_png=base64.b64encode(png(grey(preprocess, source))).decode(),
        mask_png=base64.b64encode(png(mask)).decode(),
    )


def overlay(source: Slice, mask: np.ndarray, preprocess: Preprocess | VolumePreprocess) -> bytes:
    """PNG of the slice with the model's intensities and the outlines of what was found."""
    return overlay_png(grey(preprocess, source), mask)


def _four(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def model_headers(model: ModelInfo) -> dict[str, str]:
    """Which model made an answer; the answer itself is a patient's, so nothing on its way may keep it."""
    return {
        "X-Model-Name": model.name,
        "X-Model-Version": model.version,
        "X-Model-Digest": model.digest,
        "Cache-Control": "no-store",
    }
