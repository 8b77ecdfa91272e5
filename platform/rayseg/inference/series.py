"""One series: its slices read, segmented and written in all profiles; the outcome is a row of the ledger."""

import dataclasses
import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pydicom

from rayseg import storage
from rayseg.data.manifest import read_failure
from rayseg.data.preprocess import Preprocess
from rayseg.data.stacks import along
from rayseg.dicom.reading import Header, Slice, read_slices
from rayseg.inference.outputs import Profile, Segmented, files, overlay_png
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.inference.volume import volume_ml, voxels_mm3
from rayseg.records import Reason, Reject
from rayseg.tracking.registry import ModelVersion

STAGE = "segment"  # as the table of rejects names it

_Place = tuple[str, int | None]  # URI and frame of a slice


@dataclass(frozen=True)
class Task:
    """What all series of a run have in common, beside the model itself."""

    folder: str  # URI of where files go
    model: ModelVersion
    config_digest: str
    profiles: tuple[Profile, ...] = ("seg",)
    postprocess: Postprocess = field(default_factory=Postprocess)
    write_empty: bool = True  # whether a series with nothing found gets files


def segment_series(
    predictor: Predictor,
    task: Task,
    *,
    series_key: str,
    patient_key: str,
    uris: Sequence[str],
    frames: Sequence[int | None],
    input_digest: str = "",
) -> dict[str, Any]:
    """Segments the slices of a series, given in order, and writes its files `FOLDER/<series_key>...`; never raises.

    A slice is an object at one of `uris`, or the frame of it that `frames` has at the same place; `input_digest` of all
    of them goes into the row as it is. A slice that cannot be used is in no file; a series without any other is
    rejected, and so is one that a profile cannot express.

    Returns:
        A row of the schema `records.LEDGER`, with `rejects` beside: rows of the schema `records.REJECTS`.
    """
    began = time.monotonic()
    wanted = list(zip(uris, frames, strict=True))
    refused: dict[_Place, Reject] = {}
    try:
        made = _make(predictor, task, series_key, wanted, refused)
    except Exception as error:  # a defect of ours must cost this series only
        made = Reject(Reason.INTERNAL, type(error).__name__)
    if isinstance(made, Reject):
        refused = {place: refused.get(place, made) for place in wanted}
    row = ledger_row(task, series_key, patient_key, made if isinstance(made, Reject) else None)
    row |= {
        "input_digest": input_digest,
        "rejected_slices": len(refused),
        "rejects": [reject_row(*place, STAGE, reject, patient_key, series_key) for place, reject in refused.items()],
        "seconds": time.monotonic() - began,
    }
    return row if isinstance(made, Reject) else row | made


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
        "slices": 0,
        "rejected_slices": 0,
        "foreground_pixels": 0,
        "outputs": [],
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
    predictor: Predictor, task: Task, series_key: str, wanted: Sequence[_Place], refused: dict[_Place, Reject]
) -> dict[str, Any] | Reject:
    """Writes the files of the usable slices and returns what the ledger row says of them; fills `refused`."""
    series = _segmented(predictor, task, series_key, wanted, refused)
    if not series.masks:
        first = refused[wanted[0]]
        return Reject(
            first.reason, f"none of {len(wanted)} slices can be used; the first: {first.detail or first.reason}"
        )
    geometries = [header.geometry for header in series.headers]
    if task.postprocess != Postprocess():
        try:
            masks = task.postprocess.apply(np.stack(series.masks), voxels_mm3(geometries))
        except ValueError as error:
            return Reject(Reason.MISSING_ATTRIBUTE, str(error))
        series = dataclasses.replace(series, masks=list(masks))
    foreground = [int(np.count_nonzero(mask)) for mask in series.masks]
    made = []
    if any(foreground) or task.write_empty:
        encoded = files(series, task.profiles, predictor.bundle.labels.names, task.model)
        if isinstance(encoded, Reject):
            return encoded
        made = encoded
    outputs = []
    for file in made:
        uri = storage.join(task.folder, file.name)
        try:
            storage.write(uri, file.data)
        except OSError as error:
            return Reject(Reason.WRITE_FAILED, type(error).__name__)
        outputs.append(
            {
                "profile": file.profile,
                "uri": uri,
                "sha256": hashlib.sha256(file.data).hexdigest(),
                "bytes": len(file.data),
            }
        )
    return {
        "slices": len(series.masks),
        "foreground_pixels": sum(foreground),
        "volume_ml": volume_ml(foreground, geometries),
        "outputs": outputs,
    }


