"""Shards of a manifest as tasks of a job write them, in this process."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data import accepted
from rayseg.data.samples import Making, write_shards
from rayseg.data.shards import Task, limited, planned


def tasks_of(
    table: pa.Table, folder: Path, split: str = "test", limit: int | None = None, rows_per_shard: int = 256
) -> list[Task]:
    """The tasks, all of one split; their rows are in `folder`."""
    storage.write_table(str(folder / "manifest.parquet"), table)
    units = accepted.write(folder / "manifest.parquet", folder / "rows.arrow")
    taken = limited(np.repeat(units.patient, units.rows), limit)
    return planned(units, np.zeros(len(units.first), np.int8), [split], taken, rows_per_shard)


def written(
    table: pa.Table, folder: Path, making: Making, split: str = "test", limit: int | None = None, **values: int
) -> list[dict[str, Any]]:
    """What the tasks tell of their shards, which are in `folder`."""
    tasks = tasks_of(table, folder, split, limit, **values)
    return [shard for task in tasks for shard in write_shards(task, str(folder / "rows.arrow"), str(folder), making)]
