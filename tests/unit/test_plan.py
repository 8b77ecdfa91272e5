"""What an archive run has to do, read from a manifest a part at a time."""

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseg.data.manifest import in_series
from rayseg.data.spool import Spool, by_series
from rayseg.inference import archive, ledger, plan
from rayseg.inference.series import Task
from rayseg.records import MANIFEST
from rayseg.tracking.version import ModelVersion

TASK = Task("out", ModelVersion("brain", "1", "models:/brain/1", "r", "d" * 64), "c" * 64)


def instance(series: str | None, number: int, **values: Any) -> dict[str, Any]:
    row = {"uri": f"{series}/{number}.dcm", "etag": str(number), "verdict": "ok", "kind": "dicom", "series_key": series}
    return row | {"patient_key": "p"} | values


def bad(series: str | None, number: int, reason: str = "corrupt", detail: str = "") -> dict[str, Any]:
    return instance(series, number, verdict="rejected", reason=reason, detail=detail)


def write(path: Path, rows: list[dict[str, Any]], a_group: int = 1000) -> str:
    with pq.ParquetWriter(path, MANIFEST) as writer:
        for first in range(0, len(rows), a_group):
            writer.write_table(pa.Table.from_pylist(rows[first : first + a_group], schema=MANIFEST))
    return str(path)


def made(manifest: str, done: tuple[str, ...] = ()) -> tuple[plan.Plan, list[Any], list[Any]]:
    kept: tuple[list[Any], list[Any]] = ([], [])

    def keep(rows: Any, rejects: Any) -> None:
        kept[0].extend(rows)
        kept[1].extend(rejects)

    return plan.make(manifest, TASK, lambda row: row["series_key"] in done, keep), *kept


def test_series_are_to_do_done_or_unusable_and_every_object_is_one_of_them(tmp_path: Path) -> None:
    rows = [
        *(instance("a", number) for number in range(3)),
        bad("a", 3),
        bad(None, 4, "not_dicom"),
        *(instance("b", number, frame=number) for number in range(2)),
        bad("c", 0, "series_mixed", "two sizes"),
        bad("c", 1, "series_mixed", "two sizes"),
        instance("d", 0),
        instance("e", 0, kind="image"),
    ]
    planned, unusable, rejects = made(write(tmp_path / "m.parquet", rows), done=("d",))
    todo = [plan.unpacked_series(cell) for cell in planned.todo]
    assert [(row["series_key"], row["uris"], row["frames"]) for row in todo] == [
        ("a", ["a/0.dcm", "a/1.dcm", "a/2.dcm"], [None] * 3),
        ("b", ["b/0.dcm", "b/1.dcm"], [0, 1]),
    ]
    assert (planned.series, planned.done, planned.slices) == (["a", "b", "d"], {"d"}, 5)
    assert planned.accepted == 7  # by the catalog: the picture is refused here
    assert planned.refusals.counts() == {"corrupt": 1, "not_dicom": 2, "series_mixed": 2}
    assert dict(planned.refusals.of_run) == {"corrupt": 0, "not_dicom": 1, "series_mixed": 0}
    told = [(row["series_key"], row["reason"], row["detail"], row["rejected_slices"]) for row in unusable]
    assert told[0] == ("c", "series_mixed", "two sizes", 2)
    assert told[1][:2] == ("e", "not_dicom")
    assert [reject["uri"] for reject in rejects] == ["a/3.dcm", "None/4.dcm", "c/0.dcm", "c/1.dcm", "e/0.dcm"]
    assert unusable == planned.unusable


def test_a_second_plan_writes_what_is_new_and_no_more(tmp_path: Path) -> None:
    """Both tables after each plan: unusable series by model, objects that the catalog refuses until it accepts them."""
    output = str(tmp_path / "output")

    def state(rows: list[dict[str, Any]]) -> tuple[list[Any], list[Any], int]:
        done = ledger.rows_of(output, TASK.model.digest, TASK.config_digest).to_pylist()
        latest = {row["series_key"]: row for row in done}
        keep = partial(archive._keep, output, latest)
        plan.make(write(tmp_path / "m.parquet", rows), TASK, lambda row: False, keep, ledger.refused_by_catalog(output))
        series = [(row["series_key"], row["reason"]) for row in ledger.read(output).to_pylist()]
        objects = [(row["uri"], row["reason"]) for row in ledger.rejects(output).to_pylist()]
        return series, objects, sum(1 for _ in tmp_path.glob("output/*/_delta_log/*.json"))

    rows = [instance("a", 0), bad("a", 1), bad(None, 2, "not_dicom"), bad("c", 0), instance("e", 0, kind="image")]
    series = [("c", "corrupt"), ("e", "not_dicom")]
    objects = [("None/2.dcm", "not_dicom"), ("a/1.dcm", "corrupt"), ("c/0.dcm", "corrupt"), ("e/0.dcm", "not_dicom")]
    for _ in range(2):
        assert state(rows) == (series, objects, 2)
    rows[1:3] = [instance("a", 1), bad(None, 2, "truncated")]  # one was mended, one is bad for another reason
    objects[:2] = [("None/2.dcm", "truncated")]
    for _ in range(2):
        assert state(rows) == (series, objects, 3)
    rows[-1] = instance("e", 1, kind="image")  # another file: its series is refused anew
    objects[-1] = ("e/1.dcm", "not_dicom")
    for _ in range(2):
        assert state(rows) == (series, objects, 5)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), a_group=st.integers(1, 12))
