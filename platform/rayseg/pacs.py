"""DICOMweb services (PS3.18): instances are listed by QIDO-RS, read by WADO-RS and stored by STOW-RS.

A service or a query is a URI such as `dicomweb+https://HOST/dicom-web?ModalitiesInStudy=CT`, an instance one such as
`dicomweb+https://HOST/dicom-web/studies/UID/series/UID/instances/UID`. Bytes are handed on as they came: a library
that parses instances on the way would fail at broken ones, which are to become rows of a manifest.

UIDs identify: no error and no log line has a URL. Credentials are in the environment, for each request anew, as a token
in a file may be renewed while a job runs. Certificates are always verified (REQUESTS_CA_BUNDLE names authorities of
one's own).
"""

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from email.message import Message
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import requests

from rayseg.bucket import CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S
from rayseg.retry import failure, tried

logger = logging.getLogger(__name__)

SCHEMES = ("dicomweb+https://", "dicomweb+http://")
PAGE = 1000  # results asked for at once
_FEWER = 5  # so many times, where a service refuses: Azure's takes 200 at most
_TOO_MANY = (400, 413, 422)  # what services say to a limit that is over theirs
_CONNECTIONS = 16  # kept open
_PREFIX = "RAYSEG_DICOMWEB_"

_STUDY, _SERIES, _INSTANCE = "0020000D", "0020000E", "00080018"
_FAILED, _STORED, _FAILURE_REASON, _REFERENCED = "00081198", "00081199", "00081197", "00081155"
# What is asked of series; all other keys are of studies (PS3.18 10.6.1.2).
_OF_SERIES = {
    *("Modality", "00080060", "SeriesInstanceUID", _SERIES, "SeriesNumber", "00200011"),
    *("SeriesDescription", "0008103E", "BodyPartExamined", "00180015"),
}
# Failure reasons (PS3.18 I.2.2): duplicate SOP instance, and what Azure's service says instead. UIDs of ours are hashes
# of what decides about the content, so that what is there already is the same.
_THERE_ALREADY = (0x0111, 45070)
_OUT_OF_RESOURCES = 0xA700  # to A7FF: later there may be room

_JSON = {"Accept": "application/dicom+json"}
_DICOM = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}  # as it is stored


def is_dicomweb(uri: str) -> bool:
    """Whether the URI is of a service, a query or an instance."""
    return uri.startswith(SCHEMES)


def service(uri: str) -> str:
    """The http(s) URL of a service, which may be given as one; without query.

    Raises ValueError where it is none, or has credentials in it.
    """
    url = urlsplit(uri.removeprefix("dicomweb+"))
    if "@" in url.netloc:
        raise ValueError(f"credentials do not belong into a URL: set {_PREFIX}TOKEN_FILE, or _USER and _PASSWORD_FILE")
    if url.scheme not in ("https", "http") or not url.hostname:
        raise ValueError("the URL of a DICOMweb service expected, as https://HOST/dicom-web")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def instances(uri: str) -> Iterator[str]:
    """URIs of the instances that a service has, study after study as it lists them, each in the order of UIDs.

    Args:
        uri: of the service, with keys of QIDO-RS as its query. `Modality`, `SeriesInstanceUID`, `SeriesNumber`,
            `SeriesDescription` and `BodyPartExamined` choose series, all others studies.

    Raises:
        ValueError: a URI that cannot be asked for, or an answer that makes no sense.
        OSError: as of `read`.
    """
    url = service(uri)
    keys = parse_qsl(urlsplit(uri).query, keep_blank_values=True)
    if {"limit", "offset"} & {name for name, _ in keys}:
        raise ValueError("limit and offset are for the job to choose: leave them out of the query")
    of_studies = [key for key in keys if key[0] not in _OF_SERIES]
    of_series = [key for key in keys if key[0] in _OF_SERIES]
    for study in _search(f"{url}/studies", of_studies, _STUDY):
        study_url = f"{url}/studies/{study}"
        for series in sorted(_search(f"{study_url}/series", of_series, _SERIES)):
            series_url = f"{study_url}/series/{series}"
            for instance in sorted(_search(f"{series_url}/instances", [], _INSTANCE)):
                yield f"dicomweb+{series_url}/instances/{instance}"


