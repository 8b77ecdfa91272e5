"""Tables that are replaced whole, on the local disk and on a real store: whoever reads sees one version."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from rayseg import lease, retry, snapshots, storage, tables
from rayseg.inference import plan
from rayseg.inference.series import Task
from rayseg.records import MANIFEST
from rayseg.tracking.version import ModelVersion
from tests.faults import faulty

pytestmark = pytest.mark.e2e

HTTP = {"AWS_ALLOW_HTTP": "true"}
COUNTS = {"accepted": 40}


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    base = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_store")
    return storage.join(base, request.node.name.partition("[")[0], "manifest.parquet")


def manifest_of(name: str, series: int = 10) -> pa.Table:
    """Four rows a series, in an order that no column has."""
    placed = {
        "frame_of_reference_key": "f",
        "pixel_spacing_mm": [1.0, 1.0],
        "image_orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
    }
    rows = [
        {
            "uri": f"{name}{(number * 7) % 101}-{slice}",
            "verdict": "ok",
            "kind": "dicom",
            "series_key": f"{name}{number}",
            "masks": [],
            "image_position_mm": [0.0, 0.0, float(slice)],
            **placed,
        }
        for number in range(series)
        for slice in range(4)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST.with_metadata({"said": name}))


def file_of(folder: Path, name: str) -> Path:
    path = folder / f"rows of {name}"
    pq.write_table(manifest_of(name), path, row_group_size=8, compression="zstd")
    return path


def replace(uri: str, folder: Path, name: str) -> None:
    snapshots.Writer(uri).write(file_of(folder, name), COUNTS)


def files(uri: str) -> set[str]:
    """Those right below the table that are not hidden."""
    names = [info.uri[len(uri) + 1 :] for info in storage.list_files(uri)]
    return {name for name in names if not name.startswith("_")}


def plain(uri: str) -> pa.Table:
    """The rows as who knows nothing of us reads them."""
    filesystem, path = storage.filesystem(uri)
    return pq.read_table(path, filesystem=filesystem)


def test_order_row_groups_and_metadata_are_those_that_were_written(uri: str, tmp_path: Path) -> None:
    for name in "ab":
        replace(uri, tmp_path, name)
        rows = manifest_of(name)
        assert storage.read(snapshots.current(uri)) == file_of(tmp_path, name).read_bytes()
        for found in (snapshots.read_table(uri), plain(uri)):
            assert found.equals(rows)
            assert found.schema.metadata == {b"said": name.encode()}
        assert storage.read_footer(snapshots.current(uri)).num_row_groups == 5
    table = DeltaTable(uri, storage_options=HTTP)
    assert table.to_pyarrow_table().cast(MANIFEST).equals(rows)
    dataset = table.to_pyarrow_dataset()  # noqa: F841 (by its name below)
    assert duckdb.sql("SELECT uri, frame FROM dataset").fetchall() == [(one, None) for one in rows["uri"].to_pylist()]
    history = table.history()
    assert [one["version"] for one in history] == [1, 0]
    assert json.loads(history[0]["userMetadata"]) == COUNTS
    # Nothing of the rows is in the log.
    log = [storage.read(info.uri) for info in storage.list_files(storage.join(uri, "_delta_log"), (".json",))]
    assert len(log) == 2
    assert not any(b"minValues" in one or f"{name}7-0".encode() in one for one in log)


def test_the_same_rows_are_no_new_version(uri: str, tmp_path: Path) -> None:
    for name in "aabb":
        replace(uri, tmp_path, name)
    assert DeltaTable(uri, storage_options=HTTP).version() == 1


def test_who_reads_goes_on_with_what_it_began_with(uri: str, tmp_path: Path) -> None:
    replace(uri, tmp_path, "a")
    with snapshots.reading(uri, "segment") as file:
        groups = storage.read_row_groups(file, ["uri"])
        read = [next(groups)]
        replace(uri, tmp_path, "b")
        assert plain(uri).num_rows == 80  # of both: what is replaced goes with nobody reading it
        assert snapshots.read_table(uri).equals(manifest_of("b"))
        replace(uri, tmp_path, "c")
        read += groups
    assert pa.concat_tables(read).equals(
        manifest_of("a").select(["uri"]).replace_schema_metadata(read[0].schema.metadata)
    )
    assert snapshots.read_table(uri).equals(manifest_of("c"))
    replace(uri, tmp_path, "c")
    assert plain(uri).equals(manifest_of("c"))
    assert len(files(uri)) == 1


def test_who_cannot_be_seen_is_refused_by_name(uri: str, tmp_path: Path) -> None:
    replace(uri, tmp_path, "a")

    def read() -> None:
        with snapshots.reading(uri, "segment") as file:
            groups = storage.read_row_groups(file, ["uri"])
            next(groups)
            for info in list(storage.list_files(storage.join(uri, snapshots.READERS))):
                storage.delete(info.uri)
            replace(uri, tmp_path, "b")
            list(groups)

    with pytest.raises(ValueError, match="its rows were replaced while they were read"):
        read()


def test_a_plan_is_of_one_manifest(uri: str, tmp_path: Path) -> None:
    """Another catalog commits while it is read."""
    replace(uri, tmp_path, "a")
    task = Task(str(tmp_path), ModelVersion("m", "1", "models:/m/1", "0" * 32, "0" * 64), "c" * 64)

    def is_done(row: Any) -> bool:
        if row["series_key"] == "a3":
            replace(uri, tmp_path, "b")
        return False

    planned = plan.make(uri, task, is_done, lambda rows, rejects: None)
    assert planned.series == [f"a{number}" for number in range(10)]
    again = plan.make(uri, task, lambda row: False, lambda rows, rejects: None)
    assert again.series == [f"b{number}" for number in range(10)]
    assert not list(lease.living(storage.join(uri, snapshots.READERS)))


def test_a_job_that_was_overtaken_changes_nothing(uri: str, tmp_path: Path) -> None:
    for before in (None, "a"):
        if before:
            replace(uri, tmp_path, before)
        first, second = snapshots.Writer(uri), snapshots.Writer(uri)
        second.write(file_of(tmp_path, f"second {before}"))
        with pytest.raises(lease.LostError, match="another job has replaced the rows"):
            first.write(file_of(tmp_path, f"first {before}"))
        assert plain(uri).equals(manifest_of(f"second {before}"))
    first, second = snapshots.Writer(uri), snapshots.Writer(uri)
    second.write(file_of(tmp_path, "third"))
    with pytest.raises(lease.LostError, match="another job has replaced the rows"):
        first.write(file_of(tmp_path, "second a"))  # as they were when it began
    assert plain(uri).equals(manifest_of("third"))


def test_who_clears_up_late_leaves_what_others_are_about_to_commit(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(uri, tmp_path, "a")
    late = snapshots.Writer(uri)
    clear, others = late._clear, []

    def clear_late() -> None:
        others.append(snapshots.Writer(uri))
        commit = others[0]._commit

        def commit_after(*arguments: Any) -> None:
            clear()
            commit(*arguments)

        monkeypatch.setattr(others[0], "_commit", commit_after)
        others[0].write(file_of(tmp_path, "c"))

    monkeypatch.setattr(late, "_clear", clear_late)
    late.write(file_of(tmp_path, "b"))
    assert plain(uri).equals(manifest_of("c"))


def test_a_file_of_before_becomes_a_table(uri: str, tmp_path: Path) -> None:
    storage.write_file(uri, file_of(tmp_path, "a"))
    assert snapshots.is_file(uri)
    assert snapshots.current(uri) == uri
    assert snapshots.read_table(uri).equals(manifest_of("a"))
    replace(uri, tmp_path, "b")
    assert not snapshots.is_file(uri)
    assert plain(uri).equals(manifest_of("b"))


@pytest.mark.parametrize("step", ["_commit", "_clear"])
def test_a_death_at_any_step_is_mended_by_the_next(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    replace(uri, tmp_path, "a")

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(snapshots.Writer, step, die)
        with pytest.raises(KeyboardInterrupt):
            replace(uri, tmp_path, "b")
    assert snapshots.read_table(uri).equals(manifest_of("a" if step == "_commit" else "b"))
    replace(uri, tmp_path, "b")
    assert plain(uri).equals(manifest_of("b"))


def test_rows_that_others_wrote_are_refused_by_name(uri: str, tmp_path: Path) -> None:
    replace(uri, tmp_path, "a")
    write_deltalake(uri, manifest_of("b"), mode="append", storage_options=HTTP)
    with pytest.raises(ValueError, match="another program has written to this table"):
        snapshots.current(uri)
    replace(uri, tmp_path, "c")
    assert snapshots.read_table(uri).equals(manifest_of("c"))


def test_answers_that_are_lost_lose_no_version(
    s3_store: str, s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    uri = f"{s3_store}/lost-answers/manifest.parquet"
    with faulty(s3_environment["AWS_ENDPOINT_URL"], seed=5) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        faults.share, faults.kinds = 0.3, ("lost",)
        for name in "abcdef":
            replace(uri, tmp_path, name)
        faults.share = 0.0
        assert faults.counts["lost"] > 10
        assert plain(uri).equals(manifest_of("f"))
        assert DeltaTable(uri, storage_options=HTTP).version() == 5


def test_readers_at_once_with_writers_see_whole_versions(uri: str, tmp_path: Path) -> None:
    names = [f"v{number}-" for number in range(6)]
    replace(uri, tmp_path, names[0])
    whole = {json.dumps(manifest_of(name)["uri"].to_pylist()) for name in names}
    ended, seen, wrong = threading.Event(), [], []

    def read(of: Callable[[], pa.Table]) -> None:
        while not ended.is_set():
            uris = json.dumps(of()["uri"].to_pylist())
            (seen if uris in whole else wrong).append(uris)

    readers = [threading.Thread(target=read, args=[lambda: snapshots.read_table(uri)]) for _ in range(2)]
    for reader in readers:
        reader.start()
    for name in names[1:]:
        replace(uri, tmp_path, name)
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert seen
    assert tables.exists(uri)
