"""Where bulk jobs may read and write."""

import os
import re
from http import HTTPStatus
from urllib.parse import unquote

from serving.refusals import RefusalError


def allowed(uri: str, prefixes: tuple[str, ...], key: str) -> str:
    """The URI where it lies below one of the prefixes, a local path with its links followed; raises RefusalError."""
    refusal = RefusalError(HTTPStatus.FORBIDDEN, "place_not_allowed", f"{key}: not below a place that is configured")
    # Whoever reads it may decode it once more: what leads upwards then does not pass either.
    if re.search(r"[\x00-\x1f\x7f\\]", uri) or {".", ".."} & set(re.split("[/\\\\]", unquote(uri))):
        raise refusal
    canonical = _canonical(uri)
    if canonical is None or not any(_below(canonical, _canonical(prefix)) for prefix in prefixes):
        raise refusal
    return canonical


def _canonical(uri: str) -> str | None:
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        return uri.rstrip("/")
    path = rest if separator else uri
    return os.path.realpath(path) if path.startswith("/") else None


def _below(uri: str, prefix: str | None) -> bool:
    if prefix is None:
        return False
    ends = ("/", "?") if prefix.startswith("dicomweb+") else ("/",)
    return uri == prefix or uri.startswith(tuple(prefix.rstrip("/") + end for end in ends))
