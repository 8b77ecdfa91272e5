"""A proxy before an object store that fails one call in so many: errors, stalls, resets and half answers."""

import random
import socket
import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

KINDS = ("500", "503", "stall", "reset", "truncate", "lost")
STALL_S = 0.5  # then the connection is closed


@dataclass
class Faults:
    """What a proxy does from now on: fails `share` of the calls, in one of the ways `kinds`.

    done: is told the head of each request that the store has done, before the client learns of it.
    released: calls that fail in the way "hold", which is not among the usual ones, wait for it and then are done.
    counts: calls by what was done to them, "ok" for nothing.
    """

    url: str
    share: float = 0.0
    kinds: tuple[str, ...] = KINDS
    stall_s: float = STALL_S
    done: Callable[[bytes], None] = lambda head: None
    released: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)


@contextmanager
def faulty(endpoint: str, seed: int) -> Iterator[Faults]:
    """A proxy to `endpoint`; which calls it fails, and how, is drawn from `seed`.

    A failing call is answered 500 or 503, not answered, reset, cut off in the middle of its answer, or ("lost") done
    by the store and then reset. Requests go through as they are: their signature covers the Host header.
    """
    target = urlsplit(endpoint)
    address = (str(target.hostname), int(target.port or 80))
    draw, lock = random.Random(seed), threading.Lock()

    def fate() -> str:
        with lock:
            kind = draw.choice(faults.kinds) if draw.random() < faults.share else "ok"
            faults.counts[kind] += 1
            return kind

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                with socket.create_connection(address) as store:
                    client_file, store_file = self.request.makefile("rb"), store.makefile("rb")
                    while self._call(client_file, store, store_file):
                        pass
            except OSError:  # the client has given up
                return

        def _call(self, client_file, store: socket.socket, store_file) -> bool:
            """One request and its answer; False where the connection is at its end."""
            head = _head(client_file)
            if not head:
                return False
            kind = fate()
            if kind == "stall":
                stopped.wait(faults.stall_s)
                return False
            if kind == "reset":
                return self._reset()
            if kind == "hold":
                faults.released.wait()
            if b"100-continue" in head:  # the store says so too, later
                self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = _body(client_file, head)
            if kind in ("500", "503"):
                self.request.sendall(
                    f"HTTP/1.1 {kind} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                )
                return False
            store.sendall(head + body)
            answer = _head(store_file)
            if b"100 Continue" in answer.split(b"\r\n", 1)[0]:
                answer = _head(store_file)
            no_body = head.startswith(b"HEAD ") or answer.split(b" ", 2)[1] in (b"204", b"304")
            content = b"" if no_body else _body(store_file, answer)
            faults.done(head)
            if kind == "lost":
                return self._reset()
            if kind == "truncate":
                self.request.sendall(
                    (answer + content)[: len(answer) + len(content) // 2 if content else len(answer) // 2]
                )
                return False
            self.request.sendall(answer + content)
            return True

        def _reset(self) -> bool:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
            return False

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    stopped = threading.Event()
    with Server(("127.0.0.1", 0), Handler) as server:
        faults = Faults(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield faults
        finally:
            stopped.set()
            faults.released.set()
            server.shutdown()


def _head(file) -> bytes:
    """The lines of a request or an answer up to its body."""
    lines = []
    while (line := file.readline()) not in (b"\r\n", b""):
        lines.append(line)
    return b"".join([*lines, b"\r\n"]) if lines else b""


def _body(file, head: bytes) -> bytes:
    """What comes after the head, as it came."""
    headers = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if line)
    if headers.get(b"transfer-encoding", b"").strip() != b"chunked":
        return file.read(int(headers.get(b"content-length", 0)))
    parts = []
    while True:
        size = file.readline()
        chunk = file.read(int(size.split(b";")[0], 16) + 2)
        parts += [size, chunk]
        if len(chunk) == 2:
            return b"".join(parts)
