"""Reading a ledger that a run has written in parts of 64 series: the table, beside the folder of files of before.

A process of its own reads each, so that its memory is that of the reading: `python -m rayseg.benchmark.ledger`.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from rayseg import storage
from rayseg.benchmark.data import figure
from rayseg.benchmark.watch import greatest
from rayseg.inference import ledger
from rayseg.inference.series import Task, ledger_row
from rayseg.records import LEDGER
from rayseg.tracking.version import ModelVersion

SERIES_PER_PART = 32  # as a run writes them
_TASK = Task("s3://results/2024/bench-v1-cccccccc", ModelVersion("bench", "1", "u", "r", "1" * 64), "c" * 64)
_READERS = 8


def measure(folder: Path, repeats: int, series: int) -> dict[str, Any]:
    """Seconds and memory of reading so many series, as ratios to the files of before; `folder` is for both."""
    table, files = folder / "table", folder / "files"
    for number, rows in enumerate(_parts(series)):
        storage.write_table(str(files / f"part-{number:032x}.parquet"), pa.Table.from_pylist(rows, schema=LEDGER))
    began = time.perf_counter()
    for rows in _parts(series):
        ledger.append(str(table), rows, [])
    appends = math.ceil(series / SERIES_PER_PART)
    figures = {"ledger_append_ms": figure([(time.perf_counter() - began) / appends * 1e3])}
    read: dict[str, list[dict[str, float]]] = {"table": [], "files": []}
    for _ in range(repeats):
        for name, told in read.items():
            command = [sys.executable, "-m", "rayseg.benchmark.ledger", name, str(folder / name), str(series)]
            told.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    figures["ledger_read_s"] = figure([one["seconds"] for one in read["table"]])
    for what in ("seconds", "cpu", "bytes"):
        pairs = zip(read["table"], read["files"], strict=True)
        figures[f"ledger_read_{what}_vs_files"] = figure([new[what] / old[what] for new, old in pairs])
    return figures


def _parts(series: int) -> Iterator[list[dict[str, Any]]]:
    for first in range(0, series, SERIES_PER_PART):
        yield [_row(number) for number in range(first, min(first + SERIES_PER_PART, series))]


def _row(number: int) -> dict[str, Any]:
    key = f"{number * 2_654_435_761 % 2**80:020x}"
    file = {"profile": "seg", "uri": f"{_TASK.folder}/{key}.dcm", "sha256": f"{number:064x}", "bytes": 100_000}
    return ledger_row(_TASK, key, f"{number // 2:020x}", None) | {
        "slices": 40,
        "input_digest": f"{number:064x}",
        "volume_ml": 0.0,
        "flags": [],
        "engine": "openvino 2026.1 screened",
        "outputs": [file],
        "seconds": number / 1000,
    }


def read_files(folder: str) -> pa.Table:
    """As ledgers were read before there were tables: of each series the row of the latest file."""
    parts = sorted(storage.list_files(folder, (".parquet",)), key=lambda part: (part.modified, part.uri))
    with ThreadPoolExecutor(_READERS) as pool:
        whole = pa.concat_tables(pool.map(storage.read_table, [part.uri for part in parts]))
    later = whole.select(ledger.IDENTITY).to_pandas().duplicated(keep="last").to_numpy()
    return whole.filter(~later).sort_by([(name, "ascending") for name in ledger.IDENTITY])


def _main(name: str, place: str, series: str) -> None:
    import deltalake  # noqa: F401 (a driver has these already)
    import pandas  # noqa: F401
    import pyarrow.dataset  # noqa: F401

    process = psutil.Process()
    before = process.memory_info().rss
    began, spent = time.perf_counter(), time.process_time()
    with greatest(lambda: process.memory_info().rss) as most:
        rows = ledger.read(place) if name == "table" else read_files(place)
        told = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - spent}
        assert rows.num_rows == int(series)
    print(json.dumps(told | {"bytes": max(most[0], process.memory_info().rss) - before}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
