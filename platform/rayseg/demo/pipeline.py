"""The whole way of a slice in one run: store, catalog, prepare, train, evaluate, promote, segment, serve, report."""

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayseg import cluster, snapshots, storage
from rayseg.config import plain
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.demo import online, summary
from rayseg.demo.report import write_report
from rayseg.demo.store import object_store
from rayseg.evaluation.evaluate import EvaluateConfig, evaluate
from rayseg.evaluation.promote import PromoteConfig, promote
from rayseg.inference import ledger
from rayseg.inference.archive import SegmentConfig, segment
from rayseg.training.trainer import TrainConfig, fit

MARKER = ".rayseg-demo"
# Phantoms and published research data have no identity to guard, and a known key makes two demos split alike.
PSEUDONYM_KEY = "rayseg demo: not a secret"
STAGES = ("store", "catalog", "prepare", "train", "evaluate", "promote", "segment", "serve", "report")


@dataclass(frozen=True)
class Demo:
    """What the demo runs on. `data` and `archive` are local folders; without them phantom head-CT studies are made."""

    directory: str = "demo"  # everything that the demo writes; an older demo there is replaced
    bucket: str = "rayseg"  # bucket of the store that the demo starts
    data: str | None = None  # holds the folders that the recipe's catalog.layout names
    archive: str | None = None  # DICOM files to segment
    patients: int = 24  # phantom patients to train, validate and test on
    slices: int = 10  # slices of each phantom
    size: int = 256  # rows and columns of a phantom slice
    archive_patients: int = 3  # phantom patients of the archive


@dataclass(frozen=True)
class DemoConfig:
    """A whole recipe. Its URIs lie in the demo's own bucket and folder."""

    catalog: CatalogConfig
    prepare: PrepareConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    promote: PromoteConfig
    segment: SegmentConfig
    serve: dict[str, Any]  # the configuration of jobs.serve, which runs as a process of its own
    demo: Demo = field(default_factory=Demo)

    def __post_init__(self) -> None:
        if self.segment.manifest is None:
            raise ValueError("segment.manifest: the demo catalogs its archive to it, so it is needed")
        if self.prepare.preprocess.neighbours:
            raise ValueError(
                "prepare.preprocess.neighbours: the demo asks the service for single slices, which a model that looks "
                "at neighbours refuses; set it to 0, or run the jobs one by one"
            )


@dataclass(frozen=True)
class DemoResult:
    """What `make demo` prints as its last line."""

    seconds: float
    stages: dict[str, float]
    data: str
    train_workers: int
    epochs: int
    untrained_val_dice: float | None
    val_dice: float | None  # pooled, the best epoch
    test_dice: float | None  # pooled, on the native grid
    test_dice_per_case: float | None
    background_dice: float | None  # of "everything is background" on the same test slices
    model_uri: str
    promoted: bool
    segmented_series: int
    rejected: int  # objects of the archive without a mask
    seg_paths: list[str]
    http_status: int
    online_equals_bulk: bool
    slices_compared: int
    report: str


