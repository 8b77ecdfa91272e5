"""Scoring on the cluster: patients to actors, each of which has the model, and a row of scores a patient back."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from tqdm import tqdm

from rayseg import logs, meters
from rayseg.data.labels import Labels
from rayseg.evaluation.cases import Tolerance
from rayseg.evaluation.scorer import SCORED, Scorer
from rayseg.grant import keep_to_grant
from rayseg.inference.predictor import Mirror, Predictor
from rayseg.models.engine import Engine

CPUS_PER_ACTOR = 1
_ROWS_PER_TASK = 32  # and as many more as a patient has


def score(
    rows: pa.Table,
    bundle_dirs: Sequence[Path],
    labels: Labels,
    tolerance: Tolerance,
    mirror: Mirror | None,
    concurrency: int,
) -> Iterator[dict[str, Any]]:
    """Scores rows of a prepared set with the model, or the ensemble, of the bundles, in `concurrency` actors.

    Yields rows of `scorer.SCORED` as dictionaries, in no certain order.
    """
    # The bundles travel through Ray: actors need neither the registry nor its artifact store.
    bundles = ray.put([{file.name: file.read_bytes() for file in one.iterdir()} for one in bundle_dirs])
    dataset = ray.data.from_arrow(list(_tasks(rows))).map_batches(
        _Actor,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(bundles, mirror, labels, tolerance, logs.told()),
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_cpus=CPUS_PER_ACTOR,
    )
    with tqdm(total=rows.num_rows, desc="evaluate", unit=" slices", disable=None) as progress:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                yield row
                progress.update(len(row["row_ids"]) + len(row["rejects"]))
                meters.slices("evaluate", len(row["row_ids"]), Counter(one["reason"] for one in row["rejects"]))
                meters.show("rayseg_waiting", rows.num_rows - progress.n, stage="evaluate")


class _Actor:
    """Rows of whole patients in, a row of `SCORED` for each out."""

    def __init__(
        self,
        bundles: "ray.ObjectRef[list[dict[str, bytes]]]",
        mirror: Mirror | None,
        labels: Labels,
        tolerance: Tolerance,
        told: Mapping[str, str],
    ) -> None:
        logs.adopt(told)
        keep_to_grant()  # none is asked for
        with tempfile.TemporaryDirectory() as folder:
            for place, files in enumerate(ray.get(bundles)):
                Path(folder, str(place)).mkdir()
                for name, content in files.items():
                    Path(folder, str(place), name).write_bytes(content)
            # Probabilities are scored too, and screening leaves those of slices with nothing in bfloat16.
            predictor = Predictor.load(
                *sorted(Path(folder).iterdir(), key=lambda one: int(one.name)),
                engine=Engine(precision="float32"),
                threads=CPUS_PER_ACTOR,
                mirror=mirror,
            )
            self._scorer = Scorer(predictor, labels, tolerance)

    def __call__(self, rows: pa.Table) -> pa.Table:
        patients = groupby(rows.to_pylist(), key=lambda row: row["patient_key"])
        return pa.Table.from_pylist([self._scorer.score(list(of)) for _, of in patients], schema=SCORED)


def _tasks(rows: pa.Table) -> Iterator[pa.Table]:
    """Tables of whole patients; within them the slices of a series stand together, in the order that they had."""
    ordered = rows.take(pc.sort_indices(rows, [("patient_key", "ascending"), ("series_key", "ascending")]))  # stable
    keys = ordered["patient_key"].to_pylist()
    start = 0
    for row in range(1, len(keys) + 1):
        if row == len(keys) or (row - start >= _ROWS_PER_TASK and keys[row] != keys[row - 1]):
            yield ordered.slice(start, row - start)
            start = row