def test_parts_of_the_manifest_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], a_group: int
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    rows = [instance(f"s{series}", number) for series, size in enumerate(sizes) for number in range(size)]
    whole, _, _ = made(write(folder / "whole.parquet", rows))
    parts, _, _ = made(write(folder / "parts.parquet", rows, a_group))
    assert [plan.unpacked_series(cell) for cell in parts.todo] == [plan.unpacked_series(cell) for cell in whole.todo]
    assert parts.slices == sum(sizes)


def test_the_digest_is_of_uri_frame_and_etag(tmp_path: Path) -> None:
    rows = [instance("a", 0), instance("a", 1)]
    others = [
        [instance("a", 0), instance("a", 1, **changed)] for changed in ({"uri": "x"}, {"etag": "x"}, {"frame": 1})
    ]
    digests = []
    for number, some in enumerate([rows, [row | {"detail": "told anew"} for row in rows], *others]):
        planned, _, _ = made(write(tmp_path / f"{number}.parquet", some))
        digests.append(plan.unpacked_series(planned.todo[0])["input_digest"])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_series_in_two_places_is_refused(tmp_path: Path) -> None:
    rows = [instance("a", 0), instance("b", 0), instance("a", 1)]
    with pytest.raises(ValueError, match=r"segment\.manifest: series a stands in several places"):
        made(write(tmp_path / "m.parquet", rows))


@pytest.mark.parametrize("rejected", [0, 1, 4, 5, 8, 9])
def test_a_manifest_has_series_of_one_folder_in_one_place_each_with_what_is_rejected_of_them(
    tmp_path: Path, rejected: int
) -> None:
    """Files of two series alternate; one lacks its mask."""
    geometry = {"study_key": "s", "localizer": False, "rows": 8, "columns": 8, "slice_thickness_mm": 1.0}
    geometry |= {"pixel_spacing_mm": [1.0, 1.0], "image_orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], "modality": "CT"}
    schema = MANIFEST.insert(0, pa.field("index", pa.int64()))
    rows = []
    for number in range(10):
        place = {"index": number, "instance_key": str(number), "image_position_mm": [0.0, 0.0, number // 2]}
        made_of = bad("ab"[number % 2], number, "no_mask") if number == rejected else instance("ab"[number % 2], number)
        rows.append(made_of | geometry | place | {"transfer_syntax_uid": "1.2.840.10008.1.2.1"})
    rows.append(bad(None, 10, "not_dicom") | {"index": 10})
    judged = []
    with Spool(tmp_path / "spool", schema) as spool:
        spool.append(pa.Table.from_pylist(rows[::-1], schema=schema))
        for some in by_series(spool):
            judged += in_series([{name: row[name] for name in MANIFEST.names} for row in some])
    told = ("uri", "etag", "verdict", "reason", "kind", "series_key", "patient_key")
    judged = [{name: row[name] for name in told} for row in judged]
    planned, _, rejects = made(write(tmp_path / "m.parquet", judged))
    assert sorted(planned.series) == ["a", "b"]
    assert len(rejects) == 2
    assert planned.slices == 9


def test_no_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"segment\.manifest: there is no manifest"):
        made(str(tmp_path / "m.parquet"))


def test_many_rejects_are_kept_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_REJECTS_PER_PART", 10)
    rows = [bad(None, number) for number in range(25)]
    parts: list[int] = []
    planned = plan.make(
        write(tmp_path / "m.parquet", rows), TASK, lambda row: False, lambda _, rejects: parts.append(len(rejects))
    )
    assert parts == [10, 10, 5]
    assert planned.refusals.counts() == {"corrupt": 25}
