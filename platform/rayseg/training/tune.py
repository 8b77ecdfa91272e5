"""Tune: many runs of `trainer.fit` over a space of settings, on Ray Tune, to the best one as a recipe and a model.

All trials read the same prepared set. `trials` says how they run, `halving` who survives, `sweep` what one that is
started again goes by.
"""

import dataclasses
import json
import logging
import math
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from rayseg import cluster, storage
from rayseg import config as configuration
from rayseg.data.prepared import PreparedSet, reading
from rayseg.tracking import figures, runs
from rayseg.training import findings, precision, trainer
from rayseg.training.findings import Scaling
from rayseg.training.halving import rungs
from rayseg.training.settings import TrainConfig, TrainResult, Trial
from rayseg.training.space import Space
from rayseg.training.sweep import Outcome, Sweep, told
from rayseg.training.trials import Trials, run

logger = logging.getLogger(__name__)

_MANY = 1000  # trials at once, where nothing tells how far the cluster grows
TABLE_FILE, PICTURE_FILE, RECIPE_FILE = "trials.csv", "trials.png", "best.yaml"


def _default_space() -> dict[str, dict[str, Any]]:
    return {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"choice": [8, 16, 32]}}


@dataclass(frozen=True)
class Tune:
    """The section `tune`: what is tried, how long, and how many at once."""

    # keys of `train` and what to draw: see the how-to page
    space: dict[str, dict[str, Any]] = field(default_factory=_default_space)
    points: tuple[dict[str, Any], ...] = ()  # values of the first trials; the others are drawn
    trials: int = 12  # number of trials
    search: Literal["random", "optuna"] = "random"  # random, or Optuna (TPE), whose first ten are random too
    seed: int = 1  # another seed draws other trials
    grace_epochs: int = 3  # epochs that each trial has; as many as `train.epochs` stop none
    reduction_factor: int = 3  # at each rung the best of so many go on
    concurrent: int | None = None  # trials at a time; by default as many as the cluster has room for
    output: str = ""  # URI of a folder for the table, the picture and the best recipe; by default one in train.storage

    def __post_init__(self) -> None:
        for key, least in (("trials", 1), ("grace_epochs", 1), ("reduction_factor", 2), ("concurrent", 1), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"tune.{key}: {least} or more expected, got {value}")
        if len(self.points) > self.trials:
            raise ValueError(f"tune.trials: at least as many as tune.points expected, {len(self.points)}")


@dataclass(frozen=True)
class TuneConfig:
    """A sweep over runs like `train`."""

    train: TrainConfig
    tune: Tune = field(default_factory=Tune)

    def __post_init__(self) -> None:
        self.train.check_among_others("a sweep")


@dataclass(frozen=True)
class TuneResult:
    """The best trial's registered model, its recipe, and what became of all trials."""

    run_id: str  # of the sweep, the parent of the trials' runs
    best: int
    best_values: dict[str, Any]
    best_run_id: str
    model_uri: str
    version: str
    val_dice: float | None  # pooled, of the best trial's best epoch
    best_epoch: int
    completed: int
    stopped: int
    failed: int
    recipe: str  # `python -m jobs.train --config` takes it as it is
    table: str
    picture: str
    scaling: Scaling | None
    trials: list[Outcome]
    seconds: float


def tune(config: TuneConfig) -> TuneResult:
    """Runs a sweep: trials of `train` with values of the space, halved successively, and registers the best one.

    A sweep that has not finished is gone on with when the same job is started again, in the same MLflow run: no trial
    that has ended is run again. A trial that fails is recorded and does no harm to the others.

    Raises:
        ValueError: a run or a space that cannot be, a trial too large for the cluster, or all trials failed.
        RuntimeError: the sweep was interrupted, or MLflow does not answer; the same job started again goes on.
    """
    began = time.monotonic()
    cluster.connect()
    config = dataclasses.replace(config, train=trainer.absolute(config.train))
    with reading(config.train.prepared, "tune") as prepared:
        result = _swept(config, prepared)
    return dataclasses.replace(result, seconds=time.monotonic() - began)


