"""One series: its slices read, segmented and written as one DICOM SEG; the outcome is a row of the ledger."""

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pydicom

from rayseg import storage
from rayseg.data.manifest import read_failure
from rayseg.dicom import segmentation
from rayseg.dicom.reading import Header, read_slices
from rayseg.inference.predictor import Predictor
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
    """Segments the slices of a series and writes `FOLDER/<series_key>.dcm`; never raises.

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
    frames: dict[str, list[int | None]] = {}
    for uri, frame in wanted:
        frames.setdefault(uri, []).append(frame)
    for (uri, of_uri), data in zip(frames.items(), storage.read_each(frames), strict=True):
        for frame, result in zip(of_uri, _slices(predictor, data, of_uri), strict=True):
            if isinstance(result, Reject):
                refused[uri, frame] = result
                continue
            source, mask, header = result
            sources.append(source)
            masks.append(mask)
            headers.append(header)
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


def _slices(
    predictor: Predictor, data: bytes | OSError, frames: Sequence[int | None]
) -> Iterator[tuple[pydicom.Dataset, np.ndarray, Header] | Reject]:
    """Of each frame the object's data set without pixels, the mask and the header; the object is parsed once."""
    if isinstance(data, OSError):
        yield from (read_failure(data) for _ in frames)
        return
    source: pydicom.Dataset | None = None
    for slice in read_slices(data, frames):
        try:
            if isinstance(slice, Reject):
                yield slice
            elif slice.header is None:
                yield Reject(Reason.NOT_DICOM, "an image file, where the manifest has a DICOM instance")
            else:
                source = source or pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
                (mask,) = predictor.predict([slice])
                yield source, mask, slice.header
        except Exception as error:  # a defect of ours must cost this slice only
            yield Reject(Reason.INTERNAL, type(error).__name__)
