"""Volumes of a prepared set: how a task turns the accepted rows of series into a file of voxels each."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, tee
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import config, storage
from rayseg.data import accepted, chunks, voxels
from rayseg.data.accepted import TAKEN
from rayseg.data.duplicates import fingerprint
from rayseg.data.histogram import Histogram
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.data.masks import truth
from rayseg.data.objects import read_stacks
from rayseg.data.places import Places
from rayseg.data.prepared import VERSION
from rayseg.data.samples import row_id
from rayseg.data.shards import Task
from rayseg.data.volume import Grid, VolumePreprocess
from rayseg.dicom.reading import Slice
from rayseg.records import PREPARED_VOLUMES, MissingMask, Reason, Reject
from rayseg.retry import CredentialsError

_SAME = ("uri", "frame", "bytes", "etag", "masks")  # of a slice: others make another file
_HELD_BYTES = 2**28  # of slices that are kept from measuring a volume's values to mapping them, and not read again
_MOST_VOXELS = 2**31 - 1

Labelled = tuple[Slice, np.ndarray]  # with the classes, uint8 (rows, columns)


@dataclass(frozen=True)
class VolumeMaking:
    """What volumes are made with. `missing_mask` is of the manifest's layout."""

    volume: VolumePreprocess
    labels: Labels
    missing_mask: MissingMask = "reject"
    unmasked: frozenset[str] = frozenset()  # series of which the catalog rejected slices, for they have no mask


class RefusedError(Exception):
    """A series that is no volume."""

    def __init__(self, reject: Reject, row: dict[str, Any] | None = None) -> None:
        super().__init__(reject)
        self.reject, self.row = reject, row  # the slice that is at fault, where it is one


def series_of(rows: pa.Table) -> Iterator[list[dict[str, Any]]]:
    """The rows of each series, or stack of one; an image file is alone. `rows` are accepted ones, in order."""
    measured = rows.select([*dict.fromkeys([*TAKEN, *voxels.COLUMNS, "kind", "bytes", "etag"])])
    for (*_, lone), of_series in groupby(measured.append_column("voxel_mm3", voxels.of_rows(rows)).to_pylist(), _key):
        members = list(of_series)
        yield from [[row] for row in members] if lone else [members]


def _key(row: dict[str, Any]) -> tuple[str, str, bool]:
    return row["patient_key"], row["series_key"], row["kind"] == "image" and row["frame"] is None


def write_volumes(task: Task, rows_uri: str, output: str, making: VolumeMaking) -> list[dict[str, Any]]:
    """A task: reads its series and writes each volume, and tells what became of each.

    A volume that an earlier run wrote is kept: its name is of all that it is made from.

    Args:
        task: which series.
        rows_uri: of the file of accepted rows.
        output: URI of the set.
        making: makes the volumes.

    Returns:
        Of each series in order `path`, `rows` (1, or 0 where it is rejected), `positive` (of these), `rejects`
        (`records.REJECTS`) and `table` (`records.PREPARED_VOLUMES`, as many rows).
    """
    told = []
    for series in _taken(task, rows_uri):
        path = _path(task, series, making)
        uri = storage.join(output, path)
        facts = _standing(uri)
        told.append(_told(path, task.split, series, write(series, uri, making) if facts is None else facts))
    return told


def foreground(task: Task, rows_uri: str, making: VolumeMaking) -> Histogram:
    """A task: the values (HU for CT) of its series within foreground, of those that can be read."""
    found = Histogram()
    for series in _taken(task, rows_uri):
        own = Histogram()
        try:
            for slice, classes in _read(series, _ordered(series, making), making):
                own.add(slice, classes > 0)
        except RefusedError:  # it is counted when it is made
            continue
        found.merge(own)
    return found


def class_pixels(task: Task, rows_uri: str, making: VolumeMaking) -> dict[str, list[int]]:
    """A task: the patients of its series that have foreground, each with the pixels of each class on the slices."""
    pixels: dict[str, np.ndarray] = {}
    for series in _taken(task, rows_uri):
        if not any(row["masks"] for row in series):
            continue
        counts = np.zeros(len(making.labels.names) + 1, np.int64)
        try:
            for _, classes in _read(series, _ordered(series, making), making):
                counts += np.bincount(classes.ravel(), minlength=len(counts))
        except RefusedError:  # it is counted when it is made
            continue
        if counts[1:].any():
            patient = series[0]["patient_key"]
            pixels[patient] = pixels.get(patient, 0) + counts[1:]
    return {patient: of_classes.tolist() for patient, of_classes in sorted(pixels.items())}


