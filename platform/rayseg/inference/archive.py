"""Bulk segmentation: every series of a manifest becomes files of the profiles asked for and one row in the ledger.

The series is the unit of work. It is done when its files are whole and its row is written; a run that is stopped
anywhere and started again skips what is done before reading anything, and does the rest to the same bytes.

Masks are kept (`kept`). A run in which only the files are others than before makes them of these (`remake`).
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from rayseg import config as configuration
from rayseg import lease, storage, work
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout
from rayseg.data.range import Known
from rayseg.inference import delivery, kept, ledger, plan, report, stream
from rayseg.inference.kept import Keep
from rayseg.inference.networks import Mirror
from rayseg.inference.outputs import SEGMENTATIONS, Profile, settings_digest
from rayseg.inference.plan import Estimate, Plan
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.progress import Progress
from rayseg.inference.refusals import Refusals
from rayseg.inference.series import STAGE, Task
from rayseg.models.engine import Engine
from rayseg.tracking import judged, registry, runs
from rayseg.tracking.version import ModelVersion, together

logger = logging.getLogger(__name__)

_KEYS = {"CPU": "cpus_per_actor", "GPU": "gpus_per_actor", "count": "concurrency"}
VERSION = 4  # of what is made of a series; another number makes finished series stale
MANIFEST = "manifest.parquet"  # below the output, where a source is given


@dataclass(frozen=True)
class SegmentConfig:
    """What to segment, with which model, and where to."""

    model_uri: str  # models:/NAME/VERSION or models:/NAME@ALIAS
    tracking_uri: str  # URI of the MLflow server or database, such as sqlite:///work/mlflow.db
    output: str  # URI of a folder for files, ledger and rejects
    manifest: str | None = None  # URI of a manifest as the catalog job writes it
    source: str | None = None  # URI of a folder to catalog first, in place of `manifest`
    ensemble: tuple[str, ...] = ()  # further models; their probabilities are averaged with the first model's
    # average over mirror images too: by columns; by rows and columns (both); of volumes by all three axes (all)
    mirror: Mirror | None = None
    engine: Engine = field(default_factory=Engine)
    profiles: tuple[Profile, ...] = ("seg",)  # what is written of each series
    postprocess: Postprocess = field(default_factory=Postprocess)
    # of a series without foreground: write its files, or only a row in the ledger
    nothing_found: Literal["write", "ledger"] = "write"
    retry: Literal["rejected"] | None = None  # does rejected series again
    only_changed: bool = True  # false does everything again, changed or not, masks included
    verify: bool = False  # does series again whose files are missing or have another size
    dry_run: bool = False  # only tells what there is to do, and how long it takes
    cost_per_hour: float | None = None  # cost of the machines in any currency, for the estimate
    pacs: str | None = None  # URL of a DICOMweb service that gets the DICOM files too
    concurrency: int = 1  # actors
    # CPUs of an actor: as many series at a time, and slices of theirs; on a GPU these share batches
    cpus_per_actor: int = 1
    gpus_per_actor: float = 0.0  # GPUs of an actor; fractions share one
    # Series that have ended and the ledger lacks, at most: what a killed run does again beside those that were in work.
    unrecorded: int = 64
    experiment: str = "rayseg"  # experiment of MLflow, where the run shows its progress
    # the job fails where a greater share of the manifest's accepted objects is rejected
    max_reject_fraction: float = 0.2

    def __post_init__(self) -> None:
        if not self.profiles or len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"segment.profiles: one or more, each once, expected, got {list(self.profiles)}")
        before = [profile for profile in self.profiles if profile == "report" or profile in SEGMENTATIONS]
        if before and before[0] == "report":
            raise ValueError("segment.profiles: a report is about a segmentation; name seg or seg-labelmap before it")
        for name in ("concurrency", "cpus_per_actor", "unrecorded"):
            if getattr(self, name) < 1:
                raise ValueError(f"segment.{name}: a positive number expected, got {getattr(self, name)}")
        if (self.manifest is None) == (self.source is None):
            raise ValueError("segment: give either segment.manifest or segment.source, what to catalog first")
        if self.pacs is not None:
            delivery.check(self.pacs, self.profiles)


@dataclass(frozen=True)
class SegmentResult:
    """What became of the manifest's series: `series` = `segmented` + `rejected` + `skipped` (done before this run).

    Of a dry run nothing but `series`, `skipped`, `estimate` and `not_made`, as far as headers tell, counts.
    """

    series: int
    skipped: int
    ledger: str  # URI of the folder of its parts
    model_uri: str  # with the version, whatever alias was asked for
    segmented: int = 0
    from_masks: int = 0  # of these, by masks that an earlier run has kept: no network ran
    rejected: int = 0
    slices: int = 0  # with a mask, in this run
    rejected_slices: int = 0  # objects without one, in the manifest already or in this run
    reasons: dict[str, int] = field(default_factory=dict)  # of rejected_slices
    flags: dict[str, int] = field(default_factory=dict)  # segmented series of this run by what makes them worth a look
    not_made: dict[str, int] = field(default_factory=dict)  # segmented series of this run by a profile that they lack
    # URIs of the first profile's files, those of skipped series included, in the manifest's order
    seg_paths: list[str] = field(default_factory=list)
    report: str | None = None  # URI of an HTML file; None of a dry run
    run_id: str | None = None  # in MLflow; None where there was nothing to do
    seconds: float = 0.0
    estimate: Estimate | None = None


def segment(config: SegmentConfig) -> SegmentResult:
    """Segments what the ledger does not have yet, and says what became of every series of the manifest.

    A series is done again when the model, the settings or its objects (by URI, frame and ETag) have changed; with
    `verify` also when a file of it is gone. A rejected one is done again where that may help: its objects could not be
    read or its files not be written. One run at a time writes to an output: another one waits, see `lease`.

    Raises:
        ValueError: no such manifest or model, actors that the cluster could never hold, or, after all is written, more
            rejects than `max_reject_fraction`.
    """
    began = time.monotonic()
    output = storage.absolute(config.output)
    if config.dry_run:
        result = _archive(config, output, lambda: None)
    else:
        with lease.held(storage.join(output, f"_segment{lease.SUFFIX}"), STAGE) as held:
            result = _archive(config, output, held.check)
    return replace(result, seconds=time.monotonic() - began)


def _archive(config: SegmentConfig, output: str, check: Callable[[], None]) -> SegmentResult:
    """The run; `check` raises where another one has taken the output over."""
    began = time.monotonic()
    manifest = config.manifest or _cataloged(config, output)
    fetched = [registry.fetch(config.tracking_uri, uri) for uri in (config.model_uri, *config.ensemble)]
    folders, versions = [folder for folder, _ in fetched], [version for _, version in fetched]
    model = together(versions)
    known = _known(config, versions)
    settings = _settings(config, known)
    digest = _config_digest(config, settings)
    masks_digest = kept.digest(model.digest, config.engine, config.gpus_per_actor, config.mirror, config.postprocess)
    task = Task(
        storage.join(output, f"{model.name}-v{model.version}-{digest[:8]}"),
        model,
        digest,
        config.profiles,
        config.postprocess,
        config.nothing_found == "write",
        config.pacs,
        settings,
        Keep(output, masks_digest),
    )
    earlier = ledger.rows_of(output, model.digest, digest)
    latest = {row["series_key"]: row for row in earlier.select(["series_key", *plan.KNOWN]).to_pylist()}
    for key in _damaged(output, earlier) if config.verify else ():
        del latest[key]
    unused = earlier.filter(pc.field("verdict") == "rejected").select(["series_key", *ledger.SAID]).to_pylist()
    retry = config.retry == "rejected"
    planned = plan.make(
        manifest,
        task,
        lambda row: config.only_changed and plan.is_done(latest.get(row["series_key"]), row, retry),
        (lambda rows, rejects: None)
        if config.dry_run
        else partial(_keep, output, {row["series_key"]: row for row in unused}),
        {} if config.dry_run else ledger.refused_by_catalog(output),
        cache(partial(ledger.kept, output, model.digest, masks_digest)) if config.only_changed else dict,
    )
    skipped, refusals, unusable = len(planned.done), planned.refusals, planned.unusable
    counts = len(planned.todo), len(planned.kept), skipped, len(unusable)
    logger.info("segment: %d series to segment, %d to make of kept masks, %d done, %d unusable", *counts)
    result = SegmentResult(
        series=len(planned.series) + len(unusable),
        skipped=skipped,
        ledger=storage.join(output, ledger.FOLDER),
        model_uri=model.uri,
    )
    if config.dry_run:
        at_once = config.concurrency * config.cpus_per_actor
        estimate = plan.estimate(planned, ledger.read(output), at_once, config.cost_per_hour)
        lacking = dict(sorted(planned.not_made.items()))
        return replace(result, estimate=estimate, not_made=lacking)
    rows_of_run: list[dict[str, Any]] = []
    run_id = None
    if planned.todo or planned.kept:
        with runs.running(
            config.tracking_uri,
            config.experiment,
            f"segment-{model.name}-v{model.version}",
            _asked(config, model.uri),
            {"rayseg.kind": "archive", "rayseg.model_version": model.uri},
            [one.run_id for one in versions],
        ) as run_id:
            rows_of_run = _segmented(planned, task, folders, output, config, known, run_id, check)
    segmented = {row["series_key"]: row for row in rows_of_run if row["verdict"] == "segmented"}
    done = {row["series_key"]: row for row in earlier.to_pylist() if row["series_key"] in planned.done}
    rejected = len(unusable) + len(rows_of_run) - len(segmented)
    page = storage.join(output, report.NAME)
    if rows_of_run or not storage.exists(page):  # with nothing to do that of the run before stays
        ended_as = report.Run(len(segmented), rejected, skipped, time.monotonic() - began)
        rows = [*done.values(), *rows_of_run, *unusable]
        check()
        storage.write(page, report.render(ended_as, _asked(config, model.uri), rows, refusals).encode())
    refusals.earlier = ledger.refused(output, list(done.values()), STAGE)
    _check_budget(refusals, planned.accepted, config.max_reject_fraction, output)
    ended = [row for row in map((done | segmented).get, planned.series) if row]
    return replace(
        result,
        segmented=len(segmented),
        from_masks=sum(not row["forward_s"] for row in segmented.values()),
        rejected=rejected,
        slices=sum(row["slices"] for row in rows_of_run),
        rejected_slices=refusals.reasons.total(),
        reasons=refusals.counts(),
        flags=dict(sorted(Counter(flag for row in segmented.values() for flag in row["flags"]).items())),
        not_made=dict(sorted(Counter(one["profile"] for row in segmented.values() for one in row["not_made"]).items())),
        seg_paths=[uri for row in ended for uri in ledger.uris(row, config.profiles[0])],
        report=page,
        run_id=run_id,
    )


def _damaged(output: str, earlier: pa.Table) -> set[str]:
    """The series of which a file is not in the output, or is of another size than the ledger tells, by one listing."""
    try:
        sizes = {info.uri: info.size for info in storage.list_files(output)}
    except FileNotFoundError:
        sizes = {}
    damaged = {
        row["series_key"]
        for row in earlier.select(["series_key", "outputs"]).to_pylist()
        if any(sizes.get(file["uri"]) != file["bytes"] for file in row["outputs"] or ())
    }
    if damaged:
        logger.warning("segment: files of %d series are gone or of another size; they are made again", len(damaged))
    return damaged


def _cataloged(config: SegmentConfig, output: str) -> str:
    assert config.source is not None
    manifest = storage.join(output, MANIFEST)
    catalog(CatalogConfig(config.source, manifest, Layout(), config.max_reject_fraction))
    return manifest


def _config_digest(config: SegmentConfig, settings: str) -> str:
    """Of what decides about a series' files."""
    pacs = config.pacs and config.pacs.rstrip("/")
    return configuration.digest([settings, list(config.profiles), config.nothing_found, pacs, VERSION])


