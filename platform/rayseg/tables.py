"""Tables with transactions (Delta Lake) below a URI: a local folder or a prefix of a bucket, and no server.

Rows are appended whole or not at all, by any number of processes at once: a commit is one conditional write of a file
of the log. Its number goes into its rows, in the column `sequence`, so that which of two rows is the later one is a
fact of the table, whatever becomes of the times of its files. Who reads sees the rows of one version.
"""

import logging
import random
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from rayseg import storage
from rayseg.bucket import CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, environment, place
from rayseg.retry import ATTEMPTS, meant, tried

logger = logging.getLogger(__name__)

SEQUENCE = "sequence"  # int64, of every table: the number of the commit that a row came with
COMMITS_PER_COMPACTION = 64  # small files that a reader may meet, some more while several processes write
_FILE_BYTES = 2**25  # of what compaction makes: so much is written again each time, at most
_CHECKPOINT = 32  # commits, whose files of the log are read one by one
_DATA = re.compile(r"part-\d+-[0-9a-f-]{36}-c\d+\.(\w+\.)?parquet")  # names of files of rows
_MARK = "rayseg.commit"  # of the log: by it a process knows a commit as its own
_HINT = "_last_checkpoint"  # of the log: where to begin reading it
_COMMIT_ATTEMPTS = 100  # at a commit: each failure is another process's success
_LONGEST_PAUSE_S = 2.0
_JITTER = random.SystemRandom()


def exists(uri: str) -> bool:
    """Whether there is a table at `uri`."""
    return opened(uri) is not None


def append(uri: str, rows: pa.Table, indexed: Sequence[str]) -> int:
    """Adds the rows in one commit, whose number they get as `sequence`, and gives that back.

    Every `COMMITS_PER_COMPACTION`th commit is followed by `compact`.

    Args:
        uri: of the table; without one there it is made.
        rows: of a schema that has `sequence`, whose values are replaced. A column that the table lacks is added.
        indexed: columns whose least and greatest value in each file stand in the log, where the table is made.

    Raises:
        OSError: the store kept failing; PermissionError where it refuses.
        retry.CredentialsError: it takes no credentials of ours.
    """
    from deltalake import write_deltalake
    from deltalake.exceptions import CommitFailedError

    for attempt in range(_COMMIT_ATTEMPTS):
        table = opened(uri)
        if table is None:
            if create(uri, _numbered(rows, 0), indexed):
                return 0
            continue
        number = table.version() + 1
        adding = partial(
            write_deltalake,
            table,
            _numbered(rows, number),
            mode="append",
            schema_mode="merge",
            writer_properties=_zstd(),
        )
        try:
            _commit(uri, number, adding)
        except CommitFailedError:  # by another process: its rows are earlier
            sleep(min(_LONGEST_PAUSE_S, 0.01 * 2 ** min(attempt, 10)) * _JITTER.random())
            continue
        if number % COMMITS_PER_COMPACTION == 0:
            compact(uri)
        return number
    raise OSError(f"a table: others came first at {_COMMIT_ATTEMPTS} attempts at a commit")


def create(uri: str, rows: pa.Table, indexed: Sequence[str]) -> bool:
    """Makes the table with these rows as they are; False, with nothing done, where another process was faster."""
    from deltalake import write_deltalake
    from deltalake.exceptions import CommitFailedError, DeltaError

    configuration = {
        "delta.dataSkippingStatsColumns": ",".join([*indexed, SEQUENCE]),
        "delta.checkpointInterval": str(_CHECKPOINT),
    }
    root, options = address(uri)
    making = partial(
        write_deltalake,
        root,
        rows,
        mode="error",
        configuration=configuration,
        storage_options=options,
        writer_properties=_zstd(),
    )
    try:
        _commit(uri, 0, making)
    except (CommitFailedError, DeltaError):
        if not exists(uri):
            raise
        return False
    return True


def read(
    uri: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None, schema: pa.Schema | None = None
) -> pa.Table | None:
    """The rows of the latest version that `where` is true of, in no order; None where there is no table.

    Args:
        uri: of the table.
        columns: those that are wanted; by default all.
        where: by default all rows.
        schema: of the table; a column that older rows lack is null. By default as the table has it.
    """
    table = opened(uri)
    if table is None:
        return None
    files, path = storage.filesystem(uri, ATTEMPTS)
    dataset: ds.Dataset = table.to_pyarrow_dataset(filesystem=pafs.SubTreeFileSystem(path, files), schema=schema)
    with told_as_ours():
        return dataset.to_table(None if columns is None else list(columns), where)


