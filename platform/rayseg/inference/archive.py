"""Bulk segmentation: every series of a manifest becomes files of the profiles asked for and one row in the ledger.

The series is the unit of work. It is done when its files are whole and its row is written; a run that is stopped
anywhere and started again skips what is done before reading anything, and does the rest to the same bytes.
"""

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
from tqdm import tqdm

from rayseg import cluster, storage
from rayseg import config as configuration
from rayseg.inference import ledger
from rayseg.inference.outputs import SEGMENTATIONS, Profile
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Predictor, limit_threads
from rayseg.inference.series import STAGE, Task, ledger_row, reject_row, segment_series
from rayseg.records import LEDGER, REJECTS, Reason, Reject
from rayseg.tracking import registry

logger = logging.getLogger(__name__)

VERSION = 2  # of what is made of a series; another number makes finished series stale
SERIES_PER_PART = 64  # of the ledger: what a killed run does again, at most
_SERIES_PER_TASK = 32
_CPUS_PER_ACTOR = 1

_MANIFEST_COLUMNS = ("uri", "frame", "etag", "verdict", "reason", "detail", "kind", "patient_key", "series_key")
_PLAN = pa.schema(
    [
        ("series_key", pa.string()),
        ("patient_key", pa.string()),
        ("uris", pa.list_(pa.string())),
        ("frames", pa.list_(pa.int32())),  # at the same places; null: the object is one image
        ("input_digest", pa.string()),
    ]
)
# A second try may end otherwise, whatever `retry` says.
_TRY_AGAIN = {Reason.READ_FAILED, Reason.NOT_FOUND, Reason.WRITE_FAILED, Reason.INTERNAL}
_HOUR_S = 3600.0
_FOUND = pa.schema([*LEDGER, pa.field("rejects", pa.list_(pa.struct(list(REJECTS))))])


@dataclass(frozen=True)
class SegmentConfig:
    """What to segment, with which model, and where to."""

    manifest: str  # URI of a manifest as the catalog job writes it
    model_uri: str  # models:/NAME/VERSION or models:/NAME@ALIAS
    tracking_uri: str
    output: str  # URI of a folder
    profiles: tuple[Profile, ...] = ("seg",)  # what is written of each series: see `outputs`
    postprocess: Postprocess = field(default_factory=Postprocess)
    nothing_found: Literal["write", "ledger"] = "write"  # files without foreground, or a row in the ledger only
    retry: Literal["rejected"] | None = None  # does rejected series again, too
    only_changed: bool = True  # False: does everything again, changed or not
    dry_run: bool = False  # only says what there is to do, and about how long it takes
    cost_per_hour: float | None = None  # of the machines that run this, in any currency: for the estimate
    concurrency: int = 1  # actors, one CPU each
    max_reject_fraction: float = 0.2  # of the manifest's accepted objects

    def __post_init__(self) -> None:
        if not self.profiles or len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"segment.profiles: one or more, each once, expected, got {list(self.profiles)}")
        before = [profile for profile in self.profiles if profile == "report" or profile in SEGMENTATIONS]
        if before and before[0] == "report":
            raise ValueError("segment.profiles: a report is about a segmentation; name seg or seg-labelmap before it")
        if self.concurrency < 1:
            raise ValueError(f"segment.concurrency: a positive number expected, got {self.concurrency}")


@dataclass(frozen=True)
class Estimate:
    """What a run would take, by the ledger's timings of earlier series; None where there are none yet."""

    series: int
    slices: int
    seconds: float | None
    cost: float | None  # where `cost_per_hour` is given


@dataclass(frozen=True)
class SegmentResult:
    """What became of the manifest's series: `series` = `segmented` + `rejected` + `skipped` (done before this run).

    Of a dry run nothing but `series`, `skipped` and `estimate` counts.
    """

    series: int
    segmented: int
    rejected: int
    skipped: int
    slices: int  # with a mask, in this run
    rejected_slices: int  # objects without one, in the manifest already or in this run
    reasons: dict[str, int]  # of rejected_slices
    seg_paths: list[str]  # URIs of the first profile's files, those of skipped series included, in the manifest's order
    ledger: str  # URI of the folder of its parts
    model_uri: str  # with the version, whatever alias was asked for
    seconds: float
    estimate: Estimate | None = None


