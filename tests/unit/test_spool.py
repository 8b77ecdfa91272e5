"""Rows on disk: any row by its number, and whole series in the order of their first rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayseg.data import spool as module
from rayseg.data.spool import Spool, by_series, packed, unpacked

SCHEMA = pa.schema(
    [("index", pa.int64()), ("series_key", pa.string()), ("verdict", pa.string()), ("kind", pa.string())]
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)


def table(rows: list[tuple[int, str | None, str, str | None]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


def test_rows_come_back_by_number(tmp_path: Path) -> None:
    with Spool(tmp_path / "rows", SCHEMA) as spool:
        for start in (0, 5, 35):
            spool.append(table([(n, f"s{n}", "ok", "dicom") for n in range(start, start + 30 if start else 5)]))
        assert len(spool) == 65
        numbers = np.array([64, 0, 11, 11, 40, 3])
        expected = [64, 0, 11, 11, 40, 3]
        assert [row["index"] for row in spool.rows(numbers)] == expected
        assert spool.rows(np.empty(0, np.int64)) == []


def test_an_empty_one_has_no_rows(tmp_path: Path) -> None:
    with Spool(tmp_path / "rows", SCHEMA) as spool:
        assert list(by_series(spool)) == []


def test_series_stand_whole_where_their_first_row_stands(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows: list[tuple[int, str | None, str, str | None]] = []
    for index in range(300):
        kind = ("dicom", "image")[int(rng.integers(5) == 0)]
        verdict = ("ok", "rejected")[int(rng.integers(6) == 0)]
        rows.append((index, f"s{rng.integers(9 if index < 200 else 40)}", verdict, kind))
    # A dictionary of the series, in the order of the rows, with what is rejected of each.
    members: dict[object, list[int]] = {}
    for index, key, _, kind in rows:
        members.setdefault(key if kind == "dicom" else index, []).append(index)
    expected = [index for unit in members.values() for index in unit]
    shuffled = [rows[number] for number in rng.permutation(len(rows))]
    with Spool(tmp_path / "rows", SCHEMA) as spool:
        for start in range(0, 300, 11):
            spool.append(table(shuffled[start : start + 11]))
        lists = list(by_series(spool))
    assert [row["index"] for rows in lists for row in rows] == expected
    assert len(lists) > 3
    place = {index: number for number, rows in enumerate(lists) for index in [row["index"] for row in rows]}
    for unit in members.values():
        assert len({place[index] for index in unit}) == 1


def test_a_packed_table_comes_back() -> None:
    rows = table([(n, "a series", "ok", None) for n in range(500)])
    assert unpacked(packed(rows)) == rows
    assert len(packed(rows)) < rows.nbytes / 3
