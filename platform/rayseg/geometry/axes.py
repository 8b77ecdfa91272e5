"""One axis of two grids: where the samples lie in millimetres, and the weights from those of one to those of the other.

Resampling is separable: an axis after the other, each by a sparse matrix of the few neighbours that a sample needs.
Sums run in one order in one thread, so equal input gives equal bytes wherever it is cut and whatever else runs.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import cv2
import numpy as np
from scipy.sparse import csr_array

ItemT = TypeVar("ItemT")

_NEGLIGIBLE = 1e-5  # of weights: what rounding of positions leaves where samples of both grids lie at one place


@dataclass(frozen=True, eq=False)
class Weights:
    """Each sample of a grid as a mean of samples of another one, along one axis.

    Attributes:
        matrix: float32 (samples after, samples before); a row sums up to 1.
    """

    matrix: csr_array

    @property
    def before(self) -> int:
        """Samples that there are."""
        return int(self.matrix.shape[1])

    @property
    def after(self) -> int:
        """Samples that there will be."""
        return int(self.matrix.shape[0])

    @cached_property
    def is_identity(self) -> bool:
        """Whether every sample is taken as it is."""
        return self.before == self.after == self.matrix.nnz and bool(
            (self.matrix.indices == np.arange(self.after)).all()
        )

    @cached_property
    def needed(self) -> np.ndarray:
        """The samples [first, last) that each new one and those after it, or before it, need: int (after, 2).

        Both ascend: who makes new samples in order may let go of what lies before the first.
        """
        first = self.matrix.indices[self.matrix.indptr[:-1]]
        last = self.matrix.indices[self.matrix.indptr[1:] - 1] + 1
        ends = np.minimum.accumulate(first[::-1])[::-1], np.maximum.accumulate(last)
        return np.stack(ends, axis=1).astype(np.int64)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Along the first axis of float32 (before, columns): float32 (after, columns)."""
        return array if self.is_identity else self.matrix @ array

    def gather(self, items: Iterable[ItemT]) -> Iterator[list[tuple[ItemT, np.float32]]]:
        """The items that make each new sample, with their weights, while items come one by one, in order.

        Holds those that are still needed and no more.
        """
        coming = iter(items)
        held: dict[int, ItemT] = {}
        read = 0
        for number, (first, last) in enumerate(self.needed.tolist()):
            for past in [index for index in held if index < first]:
                del held[past]
            while read < last:
                held[read] = next(coming)
                if read < first:
                    del held[read]
                read += 1
            row = slice(self.matrix.indptr[number], self.matrix.indptr[number + 1])
            yield [
                (held[index], weight)
                for index, weight in zip(self.matrix.indices[row].tolist(), self.matrix.data[row], strict=True)
            ]

    def stream(self, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Along the axis on which float32 arrays of one shape come one by one, in order.

        What is yielded may be an array as it came: do not write to it.
        """
        return map(_mean, self.gather(arrays))


def _mean(parts: list[tuple[np.ndarray, np.float32]]) -> np.ndarray:
    (first, weight), *others = parts
    if not others:
        return first
    total: np.ndarray = first * weight
    term = np.empty_like(total)
    for array, weight in others:
        total += np.multiply(array, weight, out=term)
    return total


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a source's grid and of the network's."""

    there: Weights  # from the source to the network
    back: Weights  # from the network to the source
    spacing_mm: float  # of the network's samples


def axis(source_mm: np.ndarray, edges_mm: tuple[float, float], spacing_mm: float | None) -> Axis:
    """The network's samples lie exactly `spacing_mm` apart, as many as fit when rounded, one at least, and centred.

    Back goes plain linear interpolation: a pixel of the source has the value at its centre, whatever the scale.

    Args:
        source_mm: float64, ascending positions of the source's samples.
        edges_mm: where the source begins and ends.
        spacing_mm: of the network's samples; None: the source's samples are the network's.
    """
    if spacing_mm is None:
        same = weights(source_mm, source_mm)
        return Axis(same, same, float(edges_mm[1] - edges_mm[0]) / len(source_mm))
    count = max(1, round((edges_mm[1] - edges_mm[0]) / spacing_mm))
    network_mm = sum(edges_mm) / 2 + (np.arange(count) - (count - 1) / 2) * spacing_mm
    return Axis(weights(source_mm, network_mm, spacing_mm), weights(network_mm, source_mm), spacing_mm)


def weights(before_mm: np.ndarray, after_mm: np.ndarray, spacing_mm: float = 0.0) -> Weights:
    """Linear interpolation, smoothed where the new samples are sparser than the old ones (anti-aliasing).

    The samples are joined by straight lines, and go on with the first and the last value outside. Where they lie closer
    together, g, than the new samples, t, a triangle of half width sqrt(t^2 - g^2) averages the lines. The two together
    have the variance of a triangle of half width t, t^2 / 6, which is the filter that Pillow has for even samples.
    Samples may lie at uneven distances, and a linear function comes back as it is.

    Args:
        before_mm: float64, ascending positions of the samples that there are.
        after_mm: float64, ascending positions of the new ones.
        spacing_mm: t, the distance of the new samples; 0 does without smoothing.
    """
    count = len(before_mm)
    if count == 1:
        return Weights(csr_array(np.ones((len(after_mm), 1), np.float32)))
    gaps_mm = np.diff(before_mm)
    gap = np.clip(np.searchsorted(before_mm, after_mm, side="right") - 1, 0, count - 2)
    half_mm = np.sqrt(np.maximum(spacing_mm**2 - gaps_mm[gap] ** 2, 0.0))
    half_mm[half_mm < _NEGLIGIBLE * gaps_mm[gap]] = 0.0
    first = np.clip(np.searchsorted(before_mm, after_mm - half_mm, side="right") - 1, 0, count - 1)
    last = np.clip(np.searchsorted(before_mm, after_mm + half_mm, side="left"), 0, count - 1)
    width = int((last - first).max()) + 1
    index = first[:, np.newaxis] + np.arange(width)
    inside = index <= last[:, np.newaxis]
    index = np.minimum(index, count - 1)
    # Of each sample's hat the integral under the triangle: its second differences, of what `_ramp` integrates.
    ramp = np.stack(
        [_ramp(after_mm[:, np.newaxis] - before_mm[np.clip(index + k, 0, count - 1)], half_mm) for k in (-1, 0, 1)]
    )
    below_mm = np.where(index > 0, gaps_mm[np.clip(index - 1, 0, count - 2)], math.inf)
    above_mm = np.where(index < count - 1, gaps_mm[np.clip(index, 0, count - 2)], math.inf)
    shares = (ramp[0] - ramp[1]) / below_mm - (ramp[1] - ramp[2]) / above_mm + (index == 0)
    shares[~inside | (shares < _NEGLIGIBLE)] = 0.0
    shares /= shares.sum(axis=1, keepdims=True)
    rows = np.broadcast_to(np.arange(len(after_mm))[:, np.newaxis], index.shape)
    kept = shares > 0
    matrix = csr_array((shares[kept].astype(np.float32), (rows[kept], index[kept])), (len(after_mm), count))
    matrix.sort_indices()
    return Weights(matrix)


def _ramp(off_mm: np.ndarray, half_mm: np.ndarray) -> np.ndarray:
    """max(0, x) averaged by a triangle of a half width, at (new samples, neighbours)."""
    half_mm = half_mm[:, np.newaxis]
    wide = np.where(half_mm > 0, half_mm, 1.0)
    cubes = [np.maximum(off_mm / wide + k, 0.0) ** 3 for k in (-1, 0, 1)]
    smooth = wide * (cubes[0] - 2 * cubes[1] + cubes[2]) / 6
    return np.where((half_mm > 0) & (np.abs(off_mm) < half_mm), smooth, np.maximum(off_mm, 0.0))


def plane(array_HW: np.ndarray, rows: Weights, columns: Weights) -> np.ndarray:
    """Both axes of a plane: float32 (rows before, columns before) -> (rows after, columns after).

    It may be the array as it came: do not write to it.
    """
    if columns.is_identity:
        return rows.apply(array_HW)
    # Turned round, as the matrices are fast along the first axis only; the smaller the array, the cheaper.
    if rows.after > rows.before:
        return rows.apply(cv2.transpose(columns.apply(cv2.transpose(array_HW))))
    return cv2.transpose(columns.apply(cv2.transpose(rows.apply(array_HW))))
