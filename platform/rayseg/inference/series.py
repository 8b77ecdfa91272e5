"""One series: its slices read, segmented and written in all profiles; the outcome is a row of the ledger."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import pydicom

from rayseg import storage
from rayseg.data.manifest import read_failure
from rayseg.data.preprocess import Preprocess
from rayseg.data.stacks import along
from rayseg.dicom.reading import Header, Slice, read_slices
from rayseg.geometry.volume import volume_ml, voxels_mm3
from rayseg.inference import quality
from rayseg.inference.delivery import deliver
from rayseg.inference.outputs import Profile, Segmented, files, overlay_png, without_pixels
from rayseg.inference.packed import Packed
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.records import Reason, Reject
from rayseg.tracking.version import ModelVersion

STAGE = "segment"  # as the table of rejects names it
# What a series' time goes into: waiting for bytes, decoding, waiting for its slices in the network (with their scaling,
# and behind those of the actor's other series), making files, writing them.
STEPS = ("read", "decode", "forward", "encode", "write")

T = TypeVar("T")

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
    pacs: str | None = None  # URL of a DICOMweb service that gets the DICOM files, too
    # Of what decides about a mask beside the model. Files' UIDs are made of it: a PACS keeps what it has by a UID.
    settings: str = ""


class Watch:
    """How long each of `STEPS` takes, in seconds of the clock; steps within others count for themselves."""

    def __init__(self) -> None:
        self.began = self._since = time.monotonic()
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self._step: str | None = None

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Counts the block's time, but for the steps within it, to the step `name`."""
        outer = self._turn(name)
        try:
            yield
        finally:
            self._turn(outer)

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time to get each counts to the step `name`."""
        iterator = iter(items)
        while True:
            with self.step(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _turn(self, name: str | None) -> str | None:
        now = time.monotonic()
        if self._step is not None:
            self.seconds[self._step] += now - self._since
        outer, self._step, self._since = self._step, name, now
        return outer


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
    watch = Watch()
    wanted = list(zip(uris, frames, strict=True))
    refused: dict[_Place, Reject] = {}
    try:
        made = _make(predictor, task, series_key, wanted, refused, watch)
    except Exception as error:  # a defect of ours must cost this series only
        made = Reject(Reason.INTERNAL, type(error).__name__)
    if isinstance(made, Reject):
        refused = {place: refused.get(place, made) for place in wanted}
    row = ledger_row(task, series_key, patient_key, made if isinstance(made, Reject) else None)
    row |= {
        "input_digest": input_digest,
        "rejected_slices": len(refused),
        "rejects": [reject_row(*place, STAGE, reject, patient_key, series_key) for place, reject in refused.items()],
        "engine": predictor.engine,
        **{f"{step}_s": watch.seconds[step] for step in STEPS},
        "seconds": time.monotonic() - watch.began,
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
        "engine": None,
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
    predictor: Predictor,
    task: Task,
    series_key: str,
    wanted: Sequence[_Place],
    refused: dict[_Place, Reject],
    watch: Watch,
) -> dict[str, Any] | Reject:
    """Writes the files of the usable slices and returns what the ledger row says of them; fills `refused`."""
    series = _segmented(predictor, task, series_key, wanted, refused, watch)
    if not series.masks:
        first = refused[wanted[0]]
        return Reject(
            first.reason, f"none of {len(wanted)} slices can be used; the first: {first.detail or first.reason}"
        )
    geometries = [header.geometry for header in series.headers]
    if task.postprocess != Postprocess():
        try:
            with watch.step("encode"):
                masks = task.postprocess.apply(series.masks, voxels_mm3(geometries))
        except ValueError as error:
            return Reject(Reason.MISSING_ATTRIBUTE, str(error))
        looks = [one.of(mask) for one, mask in zip(series.looks, masks, strict=True)]
        series = dataclasses.replace(series, masks=masks, looks=looks)
    foreground = [int(np.count_nonzero(mask)) for mask in series.masks]
    volume = volume_ml(foreground, geometries)
    flags = quality.judge(predictor.bundle.range, series.looks, volume)
    made = []
    if any(foreground) or task.write_empty:
        with watch.step("encode"):
            labels = predictor.bundle.labels.names
            encoded = files(series, task.profiles, labels, task.model, flags, task.settings, predictor.engine)
        if isinstance(encoded, Reject):
            return encoded
        made = encoded
    outputs = []
    for file in made:
        with watch.step("write"):
            written = deliver(file, task.folder, task.pacs)
        if isinstance(written, Reject):
            return written
        outputs.append(written)
    return {
        "slices": len(series.masks),
        "foreground_pixels": sum(foreground),
        "volume_ml": volume,
        "flags": [flag.value for flag in flags],
        "flags_detail": quality.describe(flags),
        "outputs": outputs,
    }


def _segmented(
    predictor: Predictor,
    task: Task,
    series_key: str,
    wanted: Sequence[_Place],
    refused: dict[_Place, Reject],
    watch: Watch,
) -> Segmented:
    """The usable slices with their masks; of pixels only what the profiles ask for is kept."""
    sources: list[pydicom.Dataset] = []
    masks = Packed()
    headers: list[Header] = []
    looks: list[quality.Look] = []
    probabilities = Packed()
    pictures: list[tuple[int, bytes]] = []
    datasets: dict[str, pydicom.Dataset | Reject] = {}
    stacks = along(_read(wanted, datasets, watch), predictor.neighbours)
    results = watch.each("forward", predictor.judge_stacks(stacks))
    for number, ((uri, frame), result) in enumerate(zip(wanted, results, strict=True)):
        source = result if isinstance(result, Reject) else datasets[uri]
        if isinstance(result, Reject) or isinstance(source, Reject):
            refused[uri, frame] = source
            continue
        assert result.slice.header is not None
        sources.append(source)
        masks.append(result.mask)
        headers.append(result.slice.header)
        with watch.step("encode"):
            looks.append(quality.look(predictor.bundle.preprocess, result))
            if "seg-fractional" in task.profiles:
                probabilities.append(_as_bytes(result.probabilities_KHW))
            if "overlays" in task.profiles and result.mask.any():
                pictures.append((number, _picture(predictor.bundle.preprocess, result)))
    return Segmented(series_key, sources, headers, masks, looks, probabilities or None, pictures)


def _as_bytes(probabilities_KHW: np.ndarray) -> np.ndarray:
    """Of the classes without the background, uint8 (rows, columns, classes)."""
    foreground_KHW = probabilities_KHW if len(probabilities_KHW) == 1 else probabilities_KHW[1:]
    return np.rint(np.moveaxis(foreground_KHW, 0, -1) * 255).clip(0, 255).astype(np.uint8)


def _picture(preprocess: Preprocess, prediction: Prediction) -> bytes:
    """With the grey values of the network's first channel, on the slice's own grid."""
    alone = dataclasses.replace(preprocess, size=prediction.slice.shape, neighbours=0)
    return overlay_png(alone.apply(prediction.slice)[..., 0], prediction.mask)


def _read(
    wanted: Sequence[_Place], datasets: dict[str, pydicom.Dataset | Reject], watch: Watch
) -> Iterator[Slice | Reject]:
    """Each slice in order, some read ahead; puts the data set, without pixels, of each object into `datasets`.

    Frames of one object that follow each other are read and parsed once.
    """
    runs = [(uri, [frame for _, frame in places]) for uri, places in groupby(wanted, key=lambda place: place[0])]
    for (uri, frames), data in zip(runs, watch.each("read", storage.read_each(uri for uri, _ in runs)), strict=True):
        if isinstance(data, OSError):
            yield from (read_failure(data) for _ in frames)
            continue
        for slice in watch.each("decode", read_slices(data, frames)):
            if isinstance(slice, Slice) and slice.header is None:
                yield Reject(Reason.NOT_DICOM, "an image file, where the manifest has a DICOM instance")
                continue
            if isinstance(slice, Slice) and uri not in datasets:
                with watch.step("decode"):
                    datasets[uri] = without_pixels(data)
            yield slice
