"""Out-of-fold scores: each held-out fold scored by its own model, as `evaluate` scores a test split."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayseg import cluster, work
from rayseg.data.prepared import PreparedSet
from rayseg.evaluation import checks, metrics
from rayseg.evaluation.cases import Tolerance
from rayseg.evaluation.record import Record
from rayseg.evaluation.scoring import CPUS_PER_ACTOR, score
from rayseg.inference.heldout import slices
from rayseg.inference.networks import Mirror
from rayseg.tracking import registry, runs
from rayseg.training.settings import TrainResult

logger = logging.getLogger(__name__)

SPLIT = "out_of_fold"  # what the scores are of, by its name in MLflow
FOLDS_FILE = "folds.csv"
_MOST_ACTORS = 16


@dataclass(frozen=True)
class Fold:
    """A fold's model, and what it scores on the patients whom it never saw."""

    fold: int
    model_uri: str
    run_id: str
    patients: int
    slices: int
    best_epoch: int
    epochs: int
    val_dice: float | None  # pooled, on the fold that chose the epoch
    dice_pooled: float | None
    seconds: float  # of training


def scored(
    tracking_uri: str,
    sets: Sequence[PreparedSet],
    trained: Sequence[TrainResult],
    mirror: Mirror | None,
    max_reject_fraction: float,
) -> tuple[Record, list[Fold], list[str]]:
    """All patients, each by the model that never saw them; each fold by itself; and what speaks against the scores.

    That is weights that training began from (`init_from`) and that have seen who is held out.

    Raises:
        ValueError: no row of a fold can be read, or too many of all folds cannot.
    """
    together = Record(SPLIT, sets[0].labels)
    folds: list[Fold] = []
    doubts: list[str] = []
    room = cluster.room({"CPU": CPUS_PER_ACTOR})
    actors = max(1, int(min(room, _MOST_ACTORS)))
    for fold, (prepared, result) in enumerate(zip(sets, trained, strict=True)):
        rows = slices(prepared, "test")
        bundle_dir, version = registry.fetch(tracking_uri, result.model_uri)
        alone = Record(SPLIT, prepared.labels)
        in_cluster = work.in_cluster("crossvalidate", rows.num_rows, {"CPU": CPUS_PER_ACTOR})
        chosen = min(actors, rows.num_rows) if in_cluster else None
        for row in score(rows, [bundle_dir], prepared.labels, Tolerance(), mirror, chosen):
            together.add(row)
            alone.add(row)
        if not alone.slices:
            raise ValueError(
                f"crossvalidate: no row of fold {fold} can be read; are the source objects still where they were?"
            )
        leak = checks.no_leak(tracking_uri, version, alone.of_patient)
        if not leak.passed:
            doubts.append(f"fold {fold}: {leak.detail}")
            logger.warning("crossvalidate: %s", doubts[-1])
        pooled = float(metrics.value_of(metrics.METRICS["dice_pooled"], alone.columns(alone.table())))
        folds.append(
            Fold(
                fold, result.model_uri, result.run_id, alone.patients, alone.slices, result.best_epoch, result.epochs,
                result.val_dice, None if math.isnan(pooled) else pooled, result.seconds,
            )
        )  # fmt: skip
        logger.info("crossvalidate: fold %d: pooled Dice %.4f on %d held-out patients", fold, pooled, alone.patients)
    rejected, rows_in_all = len(together.rejects), len(together.rejects) + together.slices
    if rejected > max_reject_fraction * rows_in_all:
        raise ValueError(
            f"crossvalidate: {rejected} of {rows_in_all} held-out rows rejected, over prepare.max_reject_fraction "
            f"{max_reject_fraction}; are the source objects still where they were prepared from?"
        )
    return together, folds, doubts


def publish_folds(tracking_uri: str, run_id: str, folds: Sequence[Fold]) -> None:
    """The table of folds, and their scores as a curve over folds."""
    names = [one.name for one in dataclasses.fields(Fold)]
    lines = [",".join("" if (value := getattr(fold, name)) is None else str(value) for name in names) for fold in folds]
    runs.log_bytes(tracking_uri, run_id, f"{SPLIT}/{FOLDS_FILE}", "\n".join([",".join(names), *lines, ""]).encode())
    for fold in folds:
        values = {"fold/dice_pooled": fold.dice_pooled, "fold/val_dice": fold.val_dice}
        known = {name: value for name, value in values.items() if value is not None}
        runs.log_metrics(tracking_uri, run_id, known, step=fold.fold)
