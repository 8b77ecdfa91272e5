"""S3 keys that are valid and odd: each is listed, and read whole and in part, or given as an error, never raised."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from rayseg import storage

KEYS = [
    "ct/1.dcm",
    "ct//2.dcm",
    "ct///3/.dcm",
    "/ct/4.dcm",
    "ct/./5.dcm",
    "ct/../6.dcm",
    "ct/a b+c%20d#e?f.dcm",
    "ct/ä.dcm",
]


class Bucket(BaseHTTPRequestHandler):
    """A bucket `b` whose objects hold their own keys: as much of S3 as listing and reading need."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._object(with_body=False)

    def do_GET(self) -> None:
        if "list-type" in self.path:
            entries = "".join(
                f"<Contents><Key>{quote(key)}</Key><Size>{len(key.encode())}</Size><ETag>&quot;1&quot;</ETag>"
                "<LastModified>2020-01-01T00:00:00Z</LastModified></Contents>"
                for key in KEYS
            )
            head = "<Name>b</Name><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
            self._answer(200, f"<ListBucketResult>{head}{entries}</ListBucketResult>".encode())
        else:
            self._object(with_body=True)

    def _object(self, with_body: bool) -> None:
        key = unquote(urlsplit(self.path).path).removeprefix("/b/")
        if key not in KEYS:
            self._answer(404, f"<Error><Code>NoSuchKey</Code><Key>{escape(key)}</Key></Error>".encode(), with_body)
            return
        content = key.encode()
        asked = self.headers.get("Range")
        if asked is None:
            self._answer(200, content, with_body)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        self._answer(206, content[int(first) : int(last) + 1 if last else None], with_body)

    def _answer(self, status: int, body: bytes, with_body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2020 00:00:00 GMT")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    variables = {
        "ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "ACCESS_KEY_ID": "x",
        "SECRET_ACCESS_KEY": "y",
    }
    for name, value in (variables | {"REGION": "us-east-1"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield "s3://b"
    server.shutdown()
    server.server_close()
    thread.join()


def test_each_key_is_listed_and_read(bucket: str) -> None:
    uris = [info.uri for info in storage.list_files(bucket)]
    assert uris == [f"{bucket}/{key}" for key in KEYS]
    contents = dict(zip(KEYS, storage.read_each(uris), strict=True))
    assert contents == {key: key.encode() for key in KEYS}
    assert list(storage.read_each(uris, 4)) == [key.encode()[:4] for key in KEYS]


def test_a_missing_odd_key_is_an_error_of_its_own(bucket: str) -> None:
    (missing, there) = storage.read_each([f"{bucket}/ct//absent.dcm", f"{bucket}/ct//2.dcm"])
    assert isinstance(missing, FileNotFoundError)
    assert there == b"ct//2.dcm"
    assert "absent" not in str(missing)
