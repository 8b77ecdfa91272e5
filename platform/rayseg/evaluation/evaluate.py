"""Evaluate: a registered model over a held-out split, from the source objects, on their own grids.

The prepared set only says which rows are held out. Each row's image and mask are read again at their full size, so the
scores include what resampling costs, and models of different input sizes are scored on the same pixels. A case is a
patient.
"""

import csv
import dataclasses
import io
import logging
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray.data
from tqdm import tqdm

from rayseg import config as configuration
from rayseg import storage
from rayseg.data import prepared as prepared_sets
from rayseg.data.labels import Labels, read_mask
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import read_slice
from rayseg.evaluation.scores import Counts, PerCase, counts, per_case
from rayseg.inference.predictor import Predictor, limit_threads
from rayseg.records import Reason, Reject
from rayseg.tracking import figures, registry, runs

logger = logging.getLogger(__name__)

_ROWS_PER_TASK = 32
_COLUMNS = ("row_id", "patient_key", "uri", "mask_uri")
# A row with its counts, or with the reason why there are none. `prediction` is the mask (uint8, rows x columns, zlib)
# where it or the truth has foreground, null elsewhere.
_SCORED = pa.schema(
    [
        *((name, pa.string()) for name in _COLUMNS),
        *((name, pa.int64()) for name in ("tp", "fp", "fn", "tn")),
        ("prediction", pa.binary()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Which model, on which rows."""

    prepared: str  # URI of a prepared set
    model_uri: str  # models:/NAME/VERSION or models:/NAME@ALIAS
    tracking_uri: str
    split: Literal["train", "val", "test"] = "test"
    concurrency: int = 1  # actors, one CPU each
    overlays: int = 6  # pictures: the largest slice of so many cases, from the worst case to the best
    max_reject_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.overlays < 0:
            raise ValueError("evaluate: concurrency of at least 1 and overlays of at least 0 expected")


@dataclass(frozen=True)
class EvaluateResult:
    """Scores are None where they are undefined; `scores` says when that is, and what pooled and per case mean."""

    model_uri: str
    split: str
    cases: int
    slices: int
    dice_pooled: float | None
    dice_per_case: float | None
    iou_pooled: float | None
    precision_pooled: float | None
    recall_pooled: float | None
    background_dice: float | None  # pooled Dice of "everything is background": 0 unless there is nothing to find
    cases_scored: int
    cases_missed: int
    cases_false_alarms: int
    cases_true_negative: int
    rejected: int
    reasons: dict[str, int]
    cases_table: str  # URI of a CSV in the model's run: counts and scores of each case
    overlays: list[str]  # URIs of PNG files in the model's run
    seconds: float


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Scores a registered model on a split; metrics, table and pictures go to the MLflow run that trained it.

    Raises:
        ValueError: no such set or model, a split without rows, labels that are not the model's, too many rejects.
    """
    began = time.monotonic()
    held_out = prepared_sets.describe(config.prepared)
    rows = held_out.read_rows(config.split, _COLUMNS)
    if rows.num_rows == 0:
        raise ValueError(f"evaluate.split: the prepared set has no rows in {config.split}")
    version = registry.resolve(config.tracking_uri, config.model_uri)

    totals: dict[str, Counts] = {}
    slices: Counter[str] = Counter()
    largest: dict[str, dict[str, Any]] = {}  # by patient: the row with most to find, kept for its picture
    rejects: list[dict[str, Any]] = []
    scored_rows: list[str] = []
    for row in _score(rows, config, version.uri, held_out.labels):
        if row["reason"] is not None:
            rejects.append(row)
            continue
        patient = row["patient_key"]
        found = Counts(row["tp"], row["fp"], row["fn"], row["tn"])
        totals[patient] = totals.get(patient, Counts()) + found
        slices[patient] += 1
        scored_rows.append(row["row_id"])
        if row["prediction"] is not None and (patient not in largest or _size(row) > _size(largest[patient])):
            largest[patient] = row
    reasons = dict(sorted(Counter(row["reason"] for row in rejects).items()))
    if len(rejects) > config.max_reject_fraction * rows.num_rows or not totals:
        raise ValueError(
            f"evaluate: {len(rejects)} of {rows.num_rows} rows rejected, over max_reject_fraction "
            f"{config.max_reject_fraction}: {reasons}; are the source objects still where they were prepared from?"
        )

    pooled, cases = sum(totals.values(), Counts()), per_case(totals.values())
    run = _Run(config.tracking_uri, version.run_id, config.split)
    run.log_scores(pooled, cases, slices.total(), len(rejects))
    run.tag_set(scored_rows, held_out.labels)
    return EvaluateResult(
        model_uri=version.uri,
        split=config.split,
        cases=len(totals),
        slices=slices.total(),
        dice_pooled=pooled.dice,
        dice_per_case=cases.dice,
        iou_pooled=pooled.iou,
        precision_pooled=pooled.precision,
        recall_pooled=pooled.recall,
        background_dice=pooled.background.dice,
        cases_scored=cases.scored,
        cases_missed=cases.missed,
        cases_false_alarms=cases.false_alarms,
        cases_true_negative=cases.true_negative,
        rejected=len(rejects),
        reasons=reasons,
        cases_table=run.log_cases(totals, slices),
        overlays=run.log_overlays(_spread(list(largest.values()), config.overlays), held_out),
        seconds=time.monotonic() - began,
    )


def set_tag(split: str) -> str:
    """Name of the run's tag with the digest of the rows and labels that its scores are of: equal tags, equal sets."""
    return f"rayseg.{split}_set"


class _Scorer:
    """An actor: rows in, rows of `_SCORED` out."""

    def __init__(self, tracking_uri: str, model_uri: str, labels: Labels) -> None:
        limit_threads(1)
        bundle_dir, _ = registry.fetch(tracking_uri, model_uri)
        self._predictor = Predictor.load(bundle_dir)
        if self._predictor.bundle.labels.names != labels.names:
            raise ValueError(
                f"evaluate: the model finds {self._predictor.bundle.labels.names}, the set is of {labels.names}"
            )
        self._labels = labels

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([row | self._score(row) for row in rows.to_pylist()], schema=_SCORED)

    def _score(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            made = self._masks(row)
        except FileNotFoundError:
            made = Reject(Reason.NOT_FOUND)
        except OSError as error:
            made = Reject(Reason.READ_FAILED, type(error).__name__)
        if isinstance(made, Reject):
            return {"reason": made.reason.value, "detail": made.detail}
        prediction, truth = made
        found = counts(prediction, truth)
        shown = found.tp + found.fp + found.fn > 0
        return dataclasses.asdict(found) | {"prediction": zlib.compress(prediction.tobytes(), 1) if shown else None}

    def _masks(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | Reject:
        (result,) = self._predictor.segment([storage.read(row["uri"])])
        if isinstance(result, Reject):
            return result
        truth = _truth(row, result.mask.shape, self._labels)
        return truth if isinstance(truth, Reject) else (result.mask, truth)


@dataclass(frozen=True)
class _Run:
    """The MLflow run of the model, and the folder in it."""

    tracking_uri: str
    run_id: str
    split: str

    def log_scores(self, pooled: Counts, cases: PerCase, slices: int, rejected: int) -> None:
        values = {
            "dice_pooled": pooled.dice,
            "iou_pooled": pooled.iou,
            "precision_pooled": pooled.precision,
            "recall_pooled": pooled.recall,
            "background_dice": pooled.background.dice,
            "dice_per_case": cases.dice,
            "cases_scored": cases.scored,
            "cases_missed": cases.missed,
            "cases_false_alarms": cases.false_alarms,
            "cases_true_negative": cases.true_negative,
            "slices": slices,
            "rejected": rejected,
        }
        metrics = {f"{self.split}/{name}": value for name, value in values.items() if value is not None}
        runs.log_metrics(self.tracking_uri, self.run_id, metrics)

    def tag_set(self, row_ids: list[str], labels: Labels) -> None:
        digest = configuration.digest({"rows": sorted(row_ids), "labels": configuration.plain(labels)})
        runs.client(self.tracking_uri).set_tag(self.run_id, set_tag(self.split), digest)

    def log_cases(self, totals: dict[str, Counts], slices: Counter[str]) -> str:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["patient_key", "slices", "tp", "fp", "fn", "tn", "dice", "iou", "precision", "recall"])
        for patient, found in sorted(totals.items(), key=lambda item: (item[1].dice is None, item[1].dice, item[0])):
            scores = (found.dice, found.iou, found.precision, found.recall)
            told = ["" if score is None else f"{score:.6f}" for score in scores]
            writer.writerow([patient, slices[patient], found.tp, found.fp, found.fn, found.tn, *told])
        return self._log("cases.csv", table.getvalue().encode())

    def log_overlays(self, rows: list[dict[str, Any]], held_out: prepared_sets.PreparedSet) -> list[str]:
        pictures = (_picture(row, held_out.preprocess, held_out.labels) for row in rows)
        return [self._log(f"overlay-{rank:02d}.png", png) for rank, png in enumerate(pictures, start=1)]

    def _log(self, name: str, data: bytes) -> str:
        path = f"{self.split}/{name}"
        runs.log_bytes(self.tracking_uri, self.run_id, path, data)
        return storage.join(runs.client(self.tracking_uri).get_run(self.run_id).info.artifact_uri, path)


def _score(rows: pa.Table, config: EvaluateConfig, model_uri: str, labels: Labels) -> Any:
    """Yields the rows of `_SCORED` as dictionaries, in no certain order."""
    blocks = [rows.slice(start, _ROWS_PER_TASK) for start in range(0, rows.num_rows, _ROWS_PER_TASK)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _Scorer,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.concurrency),
        fn_constructor_kwargs={"tracking_uri": config.tracking_uri, "model_uri": model_uri, "labels": labels},
        num_cpus=1,
    )
    with tqdm(total=rows.num_rows, desc="evaluate", unit=" slices", disable=None) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()
            progress.update(batch.num_rows)


def _truth(row: dict[str, Any], shape: tuple[int, ...], labels: Labels) -> np.ndarray | Reject:
    if row["mask_uri"] is None:
        return np.zeros(shape, np.uint8)
    values = read_mask(storage.read(row["mask_uri"]))
    if isinstance(values, Reject):
        return values
    if values.shape != shape:
        return Reject(Reason.MASK_MISMATCH, f"mask {values.shape}, image {shape}")
    return labels.apply(values)


def _size(row: dict[str, Any]) -> tuple[int, int, str]:
    """Most truth first, then most false alarm; the id decides between equals, so that any order of rows ends alike."""
    return row["tp"] + row["fn"], row["fp"], row["row_id"]


def _dice(row: dict[str, Any]) -> float:
    dice = Counts(row["tp"], row["fp"], row["fn"], row["tn"]).dice
    assert dice is not None, "only rows with foreground are shown"
    return dice


def _spread(rows: list[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
    """`wanted` rows at even steps from the worst Dice to the best."""
    ordered = sorted(rows, key=lambda row: (_dice(row), row["row_id"]))
    if len(ordered) <= wanted:
        return ordered
    return [ordered[round(place)] for place in np.linspace(0, len(ordered) - 1, wanted)]


def _picture(row: dict[str, Any], preprocess: Preprocess, labels: Labels) -> bytes:
    slice = read_slice(storage.read(row["uri"]))
    assert not isinstance(slice, Reject), "was read a moment ago"
    shape = slice.stored.shape
    truth = _truth(row, shape, labels)
    assert not isinstance(truth, Reject), "was read a moment ago"
    # The same grey values that the network sees, on the slice's own grid.
    grey_HW = dataclasses.replace(preprocess, size=shape).apply(slice)[..., 0]
    prediction = np.frombuffer(zlib.decompress(row["prediction"]), np.uint8).reshape(shape)
    return figures.overlay(grey_HW, truth, prediction, f"case {row['patient_key'][:10]} · Dice {_dice(row):.2f}")
