"""Evaluate: a registered model over a held-out split, from the source objects, on their own grids.

The prepared set only says which rows are held out. Each row's image and mask are read again at their full size, so the
scores include what resampling costs, and models of different input sizes are scored on the same pixels. A case is a
patient, all of whose rows go to one task: what is held at a time are the label maps of one series in each actor, and
sums of each patient in the driver.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from tqdm import tqdm

from rayseg import cluster, logs, meters
from rayseg.data import prepared as prepared_sets
from rayseg.data.labels import Labels
from rayseg.evaluation.cases import Tolerance
from rayseg.evaluation.publish import publish
from rayseg.evaluation.record import Record
from rayseg.evaluation.scorer import COLUMNS, SCORED, Scorer
from rayseg.inference.predictor import Predictor
from rayseg.models.engine import Engine
from rayseg.tracking import bundle as bundles
from rayseg.tracking import registry

_ROWS_PER_TASK = 32  # and as many more as a patient has
_CPUS_PER_ACTOR = 1


@dataclass(frozen=True)
class EvaluateConfig:
    """Which model, on which rows."""

    prepared: str  # URI of a prepared set
    model_uri: str  # models:/NAME/VERSION or models:/NAME@ALIAS
    tracking_uri: str
    split: Literal["train", "val", "test"] = "test"
    concurrency: int = 1  # actors, one CPU each
    tolerance: Tolerance = field(default_factory=Tolerance)  # of the normalised surface distance
    resamples: int = 2000  # draws of patients for the intervals
    min_patients: int = 5  # of fewer nothing gets an interval
    overlays: int = 6  # pictures: the largest slice of so many cases, from the worst case to the best
    worst: int = 10  # pictures: the slice with most wrong pixels of so many of the worst cases
    max_reject_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.overlays < 0 or self.worst < 0:
            raise ValueError("evaluate: concurrency of at least 1, overlays and worst of at least 0 expected")
        if self.resamples < 100 or self.min_patients < 2:
            raise ValueError("evaluate: resamples of at least 100 and min_patients of at least 2 expected")
        if min(self.tolerance.mm, self.tolerance.px) < 0:
            raise ValueError("evaluate.tolerance: 0 or more expected")


@dataclass(frozen=True)
class EvaluateResult:
    """What came out, without what is undefined; README has the metrics' definitions.

    Of several classes the metrics are means over those that have one, and the numbers sums; `classes` has those of
    each.
    """

    model_uri: str
    split: str
    cases: int
    slices: int
    dice_pooled: float | None
    dice_per_case: float | None
    background_dice: float | None  # pooled Dice of "everything is background": 0 unless there is nothing to find
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # of metrics: 95 %, by patient
    classes: dict[str, dict[str, float]]  # metrics of each class
    rejected: int
    reasons: dict[str, int]
    cases_table: str  # URI of a CSV in the model's run: counts and scores of each case; `cases.parquet` is beside it
    report: str  # URI of an HTML file in the model's run
    overlays: list[str]  # URIs of PNG files in the model's run
    seconds: float


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Scores a registered model on a split; everything goes to the MLflow run that trained it, and its card is renewed.

    Raises:
        ValueError: no such set or model, a split without rows, labels that are not the model's, a set that does not
            know the neighbours that the model looks at, too many rejects.
    """
    began = time.monotonic()
    cluster.connect()
    cluster.require("evaluate", {"CPU": _CPUS_PER_ACTOR}, config.concurrency, {"count": "concurrency"})
    held_out = prepared_sets.describe(config.prepared)
    rows = held_out.read_rows(config.split, COLUMNS)
    if rows.num_rows == 0:
        raise ValueError(f"evaluate.split: the prepared set has no rows in {config.split}")
    bundle_dir, version = registry.fetch(config.tracking_uri, config.model_uri)
    description = bundles.describe(bundle_dir)
    found = tuple(description["labels"]["names"])
    neighbours, known = description["preprocess"].get("neighbours", 0), held_out.preprocess.neighbours
    if neighbours > known:
        raise ValueError(
            f"evaluate.prepared: {version.uri} looks at {neighbours} slices on each side, the set names {known}; "
            f"prepare one with preprocess.neighbours of at least {neighbours}"
        )
    if found != held_out.labels.names:
        raise ValueError(f"evaluate: {version.uri} finds {found}, the prepared set is of {held_out.labels.names}")

    record = Record(config.split, held_out.labels)
    for row in _score(rows, bundle_dir, held_out.labels, config):
        record.add(row)
    rejected, scored = len(record.rejects), record.slices
    assert rejected + scored == rows.num_rows, "every row is accounted for"
    reasons = dict(sorted(Counter(row["reason"] for row in record.rejects).items()))
    if rejected > config.max_reject_fraction * rows.num_rows or not scored:
        raise ValueError(
            f"evaluate: {rejected} of {rows.num_rows} rows rejected, over max_reject_fraction "
            f"{config.max_reject_fraction}: {reasons}; are the source objects still where they were prepared from?"
        )

    findings = record.findings(resamples=config.resamples, min_patients=config.min_patients)
    artifacts = publish(
        config.tracking_uri,
        version,
        held_out,
        record,
        findings,
        tolerance=str(config.tolerance),
        overlays=config.overlays,
        worst=config.worst,
    )
    metrics = {name: one.value for name, one in findings.together.items()}
    return EvaluateResult(
        model_uri=version.uri,
        split=config.split,
        cases=record.patients,
        slices=scored,
        dice_pooled=metrics.get("dice_pooled"),
        dice_per_case=metrics.get("dice_per_case"),
        background_dice=findings.background_dice,
        metrics=metrics,
        intervals={
            name: (one.low, one.high)
            for name, one in findings.together.items()
            if one.low is not None and one.high is not None
        },
        classes={
            name: {metric: one.value for metric, one in of_class.items()} for name, of_class in findings.classes.items()
        },
        rejected=rejected,
        reasons=reasons,
        cases_table=artifacts.cases_table,
        report=artifacts.report,
        overlays=artifacts.overlays,
        seconds=time.monotonic() - began,
    )


