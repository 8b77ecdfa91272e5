"""The folds' trainings, as many at once as the cluster holds, each by `trainer.fit` in a process of its own."""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import ray
from ray.train import UserCallback

from rayseg import cluster, logs, storage
from rayseg import config as configuration
from rayseg.crossvalidation.progress import Clock, Epochs
from rayseg.data.prepared import PreparedSet
from rayseg.training import trainer
from rayseg.training.settings import TrainConfig, TrainResult, Trial

logger = logging.getLogger(__name__)

_LOOK_S = 2.0


class _Tell(UserCallback):
    """Tells the actor of each epoch."""

    def __init__(self, epochs: Any, fold: int) -> None:
        self._epochs, self._fold = epochs, fold

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """An epoch has ended."""
        self._epochs.note.remote(self._fold)


def _train_fold(job: dict[str, Any]) -> dict[str, Any]:
    """One fold, in a process of its own: its `TrainResult`, or why there is none."""
    try:
        fold: int = job["fold"]
        trial = Trial(job["parent_run_id"], fold, register=True)
        result = trainer.fit(configuration.build(TrainConfig, job["train"]), trial, [_Tell(job["epochs"], fold)])
    except (ValueError, RuntimeError) as error:
        return {"failure": str(error), "refused": type(error) is ValueError}
    return {"result": json.loads(json.dumps(dataclasses.asdict(result)))}


def train(
    base: TrainConfig, sets: Sequence[PreparedSet], folder: str, parent_run_id: str, concurrent: int | None
) -> list[TrainResult]:
    """Trains and registers a model a fold; what an earlier start has ended is taken from the folder.

    Args:
        base: the run of a fold, but for its set, name and places.
        sets: of the folds.
        folder: URI for checkpoints, and for what has ended.
        parent_run_id: in MLflow.
        concurrent: so many at once at most; None: as the cluster has room.

    Raises:
        ValueError, RuntimeError: as `trainer.fit` of any fold does; the others are ended.
    """
    ended = {
        fold: TrainResult(**storage.read_json(uri))
        for fold in range(len(sets))
        if storage.exists(uri := storage.join(folder, f"fold-{fold}.json"))
    }
    room = cluster.room(base.bundle) / base.most_workers
    abreast = len(sets) if math.isinf(room) else max(1, int(room))
    abreast = min(abreast, concurrent or abreast)
    epochs = ray.remote(num_cpus=0)(Epochs).remote()
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(logs.carried(_train_fold))
    waiting = [fold for fold in range(len(sets)) if fold not in ended]
    running: dict[Any, int] = {}
    clock = Clock(base.epochs, len(waiting), len(sets))
    try:
        while waiting or running:
            while waiting and len(running) < abreast:
                fold = waiting.pop(0)
                of_fold = dataclasses.replace(
                    base,
                    prepared=sets[fold].uri,
                    storage=storage.join(folder, "training"),
                    name=f"{base.name}-fold-{fold}",
                    registered_model=f"{base.registered_model}-folds",
                )
                job = {
                    "fold": fold,
                    "train": configuration.plain(of_fold),
                    "parent_run_id": parent_run_id,
                    "epochs": epochs,
                }
                running[task.remote(job)] = fold
            done, _ = ray.wait(list(running), timeout=_LOOK_S)
            clock.look(ray.get(epochs.done.remote()), set(ended))
            for reference in done:
                fold, outcome = running.pop(reference), ray.get(reference)
                if "failure" in outcome:
                    kind = ValueError if outcome["refused"] else RuntimeError
                    raise kind(f"crossvalidate: fold {fold}: {outcome['failure']}")
                storage.write_json(storage.join(folder, f"fold-{fold}.json"), outcome["result"])
                ended[fold] = TrainResult(**outcome["result"])
                clock.ended(fold, ended[fold].val_dice, ended[fold].best_epoch, len(ended))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return [ended[fold] for fold in range(len(sets))]
