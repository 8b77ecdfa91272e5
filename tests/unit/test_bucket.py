"""Objects of S3: odd keys are rows like others, writes that end early change nothing, refused credentials end a run."""

import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import SSLError

from rayseg import bucket as module
from rayseg import job, lease, retry, storage
from rayseg.data import catalog
from rayseg.data.catalog import CatalogConfig
from rayseg.data.layouts import Layout
from tests.unit.fake_s3 import Bucket, fake_s3

KEYS = [
    "ct/1.dcm",
    "ct//2.dcm",
    "ct///3/.dcm",
    "/ct/4.dcm",
    "ct/./5.dcm",
    "ct/../6.dcm",
    "ct/a b+c%20d#e?f.dcm",
    "ct/ä.dcm",
    "ct/7.dcm/",  # with bytes: no folder
]


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with fake_s3() as made:
        yield made


@pytest.fixture
def bucket(server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.objects = {key: key.encode() for key in KEYS}
    server.uploads, server.asked, server.refuse = {}, [], None
    monkeypatch.setattr(retry, "sleep", lambda pause: None)
    yield server
    for thread in threading.enumerate():  # a read ahead of this test must not be counted in the next one
        if thread.name.startswith("rayseg-"):
            thread.join(60)


def test_each_key_is_listed_and_read(bucket: Bucket) -> None:
    bucket.objects["ct/folder/"] = b""
    uris = [info.uri for info in storage.list_files("s3://b")]
    assert uris == [f"s3://b/{key}" for key in KEYS]
    bucket.asked.clear()
    contents = dict(zip(KEYS, storage.read_each(uris), strict=True))
    assert contents == {key: key.encode() for key in KEYS}
    assert [method for method, _ in bucket.asked] == ["GET"] * len(KEYS)  # a request each
    assert list(storage.read_each(uris, 4)) == [key.encode()[:4] for key in KEYS]


def test_a_missing_odd_key_is_an_error_of_its_own(bucket: Bucket) -> None:
    (missing, there) = storage.read_each(["s3://b/ct//absent.dcm", "s3://b/ct//2.dcm"])
    assert isinstance(missing, FileNotFoundError)
    assert there == b"ct//2.dcm"
    assert "absent" not in str(missing)


def test_an_object_without_bytes_has_none_in_its_first_ones(bucket: Bucket) -> None:
    bucket.objects["empty.dcm"] = b""
    assert list(storage.read_each(["s3://b/empty.dcm"], 65536)) == [b""]
    assert storage.read("s3://b/empty.dcm") == b""


@pytest.mark.parametrize("key", ["ct//8.dcm", "/9.dcm", "10.dcm/", "ct/ö%2F?#.dcm"])
def test_an_odd_key_is_written_and_deleted_as_it_is(bucket: Bucket, key: str) -> None:
    storage.write(f"s3://b/{key}", b"data")
    assert bucket.objects[key] == b"data"
    assert storage.read(f"s3://b/{key}") == b"data"
    storage.delete(f"s3://b/{key}")
    assert key not in bucket.objects


def test_a_mask_is_planned_by_the_key_that_it_has(bucket: Bucket) -> None:
    bucket.objects.clear()
    bucket.objects.update(dict.fromkeys(["/images/1.png", "/masks/1.png", "/masks/2.png"], b"x"))
    lonely: list[str] = []
    layout = Layout(images="**/images/{slice}.png", masks="**/masks/{slice}.png")
    (row,) = catalog._listed("s3://b", layout, {}, lonely)
    assert (row["uri"], row["masks"][0]["uri"]) == ("s3://b//images/1.png", "s3://b//masks/1.png")
    assert [catalog._below("s3://b", path) for path in lonely] == ["s3://b//masks/2.png"]


class Failing(io.BytesIO):
    """A file that cannot be read to its end."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(data)
        self._error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 2 * module.PART_BYTES:
            raise self._error
        return super().read(size)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), MemoryError(), OSError(5, "disk")])
def test_a_write_that_ends_early_leaves_the_old_object_and_no_upload(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    bucket.objects["manifest"] = b"old"
    monkeypatch.setattr(Path, "open", lambda self, mode: Failing(bytes(5000), error))
    with pytest.raises(type(error)):
        storage.write_file("s3://b/manifest", tmp_path / "new")
    assert [method for method, path in bucket.asked if "partNumber" in path] == ["PUT", "PUT"]
    assert bucket.objects["manifest"] == b"old"
    assert bucket.uploads == {}


@pytest.mark.parametrize("size", [0, 999, 1000, 1001, 2000, 4321])
def test_large_objects_are_written_in_parts(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    data = os.urandom(size)
    (tmp_path / "new").write_bytes(data)
    storage.write("s3://b/one", data)
    storage.write_file("s3://b/two", tmp_path / "new")
    assert bucket.objects["one"] == bucket.objects["two"] == data
    assert bucket.uploads == {}


def test_a_part_that_fails_is_sent_again_alone(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    parts = []

    def fail_second(client: object, **given: object) -> dict[str, str]:
        parts.append(given["PartNumber"])
        if len(parts) == 2:
            raise EndpointConnectionError(endpoint_url="x")
        return real(**given)

    client = module._client(module.environment())
    real = client.upload_part
    monkeypatch.setattr(type(client), "upload_part", fail_second)
    data = os.urandom(2500)
    storage.write("s3://b/x", data)
    assert parts == [1, 2, 2, 3]
    assert bucket.objects["x"] == data


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (403, "InvalidAccessKeyId"),
        (403, "RequestTimeTooSkewed"),
        (400, "InvalidToken"),
        (403, "SignatureDoesNotMatch"),
    ],
)
def test_refused_credentials_end_a_run_with_one_line(
    bucket: Bucket, status: int, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.refuse = status, code
    calls = {
        "read": lambda: list(storage.read_each(f"s3://b/P-17/{number}.dcm" for number in range(1000))),
        "write": lambda: storage.write("s3://b/P-17.dcm", b"x"),
        "list": lambda: list(storage.list_files("s3://b")),
    }
    for call in calls.values():
        bucket.asked.clear()
        with pytest.raises(
            retry.CredentialsError, match=rf"{code}: the credentials are refused: .*start the job again"
        ):
            call()
        assert len(bucket.asked) <= 3 * storage.THREADS  # of a thousand, with what is read ahead
    with pytest.raises(SystemExit) as ended:
        job.run("catalog", CatalogConfig, lambda config: calls["read"](), ["--set", "source=a", "--set", "output=b"])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if code in line] == [told[-1]]
    assert told[-1].startswith(f"catalog: reading an object: {code}: the credentials are refused")
    assert "P-17" not in " ".join(told)


def test_a_task_of_ray_tells_of_refused_credentials_in_its_text() -> None:
    text = """ray::MapBatches(_read_headers)() (pid=1, ip=127.0.0.1)
  File "platform/rayseg/retry.py", line 1, in tried
rayseg.retry.CredentialsError: reading an object: ExpiredToken: the credentials are refused

The above exception was the direct cause of the following exception:
ray.data.exceptions.UserCodeException: UDF failed to process a data block."""
    assert (
        retry.said_of_credentials(RuntimeError(text)) == "reading an object: ExpiredToken: the credentials are refused"
    )
    assert retry.said_of_credentials(RuntimeError("of another kind")) is None


@pytest.mark.parametrize(
    ("status", "code", "kind", "requests"),
    [
        (403, "AccessDenied", PermissionError, 1),
        (403, "AllAccessDisabled", PermissionError, 1),  # a code that the table does not have: HTTP's decides
        (404, "NoSuchBucket", FileNotFoundError, 1),
        (400, "RequestTimeout", OSError, retry.ATTEMPTS),  # one that is no fault of the request
        (503, "SlowDown", OSError, retry.ATTEMPTS),
        (500, "NeverHeardOf", OSError, retry.ATTEMPTS),
        (429, "TooMany", OSError, retry.ATTEMPTS),
    ],
)
def test_what_is_worth_another_try(bucket: Bucket, status: int, code: str, kind: type[OSError], requests: int) -> None:
    bucket.refuse = status, code
    (error,) = storage.read_each(["s3://b/P-17.dcm"])
    assert type(error) is kind
    assert str(error) == f"reading an object: {code}"
    assert len(bucket.asked) == requests


def test_an_error_of_a_parser_is_one_of_the_system(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore's, of an answer that is no XML, and urllib3's own are no kinds of boto3's errors."""
    client = module._client(module.environment())
    for error in (ResponseParserError("P-17"), SSLError("P-17")):

        def fail(self: object, error: Exception = error, **given: object) -> None:
            raise error

        monkeypatch.setattr(type(client), "get_object", fail)
        (found,) = storage.read_each(["s3://b/P-17.dcm"])
        assert (type(found), str(found)) == (OSError, f"reading an object: {type(error).__name__}")


def test_a_store_that_ignores_conditions_is_told_once_and_keeps_nobody_off(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    lease._warn.cache_clear()
    with lease.held("s3://b/out.lease", "first") as first, lease.held("s3://b/out.lease", "second") as second:
        first.check()
        second.check()
    assert caplog.messages == [
        "the store ignores the conditions of writes: two jobs on one output are not kept apart there; start one at a "
        "time"
    ]
    assert "out.lease" not in bucket.objects


def test_a_store_that_refuses_conditions_is_not_asked_again(bucket: Bucket) -> None:
    bucket.refuse = (501, "NotImplemented")
    with pytest.raises(module.NoConditionsError):
        module.write_if("b/x", b"", None)
    assert len(bucket.asked) == 1
