"""Storage on the local disk: round trips, atomic writes, listings, retries. `e2e/test_store.py` has the same on S3."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from rayseg import retry, storage

TREE = ["b.dcm", "a.dcm", "p2/x.png", "p1/deep/z.DCM", "p1/y.dcm", "p10/x.png"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number, name in enumerate(TREE):
        storage.write(str(tmp_path / name), bytes(number))
    return tmp_path


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting between attempts; the list takes what would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(retry, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_bytes_come_back(tmp_path: Path, scheme: str) -> None:
    uri = storage.join(f"{scheme}{tmp_path}", "new", "folders", "x.bin")
    assert not storage.exists(uri)
    storage.write(uri, b"one")
    storage.write(uri, b"second")
    assert storage.exists(uri)
    assert storage.read(uri) == b"second"
    assert storage.read(uri, 3) == b"sec"
    assert storage.read(uri, 100) == b"second"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_nothing_in_a_uri_is_decoded_and_no_suffix_is_compressed(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/a b%20#1?.gz"
    storage.write(uri, b"plain")
    assert (tmp_path / "a b%20#1?.gz").read_bytes() == b"plain"
    assert storage.read(uri) == b"plain"
    assert [info.uri for info in storage.list_files(f"file://{tmp_path}")] == [uri]


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("s3://b", ("x", "y.txt"), "s3://b/x/y.txt"),
        ("s3://b/p/", ("/x/",), "s3://b/p/x"),
        ("a/b", ("", "c"), "a/b/c"),
        ("a/b", (), "a/b"),
        ("/", ("a",), "/a"),
        ("file:///a", ("b",), "file:///a/b"),
    ],
)
def test_join(uri: str, parts: tuple[str, ...], expected: str) -> None:
    assert storage.join(uri, *parts) == expected


def test_absolute_is_for_plain_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x/../y") == str(tmp_path / "y")
    assert storage.absolute("s3://b/x") == "s3://b/x"


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "file://relative/x"])
def test_other_uris_are_refused_by_name(uri: str) -> None:
    with pytest.raises(ValueError, match=f"URI {uri}"):
        storage.filesystem(uri)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_listing_is_recursive_and_in_a_fixed_order(tree: Path, scheme: str) -> None:
    root = f"{scheme}{tree}"
    listed = [info.uri.removeprefix(f"{root}/") for info in storage.list_files(root)]
    assert listed == ["a.dcm", "b.dcm", "p1/y.dcm", "p1/deep/z.DCM", "p10/x.png", "p2/x.png"]
    sizes = {info.uri.removeprefix(f"{root}/"): info.size for info in storage.list_files(f"{root}/")}
    assert sizes == {name: number for number, name in enumerate(TREE)}
    etags = {info.uri: info.etag for info in storage.list_files(root)}
    (tree / "p1/y.dcm").write_bytes(bytes(TREE.index("p1/y.dcm")))  # again, of the same size
    os.utime(tree / "p1/y.dcm", ns=(0, 1))
    now = {info.uri: info.etag for info in storage.list_files(root)}
    assert [uri.removeprefix(f"{root}/") for uri in now if now[uri] != etags[uri]] == ["p1/y.dcm"]


def test_a_loop_of_links_is_walked_once(tree: Path) -> None:
    once = {info.uri for info in storage.list_files(str(tree))}
    (tree / "p1" / "deep" / "root").symlink_to("../..")  # two folders up
    (tree / "p2" / "self").symlink_to(".")
    (tree / "p10" / "nothing").symlink_to("nothing")  # a link to itself
    assert {info.uri for info in storage.list_files(str(tree))} == once
    (tree / "p2" / "other").symlink_to("../p10")  # each to the other: both names of a file are there, once
    (tree / "p10" / "other").symlink_to("../p2")
    assert [info.uri.removeprefix(str(tree)) for info in storage.list_files(str(tree)) if "/other/" in info.uri] == [
        "/p10/other/x.png",
        "/p2/other/x.png",
    ]
    (tree / "second").symlink_to("p1")  # no loop
    second = {info.uri.removeprefix(f"{tree}/") for info in storage.list_files(str(tree)) if "/second/" in info.uri}
    assert second == {"second/y.dcm", "second/deep/z.DCM"}


def test_a_listing_can_keep_suffixes(tree: Path) -> None:
    assert [Path(info.uri).name for info in storage.list_files(str(tree), (".dcm",))] == [
        "a.dcm",
        "b.dcm",
        "y.dcm",
        "z.DCM",
    ]


def test_a_listing_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in range(40):
        storage.write(str(tmp_path / f"{folder:02d}" / "x"), b"")
    visited = []
    real = pafs.LocalFileSystem()

    class Spy:
        def get_file_info(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
            visited.append(selector.base_dir)
            return real.get_file_info(selector)

    monkeypatch.setattr(storage, "filesystem", lambda uri: (Spy(), str(tmp_path)))
    listing = storage.list_files(str(tmp_path))
    next(listing)
    listing.close()
    assert len(visited) <= 1 + 2 * storage.THREADS


def test_a_listing_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(storage.list_files(str(tmp_path / "absent")))


def test_a_reader_that_has_begun_ends_with_the_old_object(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "x"), b"the old object")
    with (tmp_path / "x").open("rb", buffering=0) as reader:
        assert reader.read(4) == b"the "
        storage.write(str(tmp_path / "x"), b"NEW")
        assert reader.read() == b"old object"
    assert storage.read(str(tmp_path / "x")) == b"NEW"


def test_an_object_appears_under_its_name_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.append(sorted(p.name for p in tmp_path.iterdir())))
    storage.write(str(tmp_path / "x"), b"data")
    ((while_writing,),) = on_disk
    assert while_writing != "x"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_the_old_object_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    uri = str(tmp_path / "x")
    storage.write(uri, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write(uri, b"new")
    assert storage.read(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_writer_leaves_is_not_listed(tree: Path) -> None:
    (tree / ".rayseg-0123.tmp").write_bytes(b"half")
    assert len(list(storage.list_files(str(tree)))) == len(TREE)


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    storage.write(str(tmp_path / "ours"), b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def failing(times: int, error: OSError) -> tuple[Callable[[], str], list[int]]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "result"

    return call, calls


def test_transient_failures_are_tried_again_with_growing_pauses(
    pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    call, calls = failing(retry.ATTEMPTS - 1, OSError("key of patient X: 503 slow down"))
    with caplog.at_level(logging.WARNING):
        assert retry.tried(call) == "result"
    assert len(calls) == retry.ATTEMPTS
    for attempt, pause in enumerate(pauses):
        assert 0.5 <= pause / min(retry.LONGEST_PAUSE_S, retry.FIRST_PAUSE_S * 2**attempt) <= 1.5
    assert "patient" not in caplog.text  # the store's message names the object


def test_after_the_last_attempt_the_error_is_raised(pauses: list[float]) -> None:
    call, calls = failing(99, OSError("503"))
    with pytest.raises(OSError, match="503"):
        retry.tried(call)
    assert len(calls) == retry.ATTEMPTS
    assert len(pauses) == retry.ATTEMPTS - 1


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (FileNotFoundError("x"), FileNotFoundError),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation"), PermissionError),
        (OSError("AWS Error SIGNATURE_DOES_NOT_MATCH during GetObject"), retry.CredentialsError),
        (
            OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."),
            PermissionError,
        ),
        (OSError("AWS Error UNKNOWN [code: ExpiredToken, request id: 1] (HTTP status 400)"), retry.CredentialsError),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), OSError),
        (OSError(errno.ENAMETOOLONG, "File name too long"), OSError),
    ],
)
def test_what_cannot_get_better_is_not_tried_again(
    error: OSError, raised: type[Exception], pauses: list[float]
) -> None:
    call, calls = failing(99, error)
    with pytest.raises(raised):
        retry.tried(call)
    assert len(calls) == 1


def test_read_each_is_in_order_and_gives_failures_as_values(tree: Path) -> None:
    uris = [str(tree / TREE[number % 6]) for number in range(30)] + [str(tree / "absent")]
    found = list(storage.read_each(uris, length=4))
    assert [len(data) for data in found[:-1]] == [min(number % 6, 4) for number in range(30)]
    assert isinstance(found[-1], FileNotFoundError)


def test_read_each_is_a_few_objects_ahead(tree: Path) -> None:
    asked: list[str] = []
    reader = storage.read_each(asked.append(uri) or uri for uri in [str(tree / "a.dcm")] * 100)
    for taken in range(1, 90):
        next(reader)
        assert taken <= len(asked) <= taken + 8


def test_tables_come_back_and_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    table = pa.table({"x": list(range(100)), "name": [str(number) for number in range(100)]})
    one, two = str(tmp_path / "split=train" / "one.parquet"), str(tmp_path / "two.parquet")
    storage.write_table(one, table, row_group_rows=16)
    storage.write_table(two, pa.concat_tables([table.slice(0, 7), table.slice(7)]), row_group_rows=16)
    assert storage.read_table(one).equals(table)  # no column comes from the folder's name
    assert storage.read_table(one, ["name"]).column_names == ["name"]
    assert storage.read(one) == storage.read(two)
    assert pq.ParquetFile(one).metadata.num_row_groups == 7


def test_json_comes_back_and_other_bytes_are_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.json")
    storage.write_json(uri, {"b": [1, 2.5, None], "a": "ü"})
    assert storage.read_json(uri) == {"b": [1, 2.5, None], "a": "ü"}
    storage.write(uri, b"{")
    with pytest.raises(ValueError, match=r"x\.json: not valid JSON"):
        storage.read_json(uri)


def test_trees_go_up_and_come_down(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other, back = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("back")
    storage.upload(tree, f"file://{other}/below")
    storage.download(f"file://{other}/below", back)
    assert {str(path.relative_to(back)) for path in back.rglob("*") if path.is_file()} == set(TREE)
    assert (back / "p1/y.dcm").read_bytes() == bytes(4)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_large_files_come_a_piece_at_a_time_and_batches_by_number(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3_store")
    batches = [pa.record_batch({"number": [number] * 3}) for number in range(5)]
    with pa.ipc.new_file(str(tmp_path / "rows"), batches[0].schema) as file:
        for batch in batches:
            file.write_batch(batch)
    storage.write_file(f"{root}/rows.arrow", tmp_path / "rows")
    storage.fetch(f"{root}/rows.arrow", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "rows").read_bytes()
    assert storage.read_batches(f"{root}/rows.arrow", [3, 0]) == [batches[3], batches[0]]
    with pytest.raises(FileNotFoundError):
        storage.fetch(f"{root}/absent", tmp_path / "none")
