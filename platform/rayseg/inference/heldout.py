"""Rows of a prepared set from their source objects, on their own grid: what a model makes of them, beside the truth."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg.data import objects
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.data.masks import Mask, truth
from rayseg.data.prepared import PreparedSet
from rayseg.data.samples import row_id
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.inference import quality
from rayseg.inference.judgement import Judgement
from rayseg.inference.predictor import AnyPredictor
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.records import PREPARED, Reject

COLUMNS = ("row_id", "patient_key", "series_key", "uri", "frame", "masks", "neighbours")  # of a prepared set's rows


@dataclass(frozen=True, eq=False)
class Judged:
    """A slice with its label maps, uint8 (rows, columns), and probabilities (channels, rows, columns)."""

    slice: Slice
    prediction: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray
    look: quality.Look

    @property
    def place(self) -> Geometry | None:
        """Where the slice lies, as far as its object says."""
        if self.slice.geometry is not None or self.slice.header is None:
            return self.slice.geometry
        return self.slice.header.geometry


def slices(prepared: PreparedSet, split: str) -> pa.Table:
    """A split's slices, `COLUMNS` and `foreground_mm3`: the rows of a set, or what its volumes are made of, in order.

    Of volumes `foreground_mm3` is that of the whole volume.
    """
    if prepared.volume is None:
        return prepared.read_rows(split, (*COLUMNS, "foreground_mm3"))
    volumes = prepared.read_rows(split, ("patient_key", "series_key", "slices", "foreground_mm3")).to_pylist()
    schema = pa.schema([PREPARED.field(name) for name in (*COLUMNS, "foreground_mm3")])
    return pa.Table.from_pylist(slice_rows(volumes), schema=schema)


def slice_rows(volumes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `COLUMNS` of the slices that a set's volumes were made of.

    Args:
        volumes: rows of a set of volumes, with `patient_key`, `series_key` and `slices`: in order along the normal
            `uri`, `frame` and `masks` of each. What else they have goes to each slice.
    """
    return [
        {
            **{name: value for name, value in volume.items() if name != "slices"},
            "row_id": row_id(slice["uri"], slice["frame"]),
            "neighbours": [],
            **slice,
        }
        for volume in volumes
        for slice in volume["slices"]
    ]


class HeldOut:
    """Judges rows of a prepared set."""

    def __init__(self, predictor: AnyPredictor, labels: Labels) -> None:
        self._predictor, self._labels = predictor, labels

    def judged(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Judged | Reject]:
        """What the model makes of each row with `COLUMNS`, beside the truth.

        Each object that the rows need is read and parsed once: those of a patient should come together.
        """
        if isinstance(self._predictor, VolumePredictor):
            for _, of_series in groupby(rows, key=lambda row: row["series_key"]):
                yield from self._of_series(self._predictor, list(of_series))
            return
        stacks = [_stack(row, self._predictor.neighbours) for row in rows]
        masks = [[mask["uri"] for mask in row["masks"]] for row in rows]
        color = self._predictor.color
        for row, (stack, of_row) in zip(rows, objects.read_stacks(stacks, masks, color), strict=True):
            yield self._judged(row, stack, of_row)

    def _of_series(self, predictor: VolumePredictor, rows: Sequence[Mapping[str, Any]]) -> Iterator[Judged | Reject]:
        """Of a series, all of whose slices the rows are; results wait until those before them are there."""
        stacks: list[list[objects.Place | None]] = [[(row["uri"], row["frame"])] for row in rows]
        masks = [[mask["uri"] for mask in row["masks"]] for row in rows]
        read = list(objects.read_stacks(stacks, masks, predictor.color))
        given = [slice for (slice,), _ in read if slice is not None]
        results: dict[int, Judged | Reject] = {}
        next_one = 0
        for number, judged in predictor.judge_series(given):
            results[number] = self._beside_truth(rows[number], judged, read[number][1])
            while next_one in results:
                yield results.pop(next_one)
                next_one += 1
        assert next_one == len(rows), "each slice has a result"

    def _judged(
        self, row: Mapping[str, Any], stack: Sequence[Slice | Reject | None], masks: Sequence[Mask | OSError]
    ) -> Judged | Reject:
        assert not isinstance(self._predictor, VolumePredictor)
        return self._beside_truth(row, self._predictor.judge_stack(stack), masks)

    def _beside_truth(
        self, row: Mapping[str, Any], result: Judgement | Reject, masks: Sequence[Mask | OSError]
    ) -> Judged | Reject:
        if isinstance(result, Reject):
            return result
        true = _truth(row, masks, result.slice, self._labels)
        if isinstance(true, Reject):
            return true
        look = quality.look(self._predictor.bundle.preprocess, result)
        return Judged(result.slice, result.mask, true, result.probabilities_KHW, look)


def _stack(row: Mapping[str, Any], neighbours: int) -> list[objects.Place | None]:
    around = row["neighbours"]
    middle = len(around) // 2
    stack = [*around[middle - neighbours : middle], row, *around[middle : middle + neighbours]]
    return [None if one is None else (one["uri"], one["frame"]) for one in stack]


def read_truth(row: Mapping[str, Any], slice: Slice, labels: Labels) -> np.ndarray | Reject:
    """The true classes of one slice, uint8 (rows, columns), by `masks` and `frame` of its prepared row."""
    ((_, masks),) = objects.read_stacks([[]], [[mask["uri"] for mask in row["masks"]]], color=False)
    return _truth(row, masks, slice, labels)


def _truth(
    row: Mapping[str, Any], masks: Sequence[Mask | OSError], slice: Slice, labels: Labels
) -> np.ndarray | Reject:
    readable = []
    for mask, of_row in zip(masks, row["masks"], strict=True):
        if isinstance(mask, OSError):
            return read_failure(mask, "mask")
        readable.append((mask, of_row["label"]))
    return truth(readable, slice.shape, labels, slice.header, row["frame"], slice.geometry)