def write(series: Sequence[dict[str, Any]], uri: str, making: VolumeMaking) -> dict[str, Any] | RefusedError:
    """Makes the volume of a series and writes its file; what is told of it, or why there is none."""
    try:
        order = _ordered(series, making)
        with TemporaryDirectory(prefix="rayseg-volume-") as folder:
            path = Path(folder, "volume")
            facts = _write(series, order, _grid(series, making), path, making)
            storage.write_file(uri, path)
        return facts
    except RefusedError as refused:
        return refused
    except (OSError, CredentialsError):  # of the disk, or of where the set lies
        raise
    except Exception as error:  # a defect of ours must cost this series only
        return RefusedError(Reject(Reason.INTERNAL, type(error).__name__))


def _taken(task: Task, rows_uri: str) -> Iterator[list[dict[str, Any]]]:
    """The series that a task prepares: whole ones."""
    rows = accepted.read(rows_uri, task.ranges)
    numbers = None if task.taken is None else set(task.numbers().tolist())
    first = 0
    for series in series_of(rows):
        if numbers is None or first in numbers:
            yield series
        first += len(series)


def _path(task: Task, series: list[dict[str, Any]], making: VolumeMaking) -> str:
    made_with = [VERSION, making.missing_mask, config.plain(making.volume), config.plain(making.labels), task.split]
    digest = config.digest([made_with, [[row[name] for name in _SAME] for row in series]])[:32]
    return f"split={task.split}/volume-{digest}.arrow"


def _standing(uri: str) -> dict[str, Any] | None:
    try:
        return chunks.read_index(uri).told
    except (OSError, ValueError):
        return None


def _told(path: str, split: str, series: list[dict[str, Any]], facts: dict[str, Any] | RefusedError) -> dict[str, Any]:
    if isinstance(facts, RefusedError):
        row = {name: (facts.row or series[0])[name] for name in ("uri", "frame", "patient_key", "series_key")}
        reject = {**row, "stage": "prepare", "reason": facts.reject.reason.value, "detail": facts.reject.detail}
        return {"path": path, "rows": 0, "positive": 0, "rejects": [reject], "table": PREPARED_VOLUMES.empty_table()}
    slices = [{name: row[name] for name in ("uri", "frame", "masks")} for row in series]
    known = {name: series[0][name] for name in ("patient_key", "study_key", "series_key")}
    values = {**known, "slices": slices, "split": split, "path": path, **facts}
    values["fingerprint"] = None if facts["fingerprint"] is None else bytes.fromhex(facts["fingerprint"])
    table = pa.Table.from_pylist([values], schema=PREPARED_VOLUMES)
    return {"path": path, "rows": 1, "positive": int(facts["foreground_voxels"] > 0), "rejects": [], "table": table}


def _ordered(series: Sequence[dict[str, Any]], making: VolumeMaking) -> list[int]:
    """The rows in order along the normal."""
    if series[0]["series_key"].partition("-")[0] in making.unmasked:
        raise RefusedError(
            Reject(Reason.NO_MASK, "slices of the series have no mask (layout.missing_mask: empty takes them as such)")
        )
    order: list[int] = _grid(series, making).order.tolist()
    return order


def _grid(series: Sequence[dict[str, Any]], making: VolumeMaking) -> Grid:
    grid = making.volume.grid([voxels.geometry(row) for row in series])
    if isinstance(grid, Reject):
        raise RefusedError(grid)
    if math.prod(grid.shape) > _MOST_VOXELS:
        raise RefusedError(Reject(Reason.TOO_LARGE, "voxels of the network's grid"))
    return grid


def _read(series: Sequence[dict[str, Any]], order: Sequence[int], making: VolumeMaking) -> Iterator[Labelled]:
    """The slices with their classes, in order; raises RefusedError at the first that cannot be used."""
    rows = [series[number] for number in order]
    stacks = [[(row["uri"], row["frame"])] for row in rows]
    masks = [[mask["uri"] for mask in row["masks"]] for row in rows]
    for row, ((slice,), of_slice) in zip(rows, read_stacks(stacks, masks, color=False), strict=True):
        assert slice is not None
        if isinstance(slice, Reject):
            raise RefusedError(slice, row)
        if slice.shape != (row["rows"], row["columns"]):
            raise RefusedError(Reject(Reason.SERIES_MIXED, "slices of several sizes"), row)
        readable = []
        for mask, listed in zip(of_slice, row["masks"], strict=True):
            if isinstance(mask, OSError):
                raise RefusedError(read_failure(mask, "mask"), row)
            readable.append((mask, listed["label"]))
        try:
            classes = truth(
                readable, slice.shape, making.labels, slice.header, row["frame"], slice.geometry, making.missing_mask
            )
        except Exception as error:  # a defect of ours must cost this series only
            raise RefusedError(Reject(Reason.INTERNAL, type(error).__name__), row) from error
        if isinstance(classes, Reject):
            raise RefusedError(classes, row)
        yield slice, classes


