"""Stacks: a slice with its neighbours in the series (2.5D), the same for preparing, scoring and bulk runs.

Neighbours are the next slices in the order of the series, whatever the distance: a gap is no end. What the catalog has
rejected is nobody's neighbour. At the end of a series, or where a neighbour cannot be read, None stands in the stack,
and `Preprocess.apply` repeats the nearest one towards the middle.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayseg.dicom.reading import Slice
from rayseg.records import NEIGHBOURS, Reason, Reject

T = TypeVar("T")

# Columns of a manifest that tell which rows are of one series, and whether it has an order.
PLACE = ("patient_key", "series_key", "kind", "instance_number", "image_position_mm")


def along(series: Iterable[T], neighbours: int) -> Iterator[tuple[T | None, ...]]:
    """The stack of each item of a whole series in order; only as many items are held as a stack has."""
    beyond = repeat(None, neighbours)
    stack: deque[T | None] = deque(maxlen=2 * neighbours + 1)
    for item in chain(beyond, series, repeat(None, neighbours)):
        stack.append(item)
        if len(stack) == stack.maxlen:
            yield tuple(stack)


def alone(item: T, neighbours: int) -> tuple[T | None, ...]:
    """The stack of an item without any neighbour."""
    (stack,) = along([item], neighbours)
    return stack


def usable(stack: Sequence[Slice | Reject | None]) -> list[Slice | None] | Reject:
    """A stack as `Preprocess.apply` takes it, or why the slice in its middle cannot be used.

    A neighbour that cannot be used is missing, but for one that the store failed to give: another try would see it, and
    a result must not depend on a bad day.
    """
    centre = stack[len(stack) // 2]
    if isinstance(centre, Reject):
        return centre
    for one in stack:
        if isinstance(one, Reject) and one.reason == Reason.READ_FAILED:
            return Reject(Reason.READ_FAILED, f"neighbour: {one.detail}")
    return [None if isinstance(one, Reject) else one for one in stack]


def beside(accepted: pa.Table, rows: Sequence[int], neighbours: int) -> tuple[pa.Array, pa.Array, pa.Array]:
    """The neighbours of some rows of a manifest.

    Args:
        accepted: all accepted rows in the manifest's order, which has the slices of a series together and in order;
            columns `uri`, `frame`, `bytes`, `etag` and, where neighbours are wanted, PLACE.
        rows: which are wanted, by index.
        neighbours: on each side.

    Returns:
        For each row `records.NEIGHBOURS`, and two lists more: the sizes of these objects, and their ETags.
    """
    if not neighbours:
        none: list[list[Any]] = [[]] * len(rows)
        types = NEIGHBOURS, pa.list_(pa.int64()), pa.list_(pa.string())
        neighbours_of, sizes, etags = (pa.array(none, one) for one in types)
        return neighbours_of, sizes, etags
    offsets = np.array([step for step in range(-neighbours, neighbours + 1) if step], np.int64)
    centres = np.repeat(np.asarray(rows, np.int64), len(offsets))
    places = centres + np.tile(offsets, len(rows))
    series = _series(accepted)
    beyond = (places < 0) | (places >= len(accepted))
    places[beyond] = 0
    beyond |= series[places] != series[centres]
    objects = accepted.select(["uri", "frame", "bytes", "etag"]).take(pa.array(places, mask=beyond))
    uris, frames, sizes, etags = (column.combine_chunks() for column in objects.columns)
    structs = pa.StructArray.from_arrays([uris, frames], fields=list(NEIGHBOURS.value_type), mask=pa.array(beyond))
    ends = pa.array(np.arange(len(rows) + 1) * len(offsets), pa.int32())
    neighbours_of = pa.ListArray.from_arrays(ends, structs, type=NEIGHBOURS)
    return neighbours_of, pa.ListArray.from_arrays(ends, sizes), pa.ListArray.from_arrays(ends, etags)


def _series(accepted: pa.Table) -> np.ndarray:
    """A number for each row, equal where rows are of one series. What nothing places has a number of its own."""
    names = "patient_key", "series_key"
    keys = np.stack([np.asarray(accepted[name].combine_chunks().dictionary_encode().indices) for name in names])
    unplaced = np.asarray(
        pc.and_(
            pc.and_(pc.is_null(accepted["image_position_mm"]), pc.is_null(accepted["instance_number"])),
            pc.is_null(accepted["frame"]),
        )
    )
    begins = (keys[:, 1:] != keys[:, :-1]).any(axis=0) | unplaced[1:] | unplaced[:-1]
    return np.concatenate([[0], np.cumsum(begins)])


def refuse_unordered(count: int, rows: int) -> None:
    """Raises ValueError where `count` of some rows are image files, which nothing puts into an order."""
    if count:
        raise ValueError(
            f"prepare.preprocess.neighbours: {count} of {rows} rows are image files, and nothing says which lie "
            "beside each other; neighbours need DICOM or NIfTI, else set it to 0"
        )
