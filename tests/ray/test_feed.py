"""The feed through Ray Data's tasks: the batches that a thread would make, its errors, and an end when it is left."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayseg import storage
from rayseg.data.augment import Augment
from rayseg.data.feed import Batch, batches
from rayseg.data.prepared import describe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def epoch(uri: str, tasks: int, rank: int = 0, ranks: int = 2) -> list[Batch]:
    prepared = describe(uri)
    augment = Augment(flip_vertical=0.5, noise=9, rotate_degrees=20)
    return list(
        batches(
            prepared,
            "train",
            global_batch=6,
            rank=rank,
            world_size=ranks,
            seed=3,
            epoch=2,
            augment=augment,
            tasks=tasks,
        )
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_are_bit_equal_to_those_of_a_thread(discs: str, rank: int) -> None:
    for made, expected in zip(epoch(discs, 2, rank), epoch(discs, 0, rank), strict=True):
        for ours, theirs in zip(made, expected, strict=True):
            assert np.array_equal(ours, theirs)


def test_a_row_that_does_not_fit_the_set_is_named(discs: str, tmp_path: Path) -> None:
    copied = shutil.copytree(discs, tmp_path / "set")
    shard = str(copied / "split=train/part-00000.parquet")
    rows = storage.read_table(shard).to_pylist()
    rows[5]["image"] = rows[5]["image"][:-1]
    storage.write_table(shard, pa.Table.from_pylist(rows, schema=storage.read_table(shard).schema), 4)
    with pytest.raises(Exception, match="row train5 has 1023 image"):
        epoch(str(copied), 2, ranks=1)


def test_an_epoch_that_is_left_ends_its_tasks(discs: str) -> None:
    fed = batches(describe(discs), "train", global_batch=1, rank=0, world_size=1, seed=1, epoch=0, tasks=1)
    next(fed)
    fed.close()
    assert not [thread.name for thread in threading.enumerate() if "StreamingExecutor" in thread.name]
