"""What one request, and one bearer, may take of the service: bytes, time, headers, requests at once."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.types import Message, Receive, Scope

_JSON_BODY_BYTES = 64 * 1024  # of every route but the one that takes images
_UPLOADS = ("/v1/segment",)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The section `serve.limits` of a recipe. Of pixels, frames and zip entries the readers have their own."""

    headers: int = 64  # lines of the head
    header_bytes: int = 16 * 1024  # names and values of the head
    target_bytes: int = 4 * 1024  # path and query
    body_grace_s: float = 10.0  # seconds that a body may take beside the time of its bytes
    body_bytes_per_s: int = 64 * 1024  # rate that the time of its bytes is counted at
    request_s: float = 900.0  # seconds from the first byte to the last of the answer; routes have shorter deadlines
    requests: int = 320  # requests at a time, of all; more get a 503
    requests_per_token: int = 16  # requests at a time of one token; more get a 429

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{key}: more than 0 expected, got {value}")


class RefusedError(Exception):
    """A request that is answered with a Problem before or while it is read."""

    def __init__(self, status: int, reason: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.detail, self.headers = status, reason, detail, headers or {}


def check_head(scope: Scope, limits: Limits, max_body_bytes: int) -> None:
    """Refuses what the request's first lines say already: too many headers, too long ones, too large a body."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > limits.headers or sum(len(name) + len(value) for name, value in headers) > limits.header_bytes:
        detail = f"at most {limits.headers} headers of {limits.header_bytes} bytes together"
        raise RefusedError(431, "headers_too_large", detail)
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > limits.target_bytes:
        raise RefusedError(414, "target_too_long", f"at most {limits.target_bytes} bytes of path and query")
    announced = dict(headers).get(b"content-length", b"")
    if announced.isdigit() and int(announced[:20]) > body_limit(scope, max_body_bytes):
        raise _too_large(body_limit(scope, max_body_bytes))


def body_limit(scope: Scope, max_body_bytes: int) -> int:
    """The most bytes that the body of a request to this path may have."""
    return max_body_bytes if scope["path"] in _UPLOADS else min(_JSON_BODY_BYTES, max_body_bytes)


class Body:
    """A request's body on its way in, refused as soon as it is too large or too slow.

    Slow is a client that is waited for longer than the grace and the time of its bytes at the least rate: that bounds
    a body that stops as well as one that drips. What the service itself takes to read is not counted.
    """

    def __init__(self, receive: Receive, limits: Limits, max_bytes: int) -> None:
        self.bytes = 0
        self.disconnected = False
        self.refused: RefusedError | None = None
        self._receive, self._limits, self._max_bytes = receive, limits, max_bytes
        self._waited_s = 0.0
        self._whole = False

    async def receive(self) -> Message:
        """The next message of the server (ASGI); raises RefusedError."""
        if self._whole:  # nothing more comes but the end of the connection
            message = await self._receive()
        else:
            message = await self._next()
        self.disconnected |= message["type"] == "http.disconnect"
        return message

    async def _next(self) -> Message:
        allowed_s = self._limits.body_grace_s + self.bytes / self._limits.body_bytes_per_s - self._waited_s
        began = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, allowed_s)):
                message = await self._receive()
        except TimeoutError:
            rate = self._limits.body_bytes_per_s // 1024
            detail = f"at least {rate} KiB/s expected"
            # The rest could drip on after the answer.
            raise self._refuse(RefusedError(408, "slow_body", detail, {"Connection": "close"})) from None
        self._waited_s += time.monotonic() - began
        self.bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self.bytes > self._max_bytes:
            raise self._refuse(_too_large(self._max_bytes))
        return message

    def _refuse(self, error: RefusedError) -> RefusedError:
        # Kept, as what reads the body may turn the exception into an answer of its own.
        self.refused = error
        return error


def _too_large(max_bytes: int) -> RefusedError:
    return RefusedError(413, "too_large", f"the body is over {max_bytes} bytes")


class Slots:
    """Requests at once, by the name of the bearer."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()

    @contextlib.contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Takes one of the name's slots for the block; raises RefusedError (429) where all are taken."""
        if self._taken[name] >= self._most:
            detail = f"at most {self._most} requests of one token at once"
            raise RefusedError(429, "too_many_requests", detail, {"Retry-After": "1"})
        self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]
