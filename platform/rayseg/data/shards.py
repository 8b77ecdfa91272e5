"""Shards: which rows make which, so that a task that writes some of them reads all of their objects, and alone.

A task has whole units of rows, see `accepted`: as many as fill a shard, or one that is larger and fills several. So an
object is read by one task only, whatever the size of the shards, and what a shard holds depends on the manifest and the
configuration alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayseg.data.accepted import Units

_ROWS_FOR_ONE = 16  # that count as one where a limit leaves them out


@dataclass(frozen=True, eq=False)
class Task:
    """Shards of one split."""

    split: str
    part: int  # number of the first of its shards
    shards: int
    rows: int  # that are prepared
    ranges: np.ndarray  # int64 (ranges, 2): rows of its units, first and behind the last
    taken: np.ndarray | None  # int64, of these rows the ones that are prepared; None: all

    def numbers(self) -> np.ndarray:
        """Where the prepared rows are among those of the ranges, int64."""
        if self.taken is None:
            return np.arange(self.rows)
        every = np.concatenate([np.arange(first, end) for first, end in self.ranges.tolist()])
        return np.flatnonzero(np.isin(every, self.taken))


def limited(patients: np.ndarray, limit: int | None) -> np.ndarray | None:
    """Which rows make at most `limit`: equally many of each patient as far as it has them, spread over its rows.

    Args:
        patients: int (rows,), the number of each row's patient, the first one's the lowest.
        limit: so many; None for all.

    Returns:
        int64, ascending; None where all are taken.
    """
    if limit is None or limit >= len(patients):
        return None
    order = np.argsort(patients, kind="stable")
    counts = np.bincount(patients)
    starts = np.cumsum(counts) - counts
    left, kept = limit, []
    # The smallest patients first: what they cannot fill of an equal share goes to the others.
    for patients_left, patient in zip(range(len(counts), 0, -1), np.argsort(counts, kind="stable"), strict=True):
        count = int(counts[patient])
        take = min(count, left // patients_left)
        left -= take
        kept.append(order[starts[patient] + (2 * np.arange(take) + 1) * count // (2 * max(take, 1))])
    return np.sort(np.concatenate(kept))


def planned(
    units: Units, splits: np.ndarray, names: Sequence[str], taken: np.ndarray | None, rows_per_shard: int
) -> list[Task]:
    """The tasks, split by split in the order of their shards.

    Args:
        units: of the accepted rows.
        splits: int (units,): which of `names` each is for; -1 for none.
        names: of the splits.
        taken: int64, ascending: the rows that are prepared; None for all.
        rows_per_shard: at most.
    """
    counts = units.rows
    if taken is not None:
        counts = np.searchsorted(taken, units.first + units.rows) - np.searchsorted(taken, units.first)
    # Of a unit a task needs all rows, also those that a limit leaves out.
    sizes = np.maximum(counts, units.rows // _ROWS_FOR_ONE)
    tasks: list[Task] = []
    for number, name in enumerate(names):
        members = np.flatnonzero((splits == number) & (counts > 0))
        begins = np.arange(len(members))
        if units.together is not None:
            members = members[np.argsort(units.together[members], kind="stable")]
            begins = np.flatnonzero(np.diff(units.together[members], prepend=-1))
        ends = np.cumsum(sizes[members])[np.append(begins[1:], len(members)) - 1] if len(members) else begins
        start, size, part = 0, 0, 0
        while start < len(begins):
            stop = max(start + 1, int(np.searchsorted(ends, size + rows_per_shard, side="right")))
            of_task = members[begins[start] : begins[stop] if stop < len(begins) else None]
            task = _task(units, of_task, name, part, int(counts[of_task].sum()), taken, rows_per_shard)
            tasks.append(task)
            start, size, part = stop, int(ends[stop - 1]), part + task.shards
    return tasks


def _task(
    units: Units, members: np.ndarray, split: str, part: int, rows: int, taken: np.ndarray | None, rows_per_shard: int
) -> Task:
    firsts, ends = units.first[members], units.first[members] + units.rows[members]
    apart = np.flatnonzero(firsts[1:] != ends[:-1])
    ranges = np.stack([firsts[np.append(0, apart + 1)], ends[np.append(apart, len(ends) - 1)]], axis=1)
    if taken is not None:
        places = np.searchsorted(taken, ranges)
        taken = np.concatenate([taken[first:end] for first, end in places.tolist()])
    return Task(split, part, -(-rows // rows_per_shard), rows, ranges, taken)
