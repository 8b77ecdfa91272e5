"""What an archive run has to do: the manifest's series without those that the ledger has, and how long that takes.

What cannot be made of a series, and whether its kept masks are enough for the rest, is decided here.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayseg import config as configuration
from rayseg import snapshots, storage
from rayseg.data.objects import Place
from rayseg.data.spool import packed, unpacked
from rayseg.inference import feasible
from rayseg.inference.ledger import CATALOG
from rayseg.inference.refusals import News, Refusals
from rayseg.inference.remake import is_enough
from rayseg.inference.series import STAGE, Task, ledger_row, not_made_rows, reject_row
from rayseg.records import KEPT_FILE, NOT_MADE, Reason, Reject

SCHEMA = pa.schema(
    [
        ("series_key", pa.string()),
        ("patient_key", pa.string()),
        ("uris", pa.list_(pa.string())),
        ("frames", pa.list_(pa.int32())),  # at the same places; null: the object is one image
        ("input_digest", pa.string()),
        ("kind", pa.string()),  # of `outputs.Kind`
        ("not_made", NOT_MADE),  # the profiles that cannot be made of it
        ("masks", KEPT_FILE),  # that its files are made of; null: the network is to run
    ]
)
_MANIFEST_COLUMNS = ("uri", "frame", "etag", "verdict", "reason", "detail", "kind", "patient_key", "series_key")
KNOWN = ("input_digest", "verdict", "reason", "not_made")  # what `is_done` looks at of a ledger row
# A second try may end otherwise, whatever `retry` says.
_TRY_AGAIN = {Reason.READ_FAILED, Reason.NOT_FOUND, Reason.WRITE_FAILED, Reason.INTERNAL}
_HOUR_S = 3600.0
_REJECTS_PER_PART = 50_000  # of the ledger

_Rows = Sequence[dict[str, Any]]
_Kept = tuple[str, str, int]  # `input_digest`, SHA-256 and bytes of kept masks


@dataclass
class Plan:
    """What a manifest holds for an archive run. Memory grows by some 10 to 30 bytes an object."""

    # Series in the manifest's order, each `packed` rows of `SCHEMA`: for the network, and with masks that are kept.
    todo: list[bytes] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)
    slices: int = 0  # objects of both
    kept_slices: int = 0  # of these, of series with kept masks
    series: list[str] = field(default_factory=list)  # keys of all usable series, in the manifest's order
    done: set[str] = field(default_factory=set)  # of these, what is not to be done again
    accepted: int = 0  # objects that the catalog has accepted
    unusable: list[dict[str, Any]] = field(default_factory=list)  # ledger rows of series without any usable object
    refusals: Refusals = field(default_factory=Refusals)  # objects that are not to be segmented
    not_made: Counter[str] = field(default_factory=Counter)  # series to do, by the profiles that they will not have


@dataclass(frozen=True)
class Estimate:
    """What a run would take, by the ledger's timings of earlier series; None where there are none yet."""

    series: int
    slices: int
    seconds: float | None
    cost: float | None  # where `cost_per_hour` is given
    from_masks: int = 0  # of the series, those that need no network: their masks are kept


def make(
    manifest: str,
    task: Task,
    is_done: Callable[[Mapping[str, Any]], bool],
    keep: Callable[[_Rows, _Rows], None],
    told: Mapping[Place, Reject] | None = None,
    kept: Callable[[], Mapping[str, _Kept]] = dict,
) -> Plan:
    """Reads a manifest, a part at a time.

    What is left of a series' profiles is decided by `feasible`; without any it is unusable. An image file is a series
    by itself, named by its `instance_key`: nothing says how several belong together.

    Args:
        manifest: its URI. The rows of a series stand together, as the catalog writes them.
        task: what all series have in common.
        is_done: whether a series, a row of `SCHEMA`, is not to be done again.
        keep: gets ledger rows of unusable series, with the rejects that they are about, and what is new of others.
        told: what the catalog had refused before, by the table of rejects.
        kept: gives `ledger.kept`, of the masks that the task asks for; called where a series is to do, and often.

    Raises:
        ValueError: there is no manifest, or the rows of a series do not stand together.
    """
    plan = Plan()
    unusable: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    met: set[str] = set()
    news = News(told or {})
    columns = (*_MANIFEST_COLUMNS, *feasible.columns(task.profiles, task.postprocess))
    # What is of no series stands for itself.
    for group, rows in groupby(_rows(manifest, columns), lambda row: row["series_key"] or (row["uri"], row["frame"])):
        key = group if isinstance(group, str) else None
        planned, refused = _of_series(task, key, rows, is_done, kept)
        if key is not None:
            if key in met:
                raise ValueError(
                    f"segment.manifest: series {key} stands in several places of {manifest}; catalog again"
                )
            met.add(key)
        plan.refusals.add(refused)
        rejects += news.of(refused, planned["uris"] if planned else ())
        if planned is not None:
            plan.series.append(planned["series_key"])
            plan.accepted += len(planned["uris"])
            if "not_made" not in planned:
                plan.done.add(planned["series_key"])
            else:
                cell, slices = packed(pa.Table.from_pylist([planned], schema=SCHEMA)), len(planned["uris"])
                plan.slices += slices
                if planned["masks"] is None:
                    plan.todo.append(cell)
                else:
                    plan.kept.append(cell)
                    plan.kept_slices += slices
                plan.not_made.update(one["profile"] for one in planned["not_made"])
        elif key is not None:
            first = Reject(Reason(refused[0]["reason"]), refused[0]["detail"])
            row = ledger_row(task, key, refused[0]["patient_key"], first) | {"rejected_slices": len(refused)}
            unusable.append(row)
            plan.unusable.append(row)
        if len(rejects) >= _REJECTS_PER_PART:
            keep(unusable, rejects)
            unusable, rejects = [], []
    keep(unusable, [*rejects, *news.over()])
    plan.accepted += plan.refusals.of_run.total()
    return plan


