"""A client of the service, for Python and for the shell: `rayseg ask FILE_OR_FOLDER --server URL`."""

import argparse
import contextlib
import ipaddress
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import IO, Any

import httpx
from tqdm import tqdm

# What each format is called in HTTP, and what its files end in.
FORMATS = {
    "json": ("application/json", ".json"),
    "png": ("image/png", ".png"),
    "seg": ("application/dicom", ".seg.dcm"),
    "nifti": ("application/nifti", ".nii.gz"),
    "glb": ("model/gltf-binary", ".glb"),
}
REFUSED, FAILED = 3, 4  # exit codes: the service does not take it, or did not answer; 2 are the arguments
_MAGIC = {
    b"PK\x03\x04": "application/zip",
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
    b"\x1f\x8b": "application/gzip",
}
_CHUNK = 256 * 1024
_IN_MEMORY = 32 * 1024 * 1024  # of a folder's zip; what is more goes to the disk
_ATTEMPTS = 4  # where the service says that it is busy
_LONGEST_PAUSE_S = 30.0


class RefusedError(Exception):
    """The service does not do what was asked for; `reason` is its code."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(f"{status} {reason}: {detail}")
        self.status, self.reason, self.detail = status, reason, detail


@dataclass(frozen=True)
class Answer:
    """What became of an image or a series."""

    content: bytes
    media_type: str
    model: str  # name and version
    digest: str


class Client:
    """A service at `url`; use as a context manager, or call `close`."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 300.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Raises ValueError where the token would be read by others on its way, or the URL is none."""
        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"server: http(s)://HOST[:PORT] expected, got {url}")
        if token and address.scheme == "http" and not _is_loopback(address.host):
            raise ValueError("server: the token would cross the network in the clear; https:// expected")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def segment(
        self, source: bytes | str | Path, accept: str = "application/json", *, progress: bool = False, **query: Any
    ) -> Answer:
        """Segments an image, a volume or a series.

        Args:
            source: a file's bytes, its path, or that of a folder, whose files go as a zip, without their names.
            accept: media type of the answer, or a key of `FORMATS`.
            progress: show how much has been sent, on a terminal.
            query: of the endpoint, as `model`, `threshold` or `priority`.

        Raises:
            RefusedError: the service answered that it does not.
            httpx.TransportError: it did not answer.
            OSError: the source cannot be read.
        """
        kind = FORMATS[accept][0] if accept in FORMATS else accept
        with _opened(source) as (file, size):
            head = file.read(4)
            media_type = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "application/dicom")
            headers = {"Accept": kind, "Content-Type": media_type, "Content-Length": str(size)}
            for attempt in range(1, _ATTEMPTS + 1):
                file.seek(0)
                content = _chunks(file, size, progress)
                found = self._http.post("/v1/segment", params=query, headers=headers, content=content)
                if found.status_code not in (429, 503) or attempt == _ATTEMPTS:
                    break
                told = found.headers.get("Retry-After", "")
                sleep(min(float(told) if told.isdigit() else 2.0**attempt, _LONGEST_PAUSE_S))
        _check(found)
        name, version = (found.headers.get(f"X-Model-{key}", "") for key in ("Name", "Version"))
        return Answer(
            found.content,
            found.headers.get("Content-Type", ""),
            f"{name} {version}",
            found.headers.get("X-Model-Digest", ""),
        )

    def models(self) -> Any:
        """The models that the service has, as it tells them."""
        return self._json("GET", "/v1/models")

    def jobs(self, limit: int = 20, before: str | None = None) -> list[dict[str, Any]]:
        """The latest `limit` bulk jobs that the token may see, 100 at most, of those before the job `before`."""
        return self._json("GET", "/v1/jobs", params={"limit": limit} | ({"before": before} if before else {}))

    def job(self, job_id: str) -> dict[str, Any]:
        """A bulk job, with its progress."""
        return self._json("GET", f"/v1/jobs/{job_id}")

    def submit(self, **request: Any) -> dict[str, Any]:
        """Starts a bulk job: `source` or `manifest`, `destination`, `profiles`, `model`, `pacs`."""
        return self._json("POST", "/v1/jobs", json=request)

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancels a bulk job."""
        return self._json("DELETE", f"/v1/jobs/{job_id}")

    def _json(self, method: str, path: str, **values: Any) -> Any:
        answer = self._http.request(method, path, **values)
        _check(answer)
        return answer.json()


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        told = answer.json()
        reason, detail = str(told["reason"]), str(told["detail"])
    except (ValueError, KeyError, TypeError):  # a proxy's own page
        reason, detail = "http", answer.reason_phrase
    raise RefusedError(answer.status_code, reason, detail)


@contextlib.contextmanager
def _opened(source: bytes | str | Path) -> Iterator[tuple[IO[bytes], int]]:
    """The bytes to send, as a file, and how many they are."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            file: IO[bytes] = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY))
            file.write(source)
        elif Path(source).is_dir():
            file = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY))
            _zip(Path(source), file)
        else:
            file = stack.enter_context(Path(source).open("rb"))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        yield file, size


