"""Objects of S3 buckets by BUCKET/KEY, through boto3: listed with ETags, read, written and deleted, whatever the key.

Each request is made as often as `retry` says. Errors are the system's own, and name no key: FileNotFoundError,
PermissionError, OSError for a store that kept failing; `retry.CredentialsError` where it takes no credentials of ours.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rayseg.retry import failure, refused_credentials, tried

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
CONNECTIONS = 32  # kept open; a call of `storage` has 8 threads, and several may be under way
PART_BYTES = 2**24  # of a large object; S3 takes 10,000 of them
_CONFLICT, _NOT_MET, _NO_SUCH_RANGE, _NOT_IMPLEMENTED = 409, 412, 416, 501

ResultT = TypeVar("ResultT")


class NoConditionsError(Exception):
    """The store does not make a write depend on what is there."""


@dataclass(frozen=True)
class Entry:
    """An object of a bucket."""

    key: str
    size: int  # bytes
    modified: datetime
    etag: str  # changes with the content; without its quotes


@dataclass(frozen=True)
class Version:
    """An object as it was when the store answered."""

    data: bytes
    etag: str
    age_s: float  # since it was written, by the store's clock alone


def objects(bucket: str, prefix: str) -> Iterator[Entry]:
    """All objects whose keys begin with `prefix`, "" for all, in the store's order; a page of them is in memory."""
    asked = {"Bucket": bucket, "Prefix": prefix}

    def call(client: Any) -> Any:
        return client.list_objects_v2(**asked)

    while True:
        page = _made(f"listing bucket {bucket}", call)
        for entry in page.get("Contents", ()):
            yield Entry(entry["Key"], entry["Size"], entry["LastModified"], entry["ETag"].strip('"'))
        if not page.get("NextContinuationToken"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def read(path: str, length: int | None = None) -> bytes:
    """The object, or its first `length` bytes at most, with one request."""
    some = {} if length is None else {"Range": f"bytes=0-{length - 1}"}

    def call(client: Any) -> bytes:
        try:
            data: bytes = client.get_object(**_place(path), **some)["Body"].read()
        except client.exceptions.ClientError as error:
            if _status(error) == _NO_SUCH_RANGE and length is not None:  # of an object without bytes
                return b""
            raise
        return data

    return _made("reading an object", call)


def write(path: str, data: bytes | Path) -> None:
    """Puts the bytes, or those of a local file, as one object; whatever ends this early leaves the old one whole."""
    with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
        first = file.read(PART_BYTES)
        if len(first) < PART_BYTES:
            _made("writing an object", lambda client: client.put_object(**_place(path), Body=first))
            return
        try:
            _write_parts(path, first, file)
        except FileNotFoundError:  # completed in a call whose answer was lost, or aborted by others: once more
            file.seek(PART_BYTES)
            _write_parts(path, first, file)


def delete(path: str) -> None:
    """Removes the object if it is there."""
    _made("deleting an object", lambda client: client.delete_object(**_place(path)))


def version(path: str) -> Version:
    """The object, with its ETag and its age."""

    def call(client: Any) -> Version:
        answer = client.get_object(**_place(path))
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])  # by the store's clock
        age_s = (now - answer["LastModified"]).total_seconds()
        return Version(answer["Body"].read(), answer["ETag"].strip('"'), age_s)

    return _made("reading an object", call)


def write_if(path: str, data: bytes, etag: str | None) -> str | None:
    """Writes the object where the one that is there has this ETag, or, for None, where there is none.

    Returns its new ETag; None where the condition was not met. After an answer that was lost that may be so although
    the object was written: read it.

    Raises:
        NoConditionsError: the store says that it takes no conditions. One that ignores them says nothing.
    """
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": f'"{etag}"'}
    put = _made("writing an object", _if_met(lambda client: client.put_object(**_place(path), Body=data, **condition)))
    return None if put is None else str(put["ETag"]).strip('"')


def delete_if(path: str, etag: str) -> None:
    """Removes the object if it is there and has this ETag; raises as `write_if`."""
    call = _if_met(lambda client: client.delete_object(**_place(path), IfMatch=f'"{etag}"'))
    with contextlib.suppress(FileNotFoundError):
        _made("deleting an object", call)


