"""The ledger of an archive: what became of each series, in Parquet parts that are written once and never changed.

Parts lie at `OUTPUT/ledger/part-<digest>.parquet`, the objects that were refused at
`OUTPUT/rejects/part-<digest>.parquet`. A digest is of what the rows are about, so that doing the same again replaces
the same part.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayseg import config, storage
from rayseg.records import LEDGER, REJECTS

FOLDER, REJECTS_FOLDER = "ledger", "rejects"
PROGRESS = "progress.json"  # of the run that is at work there, or was last
_READERS = 8
_REFUSED = ("uri", "frame", "stage", "reason", "series_key")
_IDENTITY = ["series_key", "model_digest", "config_digest"]  # of a row


def append(output: str, rows: Sequence[dict[str, Any]], rejects: Sequence[dict[str, Any]]) -> None:
    """Writes one part of each table, where there is anything for it.

    Args:
        output: URI of the archive's output.
        rows: schema `records.LEDGER`, of series that are finished: their outputs are whole.
        rejects: schema `records.REJECTS`, the refused objects of these series, or of none.
    """
    # The ledger comes last: a series with a row in it is done.
    _write_part(storage.join(output, REJECTS_FOLDER), rejects, REJECTS, ("uri", "frame", "stage"))
    _write_part(storage.join(output, FOLDER), rows, LEDGER, _IDENTITY)


def read(output: str) -> pa.Table:
    """The ledger, schema `records.LEDGER`, by series: the latest row of each series, model and configuration."""
    folder = storage.join(output, FOLDER)
    if not storage.exists(folder):
        return LEDGER.empty_table()
    parts = sorted(storage.list_files(folder, (".parquet",)), key=_age)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="rayseg-ledger") as pool:
        tables = list(pool.map(storage.read_table, [part.uri for part in parts]))
    whole = pa.concat_tables([LEDGER.empty_table(), *map(_complete, tables)])
    later = whole.select(_IDENTITY).to_pandas().duplicated(keep="last").to_numpy()
    return whole.filter(~later).sort_by([(name, "ascending") for name in _IDENTITY])


def rows_of(output: str, model_digest: str, config_digest: str) -> pa.Table:
    """The rows of `read` that are of what this model with this configuration has done, segmented and rejected."""
    return read(output).filter(
        (pc.field("model_digest") == model_digest) & (pc.field("config_digest") == config_digest)
    )


def refused(output: str, rows: Sequence[Mapping[str, Any]], stage: str) -> Counter[str]:
    """How many objects of these rows' series a stage refused, by reason; `rows` are of this ledger.

    What the table of rejects does not tell of a row counts by the row's own reason, "unknown" where it has none.
    """
    left = {row["series_key"]: row["rejected_slices"] for row in rows if row["rejected_slices"]}
    reasons = {row["series_key"]: row["reason"] or "unknown" for row in rows}
    folder = storage.join(output, REJECTS_FOLDER)
    latest: dict[tuple[str, int | None], tuple[str, str]] = {}
    if left and storage.exists(folder):
        wanted = pc.field("series_key").isin(list(left)) & (pc.field("stage") == stage)
        for part in sorted(storage.list_files(folder, (".parquet",)), key=_age):
            for row in storage.read_table(part.uri, _REFUSED).filter(wanted).to_pylist():
                latest[row["uri"], row["frame"]] = row["series_key"], row["reason"]
    counts: Counter[str] = Counter()
    for key, reason in latest.values():
        if left[key]:
            left[key] -= 1
            counts[reason] += 1
    for key, number in left.items():
        counts[reasons[key]] += number
    return +counts


def _complete(part: pa.Table) -> pa.Table:
    """A part of an earlier version may lack columns."""
    return part if part.schema.equals(LEDGER) else pa.Table.from_pylist(part.to_pylist(), schema=LEDGER)


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
    assert part.modified is not None
    return part.modified.timestamp(), part.uri