def _rows(manifest: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows with `columns` and `present`; an image file's series is the file."""
    try:
        with snapshots.reading(manifest, STAGE) as file:
            for some in storage.read_row_groups(file, [*{*columns, *feasible.PRESENT, "instance_key"}]):
                known = some.select(columns)
                alone = pc.and_(pc.fill_null(pc.equal(some["kind"], "image"), False), pc.is_null(some["frame"]))
                if pc.any(alone).as_py():
                    keys = pc.if_else(alone, pc.coalesce(some["instance_key"], some["series_key"]), some["series_key"])
                    known = known.set_column(columns.index("series_key"), "series_key", keys)
                values = [*(column.to_pylist() for column in known.columns), feasible.present(some)]
                names = (*columns, "present")
                yield from (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))
    except FileNotFoundError:
        raise ValueError(f"segment.manifest: there is no manifest at {manifest}; run the catalog job") from None


def _of_series(
    task: Task,
    key: str | None,
    rows: Iterable[Mapping[str, Any]],
    is_done: Callable[[Mapping[str, Any]], bool],
    kept: Callable[[], Mapping[str, _Kept]],
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The series as a row of `SCHEMA`, and the rejects.

    None where nothing of it can be used; without `not_made` where it is done.
    """
    usable: list[Mapping[str, Any]] = []
    rejects = []
    for row in rows:
        if row["verdict"] == "ok":
            usable.append(row)
            continue
        reject = Reject(Reason(row["reason"]), row["detail"] or "")
        rejects.append(reject_row(row["uri"], row["frame"], CATALOG, reject, row["patient_key"], key))
    if not usable:
        return None, rejects
    kind = feasible.kind_of(usable[0])
    planned = {
        "series_key": key,
        "patient_key": usable[0]["patient_key"],
        "uris": [row["uri"] for row in usable],
        "frames": [row["frame"] for row in usable],
        "input_digest": configuration.digest([[row["uri"], row["frame"], row["etag"]] for row in usable]),
        "kind": kind,
    }
    if is_done(planned):
        return planned, rejects
    refused = feasible.refused(task.profiles, kind, usable)
    unmeasured = feasible.unmeasured(task.postprocess, usable)
    if unmeasured is None and len(refused) < len(task.profiles):
        profiles = [profile for profile in task.profiles if profile not in refused]
        known = kept().get(str(key)) if is_enough(task, profiles) else None
        masks = None
        if known is not None and task.keep is not None and known[0] == planned["input_digest"]:
            masks = {"digest": task.keep.digest, "sha256": known[1], "bytes": known[2]}
        return planned | {"not_made": not_made_rows(refused), "masks": masks}, rejects
    if unmeasured is None:
        profile, first = next(iter(refused.items()))
        reject = Reject(first.reason, f"{profile}: {first.detail}")
    else:
        reject = unmeasured
    ours = [reject_row(row["uri"], row["frame"], STAGE, reject, row["patient_key"], key) for row in usable]
    return None, [*ours, *rejects]


def is_done(known: Mapping[str, Any] | None, planned: Mapping[str, Any], retry_rejected: bool) -> bool:
    """Whether the ledger's row `known` is of the series as planned, and nothing is to be gained by doing it again."""
    if known is None or known["input_digest"] != planned["input_digest"]:
        return False
    if known["verdict"] == "segmented":
        return not any(one["reason"] in _TRY_AGAIN for one in known.get("not_made") or ())
    return not retry_rejected and known["reason"] not in _TRY_AGAIN


def estimate(planned: Plan, known: pa.Table, concurrency: int, cost_per_hour: float | None) -> Estimate:
    """By the seconds a slice of all series that were ever segmented into this output: `known`, of `records.LEDGER`.

    A series with kept masks takes what making and writing files took.
    """
    timed = known.filter(pc.field("verdict") == "segmented")
    seconds = None
    if timed.num_rows:
        by_network = timed.filter(pc.coalesce(pc.field("forward_s") != 0, pc.scalar(True)))
        of_files = _pace_s(timed, ("encode_s", "write_s"))
        of_network = _pace_s(by_network, ("seconds",)) if by_network.num_rows else of_files
        slices = planned.slices - planned.kept_slices
        seconds = (slices * of_network + planned.kept_slices * of_files) / concurrency
    cost = None if seconds is None or cost_per_hour is None else seconds / _HOUR_S * cost_per_hour
    kept = len(planned.kept)
    return Estimate(len(planned.todo) + kept, planned.slices, seconds, cost, kept)


def _pace_s(timed: pa.Table, columns: Sequence[str]) -> float:
    """Seconds a slice, of rows of the ledger."""
    slices = sum(pc.sum(timed[name]).as_py() for name in ("slices", "rejected_slices"))
    return float(sum(pc.sum(timed[name]).as_py() or 0.0 for name in columns) / slices)


def unpacked_series(cell: bytes) -> dict[str, Any]:
    """The row of `SCHEMA` of a cell of `Plan.todo`."""
    (row,) = unpacked(cell).to_pylist()
    return dict(row)


def objects(row: Mapping[str, Any]) -> int:
    """How many objects of the manifest a ledger row accounts for."""
    return row["slices"] + row["rejected_slices"]
