"""Cross-validation: every patient is held out once, and the scores are of patients whom their model never saw.

The patients are cut into folds (`data.split.Split.held_out`). Fold k's model trains without fold k and the fold after
it; the latter chooses its epoch and its threshold, the former is held out. Each held-out fold is scored by its model as
`evaluate` scores a test split, and all patients together make one table, with intervals over patients. The folds'
models are registered, and their mean as one further model, which has no score here: every patient has trained most of
its members, so only a test set that no fold saw can judge it.

A driver that was lost goes on when the same job is started again: with the epochs of folds that were running, without
those that have ended, and nothing is registered twice.
"""

import contextlib
import dataclasses
import json
import logging
import time
import uuid
from dataclasses import dataclass, field

from rayseg import cluster, storage
from rayseg import config as configuration
from rayseg.crossvalidation import joined, scores, training
from rayseg.crossvalidation.scores import Fold
from rayseg.data import prepared as prepared_sets
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.prepared import PreparedSet
from rayseg.evaluation.cases import Tolerance
from rayseg.evaluation.publish import Artifacts, evaluation, publish
from rayseg.evaluation.record import Findings, Record
from rayseg.inference.networks import Mirror
from rayseg.tracking import runs
from rayseg.tracking.version import ModelVersion
from rayseg.training import precision, trainer
from rayseg.training.settings import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CrossValidate:
    """The section `crossvalidate`."""

    folds: int = 5  # number of folds, 3 or more; patients are dealt to them as `prepare.split` says
    concurrent: int | None = None  # folds trained at a time; by default as many as the cluster holds
    mirror: Mirror | None = None  # average over mirror images too, when folds are scored and in the ensemble

    def __post_init__(self) -> None:
        if self.folds < 3:
            raise ValueError(
                f"crossvalidate.folds: 3 or more expected (one is held out, one validates), got {self.folds}"
            )
        if self.concurrent is not None and self.concurrent < 1:
            raise ValueError(f"crossvalidate.concurrent: a positive number expected, got {self.concurrent}")


@dataclass(frozen=True)
class CrossValidateConfig:
    """Folds of the set that `prepare` makes, trained as `train` says."""

    prepare: PrepareConfig  # the folds' sets go beside its output
    train: TrainConfig  # its `prepared` is not read
    crossvalidate: CrossValidate = field(default_factory=CrossValidate)

    def __post_init__(self) -> None:
        self.train.check_among_others("a cross-validation")


@dataclass(frozen=True)
class CrossValidateResult:
    """Out-of-fold scores, which are of single models, and the ensemble of these.

    docs/reference/metrics.md defines the metrics.
    """

    run_id: str  # the parent of the folds' runs; it has all of it
    model_uri: str  # the ensemble, which has no score
    version: str
    patients: int
    slices: int
    dice_pooled: float | None
    dice_per_image: float | None
    dice_per_case: float | None
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95 %, by patient
    folds: list[Fold]
    rejected: int
    doubts: list[str]  # what speaks against the scores: weights to start from that have seen who is held out
    cases_table: str  # URI of a CSV in the run: counts and scores of each patient
    report: str  # URI of an HTML file in the run
    seconds: float


def crossvalidate(config: CrossValidateConfig) -> CrossValidateResult:
    """Trains a model a fold, scores each on its held-out patients, and registers their mean.

    Raises:
        ValueError: as `prepare` and `trainer.fit` do, for any fold.
        RuntimeError: a fold's training was lost; the same job started again goes on.
    """
    began = time.monotonic()
    cluster.connect()
    base = trainer.absolute(config.train)
    cluster.require("train", base.bundle, base.most_workers, trainer.keys(base))
    with contextlib.ExitStack() as stack:
        sets = [stack.enter_context(_prepared(config, fold)) for fold in range(config.crossvalidate.folds)]
        result = _crossvalidated(config, base, sets)
    return dataclasses.replace(result, seconds=time.monotonic() - began)