def _known(config: SegmentConfig, versions: Sequence[ModelVersion]) -> Known | None:
    """What several models, or mirror images, are judged by, where they were evaluated on validation; else None."""
    if not config.ensemble and config.mirror is None:
        return None  # the bundle tells
    known = judged.find(config.tracking_uri, versions, config.mirror)
    if known is None:
        logger.warning(
            "segment: these models together, or with mirror images, were not evaluated on validation: entropy, pieces "
            "and pairwise Dice are judged by fixed limits, and volumes have no interval; the evaluate job with "
            "split=val and the same model_uri, ensemble and mirror measures it"
        )
    return known


def _asked(config: SegmentConfig, model_uri: str) -> dict[str, Any]:
    """What the report and MLflow say was asked for.

    Without the tracking URI, which may hold a password, and the query of a source, which may name a patient.
    """
    asked = configuration.flat(config) | {"model_uri": model_uri}
    if config.source is not None:
        asked["source"] = config.source.partition("?")[0]
    return {key: value for key, value in asked.items() if key != "tracking_uri"}


def _settings(config: SegmentConfig, known: Known | None) -> str:
    settings = settings_digest(config.postprocess, config.engine, config.mirror)
    if not config.ensemble and config.mirror is None:
        return settings
    # Flags and intervals stand in the files, too; those of one model are part of its digest.
    return configuration.digest([settings, None if known is None else configuration.plain(known)])


