"""The ledger and the rejects of an archive: what holds is a fact of the tables."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from rayseg import tables
from rayseg.inference import archive, ledger
from rayseg.inference.refusals import News, Refusals
from rayseg.inference.series import STAGE
from rayseg.records import ARCHIVE_REJECTS, LEDGER, LEDGER_TABLE, REJECTS, Reason, Reject
from tests import appending

FILES = [{"profile": "seg", "uri": "out/a.dcm"}]


def row(series_key: str, model_digest: str = "m1", **values: Any) -> dict[str, Any]:
    base = {"series_key": series_key, "verdict": "segmented", "model_digest": model_digest, "config_digest": "c"}
    return base | {"slices": 3, "rejected_slices": 0, "outputs": FILES} | values


def reject(uri: str, **values: Any) -> dict[str, Any]:
    base = {"uri": uri, "frame": None, "stage": "segment", "reason": "corrupt", "detail": "", "series_key": "a"}
    return base | values


def told(output: str) -> list[tuple[str, str, str]]:
    """The rejects that hold."""
    return [(one["model_digest"], one["uri"], one["reason"]) for one in ledger.rejects(output).to_pylist()]


def write_part(folder: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema, key: Sequence[str], age: int) -> None:
    """As it was written before there were tables; of two parts the one of the greater `age` was written later."""
    ordered = sorted(rows, key=lambda row: [str(row[name]) for name in key])
    text = json.dumps([[one[name] for name in key] for one in ordered], sort_keys=True, separators=(",", ":"))
    part = folder / f"part-{hashlib.sha256(text.encode()).hexdigest()[:32]}.parquet"
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(ordered, schema=schema), part, compression="zstd")
    os.utime(part, (1_000_000_000 + age, 1_000_000_000 + age))


def write_parts(output: Path, age: int, rows: Sequence[dict[str, Any]], rejects: Sequence[dict[str, Any]]) -> None:
    if rejects:
        write_part(output / "rejects", rejects, REJECTS, ("uri", "frame", "stage"), age)
    if rows:
        write_part(output / "ledger", rows, LEDGER, ledger.IDENTITY, age)


def test_an_archive_without_a_ledger_has_an_empty_one(tmp_path: Path) -> None:
    assert ledger.read(str(tmp_path)).schema.equals(LEDGER)
    assert ledger.rows_of(str(tmp_path), "m1", "c").num_rows == 0


def test_rows_come_back_and_delta_lake_alone_can_read_them(tmp_path: Path) -> None:
    output = str(tmp_path)
    ledger.append(
        output, [row("b"), row("a", verdict="rejected", reason="corrupt", slices=0)], [reject("y"), reject("x")]
    )
    ledger.append(output, [row("c", run_id="r")], [])
    found = ledger.read(output)
    assert found.schema.equals(LEDGER)
    assert found["series_key"].to_pylist() == ["a", "b", "c"]
    alone = DeltaTable(tmp_path / "ledger").to_pandas().set_index("series_key")
    assert alone["sequence"].to_dict() == {"a": 0, "b": 0, "c": 1}
    assert alone.loc["c", "run_id"] == "r"
    rejects = DeltaTable(tmp_path / "rejects").to_pandas()
    assert sorted(rejects["uri"]) == ["x", "y"]
    assert {*rejects["rejects_digest"]} == {alone.loc["a", "rejects_digest"]}
    assert ledger.rejects(output).schema.equals(ARCHIVE_REJECTS)
    # The log of a table has no names of files: only what is searched by is there.
    log = "".join(file.read_text() for file in (tmp_path / "rejects" / "_delta_log").glob("*.json"))
    assert "series_key" in log
    assert '\\"uri\\"' not in log.partition('"add"')[2]


def test_the_same_again_changes_nothing(tmp_path: Path) -> None:
    output = str(tmp_path)
    for _ in range(2):
        ledger.append(output, [row("b", seconds=2.0), row("a")], [reject("x"), reject("y", stage="catalog")])
        rows, rejects = ledger.read(output), ledger.rejects(output).drop_columns([tables.SEQUENCE])
        assert (rows.num_rows, rejects.num_rows) == (2, 2)
    ledger.append(output, [row("a")], [reject("x")])
    assert ledger.read(output).equals(rows)
    assert ledger.rejects(output).drop_columns([tables.SEQUENCE]).equals(rejects)


def test_the_latest_row_of_a_series_counts_in_every_copy(tmp_path: Path) -> None:
    """Whatever times the files have: those of a copy are of the copying, in any order."""
    output = tmp_path / "output"
    for slices in (2, 5, 3, 4):
        rejects = [reject(f"x{number}") for number in range(slices)]
        ledger.append(str(output), [row("a", slices=slices), row(f"b{slices}")], rejects)
    latest = [4, 3, 3, 3, 3]
    assert ledger.read(str(output))["slices"].to_pylist() == latest
    for name, backwards in (("copy", False), ("other", True)):
        shutil.copytree(output, tmp_path / name)
        for age, file in enumerate(sorted((tmp_path / name).rglob("*.*"), reverse=backwards)):
            os.utime(file, (1_000_000_000 + age, 1_000_000_000 + age))
        assert ledger.read(str(tmp_path / name)).equals(ledger.read(str(output)))
        assert [uri for _, uri, _ in told(str(tmp_path / name))] == ["x0", "x1", "x2", "x3"]


def test_a_copy_made_amid_a_run_lacks_the_last_rows_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hints at the latest checkpoint is copied last, and may be newer than what was copied before."""
    monkeypatch.setattr(tables, "_CHECKPOINT", 4)
    output = str(tmp_path)
    for number in range(9):
        ledger.append(output, [row(f"a{number}")], [])
    log = tmp_path / "ledger" / "_delta_log"
    newest = json.loads((log / "_last_checkpoint").read_text())["version"]
    later = [file for file in log.iterdir() if file.name[:20].isdigit() and int(file.name[:20]) >= newest]
    assert len(later) >= 2
    for file in later:
        file.unlink()
    keys = [f"a{number}" for number in range(newest)]
    assert ledger.read(output)["series_key"].to_pylist() == keys
    ledger.append(output, [row("b")], [])
    assert ledger.read(output)["series_key"].to_pylist() == [*keys, "b"]


