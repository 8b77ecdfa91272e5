"""Rows of a prepared set from their source objects, on their own grid: what a model makes of them, beside the truth."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayseg.data import objects
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.data.masks import Mask, truth
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.inference import quality
from rayseg.inference.predictor import Predictor
from rayseg.records import Reject

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


class HeldOut:
    """Judges rows of a prepared set."""

    def __init__(self, predictor: Predictor, labels: Labels) -> None:
        self._predictor, self._labels = predictor, labels

    def judged(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Judged | Reject]:
        """What the model makes of each row with `COLUMNS`, beside the truth.

        Each object that the rows need is read and parsed once: those of a patient should come together.
        """
        stacks = [self._stack(row) for row in rows]
        masks = [[mask["uri"] for mask in row["masks"]] for row in rows]
        color = self._predictor.bundle.preprocess.color
        for row, (stack, of_row) in zip(rows, objects.read_stacks(stacks, masks, color), strict=True):
            yield self._judged(row, stack, of_row)

    def _stack(self, row: Mapping[str, Any]) -> list[objects.Place | None]:
        neighbours, around = self._predictor.neighbours, row["neighbours"]
        middle = len(around) // 2
        stack = [*around[middle - neighbours : middle], row, *around[middle : middle + neighbours]]
        return [None if one is None else (one["uri"], one["frame"]) for one in stack]

    def _judged(
        self, row: Mapping[str, Any], stack: Sequence[Slice | Reject | None], masks: Sequence[Mask | OSError]
    ) -> Judged | Reject:
        result = self._predictor.judge_stack(stack)
        if isinstance(result, Reject):
            return result
        true = _truth(row, masks, result.slice, self._labels)
        if isinstance(true, Reject):
            return true
        look = quality.look(self._predictor.bundle.preprocess, result)
        return Judged(result.slice, result.mask, true, result.probabilities_KHW, look)


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
