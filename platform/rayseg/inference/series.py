"""One series: its slices read, segmented and written in all profiles; the outcome is a row of the ledger."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pydicom

from rayseg.data.conformal import Interval, VolumeErrors
from rayseg.data.objects import Place
from rayseg.data.preprocess import Preprocess
from rayseg.data.stacks import along
from rayseg.geometry.grid import Geometry
from rayseg.geometry.volume import volume_ml, voxels_mm3
from rayseg.inference import quality
from rayseg.inference.delivery import deliver
from rayseg.inference.outputs import File, Kind, Profile, Segmented, files, overlay_png
from rayseg.inference.packed import Packed
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.inference.sources import Sources, geometry
from rayseg.inference.watch import STEPS, Watch
from rayseg.records import Reason, Reject
from rayseg.retry import CredentialsError
from rayseg.tracking.version import ModelVersion

STAGE = "segment"  # as the table of rejects names it


@dataclass(frozen=True)
class Task:
    """What all series of a run have in common, beside the model itself."""

    folder: str  # URI of where files go
    model: ModelVersion
    config_digest: str
    profiles: tuple[Profile, ...] = ("seg",)
    postprocess: Postprocess = field(default_factory=Postprocess)
    write_empty: bool = True  # whether a series with nothing found gets files
    pacs: str | None = None  # URL of a DICOMweb service that gets the DICOM files, too
    # Of what decides about a mask beside the model. Files' UIDs are made of it: a PACS keeps what it has by a UID.
    settings: str = ""


def segment_series(
    predictor: Predictor,
    task: Task,
    *,
    series_key: str,
    patient_key: str,
    uris: Sequence[str],
    frames: Sequence[int | None],
    input_digest: str = "",
    kind: Kind = "dicom",
    not_made: Sequence[dict[str, str]] = (),
) -> dict[str, Any]:
    """Segments the slices of a series, given in order, and writes its files `FOLDER/<series_key>...`.

    A slice is an object at one of `uris`, or the frame of it that `frames` has at the same place; `input_digest` of all
    of them goes into the row as it is. A slice that cannot be used is in no file; a series without any other is
    rejected, and so is one of which no profile can be made, or a file not be written. It raises CredentialsError alone.

    Args:
        predictor, task: what all series have in common.
        series_key, patient_key, uris, frames, input_digest, kind: the series.
        not_made: rows of `records.NOT_MADE`, of the task's profiles that are not to be tried; in the row are these and
            those that fail.

    Returns:
        A row of the schema `records.LEDGER`, with `rejects` beside: rows of the schema `records.REJECTS`.
    """
    watch = Watch()
    wanted = list(zip(uris, frames, strict=True))
    known = {one["profile"] for one in not_made}
    profiles = [profile for profile in task.profiles if profile not in known]
    refused: dict[Place, Reject] = {}
    try:
        ended = _make(predictor, task, series_key, kind, profiles, wanted, refused, watch)
    except CredentialsError:
        raise
    except Exception as error:  # a defect of ours must cost this series only
        ended = Reject(Reason.INTERNAL, type(error).__name__)
    if isinstance(ended, Reject):
        refused = {slice_place: refused.get(slice_place, ended) for slice_place in wanted}
    else:
        lacking = {one["profile"]: one for one in (*not_made, *ended["not_made"])}
        ended["not_made"] = [lacking[profile] for profile in task.profiles if profile in lacking]
    row = ledger_row(task, series_key, patient_key, ended if isinstance(ended, Reject) else None)
    row |= {
        "input_digest": input_digest,
        "rejected_slices": len(refused),
        "rejects": [
            reject_row(*slice_place, STAGE, reject, patient_key, series_key) for slice_place, reject in refused.items()
        ],
        "not_made": list(not_made),
        "engine": predictor.engine,
        **{f"{step}_s": watch.seconds[step] for step in STEPS},
        "seconds": time.monotonic() - watch.began,
    }
    return row if isinstance(ended, Reject) else row | ended


def not_made_rows(refused: Mapping[str, Reject]) -> list[dict[str, str]]:
    """Rows of `records.NOT_MADE`."""
    return [
        {"profile": profile, "reason": reject.reason.value, "detail": reject.detail}
        for profile, reject in refused.items()
    ]


def ledger_row(task: Task, series_key: str, patient_key: str | None, reject: Reject | None) -> dict[str, Any]:
    """A row of the schema `records.LEDGER` before anything was made; segmented where `reject` is None."""
    return {
        "series_key": series_key,
        "patient_key": patient_key,
        "verdict": "segmented" if reject is None else "rejected",
        "reason": None if reject is None else reject.reason.value,
        "detail": None if reject is None else reject.detail,
        "model_name": task.model.name,
        "model_version": task.model.version,
        "model_digest": task.model.digest,
        "config_digest": task.config_digest,
        "engine": None,
        "slices": 0,
        "rejected_slices": 0,
        "foreground_pixels": 0,
        "class_volumes": [],
        "outputs": [],
        "not_made": [],
    }


def reject_row(
    uri: str, frame: int | None, stage: str, reject: Reject, patient_key: str | None, series_key: str | None
) -> dict[str, Any]:
    """A row of the schema `records.REJECTS`."""
    return {
        "uri": uri,
        "frame": frame,
        "stage": stage,
        "reason": reject.reason.value,
        "detail": reject.detail,
        "patient_key": patient_key,
        "series_key": series_key,
    }


def _make(
    predictor: Predictor,
    task: Task,
    series_key: str,
    kind: Kind,
    profiles: Sequence[str],
    wanted: Sequence[Place],
    refused: dict[Place, Reject],
    watch: Watch,
) -> dict[str, Any] | Reject:
    """Writes the files of the usable slices and returns what the ledger row says of them; fills `refused`."""
    if kind == "image" and predictor.neighbours:
        return Reject(Reason.NEEDS_NEIGHBOURS, "an image file has none, and the model looks at them")
    series = _segmented(predictor, series_key, kind, profiles, wanted, refused, watch)
    if not series.masks:
        first = refused[wanted[0]]
        return Reject(
            first.reason, f"none of {len(wanted)} slices can be used; the first: {first.detail or first.reason}"
        )
    if task.postprocess != Postprocess():
        try:
            with watch.step("encode"):
                masks = task.postprocess.apply(series.masks, voxels_mm3(series.geometries))
        except ValueError as error:
            return Reject(Reason.MISSING_ATTRIBUTE, str(error))
        looks = [one.of(mask) for one, mask in zip(series.looks, masks, strict=True)]
        # The errors are those of the model's own masks.
        series = dataclasses.replace(series, masks=masks, looks=looks, errors=VolumeErrors())
    foreground = [int(np.count_nonzero(mask)) for mask in series.masks]
    volume = volume_ml(foreground, series.geometries)
    flags = quality.judge(predictor.known.range, series.looks, volume)
    exported: list[File] = []
    not_made: dict[str, Reject] = {}
    if any(foreground) or task.write_empty:
        with watch.step("encode"):
            labels = predictor.bundle.labels.names
            exported, not_made = files(series, profiles, labels, task.model, flags, task.settings, predictor.engine)
    if len(not_made) == len(profiles):
        profile, first = next(iter(not_made.items()))
        return Reject(first.reason, f"{profile}: {first.detail}")
    outputs = []
    for file in exported:
        with watch.step("write"):
            written = deliver(file, task.folder, task.pacs)
        if isinstance(written, Reject):
            return written
        outputs.append(written)
    return {
        "detail": "; ".join(file.warning for file in exported if file.warning) or None,
        "slices": len(series.masks),
        "foreground_pixels": sum(foreground),
        **_with_interval(volume, series.errors.of_foreground(volume)),
        "class_volumes": _of_classes(series, predictor.bundle.labels.names),
        "entropy_bits": quality.entropy(series.looks),
        "pairwise_dice": quality.pairwise_dice(series.looks),
        "flags": [flag.value for flag in flags],
        "flags_detail": quality.describe(flags),
        "outputs": outputs,
        "not_made": not_made_rows(not_made),
    }


def _segmented(
    predictor: Predictor,
    series_key: str,
    kind: Kind,
    profiles: Sequence[str],
    wanted: Sequence[Place],
    refused: dict[Place, Reject],
    watch: Watch,
) -> Segmented:
    """The usable slices with their masks; of pixels only what the profiles ask for is kept."""
    numbers: list[int] = []
    datasets: list[pydicom.Dataset] = []
    masks = Packed()
    geometries: list[Geometry] = []
    looks: list[quality.Look] = []
    probabilities = Packed()
    pictures: list[tuple[int, bytes]] = []
    sources = Sources(kind, predictor.bundle.preprocess.color, watch)
    stacks = along(sources.read(wanted), predictor.neighbours)
    results = watch.each("forward", predictor.judge_stacks(stacks))
    for number, ((uri, frame), result) in enumerate(zip(wanted, results, strict=True)):
        source = result if isinstance(result, Reject) else sources.datasets.get(uri)
        if isinstance(result, Reject) or isinstance(source, Reject):
            assert isinstance(source, Reject)
            refused[uri, frame] = source
            continue
        if source is not None:
            datasets.append(source)
        numbers.append(number)
        masks.append(result.mask)
        geometries.append(geometry(result.slice))
        with watch.step("encode"):
            looks.append(quality.look(predictor.bundle.preprocess, result))
            if "seg-fractional" in profiles:
                probabilities.append(_as_bytes(result.probabilities_KHW))
            if "overlays" in profiles and result.mask.any():
                pictures.append((number, _picture(predictor.bundle.preprocess, result)))
    return Segmented(
        series_key,
        kind,
        numbers,
        [wanted[number][1] for number in numbers],
        geometries,
        masks,
        looks,
        datasets,
        sources.volume,
        probabilities or None,
        pictures,
        predictor.known.volumes,
    )


def _of_classes(series: Segmented, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `records.CLASS_VOLUMES`."""
    rows = []
    for value, label in enumerate(labels, start=1):
        pixels = [int(np.count_nonzero(mask == value)) for mask in series.masks]
        volume = volume_ml(pixels, series.geometries)
        rows.append({"label": label, **_with_interval(volume, series.errors.of_class(value, volume))})
    return rows


def _with_interval(volume: float | None, interval: Interval | None) -> dict[str, float | None]:
    return {
        "volume_ml": volume,
        "volume_low_ml": None if interval is None else interval.low_ml,
        "volume_high_ml": None if interval is None else interval.high_ml,
    }


def _as_bytes(probabilities_KHW: np.ndarray) -> np.ndarray:
    """Of the classes without the background, uint8 (rows, columns, classes)."""
    foreground_KHW = probabilities_KHW if len(probabilities_KHW) == 1 else probabilities_KHW[1:]
    return np.rint(np.moveaxis(foreground_KHW, 0, -1) * 255).clip(0, 255).astype(np.uint8)


def _picture(preprocess: Preprocess, prediction: Prediction) -> bytes:
    """With the grey values of the network's first channel, on the slice's own grid."""
    alone = dataclasses.replace(preprocess, size=prediction.slice.shape, neighbours=0)
    return overlay_png(alone.apply(prediction.slice)[..., 0], prediction.mask)
