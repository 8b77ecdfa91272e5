"""A bucket `b` in memory, on the loopback interface: as much of S3 as `rayseg.bucket` asks for, and its refusals."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit


@dataclass
class Bucket:
    """What is there, and what was asked; `refuse` (status, code of S3) answers all."""

    url: str
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)  # unfinished, by key
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path with query
    refuse: tuple[int, str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "y",
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def fake_s3() -> Iterator[Bucket]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answered()

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def _answered(self) -> None:
            split = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
            key = unquote(split.path).removeprefix("/b/")
            body = self._body()
            bucket.asked.append((self.command, self.path))
            if bucket.refuse is not None:
                status, code = bucket.refuse
                self._answer(status, f"<Error><Code>{code}</Code><Message>of {key}</Message></Error>".encode())
            elif "list-type" in query:
                self._list(query.get("prefix", ""))
            elif self.command == "POST" and "uploads" in query:
                bucket.uploads[key] = {}
                self._answer(200, b"<R><UploadId>1</UploadId></R>")
            elif "uploadId" in query and key not in bucket.uploads:
                self._answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
            elif self.command == "PUT" and "uploadId" in query:
                bucket.uploads[key][int(query["partNumber"])] = body
                self._answer(200, b"")
            elif self.command == "POST":
                bucket.objects[key] = b"".join(part for _, part in sorted(bucket.uploads.pop(key).items()))
                self._answer(200, b"<R><ETag>1</ETag></R>")
            elif self.command == "DELETE" and "uploadId" in query:
                del bucket.uploads[key]
                self._answer(204, b"")
            elif self.command == "DELETE":
                bucket.objects.pop(key, None)
                self._answer(204, b"")
            elif self.command == "PUT":
                bucket.objects[key] = body
                self._answer(200, b"")
            elif key not in bucket.objects:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            else:
                self._object(bucket.objects[key])

        def _body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
                return data
            parts, rest = [], data
            while rest:
                size, _, rest = rest.partition(b"\r\n")
                length = int(size.partition(b";")[0], 16)
                if not length:
                    break
                parts.append(rest[:length])
                rest = rest[length + 2 :]
            return b"".join(parts)

        def _list(self, prefix: str) -> None:
            entries = "".join(
                f"<Contents><Key>{quote(key)}</Key><Size>{len(data)}</Size><ETag>&quot;1&quot;</ETag>"
                "<LastModified>2020-01-01T00:00:00Z</LastModified></Contents>"
                for key, data in bucket.objects.items()
                if key.startswith(prefix)
            )
            head = "<Name>b</Name><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
            self._answer(200, f"<ListBucketResult>{head}{entries}</ListBucketResult>".encode())

        def _object(self, data: bytes) -> None:
            asked = self.headers.get("Range")
            if asked is None:
                self._answer(200, data)
                return
            first, _, last = asked.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):  # as Amazon's, and SeaweedFS, for any range of nothing
                self._answer(416, b"<Error><Code>InvalidRange</Code></Error>")
            else:
                self._answer(206, data[int(first) : int(last) + 1 if last else None])

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Wed, 01 Jan 2020 00:00:00 GMT")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        bucket = Bucket(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield bucket
        server.shutdown()