def _segmented(
    predictor: Predictor, task: Task, series_key: str, wanted: Sequence[_Place], refused: dict[_Place, Reject]
) -> Segmented:
    """The usable slices with their masks; of pixels only what the profiles ask for is kept."""
    sources: list[pydicom.Dataset] = []
    masks: list[np.ndarray] = []
    headers: list[Header] = []
    probabilities: list[np.ndarray] = []
    pictures: list[tuple[int, bytes]] = []
    datasets: dict[str, pydicom.Dataset | Reject] = {}
    stacks = along(_read(wanted, datasets), predictor.neighbours)
    for number, ((uri, frame), stack) in enumerate(zip(wanted, stacks, strict=True)):
        result = _predict(predictor, stack)
        source = result if isinstance(result, Reject) else datasets[uri]
        if isinstance(result, Reject) or isinstance(source, Reject):
            refused[uri, frame] = source
            continue
        prediction, probabilities_KHW = result
        assert prediction.slice.header is not None
        sources.append(source)
        masks.append(prediction.mask)
        headers.append(prediction.slice.header)
        if "seg-fractional" in task.profiles:
            probabilities.append(_as_bytes(probabilities_KHW))
        if "overlays" in task.profiles and prediction.mask.any():
            pictures.append((number, _picture(predictor.bundle.preprocess, prediction)))
    return Segmented(series_key, sources, headers, masks, probabilities or None, pictures)


def _as_bytes(probabilities_KHW: np.ndarray) -> np.ndarray:
    """Of the classes without the background, uint8 (rows, columns, classes)."""
    foreground_KHW = probabilities_KHW if len(probabilities_KHW) == 1 else probabilities_KHW[1:]
    return np.rint(np.moveaxis(foreground_KHW, 0, -1) * 255).clip(0, 255).astype(np.uint8)


def _picture(preprocess: Preprocess, prediction: Prediction) -> bytes:
    """With the grey values of the network's first channel, on the slice's own grid."""
    alone = dataclasses.replace(preprocess, size=prediction.slice.shape, neighbours=0)
    return overlay_png(alone.apply(prediction.slice)[..., 0], prediction.mask)


def _read(wanted: Sequence[_Place], datasets: dict[str, pydicom.Dataset | Reject]) -> Iterator[Slice | Reject]:
    """Each slice in order, some read ahead; puts the data set, without pixels, of each object into `datasets`.

    Frames of one object that follow each other are read and parsed once.
    """
    runs = [(uri, [frame for _, frame in places]) for uri, places in groupby(wanted, key=lambda place: place[0])]
    for (uri, frames), data in zip(runs, storage.read_each(uri for uri, _ in runs), strict=True):
        if isinstance(data, OSError):
            yield from (read_failure(data) for _ in frames)
            continue
        for slice in read_slices(data, frames):
            if isinstance(slice, Slice) and slice.header is None:
                yield Reject(Reason.NOT_DICOM, "an image file, where the manifest has a DICOM instance")
                continue
            if isinstance(slice, Slice) and uri not in datasets:
                datasets[uri] = _without_pixels(data)
            yield slice


def _without_pixels(data: bytes) -> pydicom.Dataset | Reject:
    try:
        return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
    except Exception as error:  # ours has read it
        return Reject(Reason.INTERNAL, type(error).__name__)


def _predict(predictor: Predictor, stack: Sequence[Slice | Reject | None]) -> tuple[Prediction, np.ndarray] | Reject:
    try:
        return predictor.judge_stack(stack)
    except Exception as error:  # a defect of ours must cost this slice only
        return Reject(Reason.INTERNAL, type(error).__name__)
