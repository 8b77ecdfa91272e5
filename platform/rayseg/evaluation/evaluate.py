"""Evaluate: a registered model over a held-out split, from the source objects, on their own grids.

The prepared set only says which rows are held out. Each row's image and mask are read again at their full size, so the
scores include what resampling costs, and models of different input sizes are scored on the same pixels. A case is a
patient, all of whose rows go to one task: what is held at a time are the label maps of one series in each actor, and
sums of each patient in the driver.

The scores of a model by itself, as it is served, go to the run that trained it. An ensemble, or a model with its mirror
images, is what the segment job may run over an archive: its scores go to a run of their own, for `compare`.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from rayseg import config as configuration
from rayseg import work
from rayseg.data import prepared as prepared_sets
from rayseg.data.conformal import VolumeErrors
from rayseg.data.prepared import PreparedSet
from rayseg.data.range import Range
from rayseg.evaluation import checks
from rayseg.evaluation.cases import Tolerance
from rayseg.evaluation.publish import add_to_card, publish
from rayseg.evaluation.record import Record
from rayseg.evaluation.scoring import CPUS_PER_ACTOR, score
from rayseg.inference.heldout import slices
from rayseg.inference.networks import Mirror
from rayseg.tracking import bundle as bundles
from rayseg.tracking import judged, registry, runs
from rayseg.tracking.version import ModelVersion, together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """Which model, on which rows."""

    prepared: str  # URI of a prepared set
    model_uri: str  # models:/NAME/VERSION or models:/NAME@ALIAS
    tracking_uri: str  # URI of the MLflow server or database, such as sqlite:///work/mlflow.db
    split: Literal["train", "val", "test"] = "test"  # which patients are scored
    ensemble: tuple[str, ...] = ()  # further models; their probabilities are averaged with the first model's
    # average over mirror images too: by columns; by rows and columns (both); of volumes by all three axes (all)
    mirror: Mirror | None = None
    concurrency: int = 1  # actors, one CPU each
    tolerance: Tolerance = field(default_factory=Tolerance)  # distance within which surfaces agree, for `nsd`
    resamples: int = 2000  # draws of patients for the intervals
    min_patients: int = 5  # with fewer patients nothing gets an interval
    overlays: int = 6  # number of pictures: the largest slice of cases from the worst to the best
    worst: int = 10  # number of pictures: the slice with most wrong pixels of the worst cases
    max_reject_fraction: float = 0.2  # the job fails where a greater share of the objects is rejected

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.overlays < 0 or self.worst < 0:
            raise ValueError("evaluate: concurrency of at least 1, overlays and worst of at least 0 expected")
        if self.resamples < 100 or self.min_patients < 2:
            raise ValueError("evaluate: resamples of at least 100 and min_patients of at least 2 expected")
        if min(self.tolerance.mm, self.tolerance.px) < 0:
            raise ValueError("evaluate.tolerance: 0 or more expected")

    @property
    def alone(self) -> bool:
        """Whether it is one model as it is served."""
        return not self.ensemble and self.mirror is None


@dataclass(frozen=True)
class EvaluateResult:
    """What came out, without what is undefined; docs/reference/metrics.md defines the metrics.

    Of several classes the metrics are means over those that have one, and the numbers sums; `classes` has those of
    each.
    """

    model_uri: str
    run_id: str  # of the run that has all of it
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
    doubts: list[str]  # what speaks against the scores: of `test`, models that were trained on its patients
    cases_table: str  # URI of a CSV in the run: counts and scores of each case; `cases.parquet` is beside it
    report: str  # URI of an HTML file in the run
    overlays: list[str]  # URIs of PNG files in the run
    seconds: float


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Scores a registered model on a split; everything goes to the MLflow run that trained it, and its card is renewed.

    With `ensemble` or `mirror` everything goes to a run of its own, and no card is touched. On validation that run
    then has what the segment job judges these models by, see `tracking.judged`.

    Raises:
        ValueError: no such set or model, a split without rows, labels that are not the model's, models that are no
            ensemble, a set that does not know the neighbours that the model looks at, too many rejects.
    """
    began = time.monotonic()
    held_out = prepared_sets.describe(config.prepared)
    rows = slices(held_out, config.split)
    if rows.num_rows == 0:
        raise ValueError(f"evaluate.split: the prepared set has no rows in {config.split}")
    asked = {"CPU": CPUS_PER_ACTOR}
    in_cluster = work.in_cluster("evaluate", rows.num_rows, asked, config.concurrency, {"count": "concurrency"})
    fetched = [registry.fetch(config.tracking_uri, uri) for uri in (config.model_uri, *config.ensemble)]
    described = [bundles.describe(bundle_dir) for bundle_dir, _ in fetched]
    for (_, version), description in zip(fetched, described, strict=True):
        _check_fits(version, description, held_out)
    if len({("volume" in one, _neighbours(one), one.get("preprocess", {}).get("color")) for one in described}) > 1:
        raise ValueError(
            "evaluate.ensemble: models that look at equally many neighbours, and all at grey or all at colour images, "
            "or all at volumes, expected"
        )

    record = Record(config.split, held_out.labels)
    bundle_dirs = [bundle_dir for bundle_dir, _ in fetched]
    actors = config.concurrency if in_cluster else None
    for row in score(rows, bundle_dirs, held_out.labels, config.tolerance, config.mirror, actors):
        record.add(row)
    rejected, scored = len(record.rejects), record.slices
    assert rejected + scored == rows.num_rows, "every row is accounted for"
    reasons = dict(sorted(Counter(row["reason"] for row in record.rejects).items()))
    if rejected > config.max_reject_fraction * rows.num_rows or not scored:
        raise ValueError(
            f"evaluate: {rejected} of {rows.num_rows} rows rejected, over max_reject_fraction "
            f"{config.max_reject_fraction}: {reasons}; are the source objects still where they were prepared from?"
        )

    versions = [version for _, version in fetched]
    errors = _volume_errors(config, versions, described[0])
    findings = record.findings(resamples=config.resamples, min_patients=config.min_patients, errors=errors)
    leaks = _leaks(config, versions, record.of_patient)
    doubts = leaks + _doubts(versions, described)
    for doubt in doubts:
        logger.warning("evaluate: %s", doubt)
    with _run(config, versions) as run_id:
        artifacts = publish(
            config.tracking_uri,
            run_id,
            _told(config, versions),
            held_out,
            record,
            findings,
            tolerance=str(config.tolerance),
            overlays=config.overlays,
            worst=config.worst,
            doubts=doubts,
        )
        if config.split == "val" and not config.alone and not leaks:
            trained = described[0]["range"] and configuration.build(Range, described[0]["range"])
            known = record.known(trained, volumes=not held_out.limited)
            judged.keep(config.tracking_uri, run_id, versions, config.mirror, known)
    if config.alone:
        add_to_card(config.tracking_uri, versions[0], held_out, record, findings, tolerance=str(config.tolerance))
    metrics = {name: one.value for name, one in findings.together.items()}
    return EvaluateResult(
        model_uri=together(versions).uri,
        run_id=run_id,
        split=config.split,
        cases=record.patients,
        slices=scored,
        dice_pooled=metrics.get("dice_pooled"),
        dice_per_case=metrics.get("dice_per_case"),
        background_dice=findings.background_dice,
        metrics=metrics,
        intervals=findings.intervals,
        classes={
            name: {metric: one.value for metric, one in of_class.items()} for name, of_class in findings.classes.items()
        },
        rejected=rejected,
        reasons=reasons,
        doubts=doubts,
        cases_table=artifacts.cases_table,
        report=artifacts.report,
        overlays=artifacts.overlays,
        seconds=time.monotonic() - began,
    )


