"""What became of each series of an archive, and of the objects that were refused: two tables with transactions.

They lie at `OUTPUT/ledger` and `OUTPUT/rejects`, see `tables`. docs/how-to/read-results.md says how any program reads
them. Rows are added and never changed. The latest row of a series, a model and a configuration is what holds.

A row of the ledger names, by digest, the rejects that it counts, which are written before it: whatever is killed where,
a reject holds if and only if the row that counts it does. What the catalog refused is of no series' row, as it is of no
model; it holds until the same object is said to be refused for another reason, or no more.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayseg import config, storage, tables
from rayseg.inference import parts
from rayseg.records import ARCHIVE_REJECTS, LEDGER, LEDGER_TABLE, Reason, Reject

FOLDER, REJECTS_FOLDER = "ledger", "rejects"
PROGRESS = "progress.json"  # of the run that is at work there, or was last
CATALOG = "catalog"  # the stage whose rejects are of no model
IDENTITY = ("series_key", "model_digest", "config_digest")  # of a row
SAID = ("verdict", "reason", "detail", "rejected_slices", "rejects_digest")  # of a series that cannot be used
_OBJECT = ("uri", "frame", "stage")
_OVER = "over"  # of rejects of before there were tables, which no row counts
_SCHEMAS = {FOLDER: LEDGER_TABLE, REJECTS_FOLDER: ARCHIVE_REJECTS}

_Rows = Sequence[Mapping[str, Any]]


def append(output: str, rows: _Rows, rejects: _Rows) -> None:
    """Adds rows to the tables, where there are any; the same again changes nothing that `read` and `rejects` give.

    Args:
        output: URI of the archive's output.
        rows: schema `records.LEDGER`, with `run_id` where there is a run, of series that are finished: their outputs
            are whole.
        rejects: schema `records.REJECTS`: all objects of these series that were refused, and others, of the catalog.
    """
    _convert(output)
    counting, counted = _linked(rows, rejects)
    # The ledger comes last: a series with a row in it is done.
    _add(output, REJECTS_FOLDER, counted)
    _add(output, FOLDER, counting)


def read(output: str) -> pa.Table:
    """The ledger, schema `records.LEDGER`, by series: the latest row of each series, model and configuration."""
    return tables.latest(_read(output, FOLDER), IDENTITY).select(LEDGER.names)


def rows_of(output: str, model_digest: str, config_digest: str) -> pa.Table:
    """What this model with this configuration has done, segmented and rejected: schema `records.LEDGER_TABLE`."""
    ours = (pc.field("model_digest") == model_digest) & (pc.field("config_digest") == config_digest)
    return tables.latest(_read(output, FOLDER, ours), IDENTITY)


def kept(output: str, model_digest: str, masks_digest: str) -> dict[str, tuple[str, str, int]]:
    """The masks of this digest, which are this model's, that are kept, by the latest row of each series that has some.

    By series key: the `input_digest` that they are of, SHA-256 and bytes of their file.
    """
    columns = ["series_key", "input_digest", "masks", tables.SEQUENCE]
    rows = _read(output, FOLDER, pc.field("model_digest") == model_digest, columns)
    ours = pc.fill_null(pc.equal(pc.struct_field(rows["masks"], "digest"), masks_digest), False)
    latest = tables.latest(rows.filter(ours), ["series_key"])
    files = (pc.struct_field(latest["masks"], name).to_pylist() for name in ("sha256", "bytes"))
    return dict(
        zip(latest["series_key"].to_pylist(), zip(latest["input_digest"].to_pylist(), *files, strict=True), strict=True)
    )


def rejects(output: str, stage: str | None = None) -> pa.Table:
    """What is refused now, by any stage or by this one: schema `records.ARCHIVE_REJECTS`, by object."""
    table = _read(output, REJECTS_FOLDER, None if stage is None else pc.field("stage") == stage)
    of_row = pc.is_valid(table["rejects_digest"])
    alone = tables.latest(table.filter(pc.invert(of_row)), _OBJECT)
    hold = [alone.filter(pc.is_valid(pc.field("reason")))]
    if pc.any(of_row).as_py():
        key = [*IDENTITY, "rejects_digest"]
        counting = tables.latest(_read(output, FOLDER, columns=[*key, tables.SEQUENCE]), IDENTITY).select(key)
        counted = table.filter(of_row).join(counting, keys=key, join_type="left semi").select(table.column_names)
        hold.append(tables.latest(counted, (*_OBJECT, *IDENTITY)))
    return pa.concat_tables(hold).sort_by([(name, "ascending") for name in (*_OBJECT, *IDENTITY)])


def refused_by_catalog(output: str) -> dict[tuple[str, int | None], Reject]:
    """The objects that the catalog refuses, by URI and frame, as the table tells."""
    objects = rejects(output, CATALOG).select(["uri", "frame", "reason", "detail"]).to_pylist()
    return {(one["uri"], one["frame"]): Reject(Reason(one["reason"]), one["detail"] or "") for one in objects}


def news(rows: _Rows, rejects: _Rows, known: Mapping[str, Mapping[str, Any]]) -> tuple[_Rows, _Rows]:
    """What `append` is to get of these rows, of one model and configuration, and their rejects.

    Rows are left out, with the rejects that they count, where `known`, columns `SAID` by series, says the same.
    """
    counting, _ = _linked(rows, rejects)
    same = {row["series_key"] for row in counting if _said(row) == _said(known.get(row["series_key"], {}))}
    return (
        [row for row in rows if row["series_key"] not in same],
        [one for one in rejects if one["stage"] == CATALOG or one["series_key"] not in same],
    )


def refused(output: str, rows: _Rows, stage: str) -> Counter[str]:
    """How many objects of these rows' series a stage refused, by reason; `rows` are of this ledger.

    What the table of rejects does not tell of a row counts by the row's own reason, "unknown" where it has none.
    """
    left = {_identity(row): row["rejected_slices"] for row in rows if row["rejected_slices"]}
    reasons = {_identity(row): row["reason"] or "unknown" for row in rows}
    counts: Counter[str] = Counter()
    if left:
        for one in rejects(output, stage).select([*IDENTITY, "reason"]).to_pylist():
            if left.get(_identity(one)):
                left[_identity(one)] -= 1
                counts[one["reason"]] += 1
    for identity, number in left.items():
        counts[reasons[identity]] += number
    return +counts


def uris(row: Mapping[str, Any], profile: str) -> list[str]:
    """Where a series' files of a profile lie."""
    return [file["uri"] for file in row["outputs"] or () if file["profile"] == profile]


