"""Whatever is sent: no 5xx, a reason, no identity in it, and memory that comes back."""

import asyncio
import ctypes
import gc
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import psutil
import pytest

from rayseg.dicom.reading import read_headers
from rayseg.records import Reason, Reject
from serving.guard import Guard
from tests.unit.fuzz import CANARY, Shot, shots
from tests.unit.guarded import service
from tests.unit.test_guard import KNOWN
from tests.unit.test_jobs import Recorded, jobs

WARM, BODIES = 150, 1000
HELD_MIB = 2  # by objects of Python and numpy, of requests that are over
GROWTH_MIB = 256  # of the process: what decoders' libraries and the allocator keep comes in steps of 10 to 20 MiB


async def fired(app: Guard, shot: Shot) -> tuple[int, bytes]:
    """Status and body of the answer, by bare ASGI: a well-behaved client would not send such requests."""
    path, _, query = shot.target.partition("?")
    raw = path.encode("latin-1")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": shot.method,
        "scheme": "http",
        "path": unquote_to_bytes(raw).decode("utf-8", "replace"),
        "raw_path": raw,
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(b"host", b"x"), *((name.encode(), value.encode("latin-1")) for name, value in shot.headers)],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    step = len(shot.body) // shot.chunks + 1
    parts = [shot.body[at : at + step] for at in range(0, len(shot.body), step)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    if shot.stops:
        messages[-1] = {"type": "http.disconnect"}
    sent: list[Any] = []

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()  # the client waits
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    status = sent[0]["status"] if sent else 0
    return status, b"".join(message.get("body", b"") for message in sent[1:])


async def battered(app: Guard, requests: list[Shot]) -> Counter[tuple[str, int]]:
    found: Counter[tuple[str, int]] = Counter()
    for shot in requests:
        status, body = await asyncio.wait_for(fired(app, shot), 30)
        found[shot.kind, status] += 1
        if shot.stops:  # nobody is there to read the answer
            continue
        assert 200 <= status < 500, (shot.kind, shot.headers, shot.target, status, body[:200], shot.body[:400])
        if status >= 400 and shot.method != "HEAD":
            told = json.loads(body)
            assert set(told) == {"reason", "detail"}, told
            assert CANARY.lower() not in body.decode().lower(), told
    return found


def rss_mib() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


@pytest.mark.filterwarnings("ignore")
def test_nothing_that_is_sent_breaks_the_service(tmp_path: Path):
    audit = tmp_path / "audit.jsonl"
    runners = Recorded()
    app = service(jobs(tmp_path, runners), tokens=KNOWN, audit=str(audit))
    asyncio.run(battered(app, list(shots(WARM, 1, "s-token"))))
    before = rss_mib()
    found: Counter[tuple[str, int]] = Counter()
    for part in range(10):  # the bombs of all at once would be memory of the test's own
        if part == 8:  # the last ones alone, as counting makes them slow
            tracemalloc.start()
        found += asyncio.run(battered(app, list(shots(BODIES // 10, 100 + part, "s-token"))))
    grown = rss_mib() - before
    held = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    assert held < HELD_MIB, f"{held:.1f} MiB"
    assert grown < GROWTH_MIB, f"{grown:.0f} MiB"
    statuses = {status for _, status in found}
    assert {200, 400, 401, 404, 405, 406, 413, 415, 422} <= statuses, "the shots go everywhere"
    assert not runners.settings, "no job has got through"
    text = audit.read_text()
    assert len(text.splitlines()) == WARM + BODIES
    assert CANARY not in text


@pytest.mark.parametrize("head", [b"", bytes(128) + b"DICM"])
def test_elements_without_end_are_not_walked_to_their_end(head: bytes):
    """What zeros inflate to: an element every eight bytes, which cost a minute for each 256 MiB."""
    found = read_headers(head + bytes(2**20), 2**20)
    assert found == Reject(Reason.CORRUPT, "more than 20000 elements")
