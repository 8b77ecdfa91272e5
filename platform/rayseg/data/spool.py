"""Rows of a manifest on the local disk: a source of millions is judged series by series, never held in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage

_ROWS_AT_ONCE = 4096


def packed(table: pa.Table) -> bytes:
    """A table as a compressed Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def unpacked(data: bytes) -> pa.Table:
    """The table of `packed`."""
    return pa.ipc.open_stream(data).read_all()


class Spool:
    """Tables of one schema, appended to a file and read back by row number. A context manager: closes its file."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)  # as it is in memory, so that it can be mapped
        self._ends: list[int] = []  # row number after each batch
        self._reader: pa.ipc.RecordBatchFileReader | None = None

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finish()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def append(self, table: pa.Table) -> None:
        """Adds rows, before any are read."""
        assert self._reader is None, "written before it is read"
        for batch in table.select(self.schema.names).cast(self.schema).to_batches(max_chunksize=_ROWS_AT_ONCE):
            if len(batch):
                self._writer.write_batch(batch)
                self._ends.append(len(self) + len(batch))

    def batches(self, columns: Iterable[str]) -> Iterator[pa.RecordBatch]:
        """All rows in the order of writing."""
        names = list(columns)
        for number in range(len(self._ends)):
            yield self._batch(number).select(names)

    def rows(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """The rows of these numbers, in this order; quick where they lie close together."""
        if not len(numbers):
            return []
        batches = np.searchsorted(np.array(self._ends), numbers, side="right")
        wanted = np.unique(batches)
        table = pa.Table.from_batches([self._batch(int(batch)) for batch in wanted])
        sizes = [self._ends[batch] - (self._ends[batch - 1] if batch else 0) for batch in wanted]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        firsts = np.array([self._ends[batch - 1] if batch else 0 for batch in batches])
        return table.take(pa.array(numbers - firsts + starts[np.searchsorted(wanted, batches)])).to_pylist()

    def _finish(self) -> None:
        if not self._sink.closed:
            self._writer.close()
            self._sink.close()

    def _batch(self, number: int) -> pa.RecordBatch:
        if self._reader is None:
            self._finish()
            self._reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        return self._reader.get_batch(number)


def by_series(found: Spool) -> Iterator[list[dict[str, Any]]]:
    """The rows of `found` (a manifest's, with `index`) in lists of whole series.

    A series stands where its first row, by `index`, stands, with its rows that are not accepted; so do rows that are of
    no series. What stays in memory is 24 bytes a row, and the keys of the series.
    """
    firsts: dict[str, int] = {}
    indexes, units = np.empty(len(found), np.int64), np.empty(len(found), np.int64)
    for attempt in ("find where each series stands", "place its rows there"):
        start = 0
        for batch in found.batches(("index", "series_key", "kind")):
            for number, row in enumerate(batch.to_pylist(), start):
                index, key = row["index"], row["series_key"]
                in_series = key is not None and row["kind"] == "dicom"
                if attempt.startswith("find") and in_series:
                    firsts[key] = min(firsts.get(key, index), index)
                else:
                    indexes[number], units[number] = index, firsts[key] if in_series else index
            start += len(batch)
    order = np.lexsort((indexes, units))
    units = units[order]
    start = 0
    while start < len(order):
        end = min(start + _ROWS_AT_ONCE, len(order))
        end = int(np.searchsorted(units, units[end - 1], side="right"))
        yield found.rows(order[start:end])
        start = end


def fill(spool: Spool, uri: str) -> None:
    """Adds the rows of the Parquet file at `uri`, a row group at a time."""
    for table in storage.read_row_groups(uri, spool.schema.names):
        spool.append(table)
