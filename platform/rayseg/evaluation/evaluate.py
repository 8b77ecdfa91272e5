"""Evaluate: a registered model over a held-out split, from the source objects, on their own grids.

The prepared set only says which rows are held out. Each row's image and mask are read again at their full size, so the
scores include what resampling costs, and models of different input sizes are scored on the same pixels. A case is a
patient.
"""

import dataclasses
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
from tqdm import tqdm

from rayseg import cluster, storage
from rayseg.data import prepared as prepared_sets
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.dicom.reading import Slice, read_slice
from rayseg.evaluation.record import Record, read_truth
from rayseg.evaluation.scores import Counts, Scores, counts_by_class, over_classes
from rayseg.inference.predictor import Predictor, limit_threads
from rayseg.records import PREPARED, Reason, Reject
from rayseg.tracking import bundle as bundles
from rayseg.tracking import registry

_ROWS_PER_TASK = 32
_CPUS_PER_ACTOR = 1
_COLUMNS = ("row_id", "patient_key", "uri", "frame", "masks", "neighbours")
# A row with its counts, one of each class, or with the reason why there are none. `prediction` is the mask (uint8,
# rows x columns, zlib) where it or the truth has foreground, null elsewhere.
SCORED = pa.schema(
    [
        *(PREPARED.field(name) for name in _COLUMNS),
        *((field.name, pa.list_(pa.int64())) for field in dataclasses.fields(Counts)),
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
    """Scores are None where they are undefined; `scores` says when that is, and what pooled and per case mean.

    Of several classes the scores are means over them, the numbers of cases sums, and `classes` has those of each.
    """

    model_uri: str
    split: str
    cases: int
    slices: int
    dice_pooled: float | None
    dice_per_case: float | None
    iou_pooled: float | None
    iou_per_case: float | None
    precision_pooled: float | None
    precision_per_case: float | None
    recall_pooled: float | None
    recall_per_case: float | None
    accuracy_pooled: float | None
    accuracy_per_case: float | None
    background_dice: float | None  # pooled Dice of "everything is background": 0 unless there is nothing to find
    cases_scored: int
    cases_missed: int
    cases_false_alarms: int
    cases_true_negative: int
    rejected: int
    reasons: dict[str, int]
    cases_table: str  # URI of a CSV in the model's run: counts and scores of each case
    overlays: list[str]  # URIs of PNG files in the model's run
    classes: dict[str, Scores]
    seconds: float


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Scores a registered model on a split; metrics, table and pictures go to the MLflow run that trained it.

    Raises:
        ValueError: no such set or model, a split without rows, labels that are not the model's, a set that does not
            know the neighbours that the model looks at, too many rejects.
    """
    began = time.monotonic()
    cluster.connect()
    held_out = prepared_sets.describe(config.prepared)
    rows = held_out.read_rows(config.split, _COLUMNS)
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
    for row in _score(rows, bundle_dir, held_out.labels, config.concurrency):
        record.add(row)
    rejected, scored = len(record.rejects), sum(record.slices.values())
    assert rejected + scored == rows.num_rows, "every row is accounted for"
    reasons = dict(sorted(Counter(row["reason"] for row in record.rejects).items()))
    if rejected > config.max_reject_fraction * rows.num_rows or not record.cases:
        raise ValueError(
            f"evaluate: {rejected} of {rows.num_rows} rows rejected, over max_reject_fraction "
            f"{config.max_reject_fraction}: {reasons}; are the source objects still where they were prepared from?"
        )

    classes = record.scores()
    artifacts = record.log(config.tracking_uri, version.run_id, held_out.preprocess, config.overlays)
    return EvaluateResult(
        model_uri=version.uri,
        split=config.split,
        cases=len(record.cases),
        slices=scored,
        **dataclasses.asdict(over_classes(list(classes.values()))),
        rejected=rejected,
        reasons=reasons,
        cases_table=artifacts.cases_table,
        overlays=artifacts.overlays,
        classes=classes,
        seconds=time.monotonic() - began,
    )


class _Scorer:
    """An actor: rows in, rows of `SCORED` out."""

    def __init__(self, bundle: "ray.ObjectRef[dict[str, bytes]]", labels: Labels) -> None:
        limit_threads(_CPUS_PER_ACTOR)
        self._labels = labels
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(bundle).items():
                Path(folder, name).write_bytes(content)
            self._predictor = Predictor.load(folder)
        self._object: tuple[str, bytes] = ("", b"")  # the last one: the next slice may be another frame of it
        # The next row's stack has all but one of these slices.
        self._slice = lru_cache(maxsize=2 * self._predictor.neighbours + 1)(self._read)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([row | self._score(row) for row in rows.to_pylist()], schema=SCORED)

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
        found = counts_by_class(prediction, truth, len(self._labels.names))
        shown = prediction.any() or truth.any()
        return {
            **{field.name: [getattr(one, field.name) for one in found] for field in dataclasses.fields(Counts)},
            "prediction": zlib.compress(prediction.tobytes(), 1) if shown else None,
        }

    def _masks(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | Reject:
        neighbours, around = self._predictor.neighbours, row["neighbours"]
        middle = len(around) // 2
        stack = [*around[middle - neighbours : middle], row, *around[middle : middle + neighbours]]
        result = self._predictor.predict_stack(
            [None if one is None else self._slice(one["uri"], one["frame"]) for one in stack]
        )
        if isinstance(result, Reject):
            return result
        truth = read_truth(row, result.slice, self._labels)
        return truth if isinstance(truth, Reject) else (result.mask, truth)

    def _read(self, uri: str, frame: int | None) -> Slice | Reject:
        try:
            if self._object[0] != uri:
                self._object = uri, storage.read(uri)
        except OSError as error:
            return read_failure(error)
        return read_slice(self._object[1], frame, self._predictor.bundle.preprocess.color)


def _score(rows: pa.Table, bundle_dir: Path, labels: Labels, concurrency: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of `SCORED` as dictionaries, in no certain order."""
    # The bundle travels through Ray: actors need neither the registry nor its artifact store.
    bundle = ray.put({file.name: file.read_bytes() for file in bundle_dir.iterdir()})
    blocks = [rows.slice(start, _ROWS_PER_TASK) for start in range(0, rows.num_rows, _ROWS_PER_TASK)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _Scorer,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(bundle, labels),
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_cpus=_CPUS_PER_ACTOR,
    )
    with tqdm(total=rows.num_rows, desc="evaluate", unit=" slices", disable=None) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()
            progress.update(batch.num_rows)