def demo(config: DemoConfig) -> DemoResult:
    """Runs every stage on real components: S3, Ray, MLflow, Ray Serve; leaves the models, the SEGs and a report.

    Raises:
        ValueError: `demo.directory` is a folder that no demo made, or only one of `data` and `archive` is given.
    """
    options = config.demo
    manifest = config.segment.manifest
    assert manifest is not None
    if (options.data is None) != (options.archive is None):
        raise ValueError("demo: give both demo.data (to train on) and demo.archive (to segment), or neither")
    for key, folder in (("demo.data", options.data), ("demo.archive", options.archive)):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{key}: there is no folder {folder}")
    directory = _fresh(Path(options.directory).absolute())
    archive_uri = f"s3://{options.bucket}/archive"
    seconds: dict[str, float] = {}
    with contextlib.ExitStack() as running:
        with _stage("store", seconds):
            os.environ.update(running.enter_context(object_store(directory / "store", options.bucket)))
            os.environ.setdefault("RAYSEG_PSEUDONYM_KEY", PSEUDONYM_KEY)
            data, archive = _fill_store(options, config.catalog.source, archive_uri)
            cluster.connect()  # after the environment is set: Ray's workers inherit it
        with _stage("catalog", seconds):
            cataloged = catalog(config.catalog)
            catalog(CatalogConfig(source=archive_uri, output=manifest, layout=Layout()))
        with _stage("prepare", seconds):
            prepared = prepare(config.prepare)
        with _stage("train", seconds):
            trained = fit(config.train)
        with _stage("evaluate", seconds):
            evaluated = evaluate(dataclasses.replace(config.evaluate, model_uri=trained.model_uri))
        with _stage("promote", seconds):
            promoted = promote(dataclasses.replace(config.promote, model_uri=trained.model_uri))
        with _stage("segment", seconds):
            segmented = segment(config.segment)
            local = directory / "segmentations"
            storage.download(config.segment.output, local)
        series = ledger.read(config.segment.output).to_pylist()
        uris_by_series = _uris_by_series(manifest)
        with _stage("serve", seconds), online.service(config.serve, directory / "serve.log") as url:
            # The service takes one slice a request, so a series of single images.
            largest = _largest([row for row in series if row["series_key"] in uris_by_series])
            answers = online.ask(url, uris_by_series[largest["series_key"]], ledger.uris(largest, "seg")[0])
        with _stage("report", seconds):
            results = summary.Results(
                data, archive, cataloged, prepared, trained, evaluated, promoted, segmented, series, answers, url
            )
            page = summary.page(results, seconds, config.prepare.preprocess, manifest)
            path = directory / "report.html"
            write_report(str(path), dataclasses.replace(page, config=plain(config)))
    return DemoResult(
        seconds=round(sum(seconds.values()), 1),
        stages=seconds,
        data=page.data,
        train_workers=trained.train_workers,
        epochs=trained.epochs,
        untrained_val_dice=trained.untrained_val_dice,
        val_dice=trained.val_dice,
        test_dice=evaluated.dice_pooled,
        test_dice_per_case=evaluated.dice_per_case,
        background_dice=evaluated.background_dice,
        model_uri=trained.model_uri,
        promoted=promoted.promoted,
        segmented_series=segmented.segmented,
        rejected=segmented.rejected_slices,
        seg_paths=[uri.replace(config.segment.output, str(local), 1) for uri in segmented.seg_paths],
        http_status=answers.http_status,
        online_equals_bulk=answers.online_equals_bulk,
        slices_compared=answers.slices,
        report=str(path),
    )


@contextlib.contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 1)
    print(f"      {name}: {seconds[name]} s", file=sys.stderr, flush=True)


def _fresh(directory: Path) -> Path:
    """An empty folder for the demo, where an older demo may have been."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARKER).exists():
            raise ValueError(f"demo.directory: {directory} holds something else; name another folder")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()
    return directory


def _fill_store(options: Demo, studies_uri: str, archive_uri: str) -> tuple[str, str]:
    """Puts the studies and the archive into the store; returns in words what they are."""
    if options.data is not None and options.archive is not None:
        storage.upload(options.data, studies_uri)
        storage.upload(options.archive, archive_uri)
        return Path(options.data).name, Path(options.archive).name
    studies = synthetic.write_studies(studies_uri, options.patients, options.slices, options.size)
    synthetic.write_studies(
        archive_uri, options.archive_patients, options.slices, options.size, seed=1, masks=False, spoiled=True
    )
    return (
        f"{studies.patients} phantom head CTs, {studies.slices} slices, {studies.positive_slices} with a lesion",
        f"{options.archive_patients} other phantom head CTs and 3 broken objects",
    )


def _largest(series: list[dict[str, Any]]) -> dict[str, Any]:
    """The ledger's row of the series in which most was found."""
    rows = [row for row in series if row["verdict"] == "segmented"]
    if not rows:
        raise ValueError("demo.archive: no series of single images could be segmented; the ledger says why")
    return max(rows, key=lambda row: row["foreground_pixels"])


def _uris_by_series(manifest_uri: str) -> dict[str, list[str]]:
    """The accepted objects of a manifest by series key, in its order, without multi-frame ones."""
    uris: dict[str, list[str]] = {}
    for row in snapshots.read_table(manifest_uri, ["uri", "frame", "verdict", "series_key"]).to_pylist():
        if row["verdict"] == "ok" and row["frame"] is None:
            uris.setdefault(row["series_key"], []).append(row["uri"])
    return uris