def segment(config: SegmentConfig) -> SegmentResult:
    """Segments what the ledger does not have yet, and says what became of every series of the manifest.

    A series is done again when the model, the settings or its objects (by URI, frame and ETag) have changed. A rejected
    one is done again where that may help: its objects could not be read or its files not be written.

    Raises:
        ValueError: no such manifest or model, or, after all is written, more rejects than `max_reject_fraction`.
    """
    began = time.monotonic()
    cluster.connect()
    output = storage.absolute(config.output)
    bundle_dir, model = registry.fetch(config.tracking_uri, config.model_uri)
    task = Task(
        storage.join(output, f"{model.name}-v{model.version}"),
        model,
        _config_digest(config),
        config.profiles,
        config.postprocess,
        config.nothing_found == "write",
    )
    plan, unusable, rejects = _plan(config.manifest, task)
    known = ledger.rows_of(output, model.digest, task.config_digest)
    done = {
        row["series_key"]: known[row["series_key"]]
        for row in plan
        if config.only_changed and _is_done(known.get(row["series_key"]), row, config)
    }
    todo = [row for row in plan if row["series_key"] not in done]
    logger.info("segment: %d series to do, %d done, %d unusable", len(todo), len(done), len(unusable))
    if config.dry_run:
        return SegmentResult(
            series=len(plan) + len(unusable),
            segmented=0,
            rejected=0,
            skipped=len(done),
            slices=0,
            rejected_slices=0,
            reasons={},
            seg_paths=[],
            ledger=storage.join(output, ledger.FOLDER),
            model_uri=model.uri,
            seconds=time.monotonic() - began,
            estimate=_estimate(todo, ledger.read(output).to_pylist(), config),
        )
    ledger.append(output, unusable, rejects)
    found = _run(todo, task, bundle_dir, output, config.concurrency) if todo else []
    made = {row["series_key"]: row for row in found if row["verdict"] == "segmented"}
    accepted = sum(len(row["uris"]) for row in plan) + sum(reject["stage"] == STAGE for reject in rejects)
    rejects = [*rejects, *(reject for row in found for reject in row["rejects"])]
    _check_budget(rejects, accepted, config.max_reject_fraction, output)
    ended = [row for row in map((done | made).get, (row["series_key"] for row in plan)) if row]
    return SegmentResult(
        series=len(plan) + len(unusable),
        segmented=len(made),
        rejected=len(unusable) + len(found) - len(made),
        skipped=len(done),
        slices=sum(row["slices"] for row in found),
        rejected_slices=len(rejects),
        reasons=_counts(rejects),
        seg_paths=[uri for row in ended for uri in ledger.uris(row, config.profiles[0])],
        ledger=storage.join(output, ledger.FOLDER),
        model_uri=model.uri,
        seconds=time.monotonic() - began,
    )


def _config_digest(config: SegmentConfig) -> str:
    """Of what decides about a series' files."""
    settings = [list(config.profiles), configuration.plain(config.postprocess), config.nothing_found, VERSION]
    return configuration.digest(settings)


def _is_done(known: dict[str, Any] | None, planned: dict[str, Any], config: SegmentConfig) -> bool:
    if known is None or known["input_digest"] != planned["input_digest"]:
        return False
    if known["verdict"] == "segmented":
        return True
    return config.retry != "rejected" and known["reason"] not in _TRY_AGAIN


def _estimate(todo: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]], config: SegmentConfig) -> Estimate:
    """By the seconds a slice of all series that were ever segmented into this output."""
    slices = sum(len(row["uris"]) for row in todo)
    timed = [row for row in known if row["verdict"] == "segmented"]
    seconds = None
    if timed:
        a_slice_s = sum(row["seconds"] for row in timed) / sum(map(_objects, timed))
        seconds = slices * a_slice_s / config.concurrency
    cost = None if seconds is None or config.cost_per_hour is None else seconds / _HOUR_S * config.cost_per_hour
    return Estimate(len(todo), slices, seconds, cost)


def _plan(manifest: str, task: Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Series to segment (schema `_PLAN`, in the manifest's order), ledger rows of unusable series, rejected objects."""
    try:
        table = storage.read_table(manifest, _MANIFEST_COLUMNS)
    except FileNotFoundError:
        raise ValueError(f"segment.manifest: there is no manifest at {manifest}; run the catalog job") from None
    series: dict[str, dict[str, Any]] = {}
    objects: dict[str, list[Any]] = {}
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
            objects.setdefault(key, []).append([row["uri"], row["frame"], row["etag"]])
    unusable: dict[str, dict[str, Any]] = {}
    for refused in rejects:
        key = refused["series_key"]
        if key is not None and key not in series:
            first = Reject(Reason(refused["reason"]), refused["detail"])
            row = unusable.setdefault(key, ledger_row(task, key, refused["patient_key"], first))
            row["rejected_slices"] += 1
    for key, planned in series.items():
        planned["input_digest"] = configuration.digest(objects[key])
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
