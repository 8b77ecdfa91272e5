import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from rayseg.inference import archive, ledger
from rayseg.inference.refusals import Refusals
from rayseg.inference.series import STAGE
from rayseg.records import LEDGER, REJECTS

FILES = [{"profile": "seg", "uri": "out/a.dcm"}]


def row(series_key: str, model_digest: str = "m1", **values: Any) -> dict[str, Any]:
    base = {"series_key": series_key, "verdict": "segmented", "model_digest": model_digest, "config_digest": "c"}
    return base | {"slices": 3, "rejected_slices": 0, "outputs": FILES} | values


def reject(uri: str) -> dict[str, Any]:
    return {"uri": uri, "frame": None, "stage": "segment", "reason": "corrupt", "detail": "", "series_key": "a"}


def test_an_archive_without_a_ledger_has_an_empty_one(tmp_path: Path) -> None:
    assert ledger.read(str(tmp_path)).schema.equals(LEDGER)
    assert ledger.rows_of(str(tmp_path), "m1", "c").num_rows == 0


def test_rows_come_back_from_several_parts_and_pyarrow_alone_can_read_them(tmp_path: Path) -> None:
    output = str(tmp_path)
    ledger.append(
        output, [row("b"), row("a", verdict="rejected", reason="corrupt", slices=0)], [reject("y"), reject("x")]
    )
    ledger.append(output, [row("c")], [])
    found = ledger.read(output)
    assert found.schema.equals(LEDGER)
    assert found["series_key"].to_pylist() == ["a", "b", "c"]
    assert len(list((tmp_path / "ledger").iterdir())) == 2
    alone = ds.dataset(tmp_path / "ledger").to_table()
    assert sorted(alone["series_key"].to_pylist()) == ["a", "b", "c"]
    rejects = ds.dataset(tmp_path / "rejects").to_table()
    assert rejects.schema.equals(REJECTS)
    assert rejects["uri"].to_pylist() == ["x", "y"]


def test_parts_of_an_earlier_version_are_read_beside_those_of_this(tmp_path: Path) -> None:
    output, lacking = str(tmp_path), [{"profile": "nifti", "reason": "uneven_slices", "detail": "2 mm"}]
    ledger.append(output, [row("a", not_made=lacking)], [])
    (part,) = (tmp_path / "ledger").iterdir()
    earlier = pa.Table.from_pylist([row("b")], schema=LEDGER).drop_columns(["not_made"])
    pq.write_table(earlier, part.with_name("part-earlier.parquet"))
    found = ledger.read(output)
    assert found.schema.equals(LEDGER)
    assert found["not_made"].to_pylist() == [lacking, None]


def test_doing_the_same_again_replaces_the_same_part(tmp_path: Path) -> None:
    output = str(tmp_path)
    ledger.append(output, [row("a", seconds=1.0), row("b")], [reject("x")])
    ledger.append(output, [row("b"), row("a", seconds=2.0)], [reject("x")])
    assert len(list((tmp_path / "ledger").iterdir())) == len(list((tmp_path / "rejects").iterdir())) == 1
    assert ledger.read(output)["seconds"].to_pylist() == [2.0, None]


def test_the_latest_row_of_a_series_counts(tmp_path: Path) -> None:
    output = str(tmp_path)
    ledger.append(output, [row("a", slices=3), row("b")], [])
    (older,) = (tmp_path / "ledger").iterdir()
    os.utime(older, (1_000_000_000, 1_000_000_000))
    ledger.append(output, [row("a", slices=4)], [])
    assert ledger.read(output)["slices"].to_pylist() == [4, 3]


def test_only_what_this_model_and_configuration_did_is_told(tmp_path: Path) -> None:
    output = str(tmp_path)
    rows = [row("a"), row("a", "m2", slices=9), row("b", config_digest="other"), row("c", verdict="rejected")]
    ledger.append(output, rows, [])
    done = ledger.rows_of(output, "m1", "c").to_pylist()
    assert [(row["series_key"], row["slices"]) for row in done] == [("a", 3), ("c", 3)]
    assert ledger.uris(row("a"), "seg") == ["out/a.dcm"]
    assert ledger.uris(row("a"), "nifti") == []


def test_rejects_of_no_series_need_no_ledger_row(tmp_path: Path) -> None:
    ledger.append(str(tmp_path), [], [reject("x")])
    assert not (tmp_path / "ledger").exists()
    assert ds.dataset(tmp_path / "rejects").count_rows() == 1


def test_the_same_run_again_counts_the_same_rejects_against_the_budget(tmp_path: Path) -> None:
    """Nine series of four slices: two are rejected, by two reasons, and one lacks a slice: 9 of 36, above a fifth."""
    output = str(tmp_path)
    rejects = [reject(f"{key}{number}") | {"series_key": key} for key in "ab" for number in range(4)]
    rejects[0]["reason"] = "truncated"
    rejects.append(reject("c0") | {"series_key": "c", "reason": "not_dicom"})
    rows = [row(key, slices=0, rejected_slices=4, verdict="rejected", reason="corrupt") for key in "ab"]
    rows += [row("c", rejected_slices=1), *(row(key) for key in "defghi")]
    ledger.append(output, rows, rejects)
    # What is told of other stages, and of series that nobody asks about, does not count.
    ledger.append(output, [row("z", rejected_slices=1)], [reject("z0") | {"series_key": "z"}])
    ledger.append(output, [], [reject("a9") | {"stage": "catalog"}])
    first, again = Refusals(), Refusals()
    first.add(rejects)
    known = [one for one in ledger.read(output).to_pylist() if one["series_key"] != "z"]
    again.earlier = ledger.refused(output, known, STAGE)
    told = []
    for refusals in (first, again):
        with pytest.raises(ValueError, match="9 of 36 objects rejected") as refused:
            archive._check_budget(refusals, 36, 0.2, output)
        told.append(str(refused.value))
        archive._check_budget(refusals, 36, 0.25, output)
    assert told[0] == told[1]
    assert "corrupt 7, not_dicom 1, truncated 1;" in told[0]


def test_rejects_that_no_table_names_count_all_the_same(tmp_path: Path) -> None:
    output = str(tmp_path)
    rows = [row("a", rejected_slices=3, verdict="rejected", reason="corrupt"), row("b", rejected_slices=2)]
    ledger.append(output, rows, [])
    known = ledger.read(output).to_pylist()
    assert ledger.refused(output, known, STAGE) == {"corrupt": 3, "unknown": 2}
    assert ledger.refused(output, [], STAGE) == {}