def read(uri: str) -> bytes:
    """The instance as it is stored.

    Raises:
        FileNotFoundError: there is none.
        PermissionError: the service refuses.
        CredentialsError: it does so whatever is asked for.
        OSError: the service kept failing.
    """

    def call() -> bytes:
        answer = _checked(_asked("GET", service(uri), _DICOM))
        return _only_part(answer.content, answer.headers.get("Content-Type", ""))

    return tried(call)


def store(url: str, sop_instance_uid: str, data: bytes) -> str:
    """Stores an instance, unless it is there already; returns where it can be found.

    Args:
        url: of the service, http(s).
        sop_instance_uid: of the instance.
        data: its DICOM file.

    Raises:
        PermissionError: the service refuses, for the reason that the text names by its code.
        OSError: the service kept failing.
    """
    boundary = secrets.token_hex(16)
    headers = {**_JSON, "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}'}
    body = b"".join(
        [f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode(), data, f"\r\n--{boundary}--\r\n".encode()]
    )
    tried(lambda: _check_stored(_asked("POST", f"{service(url)}/studies", headers, body), sop_instance_uid))
    return f"{service(url)}/instances?SOPInstanceUID={sop_instance_uid}"


def _check_stored(answer: requests.Response, sop_instance_uid: str) -> None:
    """Raises what an answer of STOW-RS says beside success (PS3.18 10.5.3)."""
    if answer.status_code not in (200, 202, 409):
        _checked(answer)
    try:
        told: Mapping[str, Any] = json.loads(answer.content)
        failures = {int(reason) for item in _values(told, _FAILED) for reason in _values(item, _FAILURE_REASON)}
        failed = bool(_values(told, _FAILED))
        stored = [uid for item in _values(told, _STORED) for uid in _values(item, _REFERENCED)]
    except (ValueError, TypeError, AttributeError):
        failures, failed, stored = set(), answer.status_code != 200, []
    if failures and failures <= set(_THERE_ALREADY):
        return
    if failed or answer.status_code == 409 or (stored and sop_instance_uid not in stored):
        codes = "".join(f", FailureReason 0x{code:04X}" for code in sorted(failures))
        later = failures and all(code & 0xFF00 == _OUT_OF_RESOURCES for code in failures)
        kind = OSError if later else PermissionError
        raise kind(f"not stored: HTTP {answer.status_code}{codes}")


def _search(url: str, keys: list[tuple[str, str]], tag: str) -> Iterator[str]:
    """The UIDs that a search finds, each once, a page in memory at a time, and a number a result.

    A page may have fewer than were asked for, with more behind it: only an empty one is the end.
    """
    limit, offset, pages = PAGE, 0, 0
    full, from_start, stuck = False, False, False
    seen: set[int] = set()
    first: list[str] = []
    while True:
        page, told_more = _page(url, keys, tag, limit + offset * from_start, offset)
        if page is None:
            if from_start:
                return
            if limit == 1:
                raise PermissionError("the service refuses the search, for one result, too")
            limit = max(1, limit // _FEWER)
            continue
        new = [uid for uid in page if hash(uid) not in seen]  # a service that changes meanwhile moves its pages
        seen.update(map(hash, new))
        yield from (quote(uid, safe="") for uid in new)
        if new:
            full, stuck = full or told_more or len(page) >= limit, False
            first = first or page
            offset, pages = offset + len(page), pages + 1
        elif not page:
            # Orthanc 1.10 counts the limit from the start where it is asked for ModalitiesInStudy: pages beyond are
            # empty.
            if from_start or not full:
                return
            from_start = True
        elif len(page) < limit:
            limit = len(page)  # it may count offsets in pages, of what it gives at most
        elif pages == 1 and page == first[: len(page)]:
            if full:
                raise ValueError("the service knows no offset of QIDO-RS: narrow the query, as by StudyDate")
            _warn_of_offset()
            return
        elif stuck:
            return  # it gives its last page for all offsets beyond
        else:
            offset, stuck = offset + len(page), True


def _page(url: str, keys: list[tuple[str, str]], tag: str, limit: int, offset: int) -> tuple[list[str] | None, bool]:
    """UIDs, None where the limit is refused, and whether the service says that it has more (PS3.18 8.3.4.4)."""
    query = urlencode([*keys, ("limit", limit), ("offset", offset)])

    def call() -> requests.Response | None:
        answer = _asked("GET", f"{url}?{query}", _JSON)
        return None if answer.status_code in _TOO_MANY else _checked(answer)

    try:
        answer = tried(call)
    except FileNotFoundError:
        if offset:  # there is no such page
            return [], False
        raise
    if answer is None:
        return None, False
    try:
        uids = [str(_values(item, tag)[0]) for item in answer.json()] if answer.content else []
    except (ValueError, TypeError, AttributeError, IndexError):
        raise ValueError("the answer is no list of UIDs in DICOM JSON: is it a DICOMweb service's URL?") from None
    return uids, bool(uids) and "Warning" in answer.headers


@lru_cache(maxsize=1)
def _warn_of_offset() -> None:
    logger.warning("a DICOMweb service knows no offset of QIDO-RS: what it gives at once is taken for all that it has")


def _values(item: Mapping[str, Any], tag: str) -> list[Any]:
    """An attribute of the DICOM JSON model (PS3.18 F.2)."""
    values: list[Any] = item.get(tag, {}).get("Value", [])
    return values


def _only_part(body: bytes, content_type: str) -> bytes:
    """The one part of a multipart body; raises OSError where its end is missing."""
    message = Message()
    message["Content-Type"] = content_type
    if message.get_content_type() == "application/dicom":  # as PS3.18 once allowed
        return body
    boundary = (message.get_boundary() or "").encode()
    begin = body.find(b"--" + boundary)
    head, end = body.find(b"\r\n\r\n", begin), body.rfind(b"\r\n--" + boundary + b"--")
    if not boundary or begin < 0 or not 0 <= head < end:
        raise OSError("the answer is no whole multipart message")
    return body[head + 4 : end]


def _checked(answer: requests.Response) -> requests.Response:
    if answer.status_code >= 300:  # a redirected POST would become a GET, and nothing be stored
        raise failure("HTTP", answer.status_code)
    return answer


def _asked(method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> requests.Response:
    """One request; raises OSError without the URL that the library's errors have in them."""
    timeouts = (CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S)
    try:
        return _session().request(
            method, url, headers=dict(headers), data=body, timeout=timeouts, allow_redirects=False
        )
    except requests.RequestException as error:
        kind = PermissionError if "CERTIFICATE_VERIFY_FAILED" in str(error) else OSError
        raise kind(type(error).__name__) from None


@lru_cache(maxsize=1)
def _session() -> requests.Session:
    """One a process: it keeps connections open."""
    for name in ("urllib3.connection", "urllib3.connectionpool"):  # what they say of requests has the URL
        logging.getLogger(name).setLevel(logging.ERROR)
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS))
    session.auth = _authorized
    return session


def _authorized(request: requests.PreparedRequest) -> requests.PreparedRequest:
    token, user = _secret("TOKEN"), os.environ.get(f"{_PREFIX}USER", "")
    if token:
        if not (token.isascii() and token.isprintable()):  # the library's error would have it in its text
            raise PermissionError(f"{_PREFIX}TOKEN is no token: a line of ASCII expected")
        request.headers["Authorization"] = f"Bearer {token}"
    elif user:
        request = requests.auth.HTTPBasicAuth(user.encode(), _secret("PASSWORD").encode())(request)
    return request


def _secret(name: str) -> str:
    """From the file that the variable `..._FILE` names, else from the variable."""
    path = os.environ.get(f"{_PREFIX}{name}_FILE", "")
    if not path:
        return os.environ.get(f"{_PREFIX}{name}", "").strip()
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        kind = type(error).__name__
        raise PermissionError(f"{_PREFIX}{name}_FILE names a file that cannot be read ({kind})") from None
