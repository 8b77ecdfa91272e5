"""One series: its slices read, segmented and written as one DICOM SEG; the outcome is a row of the ledger."""

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pydicom

from rayseg import storage
from rayseg.data.manifest import read_failure
from rayseg.data.stacks import along
from rayseg.dicom import segmentation
from rayseg.dicom.reading import Header, Slice, read_slices
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.inference.volume import volume_ml
from rayseg.records import Reason, Reject
from rayseg.tracking.registry import ModelVersion

STAGE = "segment"  # as the table of rejects names it

_Place = tuple[str, int | None]  # URI and frame of a slice


@dataclass(frozen=True)
class Task:
    """What all series of a run have in common, beside the model itself."""

    folder: str  # URI of where SEGs go
    kind: Literal["BINARY", "LABELMAP"]  # of the DICOM SEG
    model: ModelVersion
    config_digest: str


def segment_series(
    predictor: Predictor,
    task: Task,
    *,
    series_key: str,
    patient_key: str,
    uris: Sequence[str],
    frames: Sequence[int | None],
) -> dict[str, Any]:
    """Segments the slices of a series, given in order, and writes `FOLDER/<series_key>.dcm`; never raises.

    A slice is an object at one of `uris`, or the frame of it that `frames` has at the same place. One that cannot be
    used gets no frame in the SEG; a series without any other is rejected.

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
    """Writes the SEG of the usable slices and returns what the ledger row says of it; fills `refused`."""
    # Masks and headers of the whole series are kept, its pixels are not.
    sources: list[pydicom.Dataset] = []
    masks: list[np.ndarray] = []
    headers: list[Header] = []
    datasets: dict[str, pydicom.Dataset | Reject] = {}
    stacks = along(_read(wanted, datasets), predictor.neighbours)
    for (uri, frame), stack in zip(wanted, stacks, strict=True):
        result = _predict(predictor, stack)
        source = result if isinstance(result, Reject) else datasets[uri]
        if isinstance(result, Reject) or isinstance(source, Reject):
            refused[uri, frame] = source
            continue
        assert result.slice.header is not None
        sources.append(source)
        masks.append(result.mask)
        headers.append(result.slice.header)
    if not masks:
        first = refused[wanted[0]]
        return Reject(
            first.reason, f"none of {len(wanted)} slices can be used; the first: {first.detail or first.reason}"
        )
    model = task.model
    encoded = segmentation.encode(
        sources,
        masks,
        predictor.bundle.labels.names,
        model.name,
        model.version,
        model.digest,
        kind=task.kind,
        frames=[header.frame for header in headers],
    )
    if isinstance(encoded, Reject):
        return encoded
    output_uri = storage.join(task.folder, f"{series_key}.dcm")
    try:
        storage.write(output_uri, encoded)
    except OSError as error:
        return Reject(Reason.WRITE_FAILED, type(error).__name__)
    foreground = [int(np.count_nonzero(mask)) for mask in masks]
    return {
        "slices": len(masks),
        "foreground_pixels": sum(foreground),
        "volume_ml": volume_ml(foreground, [header.geometry for header in headers]),
        "output_uri": output_uri,
        "output_sha256": hashlib.sha256(encoded).hexdigest(),
        "output_bytes": len(encoded),
    }


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


def _predict(predictor: Predictor, stack: Sequence[Slice | Reject | None]) -> Prediction | Reject:
    try:
        return predictor.predict_stack(stack)
    except Exception as error:  # a defect of ours must cost this slice only
        return Reject(Reason.INTERNAL, type(error).__name__)
