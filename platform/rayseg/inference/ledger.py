"""The ledger of an archive: what became of each series, in Parquet parts that are written once and never changed.

Parts lie at `OUTPUT/ledger/part-<digest>.parquet`, the objects that were refused at
`OUTPUT/rejects/part-<digest>.parquet`. A digest is of what the rows are about, so that doing the same again replaces
the same part.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from rayseg import config, storage
from rayseg.records import LEDGER, REJECTS

FOLDER, REJECTS_FOLDER = "ledger", "rejects"
_READERS = 8


def append(output: str, rows: Sequence[dict[str, Any]], rejects: Sequence[dict[str, Any]]) -> None:
    """Writes one part of each table, where there is anything for it.

    Args:
        output: URI of the archive's output.
        rows: schema `records.LEDGER`, of series that are finished: their outputs are whole.
        rejects: schema `records.REJECTS`, the refused objects of these series, or of none.
    """
    # The ledger comes last: a series with a row in it is done.
    _write_part(storage.join(output, REJECTS_FOLDER), rejects, REJECTS, ("uri", "frame", "stage"))
    _write_part(storage.join(output, FOLDER), rows, LEDGER, ("series_key", "model_digest", "config_digest"))


def read(output: str) -> pa.Table:
    """The ledger, schema `records.LEDGER`, by series: the latest row of each series, model and configuration."""
    folder = storage.join(output, FOLDER)
    if not storage.exists(folder):
        return LEDGER.empty_table()
    parts = sorted(storage.list_files(folder, (".parquet",)), key=_age)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="rayseg-ledger") as pool:
        tables = list(pool.map(storage.read_table, [part.uri for part in parts]))
    latest = {
        (row["series_key"], row["model_digest"], row["config_digest"]): row
        for table in tables
        for row in table.to_pylist()
    }
    return pa.Table.from_pylist([latest[key] for key in sorted(latest)], schema=LEDGER)


def rows_of(output: str, model_digest: str, config_digest: str) -> dict[str, dict[str, Any]]:
    """Rows by series key of what this model with this configuration has done, segmented and rejected."""
    return {
        row["series_key"]: row
        for row in read(output).to_pylist()
        if (row["model_digest"], row["config_digest"]) == (model_digest, config_digest)
    }


def uris(row: Mapping[str, Any], profile: str) -> list[str]:
    """Where a series' files of a profile lie."""
    return [file["uri"] for file in row["outputs"] or () if file["profile"] == profile]


def _write_part(folder: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, key: Sequence[str]) -> None:
    if not rows:
        return
    ordered = sorted(rows, key=lambda row: [str(row[name]) for name in key])
    digest = config.digest([[row[name] for name in key] for row in ordered])
    storage.write_table(
        storage.join(folder, f"part-{digest[:32]}.parquet"), pa.Table.from_pylist(ordered, schema=schema)
    )


def _age(part: storage.FileInfo) -> tuple[float, str]:
    return part.modified.timestamp(), part.uri
