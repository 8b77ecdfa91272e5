"""Storage on a real S3 server, and the server's own life: restart, errors, loopback only."""

import hashlib
import io
import os
import subprocess
from pathlib import Path

import pytest

from rayseg import bucket, retry, storage
from rayseg.demo import store
from rayseg.demo.store import object_store

pytestmark = pytest.mark.e2e


def test_put_list_and_ranged_get(s3_store: str) -> None:
    base = storage.join(s3_store, "basics")
    data = os.urandom(100_000)
    for name in ("b.dcm", "p1/a.dcm", "p1/deep/c.png", "p0/d.dcm"):
        storage.write(storage.join(base, name), data)
    assert storage.read(storage.join(base, "b.dcm")) == data
    assert storage.read(storage.join(base, "b.dcm"), 1000) == data[:1000]
    listed = list(storage.list_files(base))
    names = [info.uri.removeprefix(f"{base}/") for info in listed]
    assert names == ["b.dcm", "p0/d.dcm", "p1/a.dcm", "p1/deep/c.png"]
    assert {info.size for info in listed} == {100_000}
    assert {info.etag for info in listed} == {hashlib.md5(data).hexdigest()}
    storage.write(storage.join(base, "p0/d.dcm"), data[::-1])
    changed = {info.uri.removeprefix(f"{base}/") for info in storage.list_files(base) if info.etag != listed[0].etag}
    assert changed == {"p0/d.dcm"}
    assert [info.uri for info in storage.list_files(base, (".png",))] == [f"{base}/p1/deep/c.png"]
    assert storage.exists(base)
    assert storage.exists(f"{base}/p1")
    storage.delete(f"{base}/b.dcm")
    storage.delete(f"{base}/b.dcm")
    assert not storage.exists(f"{base}/b.dcm")


def test_a_listing_of_more_than_one_page_is_complete(s3_store: str, tmp_path: Path) -> None:
    base = storage.join(s3_store, "pages")
    for number in range(1_100):  # a page has 1,000
        (tmp_path / f"{number:05d}").write_bytes(b"x")
    storage.upload(tmp_path, base)
    assert [info.uri for info in storage.list_files(base)] == [f"{base}/{number:05d}" for number in range(1_100)]


def test_a_large_object_in_several_parts(s3_store: str) -> None:
    data = os.urandom(1_000_000) * 23  # two parts
    storage.write(f"{s3_store}/large", data)
    assert storage.read(f"{s3_store}/large") == data


def test_a_large_write_that_ends_early_leaves_the_old_object_and_no_upload(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(f"{s3_store}/manifest", b"old")
    monkeypatch.setattr(bucket, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    client, uploads = bucket._client(bucket.environment()), []

    def under_way() -> int:
        return len(client.list_multipart_uploads(Bucket="tests").get("Uploads", ()))

    class Cut(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            uploads.append(under_way())
            if len(uploads) == 3:
                raise KeyboardInterrupt
            return super().read(size)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: Cut(os.urandom(13 * 2**20)))
        with pytest.raises(KeyboardInterrupt):
            storage.write_file(f"{s3_store}/manifest", tmp_path / "new")
    assert uploads == [0, 1, 1]
    assert under_way() == 0
    assert storage.read(f"{s3_store}/manifest") == b"old"


def test_a_suffix_does_not_change_the_bytes(s3_store: str) -> None:
    storage.write(f"{s3_store}/volume.nii.gz", b"not compressed")
    assert storage.read(f"{s3_store}/volume.nii.gz") == b"not compressed"


def test_what_is_missing_is_not_found_at_once(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(FileNotFoundError):
        storage.read(f"{s3_store}/absent")
    with pytest.raises(FileNotFoundError):
        storage.read("s3://absent-bucket/absent")
    with pytest.raises(FileNotFoundError):
        list(storage.list_files(f"{s3_store}/absent"))
    assert not storage.exists(f"{s3_store}/absent")


def test_a_wrong_secret_is_refused_at_once(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(f"{s3_store}/x", b"old")
    monkeypatch.setattr(retry, "sleep", lambda seconds: pytest.fail("tried again"))
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "0" * 40)
        with pytest.raises(retry.CredentialsError):
            storage.read(f"{s3_store}/x")
        with pytest.raises(PermissionError):  # a table's size is asked for by HEAD, whose answer tells no more
            storage.read_footer(f"{s3_store}/x")
        with pytest.raises(retry.CredentialsError):
            storage.write(f"{s3_store}/x", b"new")
        with pytest.raises(retry.CredentialsError):
            list(storage.list_files(s3_store))
    assert storage.read(f"{s3_store}/x") == b"old"


def test_trees_go_up_and_come_down(s3_store: str, tmp_path: Path) -> None:
    names = [f"p{number % 3}/{number}.bin" for number in range(20)]
    for name in names:
        storage.write(str(tmp_path / "up" / name), name.encode())
    storage.upload(tmp_path / "up", f"{s3_store}/tree")
    storage.download(f"{s3_store}/tree", tmp_path / "down")
    assert {str(p.relative_to(tmp_path / "down")) for p in (tmp_path / "down").rglob("*.bin")} == set(names)
    assert (tmp_path / "down/p1/4.bin").read_bytes() == b"p1/4.bin"


def test_started_again_it_has_its_objects_and_an_error_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    secrets = set()
    for data in (b"first", b"second"):
        with pytest.raises(KeyError), object_store(tmp_path, "kept") as environment:  # noqa: PT012
            assert {name: value for name, value in os.environ.items() if name.startswith("AWS_")} == before
            secrets.add(environment["AWS_SECRET_ACCESS_KEY"])
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                assert storage.exists("s3://kept/x") == (data == b"second")
                storage.write("s3://kept/x", data)
            (process,) = _servers(tmp_path)
            assert set(_listening(process)) == {"127.0.0.1"}
            raise KeyError("the work fails")
        assert not _servers(tmp_path)
    assert len(secrets) == 2
    told = capfd.readouterr()
    assert not any(secret in told.out + told.err for secret in secrets)


def test_a_server_that_cannot_start_says_where_its_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_command", lambda *_: ["/bin/sh", "-c", "echo no disk; exit 3"])
    with (
        pytest.raises(OSError, match=r"ended with code 3 while starting; see .*weed\.log"),
        object_store(tmp_path, "x"),
    ):
        pass
    assert (tmp_path / "weed.log").read_text() == "no disk\n"


def _servers(directory: Path) -> list[int]:
    """Process ids of the servers that keep their objects in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if f"-dir={directory}".encode() in words:
            found.append(int(entry.parent.name))
    return found


def _listening(process: int) -> list[str]:
    """The addresses on which a process listens for TCP."""
    table = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in table.splitlines() if f"pid={process}," in line]
    return [words[3].rpartition(":")[0] for words in lines]