def _crossvalidated(config: CrossValidateConfig, base: TrainConfig, sets: list[PreparedSet]) -> CrossValidateResult:
    # How many train at once changes nothing of what comes out: a start with another number goes on.
    same = dataclasses.replace(config, crossvalidate=dataclasses.replace(config.crossvalidate, concurrent=None))
    key = configuration.digest([configuration.plain(same), [one.digest for one in sets]])[:12]
    unfinished = storage.join(base.storage, f"{base.name}-folds-{key}.unfinished.json")
    try:
        mark = storage.read_json(unfinished)
    except (FileNotFoundError, ValueError):
        mark = {}
    base, decision = precision.decided(base, sets[0], mark)  # one for all folds
    if not mark:
        mark = {"id": uuid.uuid4().hex, **decision}
        storage.write_json(unfinished, mark)
    run_id = _begin(dataclasses.replace(config, train=base), mark["id"], precision.tags(decision))
    folder = storage.join(base.storage, f"{base.name}-folds-{key}-{run_id[:8]}")
    try:
        trained = training.train(base, sets, folder, run_id, config.crossvalidate.concurrent)
        record, folds, doubts = scores.scored(
            base.tracking_uri, sets, trained, config.crossvalidate.mirror, config.prepare.max_reject_fraction
        )
        findings = record.findings(resamples=2000, min_patients=5)
        artifacts = publish(
            base.tracking_uri,
            run_id,
            f"{len(folds)} models, each on the patients whom it never saw",
            sets[0],
            record,
            findings,
            tolerance=str(Tolerance()),
            overlays=6,
            worst=10,
            doubts=doubts,
        )
        scores.publish_folds(base.tracking_uri, run_id, folds)
        of_folds = evaluation(record, sets[0], findings, str(Tolerance()))
        version = joined.register(base, sets[0], trained, config.crossvalidate.mirror, of_folds, run_id)
    except BaseException as error:
        trainer.finish(base.tracking_uri, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    runs.finish(base.tracking_uri, run_id, "FINISHED")
    storage.delete(unfinished)
    storage.delete_tree(folder)  # checkpoints
    return _result(run_id, version, record, findings, folds, doubts, artifacts)


def _prepared(config: CrossValidateConfig, fold: int) -> contextlib.AbstractContextManager[PreparedSet]:
    """To read: the set whose test split is the fold; an equal one that stands is taken."""
    split = dataclasses.replace(
        config.prepare.split, folds=config.crossvalidate.folds, fold=fold, held_out=True, val=0.0
    )
    output = storage.join(f"{config.prepare.output.rstrip('/')}-folds", f"{config.crossvalidate.folds}-{fold}")
    prepare(dataclasses.replace(config.prepare, output=output, split=split))
    return prepared_sets.reading(output, "crossvalidate")


def _begin(config: CrossValidateConfig, job_id: str, more_tags: dict[str, str]) -> str:
    """The run in MLflow: the one that an earlier start began, else a new one."""
    base = config.train
    uri = base.tracking_uri
    tags = {"rayseg.kind": "crossvalidation", "rayseg.crossvalidation": job_id}
    for run_id in runs.tagged(uri, base.experiment, tags):
        logger.info("crossvalidate: goes on with the unfinished run %s", run_id)
        runs.resume(uri, run_id)
        return run_id
    run_id = runs.start(uri, base.experiment, f"{base.name}-folds", configuration.flat(config), tags | more_tags)
    runs.log_bytes(uri, run_id, "crossvalidation.json", json.dumps(configuration.plain(config), indent=2).encode())
    return run_id


def _result(
    run_id: str,
    version: ModelVersion,
    record: Record,
    findings: Findings,
    folds: list[Fold],
    doubts: list[str],
    artifacts: Artifacts,
) -> CrossValidateResult:
    values = {name: one.value for name, one in findings.together.items()}
    return CrossValidateResult(
        run_id=run_id,
        model_uri=version.uri,
        version=version.version,
        patients=record.patients,
        slices=record.slices,
        dice_pooled=values.get("dice_pooled"),
        dice_per_image=values.get("dice_per_image"),
        dice_per_case=values.get("dice_per_case"),
        metrics=values,
        intervals=findings.intervals,
        folds=folds,
        rejected=len(record.rejects),
        doubts=doubts,
        cases_table=artifacts.cases_table,
        report=artifacts.report,
        seconds=0.0,
    )