def test_rejects_are_of_a_model_and_end_when_their_object_succeeds(tmp_path: Path) -> None:
    output = str(tmp_path)
    bad = {"verdict": "rejected", "reason": "corrupt", "slices": 0}
    ledger.append(output, [row("a", rejected_slices=2, **bad)], [reject("x"), reject("y")])
    ledger.append(output, [row("a", "m2", rejected_slices=1)], [reject("x", reason="internal")])
    assert told(output) == [("m1", "x", "corrupt"), ("m2", "x", "internal"), ("m1", "y", "corrupt")]
    ledger.append(output, [row("a", rejected_slices=1)], [reject("y")])
    assert told(output) == [("m2", "x", "internal"), ("m1", "y", "corrupt")]
    ledger.append(output, [row("a")], [])
    assert told(output) == [("m2", "x", "internal")]
    ledger.append(output, [row("a", config_digest="d", rejected_slices=1)], [reject("x", frame=3)])
    ledger.append(output, [row("a", rejected_slices=2, **bad)], [reject("x"), reject("y")])  # as at first
    corrupt = [("m1", uri, "corrupt") for uri in "xxy"]  # two of the first configuration, one of the other
    assert sorted(told(output)) == [*corrupt, ("m2", "x", "internal")]
    ours = ledger.rows_of(output, "m1", "c").to_pylist()
    assert ledger.refused(output, ours, STAGE) == {"corrupt": 2}


def test_what_the_catalog_refuses_holds_until_a_manifest_says_otherwise(tmp_path: Path) -> None:
    output = str(tmp_path)
    nothing = {"series_key": None, "stage": "catalog"}
    rejects = [reject("x", **nothing), reject("y", frame=1, **nothing), reject("z", detail="why", **nothing)]
    known: dict[tuple[str, int | None], Reject] = {}

    def plan(refused: list[dict[str, Any]], *accepted: str) -> int:
        """How many rows a run adds to the table."""
        news = News(ledger.refused_by_catalog(output))
        rows = [*news.of(refused, accepted), *news.over()]
        ledger.append(output, [], rows)
        return len(rows)

    assert plan(rejects) == 3
    assert plan(rejects) == 0
    assert plan([rejects[1] | {"reason": "truncated"}, rejects[2]], "x") == 2  # x was mended, y is spoiled otherwise
    known = {("y", 1): Reject(Reason.TRUNCATED), ("z", None): Reject(Reason.CORRUPT, "why")}
    assert ledger.refused_by_catalog(output) == known
    assert plan([]) == 0  # of another manifest
    assert plan([], "w", "y") == 1  # as one image, whatever its frames were
    assert told(output) == [(None, "z", "corrupt")]


def test_a_death_between_the_tables_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, undisturbed = str(tmp_path / "output"), str(tmp_path / "undisturbed")
    steps = [
        ([row("a", rejected_slices=1), row("b")], [reject("x")]),
        ([row("a", rejected_slices=1)], [reject("y")]),
    ]
    append = tables.append
    for rows, rejects in steps:
        before = (ledger.read(output), ledger.rejects(output))
        for dies_at in (ledger.REJECTS_FOLDER, ledger.FOLDER):

            def add(uri: str, *rest: Any, dies_at: str = dies_at) -> int:
                if uri.endswith(dies_at):
                    raise KeyboardInterrupt
                return append(uri, *rest)

            monkeypatch.setattr(tables, "append", add)
            with pytest.raises(KeyboardInterrupt):
                ledger.append(output, rows, rejects)
            assert (ledger.read(output), ledger.rejects(output)) == before
        monkeypatch.setattr(tables, "append", append)
        for place in (output, undisturbed):
            ledger.append(place, rows, rejects)
    assert ledger.read(output).equals(ledger.read(undisturbed))
    assert told(output) == told(undisturbed) == [("m1", "y", "corrupt")]


