"""Clients that drip, stall and leave, over real sockets and the HTTP server of `jobs.serve`."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest

from rayseg.data.synthetic import slice_bytes
from rayseg.records import Reject
from serving import front, guard, routes
from serving.guard import Protection
from serving.limits import Limits
from serving.messages import Ask, Refusal, Segmented
from serving.metrics import Metrics
from serving.segment import Settings
from tests.unit import guarded
from tests.unit.guarded import MAX_BODY, Threshold

GRACE_S = 2.0  # more than a busy machine takes to pass a head on, as the other times here
HEAD_S = 1.0
BODY = slice_bytes(3, 64)


class Slow(Threshold):
    """Waits with its answer for a body of one byte, until nobody waits for it any more."""

    def __init__(self) -> None:
        self.asked, self.dropped = threading.Event(), threading.Event()

    async def segment(self, body: bytes, ask: Ask) -> Segmented | Reject | Refusal:
        if len(body) > 1:
            return await super().segment(body, ask)
        self.asked.set()
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value]
        finally:
            self.dropped.set()


class Service:
    """The address of the service, and what it keeps count of."""

    def __init__(self, url: str, model: Slow) -> None:
        self.url, self.model = url, model
        self.address = ("127.0.0.1", int(url.rpartition(":")[2]))

    def connect(self, head: str = "", body: bytes = b"") -> socket.socket:
        connection = socket.create_connection(self.address, timeout=20)
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        return connection

    def at_work(self) -> int:
        (line,) = [line for line in self.metrics().splitlines() if line.startswith("rayseg_http_in_flight ")]
        return int(float(line.split()[1])) - 1  # without the one that asks

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics").text

    def idle(self) -> None:
        deadline = time.monotonic() + 20
        while self.at_work():
            assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    model = Slow()
    app = routes.create(model, Settings(MAX_BODY))
    protection = Protection(max_body_bytes=MAX_BODY, limits=Limits(body_grace_s=GRACE_S, body_bytes_per_s=10**6))
    guarding = guard.around(app, protection, Metrics(), None, model.state)
    with guarded.listening(guarding, http=front.Protocol, timeout_keep_alive=60) as url:
        yield Service(url, model)


def head(length: int | None) -> str:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST /v1/segment HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/dicom\n{size}\n\n"


def rest(connection: socket.socket) -> bytes:
    """What comes until the end of the connection."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def test_a_body_that_drips_gets_a_408_and_the_connection_ends(service: Service):
    with closing(service.connect(head(len(BODY)), BODY[:100])) as connection:
        for _ in range(3):
            time.sleep(GRACE_S / 20)
            connection.sendall(b"\0")
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"slow_body" in answer
    service.idle()


@pytest.mark.parametrize("begun", ["", "POST /v1/seg", "GET / HTTP/1.1\nHost: 127.0.0.1\n"])
def test_a_head_that_does_not_end_is_not_waited_for(service: Service, begun: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front, "HEAD_S", HEAD_S)
    with closing(service.connect(begun)) as connection:
        assert rest(connection) == b""


def test_only_heads_are_bound_by_their_time(service: Service, monkeypatch: pytest.MonkeyPatch):
    """Not a body, and not the connection between two requests; the second one's head is."""
    monkeypatch.setattr(front, "HEAD_S", HEAD_S)
    with closing(service.connect(head(len(BODY)), BODY[:-1])) as connection:
        time.sleep(1.2 * HEAD_S)
        connection.sendall(BODY[-1:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        time.sleep(1.2 * HEAD_S)
        connection.sendall(head(len(BODY)).replace("\n", "\r\n").encode() + BODY)
        assert b"HTTP/1.1 200 " in connection.recv(65536)
        connection.sendall(b"GET /hea")
        assert not rest(connection).startswith(b"HTTP")


def test_a_head_without_end_is_cut(service: Service):
    def flood(connection: socket.socket) -> None:
        for _ in range(64):
            connection.sendall(b"x" * front.HEAD_BYTES)

    with closing(service.connect("GET / HTTP/1.1\nX: ")) as connection, pytest.raises(OSError):
        flood(connection)


@pytest.mark.parametrize("sent", [0, 1, len(BODY) // 2])
def test_who_leaves_during_an_upload_leaves_nothing_behind(service: Service, sent: int):
    for size in (len(BODY), None):
        body = BODY[:sent] if size else b"ffff\r\n" + BODY[:sent]
        service.connect(head(size), body).close()
    service.idle()


def test_the_model_is_told_when_nobody_waits_any_more(service: Service):
    connection = service.connect(head(1), b"x")
    assert service.model.asked.wait(20)
    assert service.at_work() == 1
    assert not service.model.dropped.is_set()
    connection.close()
    assert service.model.dropped.wait(20)
    service.idle()
    assert 'route="/v1/segment",status="499"' in service.metrics()


def test_who_leaves_during_an_answer_leaves_nothing_behind(service: Service):
    for _ in range(20):
        connection = service.connect(head(len(BODY)), BODY)
        connection.recv(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # an RST
        connection.close()
    service.idle()
    assert 'status="5' not in service.metrics()
