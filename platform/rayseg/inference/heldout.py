"""Rows of a prepared set from their source objects, on their own grid: what a model makes of them, beside the truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rayseg import storage
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.data.masks import truth
from rayseg.dicom.reading import Slice, read_slice
from rayseg.geometry.grid import Geometry
from rayseg.inference import quality
from rayseg.inference.predictor import Predictor
from rayseg.records import Reason, Reject

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
    """Judges rows one by one, those of a series together; one thread only, as it remembers what it has read."""

    def __init__(self, predictor: Predictor, labels: Labels) -> None:
        self._predictor, self._labels = predictor, labels
        self._object: tuple[str, bytes] = ("", b"")  # the last one: the next slice may be another frame of it
        # The next row's stack has all but one of these slices.
        self._slice = lru_cache(maxsize=2 * predictor.neighbours + 1)(self._read)

    def judged(self, row: Mapping[str, Any]) -> Judged | Reject:
        """What the model makes of a row with `COLUMNS`, beside the truth."""
        try:
            return self._judged(row)
        except FileNotFoundError:
            return Reject(Reason.NOT_FOUND)
        except OSError as error:
            return Reject(Reason.READ_FAILED, type(error).__name__)

    def _judged(self, row: Mapping[str, Any]) -> Judged | Reject:
        neighbours, around = self._predictor.neighbours, row["neighbours"]
        middle = len(around) // 2
        stack: Sequence[Mapping[str, Any] | None] = [
            *around[middle - neighbours : middle], row, *around[middle : middle + neighbours]
        ]  # fmt: skip
        result = self._predictor.judge_stack(
            [None if one is None else self._slice(one["uri"], one["frame"]) for one in stack]
        )
        if isinstance(result, Reject):
            return result
        true = read_truth(row, result.slice, self._labels)
        if isinstance(true, Reject):
            return true
        look = quality.look(self._predictor.bundle.preprocess, result)
        return Judged(result.slice, result.mask, true, result.probabilities_KHW, look)

    def _read(self, uri: str, frame: int | None) -> Slice | Reject:
        try:
            if self._object[0] != uri:
                self._object = uri, storage.read(uri)
        except OSError as error:
            return read_failure(error)
        return read_slice(self._object[1], frame, self._predictor.bundle.preprocess.color)


def read_truth(row: Mapping[str, Any], slice: Slice, labels: Labels) -> np.ndarray | Reject:
    """The true classes of a slice, uint8 (rows, columns), by `masks` and `frame` of its prepared row.

    Raises:
        OSError: a mask cannot be read.
    """
    masks = [(storage.read(mask["uri"]), mask["label"]) for mask in row["masks"]]
    return truth(masks, slice.shape, labels, slice.header, row["frame"], slice.geometry)