def test_two_drivers_at_once_lose_nothing(tmp_path: Path) -> None:
    appending.check(str(tmp_path))


def test_many_small_appends_are_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "COMMITS_PER_COMPACTION", 8)
    output = str(tmp_path)
    for number in range(20):
        ledger.append(output, [row("a", slices=number), row(f"b{number:02d}")], [])
    table = DeltaTable(tmp_path / "ledger")
    assert len(table.file_uris()) <= 8
    assert len({one["sequence"] for one in table.to_pyarrow_table().to_pylist()}) == 20
    found = ledger.read(output)
    assert found["series_key"].to_pylist() == ["a", *(f"b{number:02d}" for number in range(20))]
    assert found["slices"].to_pylist()[0] == 19
    # A week later what is of no use goes: what was put together, and what somebody left who was killed amid a commit.
    superseded = {Path(file).name for file in (tmp_path / "ledger").glob("*.parquet")} - {
        Path(uri).name for uri in table.file_uris()
    }
    assert superseded
    useless = tmp_path / "ledger" / "part-00000-01234567-89ab-cdef-0123-456789abcdef-c000.zstd.parquet"
    of_before = tmp_path / "ledger" / f"part-{'0' * 32}.parquet"
    for file in (useless, of_before):
        file.write_bytes(b"old")
        os.utime(file, (1_000_000_000, 1_000_000_000))
    tables.compact(str(tmp_path / "ledger"))
    assert (useless.exists(), of_before.exists()) == (False, True)
    assert all((tmp_path / "ledger" / name).exists() for name in superseded)  # of today
    # Who began to read before goes on with what was there.
    early = tables.append(str(tmp_path / "ledger"), LEDGER_TABLE.empty_table(), ledger.IDENTITY) - 4
    assert DeltaTable(tmp_path / "ledger", version=early).to_pyarrow_table().num_rows < 40


def test_ledgers_of_before_there_were_tables_are_read_and_become_tables(tmp_path: Path) -> None:
    output = str(tmp_path)
    lost, bad = {"slices": 0, "verdict": "rejected", "reason": "corrupt"}, {"series_key": "b"}
    rejects = [reject("a0"), reject("b0", **bad), reject("b1", **bad), reject("n", series_key=None, stage="catalog")]
    write_parts(tmp_path, 1, [row("a", slices=2, rejected_slices=1), row("b", rejected_slices=2, **lost)], rejects)
    write_parts(tmp_path, 2, [row("a", slices=3)], [])  # the retry
    write_parts(tmp_path, 0, [row("a", slices=9), row("z", "m2")], [])  # older than both
    expected = [("a", "m1", 3), ("b", "m1", 0), ("z", "m2", 3)]
    held = [("m1", "b0", "corrupt"), ("m1", "b1", "corrupt"), (None, "n", "corrupt")]

    def state() -> tuple[list[Any], list[Any]]:
        rows = ledger.read(output).to_pylist()
        return [(one["series_key"], one["model_digest"], one["slices"]) for one in rows], told(output)

    before = {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")}
    assert state() == (expected, held)
    assert not (tmp_path / "ledger" / "_delta_log").exists()  # reading changes nothing
    assert ledger.refused(output, ledger.read(output).to_pylist(), STAGE) == {"corrupt": 2}
    ledger.append(output, [], [])
    assert state() == (expected, held)
    assert DeltaTable(tmp_path / "ledger").to_pyarrow_table().num_rows == 5
    assert {file: file.read_bytes() for file in before} == before
    ledger.append(output, [row("b", slices=2)], [])
    assert state() == ([expected[0], ("b", "m1", 2), expected[2]], held[2:])
    ledger.append(output, [row("a", rejected_slices=1)], [reject("a0")])
    assert state()[1] == [("m1", "a0", "corrupt"), held[2]]


def test_parts_of_an_earlier_version_may_lack_columns(tmp_path: Path) -> None:
    write_parts(
        tmp_path, 0, [row("a", not_made=[{"profile": "nifti", "reason": "uneven_slices", "detail": "2 mm"}])], []
    )
    earlier = pa.Table.from_pylist([row("b")], schema=LEDGER).drop_columns(["not_made"])
    files = pa.struct([field for field in LEDGER.field("outputs").type.value_type if field.name != "pacs"])
    outputs = pa.array([FILES], pa.list_(files))
    earlier = earlier.set_column(earlier.column_names.index("outputs"), "outputs", outputs)
    pq.write_table(earlier, tmp_path / "ledger" / "part-earlier.parquet")
    found = ledger.read(str(tmp_path))
    assert found.schema.equals(LEDGER)
    assert [bool(one) for one in found["not_made"].to_pylist()] == [True, False]
    assert found["outputs"].to_pylist()[1][0]["pacs"] is None


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
    assert told(str(tmp_path)) == [(None, "x", "corrupt")]


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
