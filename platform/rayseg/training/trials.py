"""How trials run: on Ray Tune, each as a function that runs `trainer.fit` with Ray Train workers of its own.

That is "Tune with Ray Train V2" of Ray's documentation; epochs come back through Ray's TuneReportCallback. Ray's
`Tuner.restore` forgets what its scheduler knew (ray#30838), so it is not used: `sweep` knows.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayseg import config as configuration
from rayseg import logs, storage
from rayseg.training import trainer
from rayseg.training.settings import TrainConfig, Trial
from rayseg.training.space import Space
from rayseg.training.sweep import Sweep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trials:
    """The trials' runs: children of one in MLflow, with their checkpoints in one folder."""

    space: Space
    parent_run_id: str
    storage: str
    name: str

    def config(self, number: int, values: dict[str, Any]) -> TrainConfig:
        """The run of trial `number`."""
        return self.space.changed(values, storage=self.storage, name=f"{self.name}-{number:03d}")


def run(sweep: Sweep, runs_of: Trials, folder: str, abreast: int) -> None:
    """Runs the trials that have not ended, `abreast` at once; Ray Tune's own files go to `folder`."""
    if sweep.found == sweep.trials:
        return
    # Nobody reads its tables and reports beside ours; the newer kind of the latter has a banner at any verbosity.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    files, path = storage.filesystem(folder)
    parent, _, name = path.rpartition("/")
    tuner = ray_tune.Tuner(
        # The trial's driver takes no CPU; its workers ask the cluster for theirs. Ray wants something: a byte.
        ray_tune.with_resources(logs.carried(_run_trial), ray_tune.PlacementGroupFactory([{"memory": 1}])),
        tune_config=ray_tune.TuneConfig(
            num_samples=sweep.trials,
            search_alg=_InOrder(sweep, runs_of),
            scheduler=_Halving(sweep),
            max_concurrent_trials=abreast,
            reuse_actors=False,  # after one that was stopped, whose function is still running, the next one fails
        ),
        run_config=ray_tune.RunConfig(name=name, storage_path=parent, storage_filesystem=files, verbose=0),
    )
    tuner.fit()


def _run_trial(job: dict[str, Any]) -> dict[str, Any]:
    """One trial, in a process of its own: what it scored, or why it failed."""
    try:
        config = configuration.build(TrainConfig, job["train"])
        result = trainer.fit(config, Trial(job["parent_run_id"], job["number"]), [TuneReportCallback()])
    except Exception as error:
        logger.warning("trial %d failed", job["number"], exc_info=True)
        return {"failure": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    return {"dice": [row["val/dice_pooled"] for row in result.history]}


class _InOrder(Searcher):
    """Hands out the trials that have not ended, in order of number."""

    def __init__(self, sweep: Sweep, runs_of: Trials) -> None:
        super().__init__()
        self._sweep, self._runs_of = sweep, runs_of
        self._next = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next one's job, None while it waits for others."""
        while self._next < self._sweep.trials:
            number = self._next
            values = self._sweep.values(number)
            if values is None:
                return None
            self._next += 1
            if not self._sweep.has_ended(number):
                self._sweep.begin(number)
                config = configuration.plain(self._runs_of.config(number, values))
                return {"number": number, "train": config, "parent_run_id": self._runs_of.parent_run_id}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler hears of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on by its own files."""


class _Halving(FIFOScheduler):
    """Tells the sweep what Ray Tune hears, and Ray Tune which trials are stopped."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """After each epoch."""
        stop = "dice" in result and self._sweep.hear(trial.config["number"], result["dice"])
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """It has returned, or was stopped."""
        if "dice" in result:
            self._sweep.hear(trial.config["number"], result["dice"])
        self._sweep.end(trial.config["number"], result.get("failure"))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Its process was lost."""
        self._sweep.end(trial.config["number"], "its process was lost: killed, out of memory, or with its machine")