def _zip(folder: Path, file: IO[bytes]) -> None:
    """All files below the folder, hidden ones left out, under numbers: names may tell who it is."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise FileNotFoundError(f"{folder}: no files")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number, path in enumerate(found):
            with path.open("rb") as source, archive.open(f"{number:07}", "w") as entry:
                while chunk := source.read(_CHUNK):
                    entry.write(chunk)


def _chunks(file: IO[bytes], size: int, progress: bool) -> Iterator[bytes]:
    bar = tqdm(total=size, desc="upload", unit="B", unit_scale=True, disable=None if progress else True)
    with bar:
        while chunk := file.read(_CHUNK):
            yield chunk
            bar.update(len(chunk))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `rayseg ask`."""
    about = "Has a service segment an image, a volume or a series. Research software, not a medical device."
    parser = argparse.ArgumentParser(prog="rayseg ask", description=about)
    parser.add_argument("source", type=Path, metavar="FILE_OR_FOLDER", help="DICOM, image, NIfTI or zip; or a folder")
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="else the variable RAYSEG_TOKEN, if any")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to; - is the standard output")
    parser.add_argument("--format", choices=list(FORMATS), default="json")
    parser.add_argument("--model", help="alias or version")
    parser.add_argument("--threshold", type=float, help="0 to 1, of models of one class")
    options = parser.parse_args(arguments)
    try:
        token = options.token_file.read_text().strip() if options.token_file else os.environ.get("RAYSEG_TOKEN")
        query = {key: value for key in ("model", "threshold") if (value := getattr(options, key)) is not None}
        with Client(options.server, token) as client:
            answer = client.segment(options.source, options.format, progress=True, **query)
        _write(answer, options)
    except RefusedError as error:
        print(f"rayseg: {error}", file=sys.stderr)
        raise SystemExit(REFUSED if error.status < 500 else FAILED) from None
    except httpx.HTTPError as error:
        print(f"rayseg: {options.server}: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None
    except (OSError, ValueError, httpx.InvalidURL) as error:
        print(f"rayseg: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _write(answer: Answer, options: argparse.Namespace) -> None:
    """JSON to the standard output, anything else to a file that is named after the source; or where was asked for."""
    target = options.output
    if target is None and options.format != "json":
        source = options.source.resolve()
        target = Path((source.name if source.is_dir() else source.stem) + FORMATS[options.format][1])
    if target is None or str(target) == "-":
        sys.stdout.buffer.write(answer.content + (b"\n" if options.format == "json" else b""))
        sys.stdout.buffer.flush()
        return
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(answer.content)
    part.replace(target)  # whole or not there
    print(f"{target}: {len(answer.content)} bytes, model {answer.model}", file=sys.stderr)