def _check_fits(version: ModelVersion, description: Mapping[str, Any], held_out: PreparedSet) -> None:
    found = tuple(description["labels"]["names"])
    neighbours, known = _neighbours(description), held_out.preprocess.neighbours if held_out.volume is None else 0
    if "volume" in description and held_out.limited and held_out.volume is None:
        raise ValueError(f"evaluate.prepared: {version.uri} sees volumes, and prepare.limit left slices out of the set")
    if neighbours > known:
        raise ValueError(
            f"evaluate.prepared: {version.uri} looks at {neighbours} slices on each side, the set names {known}; "
            f"prepare one with preprocess.neighbours of at least {neighbours}"
        )
    if found != held_out.labels.names:
        raise ValueError(f"evaluate: {version.uri} finds {found}, the prepared set is of {held_out.labels.names}")


def _neighbours(description: Mapping[str, Any]) -> int:
    neighbours: int = description.get("preprocess", {}).get("neighbours", 0)
    return neighbours


def _leaks(config: EvaluateConfig, versions: Sequence[ModelVersion], patients: Collection[str]) -> list[str]:
    """Tells of models that were trained on patients who test them, or of which that is not known.

    Validation of one model alone is what its training says. Several are measured by patients new to all of them.
    """
    if config.split == "train" or (config.split == "val" and config.alone):
        return []
    held_out_by = ("test", config.split)
    outcomes = [checks.no_leak(config.tracking_uri, one, patients, held_out_by) for one in versions]
    return [check.detail for check in outcomes if not check.passed]


def _doubts(versions: Sequence[ModelVersion], described: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tells of models whose labels are shifted."""
    return [
        f"{version.uri} was trained on masks with mask_filter nearest: where slices shrink by an even factor its "
        "labels lie half a source pixel up and to the left"
        for version, description in zip(versions, described, strict=True)
        if getattr(bundles.preprocess_of(description), "mask_filter", "linear") == "nearest"
    ]


def _volume_errors(
    config: EvaluateConfig, versions: Sequence[ModelVersion], description: Mapping[str, Any]
) -> VolumeErrors:
    """Of one model what its bundle says, of several what their own evaluation on validation has found."""
    if config.alone:
        return configuration.build(VolumeErrors, description.get("volumes", {}))
    known = judged.find(config.tracking_uri, versions, config.mirror)
    return VolumeErrors() if known is None else known.volumes


def _told(config: EvaluateConfig, versions: Sequence[ModelVersion]) -> str:
    return together(versions).uri + (f", mirror {config.mirror}" if config.mirror else "")


def _run(config: EvaluateConfig, versions: Sequence[ModelVersion]) -> AbstractContextManager[str]:
    """The run that trained the model, as it is; for anything but a model alone a new one in that one's experiment."""
    uri, first, model = config.tracking_uri, versions[0], together(versions)
    if config.alone:
        return nullcontext(first.run_id)
    mlflow = runs.client(uri)
    return runs.running(
        uri,
        mlflow.get_experiment(mlflow.get_run(first.run_id).info.experiment_id).name,
        f"evaluate-{model.name}-v{model.version}" + (f"-mirror-{config.mirror}" if config.mirror else ""),
        {key: value for key, value in configuration.flat(config).items() if key != "tracking_uri"},
        {
            "rayseg.kind": "evaluation",
            "rayseg.models": json.dumps({one.uri: one.run_id for one in versions}),
            "mlflow.note.content": f"{_told(config, versions)} on {config.split}, research software.",
        },
        [one.run_id for one in versions],
    )