def _segmented(
    planned: Plan,
    task: Task,
    folders: Sequence[Path],
    output: str,
    config: SegmentConfig,
    known: Known | None,
    run_id: str,
    check: Callable[[], None],
) -> list[dict[str, Any]]:
    """Segments what is to do, writes the ledger's rows and returns them; the plan counts the refusals."""
    workers = stream.Workers(
        config.concurrency, config.cpus_per_actor, config.gpus_per_actor, config.engine, config.mirror, known
    )
    # TensorFlow would take threads and GPUs of the driver.
    amount = sys.maxsize if config.engine.name == "tensorflow" else planned.slices
    asked = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor}
    if not work.in_cluster("segment", amount, asked, config.concurrency, _KEYS):
        workers = replace(workers, actors=1, cpus=max(config.cpus_per_actor, os.cpu_count() or 1), here=True)
    rows: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    todo = len(planned.todo) + len(planned.kept)
    with Progress(todo, planned.slices, output, config.tracking_uri, run_id) as progress:
        try:
            for some in stream.rows(planned.todo, planned.kept, task, folders, workers):
                waiting += some
                progress.update(some)
                # More end while the ledger is written: the other half is for those.
                if len(waiting) >= max(1, config.unrecorded // 2):
                    check()
                    rows += _appended(output, waiting, planned.refusals, run_id)
                    waiting = []
        finally:
            check()
            rows += _appended(output, waiting, planned.refusals, run_id)
    assert len(rows) == todo, "every series is one row"
    return rows


def _keep(
    output: str,
    known: Mapping[str, Mapping[str, Any]],
    rows: Sequence[dict[str, Any]],
    rejects: Sequence[dict[str, Any]],
) -> None:
    """Writes what the plan says of series that cannot be used, where the tables do not say the same already."""
    ledger.append(output, *ledger.news(rows, rejects, known))


def _appended(output: str, rows: Sequence[dict[str, Any]], refusals: Refusals, run_id: str) -> list[dict[str, Any]]:
    """The rows without their rejects, which are counted and written."""
    rejects = [reject for row in rows for reject in row["rejects"]]
    alone = [{name: value for name, value in row.items() if name != "rejects"} for row in rows]
    ledger.append(output, [row | {"run_id": run_id} for row in alone], rejects)
    refusals.add(rejects)
    return alone


def _check_budget(refusals: Refusals, accepted: int, most: float, output: str) -> None:
    """Compares what this stage refused, in this run or before, with what the catalog had accepted."""
    against = refusals.against()
    ours = sum(against.values())
    if ours > most * accepted:
        counts = ", ".join(f"{reason} {count}" for reason, count in against.items())
        raise ValueError(
            f"segment: {ours} of {accepted} objects rejected, over max_reject_fraction {most}: {counts}; "
            f"{storage.join(output, ledger.REJECTS_FOLDER)} names each"
        )
