"""Histogram: how often each value occurs in a volume, gathered slice by slice, in bounded memory."""

from collections.abc import Sequence

import numpy as np

from rayseg.dicom.reading import Slice

# Different values that are told apart: all that 16 bits have, sixteen times over. More come of volumes of fractions,
# and where each slice has a slope of its own; then neighbours are joined, whose ranks are a two-millionth apart.
_DISTINCT = 2**20


class Histogram:
    """The values of a volume, rescaled (HU for CT). Mean and standard deviation are exact, whatever is joined."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0  # sum of squared deviations from the mean
        self._values: list[np.ndarray] = []  # float64, not sorted
        self._counts: list[np.ndarray] = []  # int64
        # Of slices with one type, slope and intercept: how often each stored value occurs.
        self._kind: tuple[np.dtype, float, float] | None = None
        self._occurrences = np.zeros(0, np.int64)

    def add(self, slice: Slice, inside: np.ndarray | None = None) -> None:
        """The values of a slice, or those of its pixels where `inside`, bool (rows, columns), holds."""
        stored = slice.stored if inside is None else slice.stored[inside]
        if not stored.size:
            return
        if stored.dtype.itemsize > 2:
            self._close()
            values, counts = np.unique(
                stored.astype(np.float64) * slice.rescale_slope + slice.rescale_intercept, return_counts=True
            )
            self._fold(values, counts.astype(np.int64))
            return
        kind = stored.dtype, slice.rescale_slope, slice.rescale_intercept
        if kind != self._kind:
            self._close()
            self._kind, self._occurrences = kind, np.zeros(2 ** (8 * stored.dtype.itemsize), np.int64)
        index = np.ascontiguousarray(stored).view(f"u{stored.dtype.itemsize}")
        counts = np.bincount(index.ravel())
        self._occurrences[: len(counts)] += counts

    def merge(self, other: "Histogram") -> None:
        """The values of another one, too."""
        self._close()
        other._close()
        self._moments(other._count, other._mean, other._squares)
        self._values += other._values
        self._counts += other._counts
        self._compact()

    @property
    def count(self) -> int:
        """How many values."""
        self._close()
        return self._count

    @property
    def mean(self) -> float:
        """Of all values."""
        self._close()
        return self._mean

    @property
    def deviation(self) -> float:
        """The standard deviation of all values, of the population; exactly 0 where all are one."""
        values, _ = self._sorted()
        return float(np.sqrt(self._squares / self._count)) if len(values) > 1 else 0.0

    def percentiles(self, percentiles: Sequence[float]) -> tuple[float, ...]:
        """Percentiles, in 0..100, as `numpy.percentile` defines them (linear interpolation)."""
        assert self.count, "a histogram of nothing has no percentiles"
        values, counts = self._sorted()
        cumulative = np.cumsum(counts)
        found = []
        for percentile in percentiles:
            rank = percentile / 100 * (self._count - 1)
            below, above = values[np.searchsorted(cumulative, [np.floor(rank), np.ceil(rank)], side="right")]
            found.append(float(below + (above - below) * (rank - np.floor(rank))))
        return tuple(found)

    def _close(self) -> None:
        """Takes what was counted as stored values in."""
        if self._kind is None:
            return
        dtype, slope, intercept = self._kind
        present = np.flatnonzero(self._occurrences)
        stored = present.astype(f"u{dtype.itemsize}").view(dtype)
        self._kind = None
        self._fold(stored.astype(np.float64) * slope + intercept, self._occurrences[present])

    def _fold(self, values: np.ndarray, counts: np.ndarray) -> None:
        count = int(counts.sum())
        mean = float((values * counts).sum() / count)
        self._moments(count, mean, float(((values - mean) ** 2 * counts).sum()))
        self._values.append(values)
        self._counts.append(counts)
        if sum(map(len, self._values)) > 2 * _DISTINCT:
            self._compact()

    def _moments(self, count: int, mean: float, squares: float) -> None:
        """Chan, Golub, LeVeque 1983, doi:10.1080/00031305.1983.10483115: of two samples together."""
        total = self._count + count
        if not count:
            return
        off = mean - self._mean
        self._squares += squares + off * off * self._count * count / total
        self._mean += off * count / total
        self._count = total

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        self._close()
        self._compact()
        return self._values[0], self._counts[0]

    def _compact(self) -> None:
        """One array of ascending values with their counts, `_DISTINCT` at most."""
        if not self._values:
            return
        values, counts = np.concatenate(self._values), np.concatenate(self._counts)
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        values, counts = values[first], np.add.reduceat(counts, first)
        if len(values) > _DISTINCT:
            # Those that begin in the same of many equal parts of the ranks become their mean.
            part = (np.cumsum(counts) - counts) // -(-int(counts.sum()) // (_DISTINCT // 2))
            first = np.flatnonzero(np.concatenate([[True], part[1:] != part[:-1]]))
            sums, counts = np.add.reduceat(values * counts, first), np.add.reduceat(counts, first)
            values = sums / counts
        self._values, self._counts = [values], [counts]
