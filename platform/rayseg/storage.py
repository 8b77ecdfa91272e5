"""Files by URI: plain local paths, `file://...` and `s3://BUCKET/KEY`; to list and read also DICOMweb services.

Objects of buckets go through `bucket`, those of services through `pacs`, tables and local listings through pyarrow.

S3 settings are the standard environment variables (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, ...), which
every process reads for itself. URIs are taken as written: nothing in them is percent-decoded. A write is atomic: a
reader sees the old object or the new one, never half of one. A failing call is tried again, see `retry`.
"""

import contextlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayseg import bucket, pacs
from rayseg.ahead import mapped
from rayseg.bucket import CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, environment, place
from rayseg.retry import tried

THREADS = 8  # transfers and listings in flight of one call
# Handing a small local file over from a thread takes longer than reading it: so many at a time, twice as many ahead.
_LOCAL_AT_A_TIME = 4
_COPY_BYTES = 2**23

Folders = frozenset[tuple[int, int]]  # by device and inode

_TEMPORARY = (".rayseg-", ".tmp")  # prefix and suffix of half-written local files


@dataclass(frozen=True)
class FileInfo:
    """One object of a listing."""

    uri: str
    size: int | None  # bytes; this and the rest are None of what a DICOMweb service has, which does not tell them
    modified: datetime | None
    etag: str | None  # another one is another content: the store's ETag, of a local file the nanosecond of its change


def absolute(uri: str) -> str:
    """The URI with a plain local path made absolute, so that it means the same in a process with another folder."""
    return uri if "://" in uri else _local(uri)


def filesystem(uri: str, attempts: int = 1) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of `uri` and the path in it; raises ValueError for a scheme other than file and s3.

    `attempts` at each request are for libraries that do not try again themselves.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), _local(uri)
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValueError(f"URI {uri}: expected file:///absolute/path")
        return pafs.LocalFileSystem(), _local(rest)
    if scheme == "s3":
        if not rest.strip("/"):
            raise ValueError(f"URI {uri}: expected s3://BUCKET/KEY")
        return _s3(environment(), attempts), rest.strip("/")
    raise ValueError(f"URI {uri}: unknown scheme {scheme}; known: file, s3, or a plain path (dicomweb+https to read)")


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it; empty parts are left out."""
    below = [part.strip("/") for part in parts if part.strip("/")]
    return "/".join([uri.rstrip("/"), *below]) if below else uri


def exists(uri: str) -> bool:
    """Whether an object or a folder stands at `uri`."""
    files, path = filesystem(uri)
    return tried(lambda: files.get_file_info(path)).type != pafs.FileType.NotFound


def list_files(uri: str, suffixes: Sequence[str] = ()) -> Iterator[FileInfo]:
    """Every object below `uri`, streamed in an order that is always the same.

    On S3 that is the store's own, and a page of keys is in memory at a time. On the local disk the files of a folder
    come by name, then its folders by name, recursively; the folders on the way and a few listed ahead are in memory.
    Links are followed, but for one to a folder that it lies in itself (as `find -L` does it).
    Of a DICOMweb service's studies the order is its own.

    Args:
        uri: a folder, a prefix, or a query of a DICOMweb service.
        suffixes: keep names that end so, letter case ignored; empty keeps all.

    Raises:
        FileNotFoundError: there is nothing at `uri`.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    if pacs.is_dicomweb(uri):
        found: Iterator[FileInfo] = (FileInfo(instance, None, None, None) for instance in pacs.instances(uri))
    else:
        found = _listed_s3(uri) if uri.startswith("s3://") else _listed_local(uri)
    return (info for info in found if not endings or info.uri.lower().endswith(endings))


def _listed_s3(uri: str) -> Iterator[FileInfo]:
    name, _, prefix = _in_bucket(uri).rstrip("/").partition("/")
    empty = True
    for entry in bucket.objects(name, f"{prefix}/" if prefix else ""):
        empty = False
        if entry.size or not entry.key.endswith("/"):  # else what some tools leave for a folder
            yield FileInfo(f"s3://{name}/{entry.key}", entry.size, entry.modified, entry.etag)
    if empty and prefix:
        raise FileNotFoundError(f"no objects below {uri}")