def _add(output: str, folder: str, rows: _Rows) -> None:
    if rows:
        # Nothing else is in the log, for any reader: a URI may name a patient.
        tables.append(storage.join(output, folder), pa.Table.from_pylist(list(rows), schema=_SCHEMAS[folder]), IDENTITY)


def _read(
    output: str, folder: str, where: pc.Expression | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """All rows of a table, or of what was there before there were tables."""
    table = tables.read(storage.join(output, folder), columns, where, _SCHEMAS[folder])
    if table is not None:
        return table
    before = _before(output)[folder]
    return before.filter(pc.scalar(True) if where is None else where).select(columns or before.column_names)


def _said(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(name) for name in SAID]


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in IDENTITY)


def _linked(rows: _Rows, rejects: _Rows) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the ledger with the digests of the rejects that are of their series, and all rejects."""
    of_series: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    series = {row["series_key"] for row in rows}
    counted = []
    for reject in rejects:
        if reject["stage"] != CATALOG and reject["series_key"] in series:
            of_series[reject["series_key"]].append(reject)
        else:
            counted.append(dict(reject))
    counting = []
    for row in {_identity(row): row for row in rows}.values():
        one, its_rejects = _counting(row, of_series[row["series_key"]])
        counting.append(one)
        counted += its_rejects
    return counting, counted


def _counting(row: Mapping[str, Any], rejects: _Rows) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row with the digest of these rejects, and the rejects with that and what the row is of."""
    if not rejects:
        return {**row, "rejects_digest": None}, []
    content = sorted([str(reject.get(name)) for name in (*_OBJECT, "reason", "detail")] for reject in rejects)
    link = {name: row.get(name) for name in ("model_digest", "config_digest", "run_id")}
    link["rejects_digest"] = config.digest(content)
    return {**row, "rejects_digest": link["rejects_digest"]}, [{**reject, **link} for reject in rejects]


def _convert(output: str) -> None:
    """Makes tables of what was written before there were tables, once: of several processes one does it. Parts stay."""
    if tables.exists(storage.join(output, FOLDER)):
        return
    before = _before(output)
    for folder in (REJECTS_FOLDER, FOLDER):  # as they are written
        uri = storage.join(output, folder)
        if before[folder].num_rows and not tables.exists(uri):
            tables.create(uri, before[folder], IDENTITY)


def _before(output: str) -> dict[str, pa.Table]:
    """By folder what was written before there were tables.

    Parts do not tell of which model a reject is: it goes to each row of its series that counts any, the latest first.
    """
    rows, refused = (parts.read(storage.join(output, folder), _SCHEMAS[folder]) for folder in (FOLDER, REJECTS_FOLDER))
    if not refused.num_rows:
        return {FOLDER: rows, REJECTS_FOLDER: refused}
    every = rows.sort_by(tables.SEQUENCE).to_pylist()
    last = {_identity(row): number for number, row in enumerate(every)}
    of_series: dict[str, list[dict[str, Any]]] = {row["series_key"]: [] for row in every}
    kept: list[dict[str, Any]] = []
    for reject in tables.latest(refused, _OBJECT).sort_by([(tables.SEQUENCE, "descending")]).to_pylist():
        own = reject["stage"] != CATALOG and reject["series_key"] in of_series
        (of_series[reject["series_key"]] if own else kept).append(reject)
    counted: set[int] = set()
    for number in last.values():
        row = every[number]
        its_own = of_series[row["series_key"]][: row["rejected_slices"] or 0]
        every[number], linked = _counting(row, its_own)
        kept += linked
        counted.update(map(id, its_own))
    over = (one for some in of_series.values() for one in some if id(one) not in counted)
    kept += [{**one, "rejects_digest": _OVER} for one in over]
    converted = {FOLDER: every, REJECTS_FOLDER: kept}
    return {folder: pa.Table.from_pylist(some, schema=_SCHEMAS[folder]) for folder, some in converted.items()}