def _if_met(call: Callable[[Any], ResultT]) -> Callable[[Any], ResultT | None]:
    """The call, which gives None where its condition was not met."""

    def once(client: Any) -> ResultT | None:
        try:
            return call(client)
        except client.exceptions.ClientError as error:
            if _status(error) == _NOT_MET or error.response.get("Error", {}).get("Code") == "NoSuchKey":
                return None
            if _status(error) == _CONFLICT:  # with another write at the same moment: the same call once more
                raise OSError("conditional write: a conflict") from error
            if _status(error) == _NOT_IMPLEMENTED:
                raise NoConditionsError("the store takes no conditional writes") from error
            raise

    return once


def _write_parts(path: str, first: bytes, file: BinaryIO) -> None:
    """An object in several requests, each tried again by itself; it appears with the last one."""
    doing, upload = "writing an object", _place(path)
    upload["UploadId"] = _made(doing, lambda client: client.create_multipart_upload(**upload))["UploadId"]
    parts: list[dict[str, Any]] = []
    try:
        data = first
        while data:
            part = {"PartNumber": len(parts) + 1}
            put = _made(doing, partial(_put_part, part=upload | part, data=data))
            parts.append(part | {"ETag": put["ETag"]})
            data = file.read(PART_BYTES)
        whole = {"Parts": parts}
        _made(doing, lambda client: client.complete_multipart_upload(**upload, MultipartUpload=whole))
    except BaseException:  # Ctrl-C, too: what is uploaded would be kept, and paid for, out of sight
        with contextlib.suppress(Exception):
            _made(doing, lambda client: client.abort_multipart_upload(**upload))
        raise


def _put_part(client: Any, part: dict[str, Any], data: bytes) -> Any:
    return client.upload_part(**part, Body=data)


def _place(path: str) -> dict[str, Any]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


def _made(doing: str, call: Callable[[Any], ResultT]) -> ResultT:
    """What `call` of a client returns, with boto3's errors as `retry.failure` has them."""
    # Only here: it takes 50 MB, and who reads local files needs none of it.
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    def once() -> ResultT:
        try:
            return call(_client(environment()))
        except exceptions.ClientError as error:
            raise failure(f"{doing}:", error.response.get("Error", {}).get("Code", ""), _status(error)) from error
        except _without_credentials(exceptions) as error:
            raise refused_credentials(f"{doing}: {type(error).__name__}") from error
        except exceptions.ParamValidationError as error:  # such a bucket, or such a key, cannot be
            raise FileNotFoundError(f"{doing}: no name of an object") from error
        # urllib3's of a connection that breaks while a body is read; the parser's of an answer that is no XML.
        except (exceptions.BotoCoreError, exceptions.HTTPClientError, HTTPError, ResponseParserError) as error:
            raise OSError(f"{doing}: {type(error).__name__}") from error

    return tried(once)


def _status(error: Any) -> int:
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def _without_credentials(exceptions: Any) -> tuple[type[Exception], ...]:
    """botocore's errors of credentials that are absent, or that it cannot get or renew."""
    return (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.ProfileNotFound,
        exceptions.NoAuthTokenError,
        exceptions.SSOError,
        exceptions.LoginError,
    )


def environment() -> tuple[tuple[str, str], ...]:
    """The AWS_* variables, which say where the store is and who asks: a client is made for each set of them."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def place(variables: Mapping[str, str]) -> tuple[str | None, str]:
    """The store's endpoint, None for Amazon's own, and its region."""
    endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL") or None
    return endpoint, variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION") or "us-east-1"


@lru_cache(maxsize=4)
def _client(variables: tuple[tuple[str, str], ...]) -> Any:
    """One client a process and a set of AWS_* variables, which boto3 reads itself."""
    import boto3
    from botocore.config import Config

    endpoint, region = place(dict(variables))
    return boto3.session.Session().client(
        "s3",
        region_name=region,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=REQUEST_TIMEOUT_S,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1},  # one place counts attempts: `retry`
            # As pyarrow does it: other servers seldom have a host name for each bucket.
            s3={"addressing_style": "path" if endpoint else "auto"},
        ),
    )
