"""Bulk segmentation: every series of a manifest becomes one DICOM SEG and one row in the ledger.

The series is the unit of work. It is done when its SEG is whole and its row is written; a run that is stopped anywhere
and started again skips what is done before reading anything, and does the rest to the same bytes.
"""

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
from tqdm import tqdm

from rayseg import cluster, storage
from rayseg import config as configuration
from rayseg.inference import ledger
from rayseg.inference.predictor import Predictor, limit_threads
from rayseg.inference.series import STAGE, Task, ledger_row, reject_row, segment_series
from rayseg.records import LEDGER, REJECTS, Reason, Reject
from rayseg.tracking import registry

logger = logging.getLogger(__name__)

VERSION = 1  # of what is made of a series; another number makes finished series stale
SERIES_PER_PART = 64  # of the ledger: what a killed run does again, at most
_SERIES_PER_TASK = 32
_CPUS_PER_ACTOR = 1

_MANIFEST_COLUMNS = ("uri", "frame", "verdict", "reason", "detail", "kind", "patient_key", "series_key")
_PLAN = pa.schema(
    [
        ("series_key", pa.string()),
        ("patient_key", pa.string()),
        ("uris", pa.list_(pa.string())),
        ("frames", pa.list_(pa.int32())),  # at the same places; null: the object is one image
    ]
)
_FOUND = pa.schema([*LEDGER, pa.field("rejects", pa.list_(pa.struct(list(REJECTS))))])


@dataclass(frozen=True)
class SegmentConfig:
    """What to segment, with which model, and where to."""

    manifest: str  # URI of a manifest as the catalog job writes it
    model_uri: str  # models:/NAME/VERSION or models:/NAME@ALIAS
    tracking_uri: str
    output: str  # URI of a folder
    kind: Literal["BINARY", "LABELMAP"] = "BINARY"  # of the DICOM SEG
    concurrency: int = 1  # actors, one CPU each
    max_reject_fraction: float = 0.2  # of the manifest's accepted objects


@dataclass(frozen=True)
class SegmentResult:
    """What became of the manifest's series: `series` = `segmented` + `rejected` + `skipped` (done before this run)."""

    series: int
    segmented: int
    rejected: int
    skipped: int
    slices: int  # with a mask, in this run
    rejected_slices: int  # objects without one, in the manifest already or in this run
    reasons: dict[str, int]  # of rejected_slices
    seg_paths: list[str]  # URIs, those of skipped series included, in the manifest's order
    ledger: str  # URI of the folder of its parts
    model_uri: str  # with the version, whatever alias was asked for
    seconds: float


def segment(config: SegmentConfig) -> SegmentResult:
    """Segments what the ledger does not have yet, and says what became of every series of the manifest.

    Raises:
        ValueError: no such manifest or model, or, after all is written, more rejects than `max_reject_fraction`.
    """
    began = time.monotonic()
    cluster.connect()
    output = storage.absolute(config.output)
    bundle_dir, model = registry.fetch(config.tracking_uri, config.model_uri)
    folder = storage.join(output, f"{model.name}-v{model.version}")
    task = Task(folder, config.kind, model, configuration.digest({"kind": config.kind, "version": VERSION}))
    plan, unusable, rejects = _plan(config.manifest, task)
    finished = ledger.segmented(output, model.digest, task.config_digest)
    # A series that has got or lost objects since is done again.
    done = {
        row["series_key"]: finished[row["series_key"]]
        for row in plan
        if _objects(finished.get(row["series_key"])) == len(row["uris"])
    }
    todo = [row for row in plan if row["series_key"] not in done]
    logger.info("segment: %d series to do, %d done, %d unusable", len(todo), len(done), len(unusable))
    ledger.append(output, unusable, rejects)
    found = _run(todo, task, bundle_dir, output, config.concurrency) if todo else []
    made = {row["series_key"]: row for row in found if row["verdict"] == "segmented"}
    accepted = sum(len(row["uris"]) for row in plan) + sum(reject["stage"] == STAGE for reject in rejects)
    rejects = [*rejects, *(reject for row in found for reject in row["rejects"])]
    _check_budget(rejects, accepted, config.max_reject_fraction, output)
    return SegmentResult(
        series=len(plan) + len(unusable),
        segmented=len(made),
        rejected=len(unusable) + len(found) - len(made),
        skipped=len(done),
        slices=sum(row["slices"] for row in found),
        rejected_slices=len(rejects),
        reasons=_counts(rejects),
        seg_paths=[row["output_uri"] for row in map((done | made).get, (row["series_key"] for row in plan)) if row],
        ledger=storage.join(output, ledger.FOLDER),
        model_uri=model.uri,
        seconds=time.monotonic() - began,
    )


