"""Scoring on the cluster: patients to actors, each of which has the model, and a row of scores a patient back."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from rayseg import logs, meters
from rayseg.data.labels import Labels
from rayseg.evaluation.cases import Tolerance
from rayseg.evaluation.scorer import SCORED, Scorer
from rayseg.inference.networks import Mirror
from rayseg.inference.predictor import AnyPredictor, load_any
from rayseg.models.engine import Engine

if TYPE_CHECKING:
    import ray

CPUS_PER_ACTOR = 1
_ROWS_PER_TASK = 32  # and as many more as a patient has


def score(
    rows: pa.Table,
    bundle_dirs: Sequence[Path],
    labels: Labels,
    tolerance: Tolerance,
    mirror: Mirror | None,
    actors: int | None,
) -> Iterator[dict[str, Any]]:
    """Scores rows of a prepared set with the model, or the ensemble, of the bundles.

    Does so in `actors` of the cluster; None: in this process, on all of its cores. Yields rows of `scorer.SCORED` as
    dictionaries, in no certain order.
    """
    tasks = _tasks(rows)
    if actors is None:
        predictor = _load(bundle_dirs, mirror, os.cpu_count() or 1, "openvino")
        scorer = Scorer(predictor, labels, tolerance)
        batches: Iterator[pa.Table] = (_scored(scorer, task) for task in tasks)
    else:
        batches = _in_actors(tasks, bundle_dirs, labels, tolerance, mirror, actors)
    with tqdm(total=rows.num_rows, desc="evaluate", unit=" slices", disable=None) as progress:
        for batch in batches:
            for row in batch.to_pylist():
                yield row
                progress.update(len(row["row_ids"]) + len(row["rejects"]))
                meters.slices("evaluate", len(row["row_ids"]), Counter(one["reason"] for one in row["rejects"]))
                meters.show("rayseg_waiting", rows.num_rows - progress.n, stage="evaluate")


def _in_actors(
    tasks: Iterator[pa.Table],
    bundle_dirs: Sequence[Path],
    labels: Labels,
    tolerance: Tolerance,
    mirror: Mirror | None,
    actors: int,
) -> Iterator[pa.Table]:
    # Takes seconds, and small sets need none.
    import ray
    import ray.data

    # The bundles travel through Ray: actors need neither the registry nor its artifact store.
    bundles = ray.put([{file.name: file.read_bytes() for file in one.iterdir()} for one in bundle_dirs])
    dataset = ray.data.from_arrow(list(tasks)).map_batches(
        _Actor,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(bundles, mirror, labels, tolerance, logs.told()),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=CPUS_PER_ACTOR,
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _load(
    folders: Sequence[Path], mirror: Mirror | None, threads: int, engine: Literal["auto", "openvino"]
) -> AnyPredictor:
    # Probabilities are scored too, and screening leaves those of slices with nothing in bfloat16.
    return load_any(*folders, engine=Engine(engine, "float32"), threads=threads, mirror=mirror)


def _scored(scorer: Scorer, rows: pa.Table) -> pa.Table:
    """Rows of whole patients in, a row of `SCORED` for each out."""
    patients = groupby(rows.to_pylist(), key=lambda row: row["patient_key"])
    return pa.Table.from_pylist([scorer.score(list(of)) for _, of in patients], schema=SCORED)


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
        import ray

        from rayseg.grant import keep_to_grant

        logs.adopt(told)
        keep_to_grant()  # none is asked for

        with tempfile.TemporaryDirectory() as folder:
            for place, files in enumerate(ray.get(bundles)):
                Path(folder, str(place)).mkdir()
                for name, content in files.items():
                    Path(folder, str(place), name).write_bytes(content)
            places = sorted(Path(folder).iterdir(), key=lambda one: int(one.name))
            self._scorer = Scorer(_load(places, mirror, CPUS_PER_ACTOR, "auto"), labels, tolerance)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return _scored(self._scorer, rows)


def _tasks(rows: pa.Table) -> Iterator[pa.Table]:
    """Tables of whole patients; within them the slices of a series stand together, in the order that they had."""
    ordered = rows.take(pc.sort_indices(rows, [("patient_key", "ascending"), ("series_key", "ascending")]))  # stable
    keys = ordered["patient_key"].to_pylist()
    start = 0
    for row in range(1, len(keys) + 1):
        if row == len(keys) or (row - start >= _ROWS_PER_TASK and keys[row] != keys[row - 1]):
            yield ordered.slice(start, row - start)
            start = row