class _Actor:
    """Rows of whole patients in, a row of `SCORED` for each out."""

    def __init__(
        self,
        bundle: "ray.ObjectRef[dict[str, bytes]]",
        labels: Labels,
        tolerance: Tolerance,
        told: Mapping[str, str],
    ) -> None:
        logs.adopt(told)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(bundle).items():
                Path(folder, name).write_bytes(content)
            # Probabilities are scored too, and screening leaves those of slices with nothing in bfloat16.
            predictor = Predictor.load(folder, engine=Engine(precision="float32"), threads=_CPUS_PER_ACTOR)
            self._scorer = Scorer(predictor, labels, tolerance)

    def __call__(self, rows: pa.Table) -> pa.Table:
        patients = groupby(rows.to_pylist(), key=lambda row: row["patient_key"])
        return pa.Table.from_pylist([self._scorer.score(list(of)) for _, of in patients], schema=SCORED)


def _score(rows: pa.Table, bundle_dir: Path, labels: Labels, config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """Yields the rows of `SCORED` as dictionaries, in no certain order."""
    # The bundle travels through Ray: actors need neither the registry nor its artifact store.
    bundle = ray.put({file.name: file.read_bytes() for file in bundle_dir.iterdir()})
    dataset = ray.data.from_arrow(list(_tasks(rows))).map_batches(
        _Actor,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(bundle, labels, config.tolerance, logs.told()),
        compute=ray.data.ActorPoolStrategy(size=config.concurrency),
        num_cpus=_CPUS_PER_ACTOR,
    )
    with tqdm(total=rows.num_rows, desc="evaluate", unit=" slices", disable=None) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                yield row
                progress.update(len(row["row_ids"]) + len(row["rejects"]))
                meters.slices("evaluate", len(row["row_ids"]), Counter(one["reason"] for one in row["rejects"]))
                meters.show("rayseg_waiting", rows.num_rows - progress.n, stage="evaluate")


def _tasks(rows: pa.Table) -> Iterator[pa.Table]:
    """Tables of whole patients; within them the slices of a series stand together, in the order that they had."""
    ordered = rows.take(pc.sort_indices(rows, [("patient_key", "ascending"), ("series_key", "ascending")]))  # stable
    keys = ordered["patient_key"].to_pylist()
    start = 0
    for row in range(1, len(keys) + 1):
        if row == len(keys) or (row - start >= _ROWS_PER_TASK and keys[row] != keys[row - 1]):
            yield ordered.slice(start, row - start)
            start = row