def _swept(config: TuneConfig, prepared: PreparedSet) -> TuneResult:
    base, options = config.train, config.tune
    Space(options.space, options.points, base)  # refused before anything else
    trainer.check(base, prepared)
    abreast = min(_room(base), options.trials, options.concurrent or options.trials)

    key = f"{base.name}-sweep-{configuration.digest([configuration.plain(config), prepared.digest])[:12]}"
    unfinished = storage.join(base.storage, f"{key}.unfinished.json")
    try:
        mark = storage.read_json(unfinished)
        logger.info("tune: goes on with an unfinished sweep")
    except (FileNotFoundError, ValueError):
        mark = {}
    base, decision = precision.decided(base, prepared, mark)  # one for all trials
    if not mark:
        mark = {"id": uuid.uuid4().hex, "abreast": abreast, **decision}
        storage.write_json(unfinished, mark)
    config = dataclasses.replace(config, train=base)
    space = Space(options.space, options.points, base)
    folder = storage.join(base.storage, f"{key}-{mark['id'][:8]}")
    run_id = _begin(config, mark["id"], precision.tags(decision))
    trials = storage.join(folder, "trials")
    drawn = (options.search, options.seed, options.trials)
    halving = (rungs(options.grace_epochs, options.reduction_factor, base.epochs), options.reduction_factor)
    sweep = Sweep(storage.join(folder, "ended"), space, *drawn, *halving, mark["abreast"])
    runs_of = Trials(space, run_id, trials, base.name)
    try:
        run(sweep, runs_of, storage.join(folder, "tune"), abreast)
        outcomes = sweep.outcomes()
        _mark(base, run_id, outcomes)
        try:
            best = findings.best(outcomes)
        except ValueError:
            storage.delete(unfinished)  # there is nothing to go on with
            raise
        logger.info("tune: the best is trial %d (%s); its model is registered", best.number, told(best.values))
        result = trainer.fit(runs_of.config(best.number, best.values), Trial(run_id, best.number, register=True))
        found = _conclude(
            config, run_id, outcomes, best, result, storage.absolute(options.output) if options.output else folder
        )
    except BaseException as error:
        trainer.finish(base.tracking_uri, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    runs.finish(base.tracking_uri, run_id, "FINISHED")
    storage.delete(unfinished)
    for below in ("trials", "tune"):  # checkpoints of the trials, and Ray Tune's own files
        storage.delete_tree(storage.join(folder, below))
    return found


def _room(train: TrainConfig) -> int:
    """How many trials the cluster has room for; raises ValueError where there is none for one."""
    cluster.require("train", train.bundle, train.most_workers, trainer.keys(train))
    room = cluster.room(train.bundle) / train.most_workers
    return _MANY if math.isinf(room) else int(room)


def _begin(config: TuneConfig, sweep_id: str, more_tags: dict[str, str]) -> str:
    """The sweep's run in MLflow: the one that it has, else a new one."""
    uri, tags = config.train.tracking_uri, {"rayseg.sweep": sweep_id}
    for run_id in runs.tagged(uri, config.train.experiment, tags):
        runs.resume(uri, run_id)
        return run_id
    name = f"{config.train.name}-sweep"
    run_id = runs.start(uri, config.train.experiment, name, configuration.flat(config), tags | more_tags)
    runs.log_bytes(uri, run_id, "config.json", json.dumps(configuration.plain(config), indent=2).encode())
    return run_id


def _mark(base: TrainConfig, run_id: str, outcomes: list[Outcome]) -> None:
    """Ends the trials' runs and says in them what became of them."""
    uri = base.tracking_uri
    for found in outcomes:
        tags = Trial(run_id, found.number).tags
        about = {"rayseg.trial_status": found.status} | ({"rayseg.trial_reason": found.reason} if found.reason else {})
        trial_runs = runs.tagged(uri, base.experiment, tags)
        if not trial_runs:  # it failed before it had one
            trial_runs = [runs.start(uri, base.experiment, f"{base.name}-{found.number:03d}", found.values, tags)]
        for trial_run in trial_runs:
            runs.set_tags(uri, trial_run, about)
            if found.val_dice is not None:
                runs.log_metrics(uri, trial_run, {"tune/val_dice": found.val_dice, "tune/epochs": found.epochs})
            runs.finish(uri, trial_run, "FAILED" if found.status == "failed" else "FINISHED")


def _conclude(
    config: TuneConfig, run_id: str, outcomes: list[Outcome], best: Outcome, result: TrainResult, output: str
) -> TuneResult:
    """Writes what the sweep has found to the output and to MLflow."""
    base = config.train
    table, scaling = findings.table(outcomes), findings.scaling(outcomes)
    count = {status: sum(found.status == status for found in outcomes) for status in ("completed", "stopped", "failed")}
    winner = Space(config.tune.space, config.tune.points, base).changed(best.values)
    dice = result.val_dice or 0.0
    recipe = (
        f"# The best of {len(outcomes)} trials ({told(best.values)}): validation Dice {dice:.4f} in epoch "
        f"{result.best_epoch}.\n# python -m jobs.train --config {RECIPE_FILE}\n"
        + yaml.safe_dump({"train": configuration.plain(winner)}, sort_keys=False)
    )
    files = {
        TABLE_FILE: table.encode(),
        PICTURE_FILE: figures.trials([dataclasses.asdict(found) for found in outcomes]),
        RECIPE_FILE: recipe.encode(),
    }
    for name, data in files.items():
        storage.write(storage.join(output, name), data)
        runs.log_bytes(base.tracking_uri, run_id, name, data)
    metrics = {"val_dice": dice, "best_trial": best.number, **count}
    if scaling is not None:
        metrics["learning_rate_exponent"] = scaling.exponent
        runs.log_bytes(base.tracking_uri, run_id, "scaling.json", json.dumps(dataclasses.asdict(scaling)).encode())
    runs.log_metrics(base.tracking_uri, run_id, metrics)
    print(findings.aligned(table), *([scaling.sentence] if scaling else []), sep="\n", file=sys.stderr)
    return TuneResult(
        run_id=run_id,
        best=best.number,
        best_values=best.values,
        best_run_id=result.run_id,
        model_uri=result.model_uri,
        version=result.version,
        val_dice=result.val_dice,
        best_epoch=result.best_epoch,
        completed=count["completed"],
        stopped=count["stopped"],
        failed=count["failed"],
        recipe=storage.join(output, RECIPE_FILE),
        table=storage.join(output, TABLE_FILE),
        picture=storage.join(output, PICTURE_FILE),
        scaling=scaling,
        trials=outcomes,
        seconds=0.0,
    )