def compact(uri: str) -> None:
    """Puts small files together, and deletes what no version of the last week has.

    Others may read and write meanwhile: rows, with their `sequence`, stay as they are. Of several who do it at once one
    succeeds; the others, and one who dies, leave the table as it was.
    """
    from deltalake.exceptions import DeltaError

    table = opened(uri)
    if table is None:
        return
    try:
        with told_as_ours():
            table.optimize.compact(target_size=_FILE_BYTES, max_concurrent_tasks=1, writer_properties=_zstd())
            useless = table.vacuum(full=True)  # only tells; a week is the default
        for name in filter(_DATA.fullmatch, useless):  # what others have put here stays
            storage.delete(storage.join(uri, name))
    except (DeltaError, OSError) as error:
        logger.info("a table was not compacted, which the next does: %s", type(error).__name__)


def latest(rows: pa.Table, key: Sequence[str]) -> pa.Table:
    """Of the rows with equal `key` that of the greatest `sequence`, sorted by `key`."""
    rows = rows.combine_chunks()
    order = pc.sort_indices(rows, [*((name, "ascending") for name in key), (SEQUENCE, "descending")])
    if len(order) < 2:
        return rows
    # Equal to the row before, in all of the key; null equals null.
    again = pa.array([True] * (len(order) - 1))
    for name in key:
        column = rows[name].combine_chunks().take(order)
        here, before = column[1:], column[:-1]
        both_null = pc.and_(pc.is_null(here), pc.is_null(before))
        again = pc.and_(again, pc.or_(pc.fill_null(pc.equal(here, before), False), both_null))
    return rows.take(order.filter(pa.concat_arrays([pa.array([True]), pc.invert(again)])))


def opened(uri: str) -> Any | None:
    """The latest version of the table, None where there is none."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    root, options = address(uri)
    if not uri.startswith("s3://") and not Path(root).is_dir():  # which is no TableNotFoundError
        return None
    try:
        with told_as_ours():
            return DeltaTable(root, storage_options=options)
    except TableNotFoundError:
        return None
    except DeltaError as error:
        hint = storage.join(uri, "_delta_log", _HINT)
        if _HINT not in str(error) or not storage.exists(hint):
            raise
        # In a copy that was made amid a run it may be newer than the log. Nobody needs it: a new one comes by itself.
        storage.delete(hint)
        return opened(uri)


def address(uri: str) -> tuple[str, dict[str, str]]:
    """The URI and the options of the store, as deltalake takes them."""
    if not uri.startswith("s3://"):
        return storage.filesystem(uri)[1], {}
    variables = dict(environment())
    endpoint, region = place(variables)
    options = variables | {
        "AWS_REGION": region,
        "AWS_ALLOW_HTTP": str((endpoint or "").startswith("http://")),
        "connect_timeout": f"{CONNECT_TIMEOUT_S:.0f}s",
        "timeout": f"{REQUEST_TIMEOUT_S:.0f}s",
        "max_retries": str(ATTEMPTS),  # of a request
        "retry_timeout": "120s",
    }
    return uri, options | ({"AWS_ENDPOINT_URL": endpoint} if endpoint else {})


def _commit(uri: str, number: int, commit: Callable[..., None]) -> None:
    """Makes the commit, once, whatever answers of the store are lost; it fails where another process has its number."""
    from deltalake import CommitProperties
    from deltalake.exceptions import DeltaError

    mark = secrets.token_hex(8)
    log = storage.join(uri, "_delta_log", f"{number:020d}.json")

    def once() -> None:
        try:
            with told_as_ours():
                commit(commit_properties=CommitProperties({_MARK: mark}, max_commit_retries=0))
        except (DeltaError, OSError):
            try:
                if mark.encode() in storage.read(log):
                    return
            except FileNotFoundError:
                pass
            raise

    tried(once)


def _zstd() -> Any:
    """How all rows are written."""
    from deltalake import WriterProperties

    return WriterProperties(compression="ZSTD")


@contextmanager
def told_as_ours() -> Iterator[None]:
    """The store's errors as `retry` has them."""
    try:
        yield
    except OSError as error:
        raise meant(error) from error


def _numbered(rows: pa.Table, number: int) -> pa.Table:
    column = pa.array([number] * rows.num_rows, pa.int64())
    return rows.set_column(rows.schema.get_field_index(SEQUENCE), SEQUENCE, column)
