"""The HTTP server of `jobs.serve`, in its process: Ray's proxies would be one more that each body goes through."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.ingress import IngressReplica

HEAD_S = 20.0  # for a request's head to arrive; none may begin later after the connection
HEAD_BYTES = 64 * 1024
KEEP_ALIVE_S = 90  # of a connection that nothing comes through, as behind Ray's proxies
STOP_S = 20  # for requests at work


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address; nothing gets through until it listens.

    Raises:
        ValueError: it cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"port: {host}:{port} cannot be used ({error.strerror})") from None
    return listener


def check_certificate(keyfile: str, certfile: str) -> None:
    """Raises ValueError where the files are no key and its certificate."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    except OSError as error:  # of which SSL's own are
        why = error.strerror or type(error).__name__
        raise ValueError(f"ssl_keyfile, ssl_certfile: no key with its certificate ({why})") from None


class Protocol(HttpToolsProtocol):
    """The server's, which would wait for ever for a head that drips, and hold one without end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there (asyncio)."""
        super().connection_made(transport)
        self._in_head, self._head_bytes = False, 0
        self._late: asyncio.TimerHandle | None = self.loop.call_later(HEAD_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone (asyncio)."""
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, a body, or both (asyncio)."""
        began = self._in_head
        super().data_received(data)
        if began and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head is too large.")

    def on_message_begin(self) -> None:
        """A head begins (httptools)."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._late is None:
            self._late = self.loop.call_later(HEAD_S, self.transport.close)

    def on_headers_complete(self) -> None:
        """It is whole (httptools)."""
        self._in_head = False
        self._in_time()
        super().on_headers_complete()

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = None


def run(
    ingress: IngressReplica,
    listener: socket.socket,
    keyfile: str | None,
    certfile: str | None,
    ready: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or SIGINT, and then until the requests at work have ended.

    Args:
        ingress: what answers.
        listener: a bound socket.
        keyfile: PEM, for TLS; None: none.
        certfile: PEM.
        ready: told the version that answers, when the model gives the right mask.

    Raises:
        RuntimeError: it does not.
    """

    async def serve() -> None:
        health = await ingress.health()
        if not health.matches:
            raise RuntimeError("the bundle's example does not give the recorded mask")
        server = uvicorn.Server(
            uvicorn.Config(
                ingress.__serve_build_asgi_app__(),
                http=Protocol,
                ssl_keyfile=keyfile,
                ssl_certfile=certfile,
                access_log=False,  # it would write paths, which a client chooses
                log_config=None,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=STOP_S,
            )
        )
        listener.listen()  # or who is told that it is ready could come before the server and be turned away
        ready(health.model.version)
        await server.serve(sockets=[listener])

    # The server ends at a signal, and gives it on to who waited for it before: the caller, or the loop.
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