def _plan(manifest: str, task: Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Series to segment (schema `_PLAN`, in the manifest's order), ledger rows of unusable series, rejected objects."""
    try:
        table = storage.read_table(manifest, _MANIFEST_COLUMNS)
    except FileNotFoundError:
        raise ValueError(f"segment.manifest: there is no manifest at {manifest}; run the catalog job") from None
    series: dict[str, dict[str, Any]] = {}
    rejects = []
    for row in table.select(_MANIFEST_COLUMNS).to_pylist():
        key, patient_key = row["series_key"], row["patient_key"]
        if row["verdict"] != "ok":
            reject = Reject(Reason(row["reason"]), row["detail"] or "")
            rejects.append(reject_row(row["uri"], row["frame"], "catalog", reject, patient_key, key))
        elif row["kind"] != "dicom":
            reject = Reject(Reason.NOT_DICOM, "a DICOM SEG refers to DICOM instances, and this is an image file")
            rejects.append(reject_row(row["uri"], row["frame"], STAGE, reject, patient_key, key))
        else:
            planned = series.setdefault(key, {"series_key": key, "patient_key": patient_key, "uris": [], "frames": []})
            planned["uris"].append(row["uri"])
            planned["frames"].append(row["frame"])
    unusable: dict[str, dict[str, Any]] = {}
    for refused in rejects:
        key = refused["series_key"]
        if key is not None and key not in series:
            first = Reject(Reason(refused["reason"]), refused["detail"])
            row = unusable.setdefault(key, ledger_row(task, key, refused["patient_key"], first))
            row["rejected_slices"] += 1
    return list(series.values()), list(unusable.values()), rejects


def _run(
    todo: Sequence[dict[str, Any]], task: Task, bundle_dir: Path, output: str, concurrency: int
) -> list[dict[str, Any]]:
    """Segments the series and writes their ledger rows; returns these rows with the series' rejects in `rejects`."""
    # The bundle travels through Ray: actors need neither the registry nor its artifact store.
    bundle = ray.put({file.name: file.read_bytes() for file in bundle_dir.iterdir()})
    per_task = min(max(len(todo) // (8 * concurrency), 1), _SERIES_PER_TASK)
    blocks = [
        pa.Table.from_pylist(list(todo[first : first + per_task]), schema=_PLAN)
        for first in range(0, len(todo), per_task)
    ]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _Segmenter,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_args=(bundle, task),
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_cpus=_CPUS_PER_ACTOR,
    )
    rows: list[dict[str, Any]] = []
    written = 0

    def write() -> None:
        pending = rows[written:]
        ledger.append(output, pending, [reject for row in pending for reject in row["rejects"]])

    objects = sum(len(row["uris"]) for row in todo)
    with tqdm(total=objects, desc="segment", unit=" slices", disable=None) as progress:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                rows.extend(batch.to_pylist())
                progress.update(sum(map(_objects, rows[-len(batch) :])))
                if len(rows) - written >= SERIES_PER_PART:
                    write()
                    written = len(rows)
        finally:
            write()
    assert len(rows) == len(todo), "every series is one row"
    return rows


class _Segmenter:
    """An actor: series in, ledger rows out; what it makes lies on the store before a row comes back."""

    def __init__(self, bundle: "ray.ObjectRef[dict[str, bytes]]", task: Task) -> None:
        limit_threads(_CPUS_PER_ACTOR)
        self._task = task
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(bundle).items():
                Path(folder, name).write_bytes(content)
            self._predictor = Predictor.load(folder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [segment_series(self._predictor, self._task, **series) for series in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=_FOUND)


def _objects(row: dict[str, Any] | None) -> int:
    """How many objects of the manifest a ledger row accounts for."""
    return 0 if row is None else row["slices"] + row["rejected_slices"]


def _counts(rejects: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(reject["reason"] for reject in rejects).items()))


def _check_budget(rejects: Sequence[dict[str, Any]], accepted: int, most: float, output: str) -> None:
    """Compares what this stage refused with what the catalog had accepted."""
    ours = [reject for reject in rejects if reject["stage"] == STAGE]
    if len(ours) > most * accepted:
        counts = ", ".join(f"{reason} {count}" for reason, count in _counts(ours).items())
        raise ValueError(
            f"segment: {len(ours)} of {accepted} objects rejected, over max_reject_fraction {most}: {counts}; "
            f"{storage.join(output, ledger.REJECTS_FOLDER)} names each"
        )
