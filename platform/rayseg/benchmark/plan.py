"""What comes before the first slice of an archive run: the plan of a large manifest, new and with all of it done.

A ledger is read by itself, too, see `benchmark.ledger`.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from rayseg.benchmark import ledger as reading
from rayseg.benchmark.data import figure
from rayseg.benchmark.watch import greatest
from rayseg.inference import ledger, plan
from rayseg.inference.series import Task, ledger_row
from rayseg.records import MANIFEST
from rayseg.tracking.version import ModelVersion

_SLICES = 200  # a series
_SERIES_PER_GROUP = 20
_OBJECTS_PER_SERIES = 100  # of the ledger that is read by itself


def measure(folder: Path, repeats: int, rows: int) -> dict[str, Any]:
    """All figures of the suite, of a manifest of `rows` objects that is made up; `folder` is for its files."""
    series = max(rows // _SLICES, 1)
    manifest, output = folder / "manifest.parquet", str(folder / "output")
    _write_manifest(manifest, series)
    model = ModelVersion("bench", "1", "models:/bench/1", "0" * 32, "0" * 64)
    task = Task(str(folder), model, "c" * 64)
    millions = series * _SLICES / 1e6
    made: dict[str, list[float]] = {"plan_s_per_million": [], "plan_bytes_per_object": [], "skip_s_per_million": []}
    planned = plan.Plan()
    for _ in range(repeats):
        planned = plan.Plan()  # what the one before takes is free
        before = psutil.Process().memory_info().rss
        began = time.perf_counter()
        with greatest(lambda: psutil.Process().memory_info().rss) as most:
            planned = plan.make(str(manifest), task, lambda row: False, lambda rows, rejects: None)
        made["plan_s_per_million"].append((time.perf_counter() - began) / millions)
        made["plan_bytes_per_object"].append(max(most[0] - before, 0) / (series * _SLICES))
    assert planned.slices == series * _SLICES
    _write_ledger(output, task, planned)
    for _ in range(repeats):
        began = time.perf_counter()
        known = ledger.rows_of(output, model.digest, task.config_digest).select(["series_key", *plan.KNOWN])
        latest = {row["series_key"]: row for row in known.to_pylist()}

        def is_done(row: Any, latest: dict[str, Any] = latest) -> bool:
            return plan.is_done(latest.get(row["series_key"]), row, retry_rejected=False)

        again = plan.make(str(manifest), task, is_done, lambda rows, rejects: None)
        made["skip_s_per_million"].append((time.perf_counter() - began) / millions)
        assert not again.todo
    figures = {name: figure(values) for name, values in made.items()}
    parts = sum(file.stat().st_size for file in Path(output, ledger.FOLDER).rglob("*") if file.is_file())
    figures["manifest_bytes_per_object"] = figure([manifest.stat().st_size / (series * _SLICES)])
    figures["ledger_bytes_per_series"] = figure([parts / series])
    return figures | reading.measure(folder, repeats, rows // _OBJECTS_PER_SERIES)


def _write_manifest(path: Path, series: int) -> None:
    """As the catalog writes it, of CT."""
    with pq.ParquetWriter(path, MANIFEST, compression="zstd") as writer:
        for first in range(0, series, _SERIES_PER_GROUP):
            numbers = range(first, min(first + _SERIES_PER_GROUP, series))
            writer.write_table(
                pa.Table.from_pylist([row for number in numbers for row in _series(number)], schema=MANIFEST)
            )


def _series(number: int) -> list[dict[str, Any]]:
    patient, key = _hash("patient", number // 2), _hash("series", number)
    return [
        {
            "uri": f"s3://archive/ct/2024/{number:07d}/1.2.840.113619.2.{number}.{slice}.dcm",
            "bytes": 525_000,
            "etag": _hash("etag", number, slice)[:32],
            "verdict": "ok",
            "kind": "dicom",
            "masks": [],
            "patient_key": patient,
            "study_key": key,
            "series_key": key,
            "instance_key": _hash("instance", number, slice),
            "frame_of_reference_key": patient,
            "modality": "CT",
            "rows": 512,
            "columns": 512,
            "pixel_spacing_mm": [0.5, 0.5],
            "image_position_mm": [0.0, 0.0, float(slice)],
            "image_orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
            "series_verdict": "ok",
        }
        for slice in range(_SLICES)
    ]


def _hash(*of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()


def _write_ledger(output: str, task: Task, planned: plan.Plan) -> None:
    """As a run that has segmented all of it."""
    rows: list[dict[str, Any]] = []
    for number, series in enumerate(map(plan.unpacked_series, planned.todo), start=1):
        key = series["series_key"]
        file = {"profile": "seg", "uri": f"{task.folder}/{key}.dcm", "sha256": key, "bytes": 7_000_000, "pacs": None}
        done = {"input_digest": series["input_digest"], "slices": _SLICES, "outputs": [file], "seconds": 20.0}
        rows.append(ledger_row(task, key, series["patient_key"], None) | done)
        if len(rows) == reading.SERIES_PER_PART or number == len(planned.todo):
            ledger.append(output, rows, [])
            rows = []
