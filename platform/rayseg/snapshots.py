"""Tables that are replaced whole (Delta Lake), and whose rows have an order: one Parquet file is all of a version.

Each replacement is one commit. Who reads goes on with the file of the version that was there when it began, or is
refused by name: never does it see rows of two versions. A file that was replaced is removed at once, so that any reader
of Parquet finds the current rows in the folder; while a job reads it, see `reading`, it stays until the next version.

The rows stay in their order, in their row groups, with the metadata of their schema: Delta Lake keeps none of these
when it writes rows itself, and so its log gets a file that is written already.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayseg import lease, storage, tables
from rayseg.retry import tried

logger = logging.getLogger(__name__)

READERS = "_readers"  # below the table: a lease of each job that `reading` is open in
_FILE = re.compile(r"part-[0-9a-f]{32}\.parquet")


class Writer:
    """Of one job's next version of the table at `uri`. Other jobs are to be kept off, see `lease`."""

    def __init__(self, uri: str) -> None:
        """Remembers the version that is to be replaced, and the files that are there."""
        self.uri = uri
        self._table = tables.opened(uri)
        self._old = set(_files(uri))

    def write(self, path: Path, counts: Mapping[str, Any] | None = None) -> None:
        """Makes the rows of the local Parquet file `path` those of the table. The same file again is no new version.

        A file at the table's place, as there was before there were tables, goes.

        Args:
            path: the file.
            counts: what the table's history is to tell of this version (`userMetadata`).

        Raises:
            lease.LostError: another job has replaced the rows meanwhile; its rows stay.
        """
        with path.open("rb") as file:
            name = f"part-{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}.parquet"
        if self._table is None and is_file(self.uri):
            storage.delete(self.uri)  # neither a disk nor every store has a file and a folder of one name
        if self._table is None or _names(self._table) != [name]:
            storage.write_file(storage.join(self.uri, name), path)
            self._commit(name, path, counts or {})
        elif self._now().version() != self._table.version():
            raise self._lost()
        self._clear()

    def _commit(self, name: str, path: Path, counts: Mapping[str, Any]) -> None:
        from deltalake import CommitProperties, Schema
        from deltalake.exceptions import DeltaError
        from deltalake.transaction import AddAction, create_table_with_add_actions

        footer = pq.read_metadata(path)
        # Nothing of the rows but their number: a URI may name a patient.
        statistics = json.dumps({"numRecords": footer.num_rows})
        added = [AddAction(name, path.stat().st_size, {}, int(time.time() * 1000), True, statistics)]
        schema = Schema.from_arrow(footer.schema.to_arrow_schema().remove_metadata())
        # Bound to the version after the one that was there at first.
        properties = CommitProperties(
            custom_metadata={"userMetadata": json.dumps(counts, sort_keys=True)}, max_commit_retries=0
        )

        def call() -> None:
            try:
                with tables.told_as_ours():
                    if self._table is not None:
                        self._table.create_write_transaction(added, "overwrite", schema, commit_properties=properties)
                        return
                    root, options = tables.address(self.uri)
                    configuration = {"delta.dataSkippingStatsColumns": "reason"}
                    create_table_with_add_actions(
                        root,
                        schema,
                        added,
                        configuration=configuration,
                        storage_options=options,
                        commit_properties=properties,
                    )
            except (DeltaError, OSError):
                there = tables.opened(self.uri)
                if there is None or (self._table is not None and there.version() == self._table.version()):
                    raise
                if _names(there) != [name]:  # else it is ours, and the answer was lost
                    storage.delete(storage.join(self.uri, name))
                    raise self._lost() from None

        tried(call)

    def _now(self) -> Any:
        """The version that is there now."""
        table = tables.opened(self.uri)
        if table is None:
            raise self._lost()
        return table

    def _lost(self) -> lease.LostError:
        return lease.LostError(
            f"another job has replaced the rows of {self.uri} while this process was paused or cut off from the store; "
            "its rows stay. Start the job again"
        )

    def _clear(self) -> None:
        """Removes the files of earlier versions, and of commits that never came.

        Those that were there at first alone: if another job has taken over meanwhile, its file may wait for its commit.
        """
        if readers := lease.living(storage.join(self.uri, READERS)):
            logger.info("rows that were replaced stay until they are again: %s reads them", readers[0])
            return
        for name in self._old.difference(_names(self._now())):
            storage.delete(storage.join(self.uri, name))


def write_table(uri: str, rows: pa.Table) -> None:
    """Makes these rows those of the table at `uri`; see `Writer`."""
    writer = Writer(uri)
    with TemporaryDirectory(prefix="rayseg-rows-") as folder:
        path = Path(folder, "rows")
        pq.write_table(rows, path, compression="zstd")
        writer.write(path)


def current(uri: str) -> str:
    """URI of the Parquet file that has the table's rows; `uri` itself where a file is there.

    Raises:
        FileNotFoundError: neither is.
        ValueError: another program has written to the table.
    """
    table = tables.opened(uri)
    if table is None:
        if is_file(uri):
            return uri
        raise FileNotFoundError("no table and no file")
    names = _names(table)
    if len(names) != 1:
        raise ValueError(
            f"{uri}: another program has written to this table, whose rows have no order now; make it anew"
        )
    return storage.join(uri, names[0])


@contextmanager
def reading(uri: str, job: str) -> Iterator[str]:
    """`current`, whose file stays while this is open, whatever is written there meanwhile.

    Raises:
        FileNotFoundError: as `current`.
        ValueError: as `current`; the file was removed all the same, by a job that could not see this one.
    """
    if tables.opened(uri) is None:
        yield current(uri)
        return
    # A writer commits before it looks for readers: one of the two sees the other.
    with lease.reader(storage.join(uri, READERS), job):
        file = current(uri)
        try:
            yield file
        except FileNotFoundError:
            if storage.exists(file):
                raise
            raise ValueError(f"{uri}: its rows were replaced while they were read; start the job again") from None


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of the table, or of the Parquet file, at `uri`, in order."""
    with reading(uri, "reading") as file:
        return storage.read_table(file, columns)


def is_file(uri: str) -> bool:
    """Whether a file, and no table, is at `uri`."""
    files, path = storage.filesystem(uri)
    return bool(tried(lambda: files.get_file_info(path)).type == pafs.FileType.File)


def _names(table: Any) -> list[str]:
    """The files of a version."""
    return sorted(pa.table(table.get_add_actions())["path"].to_pylist())


def _files(uri: str) -> Iterator[str]:
    """The names of files of rows, of any version, in the table's folder."""
    if not is_file(uri):
        with suppress(FileNotFoundError):
            for info in storage.list_files(uri, (".parquet",)):
                name = info.uri[len(uri.rstrip("/")) + 1 :]
                if _FILE.fullmatch(name):
                    yield name