def _write(
    series: Sequence[dict[str, Any]], order: Sequence[int], grid: Grid, path: Path, making: VolumeMaking
) -> dict[str, Any]:
    read = partial(_read, series, order, making)
    pairs: Iterable[Labelled] = ()
    if making.volume.intensity.is_measured:
        levels, pairs = making.volume.levels(()), read()
    elif math.prod(grid.source_shape) * np.dtype(np.int32).itemsize <= _HELD_BYTES:
        pairs = list(read())
        levels = making.volume.levels(slice for slice, _ in pairs)
    else:
        bare = [{**row, "masks": []} for row in series]
        levels, pairs = making.volume.levels(slice for slice, _ in _read(bare, order, making)), read()
    facts = _Facts(series, [series[number]["voxel_mm3"] for number in order], len(making.labels.names))
    for_image, for_mask = tee(facts.seen(pairs))
    images = grid.image((slice for slice, _ in for_image), levels)
    labels = grid.labels(classes for _, classes in for_mask)
    with chunks.Writer(path, grid.shape, chunks.edges(making.volume.patch)) as writer:
        # A plane of each in turn, so that neither is far ahead of the other.
        for image_HW, mask_HW in zip(images, labels, strict=True):
            facts.add(image_HW, mask_HW)
            writer.add(image_HW, mask_HW)
        told = facts.told(grid)
        writer.finish(told, np.concatenate(facts.places.voxels()))
    return told


class _Facts:
    """What is told of a volume, gathered while it is made."""

    def __init__(self, series: Sequence[dict[str, Any]], voxels_mm3: Sequence[float | None], classes: int) -> None:
        self.places = Places(classes)
        self._first, self._voxels_mm3 = series[0], voxels_mm3
        self._header: dict[str, str | None] = {"modality": None, "body_part": None}
        self._mm3: float | None = 0.0
        self._sum, self._squares, self._share, self._depth = 0.0, 0.0, 0.0, 0
        self._flat: np.ndarray = np.zeros(1)

    def seen(self, pairs: Iterable[Labelled]) -> Iterator[Labelled]:
        """The slices and classes, once they were looked at."""
        for (slice, classes), voxel_mm3 in zip(pairs, self._voxels_mm3, strict=True):
            if slice.header is not None:
                self._header = {
                    "modality": slice.header.modality or None,
                    "body_part": slice.header.body_part or None,
                }
            inside = int(np.count_nonzero(classes))
            self._mm3 = None if voxel_mm3 is None or self._mm3 is None else self._mm3 + inside * voxel_mm3
            yield slice, classes

    def add(self, image_HW: np.ndarray, mask_HW: np.ndarray) -> None:
        """A plane of the volume."""
        values = image_HW.astype(np.float32)
        self._sum += float(values.sum(dtype=np.float64))
        self._squares += float(np.square(values).sum(dtype=np.float64))
        self._share = max(self._share, np.count_nonzero(mask_HW) / mask_HW.size)
        self._flat = self._flat + values
        self.places.add(self._depth, mask_HW)
        self._depth += 1

    def told(self, grid: Grid) -> dict[str, Any]:
        """Columns of `records.PREPARED_VOLUMES`, and `class_places`, the numbers of places of each class."""
        count = math.prod(grid.shape)
        mean = self._sum / count
        low, high = float(self._flat.min()), float(self._flat.max())
        picture = (self._flat - low) * (255 / (high - low) if high > low else 0)
        print_ = fingerprint(np.rint(picture).astype(np.uint8)[..., np.newaxis])
        class_voxels = self.places.counts[1:].tolist()
        return {
            "row_id": row_id(self._first["uri"], self._first["frame"]),
            "shape": list(grid.shape),
            "spacing_mm": list(grid.spacing_mm),
            "fingerprint": None if print_ is None else print_.hex(),
            **self._header,
            "foreground_mm3": self._mm3,
            "class_voxels": class_voxels,
            "foreground_voxels": sum(class_voxels),
            "foreground_share": self._share,
            "intensity_mean": mean,
            "intensity_sd": math.sqrt(max(0.0, self._squares / count - mean**2)),
            "class_places": [len(voxels) for voxels in self.places.voxels()],
        }