def _listed_local(uri: str) -> Iterator[FileInfo]:
    files, root = filesystem(uri)
    prefix = uri if "://" in uri else root

    def entries(path: str, above: Folders) -> tuple[list[pafs.FileInfo], Folders]:
        status = tried(lambda: os.stat(path))  # noqa: PTH116 (the path may be no UTF-8, and links are followed)
        here = status.st_dev, status.st_ino
        if here in above:  # through a link
            return [], above
        found = tried(lambda: files.get_file_info(pafs.FileSelector(path)))
        try:
            return sorted(found, key=lambda info: info.path), above | {here}
        except UnicodeDecodeError:
            raise ValueError(
                "a file has a name that is not UTF-8; find . | LC_ALL=C.UTF-8 grep -axv '.*' shows it there: rename it"
            ) from None

    def walk(listing: list[pafs.FileInfo], above: Folders) -> Iterator[FileInfo]:
        for info in listing:
            temporary = info.base_name.startswith(_TEMPORARY[0]) and info.base_name.endswith(_TEMPORARY[1])
            if info.is_file and not temporary:
                yield FileInfo(join(prefix, info.path[len(root) :]), info.size, info.mtime, f"{info.mtime_ns:x}")
        folders = (info.path for info in listing if info.type == pafs.FileType.Directory)
        for below in mapped(pool, lambda path: entries(path, above), folders, THREADS):
            yield from walk(*below)

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="rayseg-list")
    try:
        yield from walk(*entries(root, frozenset()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read(uri: str, length: int | None = None) -> bytes:
    """The object's bytes, or its first `length` at most (a ranged request on S3; DICOMweb knows none).

    Raises:
        FileNotFoundError: no such object.
        OSError: the store kept failing; PermissionError where it refuses.
    """
    if pacs.is_dicomweb(uri):
        return pacs.read(uri)[:length]
    if uri.startswith("s3://"):
        return bucket.read(_in_bucket(uri), length)
    path = filesystem(uri)[1]

    def call() -> bytes:
        with Path(path).open("rb") as file:
            return file.read() if length is None else file.read(length)

    try:
        return tried(call)
    except ValueError as error:  # its text quotes the path
        raise OSError("the file's name is one that the system refuses") from error


def fetch(uri: str, path: Path) -> None:
    """Writes the object's bytes, which may be many, into the local file `path`, a piece at a time; raises as `read`."""
    files, source = filesystem(uri)

    def call() -> None:
        with files.open_input_stream(source) as stream, path.open("wb") as file:
            shutil.copyfileobj(stream, file, _COPY_BYTES)

    tried(call)


def read_each(uris: Iterable[str], length: int | None = None) -> Iterator[bytes | OSError]:
    """`read` of each URI, in order, with a few read ahead in threads; what failed comes as its error, not raised."""

    def one(uri: str) -> bytes | OSError:
        try:
            return read(uri, length)
        except OSError as error:
            return error

    def each(some: list[str]) -> list[bytes | OSError]:
        return [one(uri) for uri in some]

    rest = iter(uris)
    first = list(islice(rest, 1))
    local = bool(first) and "://" not in first[0].removeprefix("file://")
    # Of a store twice as many as are under way: threads need not wait for who takes what is done, or for a slow one.
    size, threads, ahead = (_LOCAL_AT_A_TIME, 2, 2) if local else (1, THREADS, 2 * THREADS)
    rest = chain(first, rest)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="rayseg-read")
    try:
        for found in mapped(pool, each, iter(lambda: list(islice(rest, size)), []), ahead):
            yield from found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def write(uri: str, data: bytes) -> None:
    """Writes the object whole or not at all; folders on the way are made; an object that was there is replaced."""
    _write(uri, data)


def write_file(uri: str, path: Path) -> None:
    """Writes the local file `path`, which may be large, as the object `uri`: `write` without its bytes in memory."""
    _write(uri, path)


def _write(uri: str, data: bytes | Path) -> None:
    if uri.startswith("s3://"):
        bucket.write(_in_bucket(uri), data)
    else:
        path = Path(filesystem(uri)[1])
        tried(lambda: _write_local(path, data))


def delete(uri: str) -> None:
    """Removes the object at `uri` if it is there."""
    if uri.startswith("s3://"):
        bucket.delete(_in_bucket(uri))
        return
    files, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        tried(lambda: files.delete_file(path))


def delete_tree(uri: str) -> None:
    """Removes all below `uri`; one that is not there is fine."""
    files, path = filesystem(uri)

    def call() -> None:
        # S3 has no folders: one without objects is not found.
        with contextlib.suppress(FileNotFoundError):
            files.delete_dir(path)

    tried(call)


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The Parquet file at `uri`, or only `columns` of it."""
    files, path = filesystem(uri)

    def call() -> pa.Table:
        with files.open_input_file(path) as file:
            return pq.ParquetFile(file).read(columns=None if columns is None else list(columns))

    return tried(call)


def read_footer(uri: str) -> pq.FileMetaData:
    """What the Parquet file at `uri` says of itself; raises ValueError where it is no whole Parquet file."""
    files, path = filesystem(uri)

    def call() -> pq.FileMetaData:
        with files.open_input_file(path) as file:
            return pq.read_metadata(file)

    return tried(call)


def read_row_groups(uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """`columns` of the Parquet file at `uri`, a row group at a time."""
    footer = read_footer(uri)
    for number in range(footer.num_row_groups):
        yield read_row_group(uri, number, columns, footer)


def read_row_group(uri: str, number: int, columns: Sequence[str], footer: pq.FileMetaData) -> pa.Table:
    """`columns` of one row group of the Parquet file at `uri`, whose footer is known."""
    files, path = filesystem(uri)

    def call() -> pa.Table:
        with files.open_input_file(path) as file:
            return pq.ParquetFile(file, metadata=footer, pre_buffer=True).read_row_group(number, list(columns))

    return tried(call)


def read_batches(uri: str, numbers: Sequence[int]) -> list[pa.RecordBatch]:
    """Some batches of the Arrow file at `uri`, by their numbers; negative ones count from the end."""
    files, path = filesystem(uri)

    def call() -> list[pa.RecordBatch]:
        with files.open_input_file(path) as file:
            reader = pa.ipc.open_file(file)
            return [reader.get_batch(number % reader.num_record_batches) for number in numbers]

    return tried(call)


def write_table(uri: str, table: pa.Table, row_group_rows: int | None = None) -> None:
    """Writes `table` as one Parquet file (zstd), atomically; equal tables give equal bytes."""
    buffer = io.BytesIO()
    # The least and the greatest picture of each row group tell nothing, and readers keep all footers in memory.
    statistics = not any(pa.types.is_binary(field.type) for field in table.schema)
    pq.write_table(table, buffer, compression="zstd", row_group_size=row_group_rows, write_statistics=statistics)
    write(uri, buffer.getvalue())


def read_json(uri: str) -> Any:
    """The JSON value at `uri`; raises ValueError where it is not JSON."""
    try:
        return json.loads(read(uri))
    except ValueError as error:
        raise ValueError(f"{uri}: not valid JSON ({error})") from None


def write_json(uri: str, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically."""
    write(uri, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def upload(local_dir: str | Path, uri: str) -> None:
    """Copies the files of a local folder, recursively and in parallel, to below `uri`; each object is atomic."""
    _copy(str(local_dir), uri)


def download(uri: str, local_dir: str | Path) -> None:
    """Copies all objects below `uri`, recursively and in parallel, into a local folder."""
    _copy(uri, str(local_dir))


def _copy(source: str, destination: str) -> None:
    root = filesystem(source)[1]

    def copy(info: FileInfo) -> None:
        write(join(destination, filesystem(info.uri)[1][len(root) :]), read(info.uri))

    with ThreadPoolExecutor(THREADS, thread_name_prefix="rayseg-copy") as pool:
        for _ in mapped(pool, copy, list_files(source), THREADS):
            pass


def _in_bucket(uri: str) -> str:
    """BUCKET/KEY, the key as it is written: `ct//2.dcm` is another one than `ct/2.dcm`."""
    path = uri.removeprefix("s3://")
    if not path.strip("/"):
        raise ValueError(f"URI {uri}: expected s3://BUCKET/KEY")
    return path


def _local(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 (unlike Path.resolve it leaves links as they are)


def _write_local(path: Path, data: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix, suffix = _TEMPORARY
    temporary = path.parent / f"{prefix}{secrets.token_hex(8)}{suffix}"
    try:
        with temporary.open("xb") as file:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file, _COPY_BYTES)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(maxsize=4)
def _s3(variables: tuple[tuple[str, str], ...], attempts: int) -> pafs.S3FileSystem:
    """One client a process and a set of AWS_* variables; pyarrow reads the credentials from those itself."""
    url, region = place(dict(variables))
    endpoint = urlsplit(url or "https://")
    return pafs.S3FileSystem(
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme,
        region=region,
        # A small object is then put with one request instead of three, each of which could fail.
        allow_delayed_open=True,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        # For what this module calls one place counts attempts: `retry`.
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )
