"""What pyarrow cannot do with S3 buckets, through boto3: listings with ETags, reading objects with odd keys."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0

_MISSING = ("NoSuchBucket", "NoSuchKey", "404")
_FORBIDDEN = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403")


@dataclass(frozen=True)
class Entry:
    """An object of a bucket."""

    key: str
    size: int  # bytes
    modified: datetime
    etag: str  # changes with the content; without its quotes


def page(bucket: str, prefix: str, after: str | None) -> tuple[list[Entry], str | None]:
    """Some of the objects whose keys begin with `prefix`, in the store's order, with one request.

    Args:
        bucket: its name.
        prefix: "" for all.
        after: the token that came with the page before; None for the first page.

    Returns:
        The entries, and the token of the next page, None where this is the last.

    Raises:
        FileNotFoundError: there is no such bucket.
        PermissionError: the store refuses.
        OSError: the store did not answer, or with an error; another try may help.
    """
    more = {} if after is None else {"ContinuationToken": after}
    with _errors(f"listing bucket {bucket}"):
        answer = _client(environment()).list_objects_v2(Bucket=bucket, Prefix=prefix, **more)
    entries = [
        Entry(found["Key"], found["Size"], found["LastModified"], found["ETag"].strip('"'))
        for found in answer.get("Contents", ())
    ]
    return entries, answer.get("NextContinuationToken")


def is_odd(path: str) -> bool:
    """Whether BUCKET/KEY has a component that pyarrow refuses or resolves: `ct//2.dcm`, `ct/../2.dcm`."""
    return not {"", ".", ".."}.isdisjoint(path.split("/"))


def read(path: str, length: int | None = None) -> bytes:
    """The object at BUCKET/KEY, or its first `length` bytes at most, with one request; raises as `page` does."""
    bucket, _, key = path.partition("/")
    some = {} if length is None else {"Range": f"bytes=0-{length - 1}"}
    with _errors("reading an object"):
        data: bytes = _client(environment()).get_object(Bucket=bucket, Key=key, **some)["Body"].read()
        return data


@contextlib.contextmanager
def _errors(doing: str) -> Iterator[None]:
    """Makes boto3's errors the system's own."""
    # Only here: it takes 50 MB, and who reads local files needs none of it.
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        kind = FileNotFoundError if code in _MISSING else PermissionError if code in _FORBIDDEN else OSError
        raise kind(f"{doing}: {code}") from error
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise PermissionError(f"{doing}: {error}") from error
    except (BotoCoreError, HTTPClientError) as error:
        raise OSError(f"{doing}: {type(error).__name__}") from error


def objects(bucket: str, prefix: str, attempt: Any) -> Iterator[Entry]:
    """All objects whose keys begin with `prefix`, a page in memory at a time; `attempt(call)` makes each request."""
    token = None
    while True:
        found, token = attempt(lambda after=token: page(bucket, prefix, after))
        yield from found
        if token is None:
            return


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
            retries={"total_max_attempts": 1},  # one place counts attempts: `storage`
            # As pyarrow does it: other servers seldom have a host name for each bucket.
            s3={"addressing_style": "path" if endpoint else "auto"},
        ),
    )
