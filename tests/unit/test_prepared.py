"""A prepared set is described and read back as it was written."""

from pathlib import Path

import pyarrow as pa
import pytest

from rayseg import storage
from rayseg.config import plain
from rayseg.data.labels import Labels
from rayseg.data.prepared import DESCRIPTION, VERSION, describe
from rayseg.data.preprocess import Preprocess, Window
from rayseg.records import PREPARED

PREPROCESS = Preprocess(size=(2, 3), window=Window(40, 80), percentiles=None)
LABELS = Labels(names=("tumour",), threshold=127)


def rows(split: str, numbers: range) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"row_id": f"r{n}", "patient_key": f"p{n}", "split": split, "image": bytes([n] * 6), "mask": bytes(6)}
            for n in numbers
        ],
        schema=PREPARED,
    )


@pytest.fixture
def uri(tmp_path: Path) -> str:
    root = str(tmp_path / "set")
    shards = {"train": ["split=train/part-00000.parquet", "split=train/part-00001.parquet"], "val": [], "test": []}
    storage.write_table(storage.join(root, shards["train"][0]), rows("train", range(3)))
    storage.write_table(storage.join(root, shards["train"][1]), rows("train", range(3, 5)))
    storage.write_table(storage.join(root, "split=train/part-00002.parquet"), rows("train", range(9)))  # not of the set
    description = {
        "version": VERSION,
        "digest": "d" * 64,
        "preprocess": plain(PREPROCESS),
        "labels": plain(LABELS),
        "shape": [2, 3, 1],
        "rows": {"train": 5, "val": 0, "test": 0},
        "shards": shards,
        "shard_rows": {"train": [3, 2], "val": [], "test": []},
        "row_group_rows": 16,
    }
    storage.write_json(storage.join(root, DESCRIPTION), description)
    return root


def test_the_description_comes_back_typed(uri: str) -> None:
    found = describe(uri)
    assert found.uri == uri
    assert found.shape == (2, 3, 1)
    assert found.preprocess == PREPROCESS
    assert found.labels == LABELS
    assert found.rows == {"train": 5, "val": 0, "test": 0}
    assert found.digest == "d" * 64
    assert found.shard_rows == {"train": (3, 2), "val": (), "test": ()}
    assert found.row_group_rows == 16


def test_rows_come_in_the_order_of_the_shards_and_only_from_them(uri: str) -> None:
    table = describe(uri).read_rows("train")
    assert table.schema == PREPARED
    assert table["row_id"].to_pylist() == ["r0", "r1", "r2", "r3", "r4"]
    assert table["image"][4].as_py() == bytes([4] * 6)
    assert table["split"].to_pylist() == ["train"] * 5


def test_columns_can_be_chosen(uri: str) -> None:
    table = describe(uri).read_rows("train", ["split", "patient_key"])
    assert table.column_names == ["split", "patient_key"]
    assert len(table) == 5


def test_an_empty_split_has_no_files_and_no_rows(uri: str) -> None:
    assert describe(uri).files("val") == []
    assert describe(uri).read_rows("val").schema == PREPARED
    assert len(describe(uri).read_rows("val")) == 0


def test_no_set_and_an_old_set_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished prepared set"):
        describe(str(tmp_path / "elsewhere"))
    stale = storage.read_json(storage.join(uri, DESCRIPTION)) | {"version": 0}
    storage.write_json(storage.join(uri, DESCRIPTION), stale)
    with pytest.raises(ValueError, match="of version 0, not"):
        describe(uri)


def test_a_set_is_the_same_wherever_its_tasks_run():
    from rayseg.data.prepare import PrepareConfig, _digest

    plain, pinned = (PrepareConfig("m", "o", resources=asked) for asked in ({}, {"decode": 1.0}))
    assert _digest(plain, "0" * 64, {}) == _digest(pinned, "0" * 64, {})
    assert _digest(plain, "0" * 64, {}) != _digest(plain, "1" * 64, {})
