"""One series: its slices read, segmented and written in all profiles; the outcome is a row of the ledger."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayseg.data.conformal import Interval, VolumeErrors
from rayseg.data.objects import Place
from rayseg.data.range import Range
from rayseg.geometry.volume import volume_ml, voxels_mm3
from rayseg.inference import forward, kept, quality
from rayseg.inference.delivery import deliver
from rayseg.inference.kept import Head, Keep
from rayseg.inference.outputs import File, Kind, Profile, Segmented, files
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import AnyPredictor
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
    keep: Keep | None = None  # where masks are kept; None where they are not


def segment_series(
    predictor: AnyPredictor,
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
    """Segments the slices of a series, given in order, keeps its masks, and writes its files `FOLDER/<series_key>...`.

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
    refused: dict[int, Reject] = {}
    labels = predictor.bundle.labels.names
    masks: dict[str, Any] | None = None
    try:
        outcome = _segmented(predictor, task, series_key, kind, profiles, wanted, refused, watch)
        ended: dict[str, Any] | Reject
        if isinstance(outcome, Reject):
            ended = outcome
        else:
            series, heads = outcome
            with watch.step("write"):
                written = kept.write(task.keep, series, labels, predictor.engine, heads, refused)
            if isinstance(written, Reject):
                ended = written
            else:
                masks = written
                ended = finish(task, series, predictor.known.range, labels, predictor.engine, profiles, watch)
    except CredentialsError:
        raise
    except Exception as error:  # a defect of ours must cost this series only
        ended = Reject(Reason.INTERNAL, type(error).__name__)
    return ended_row(
        task,
        series_key,
        patient_key,
        ended,
        wanted=wanted,
        refused=refused,
        input_digest=input_digest,
        not_made=not_made,
        masks=masks,
        engine=predictor.engine,
        watch=watch,
    )


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
        "masks": None,
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


def finish(
    task: Task,
    series: Segmented,
    known: Range | None,
    labels: tuple[str, ...],
    engine: str,
    profiles: Sequence[str],
    watch: Watch,
) -> dict[str, Any] | Reject:
    """Makes the files of a segmented series and writes them.

    Args:
        task: what all series have in common.
        series: with its final masks.
        known: what the model was trained on.
        labels: the classes' names.
        engine: that made the masks.
        profiles: that are to be made.
        watch: counts the time.

    Returns:
        What the ledger's row says of it; a Reject where no profile can be made, or a file not be written.
    """
    foreground = [int(np.count_nonzero(mask)) for mask in series.masks]
    volume = volume_ml(foreground, series.geometries)
    flags = quality.judge(known, series.looks, volume)
    exported: list[File] = []
    not_made: dict[str, Reject] = {}
    if any(foreground) or task.write_empty:
        with watch.step("encode"):
            exported, not_made = files(series, profiles, labels, task.model, flags, task.settings, engine)
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
        "class_volumes": _of_classes(series, labels),
        "entropy_bits": quality.entropy(series.looks),
        "pairwise_dice": quality.pairwise_dice(series.looks),
        "flags": [flag.value for flag in flags],
        "flags_detail": quality.describe(flags),
        "outputs": outputs,
        "not_made": not_made_rows(not_made),
    }


def ended_row(
    task: Task,
    series_key: str,
    patient_key: str,
    ended: dict[str, Any] | Reject,
    *,
    wanted: Sequence[Place],
    refused: Mapping[int, Reject],
    input_digest: str,
    not_made: Sequence[dict[str, str]],
    masks: Mapping[str, Any] | None,
    engine: str,
    watch: Watch,
) -> dict[str, Any]:
    """The row of a series as `segment_series` gives it.

    Args:
        task, series_key, patient_key, input_digest, not_made: as `segment_series` has them.
        ended: what `finish` gave, or why it could not be asked.
        wanted: the slices.
        refused: those that cannot be used, by number.
        masks: what is kept, `records.KEPT_FILE`.
        engine: that made the masks.
        watch: what the time went into.
    """
    if isinstance(ended, Reject):
        refused = {number: refused.get(number, ended) for number in range(len(wanted))}
    else:
        lacking = {one["profile"]: one for one in (*not_made, *ended["not_made"])}
        ended["not_made"] = [lacking[profile] for profile in task.profiles if profile in lacking]
    row = ledger_row(task, series_key, patient_key, ended if isinstance(ended, Reject) else None)
    row |= {
        "input_digest": input_digest,
        "rejected_slices": len(refused),
        "rejects": [
            reject_row(*wanted[number], STAGE, reject, patient_key, series_key) for number, reject in refused.items()
        ],
        "not_made": list(not_made),
        "masks": masks,
        "engine": engine,
        **{f"{step}_s": watch.seconds[step] for step in STEPS},
        "seconds": time.monotonic() - watch.began,
    }
    return row if isinstance(ended, Reject) else row | ended


def _segmented(
    predictor: AnyPredictor,
    task: Task,
    series_key: str,
    kind: Kind,
    profiles: Sequence[str],
    wanted: Sequence[Place],
    refused: dict[int, Reject],
    watch: Watch,
) -> tuple[Segmented, list[Head | None]] | Reject:
    """The series with its final masks; fills `refused`."""
    if kind == "image" and predictor.needs_series:
        return Reject(Reason.NEEDS_NEIGHBOURS, "an image file has none, and the model looks at them")
    series, heads = forward.segmented(predictor, series_key, kind, profiles, wanted, refused, watch)
    if not series.masks:
        first = refused[0]
        return Reject(
            first.reason, f"none of {len(wanted)} slices can be used; the first: {first.detail or first.reason}"
        )
    if task.postprocess == Postprocess():
        return series, heads
    try:
        with watch.step("encode"):
            masks = task.postprocess.apply(series.masks, voxels_mm3(series.geometries))
    except ValueError as error:
        return Reject(Reason.MISSING_ATTRIBUTE, str(error))
    looks = [one.of(mask) for one, mask in zip(series.looks, masks, strict=True)]
    # The errors are those of the model's own masks.
    return dataclasses.replace(series, masks=masks, looks=looks, errors=VolumeErrors()), heads


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
