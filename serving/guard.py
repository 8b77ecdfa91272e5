"""What stands around all routes: tokens, limits, security headers, figures and the audit log. Plain ASGI."""

import asyncio
import contextlib
import json
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from serving import auth
from serving.audit import Audit
from serving.auth import Token
from serving.jobs import Jobs, router
from serving.limits import Body, Limits, RefusedError, Slots, body_limit, check_head
from serving.messages import State
from serving.metrics import CONTENT_TYPE, Metrics
from serving.refusals import RefusalError

logger = logging.getLogger(__name__)

# What an answer lacks of these is added; the page brings a stricter policy. There is no CORS header anywhere: other
# sites' scripts may not read an answer.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_TLS_HEADERS = {"Strict-Transport-Security": "max-age=31536000"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CHALLENGE = 'Bearer realm="rayseg"'
_PROBLEM_BYTES = 4096
_STATE_S = 2.0  # for a replica to answer
_PROBLEM = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
_REFUSALS = {
    "401": {"description": "No token that is known", "content": _PROBLEM},
    "403": {"description": "The token has not the role that this needs", "content": _PROBLEM},
    "408": {"description": "The body comes too slowly", "content": _PROBLEM},
    "429": {"description": "Too many requests of this token at once; see Retry-After", "content": _PROBLEM},
}


@dataclass(frozen=True, kw_only=True)
class Protection:
    """How the service is protected."""

    tokens: tuple[Token, ...] = ()  # who may ask; none: everybody that gets here
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int
    audit: str | None = None  # file of the audit log
    # Without tokens only this machine gets here: then pages of other sites, which a browser here may show, must not get
    # through it either.
    local: bool = True
    tls: bool = False  # spoken by the service itself


class Guard:
    """The service around an application, and the figures about its requests."""

    def __init__(self, app: FastAPI, metrics: Metrics, protection: Protection) -> None:
        self._app, self._metrics = app, metrics
        self._paths = {getattr(route, "path", None) for route in app.routes}
        self._tokens, self._limits = protection.tokens, protection.limits
        self._max_body_bytes = protection.max_body_bytes
        self._local = protection.local and not protection.tokens
        self._audit = Audit(protection.audit) if protection.audit else None
        self._at_work = 0
        self._slots = Slots(self._limits.requests_per_token)
        self._headers = HEADERS | (_TLS_HEADERS if protection.tls else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection's request (ASGI)."""
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        body = Body(receive, self._limits, body_limit(scope, self._max_body_bytes))
        answer = _Answer(send, body, self._headers)
        token = None
        refusal: RefusedError | None = None
        with self._metrics.in_flight.track_inprogress():
            try:
                check_head(scope, self._limits, self._max_body_bytes)
                token = self._admit(scope)
                scope.setdefault("state", {})["token"] = token
                with self._place(token):
                    async with asyncio.timeout(self._limits.request_s):
                        await self._app(scope, body.receive, answer.send)
            except RefusedError as error:
                refusal = error
            except TimeoutError:
                refusal = RefusedError(503, "deadline", "the request took too long", {"Retry-After": "5"})
            except Exception as error:
                # Its message may hold what a client sent: the frames alone say where it was.
                if not body.disconnected and not body.refused:
                    frames = "".join(traceback.format_tb(error.__traceback__))
                    logger.error("%s: %s\n%s", self._route(scope), type(error).__name__, frames)
                refusal = RefusedError(500, "internal", type(error).__name__)
            refusal = body.refused or refusal
            if refusal and not answer.started and not body.disconnected:
                body.refused = None
                problem = {"reason": refusal.reason, "detail": refusal.detail}
                await JSONResponse(problem, refusal.status, refusal.headers)(scope, receive, answer.send)
        # What nobody was there to get has nginx's status for it, whatever the routes made of the client's going.
        gone = body.disconnected and answer.status >= 500
        status = 499 if gone else answer.status or 499
        self._tell(scope, status, time.monotonic() - began, body, answer, token)
        if refusal and answer.started and not answer.ended and not body.disconnected:
            raise refusal  # the server cuts the connection, so that nobody takes half an answer for a whole one

    @contextlib.contextmanager
    def _place(self, token: Token | None) -> Iterator[None]:
        """One among the requests at work, and among the token's, for the block."""
        if self._at_work >= self._limits.requests:
            raise RefusedError(503, "busy", "too many requests at once", {"Retry-After": "5"})
        self._at_work += 1
        try:
            with self._slots.one(token.name) if token else contextlib.nullcontext():
                yield
        finally:
            self._at_work -= 1

    def _admit(self, scope: Scope) -> Token | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if self._local:
            _refuse_strangers(dict(headers))
        if not self._tokens:
            return None
        role = auth.required(scope["method"], scope["path"])
        given = [value for name, value in headers if name == b"authorization"]
        token = auth.bearer(self._tokens, given[0].decode("latin-1")) if len(given) == 1 else None
        if role is None:
            return None
        if token is None:
            challenge = f'{_CHALLENGE}, error="invalid_token"' if given else _CHALLENGE
            detail = "the token is not known" if given else "send the header Authorization: Bearer TOKEN"
            raise RefusedError(401, "unauthorized", detail, {"WWW-Authenticate": challenge})
        if not token.may(role):
            challenge = f'{_CHALLENGE}, error="insufficient_scope", scope="{role}"'
            raise RefusedError(403, "forbidden", f"this needs the role {role}", {"WWW-Authenticate": challenge})
        return token

    def _tell(
        self, scope: Scope, status: int, seconds: float, body: Body, answer: "_Answer", token: Token | None
    ) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = self._route(scope)
        self._metrics.answered(method, route, status, seconds, body.bytes, answer.bytes)
        reason = answer.reason() if status >= 400 else None
        if reason:
            self._metrics.rejected(reason)
        if answer.model:
            self._metrics.model(*answer.model)
        if self._audit:
            self._audit.write(
                scope,
                token=token.name if token else None,
                method=method,
                route=route,
                status=status,
                reason=reason,
                received=body.bytes,
                answered=answer.bytes,
                ms=round(1000 * seconds, 1),
                model=answer.model[1] if answer.model else None,
            )

    def _route(self, scope: Scope) -> str:
        """The template of the route that took the request, or would have: the path itself may hold anything."""
        path = getattr(scope.get("route"), "path", None)
        if isinstance(path, str):
            return path
        return scope["path"] if scope["path"] in self._paths else "unmatched"


def around(
    app: FastAPI,
    protection: Protection,
    metrics: Metrics,
    jobs: Jobs | None,
    state: Callable[[], Awaitable[State]],
) -> Guard:
    """The routes with those of jobs and figures beside them, and the guard around all.

    `state` tells of a model replica, for the figures.
    """
    app.include_router(router(jobs))
    app.router.redirect_slashes = False  # to an address that is made of the client's Host

    @app.get(
        "/metrics",
        summary="Figures for Prometheus, of this replica of the ingress",
        response_class=PlainTextResponse,
    )
    async def figures() -> PlainTextResponse:
        # Without a model there are still figures of requests, which then matter most.
        with contextlib.suppress(RefusalError, TimeoutError):
            async with asyncio.timeout(_STATE_S):
                metrics.replica(await state())
        return PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE)

    if protection.tokens:
        _describe_tokens(app)
    return Guard(app, metrics, protection)


def _describe_tokens(app: FastAPI) -> None:
    """Tells the OpenAPI description that a bearer token is wanted, so that /docs asks for one, and what is refused."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                if auth.required(method.upper(), path):
                    operation["security"] = [{"token": []}]
                    for status, told in _REFUSALS.items():
                        operation["responses"].setdefault(status, told)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


class _Answer:
    """An answer on its way out: counted, given the security headers, held back where the body was refused."""

    def __init__(self, send: Send, body: Body, headers: dict[str, str]) -> None:
        self.status = 0
        self.bytes = 0
        self.ended = False
        self.model: tuple[str, str, str] | None = None
        self._send, self._body, self._headers = send, body, headers
        self._problem = b""

    @property
    def started(self) -> bool:
        return self.status > 0

    async def send(self, message: Message) -> None:
        if self._body.refused and not self.started:
            return  # what the routes make of the exception
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": self._completed(message.get("headers", ()))}
        else:
            part = message.get("body", b"")
            self.bytes += len(part)
            self.ended = not message.get("more_body", False)
            if self.status >= 400 and len(self._problem) < _PROBLEM_BYTES:
                self._problem += part[:_PROBLEM_BYTES]
        await self._send(message)

    def reason(self) -> str | None:
        """The code of the Problem that was answered."""
        try:
            reason = json.loads(self._problem)["reason"]
        except (ValueError, KeyError, TypeError):
            return None
        return reason if isinstance(reason, str) else None

    def _completed(self, headers: Any) -> list[tuple[bytes, bytes]]:
        given = [(name.lower(), value) for name, value in headers]
        known = dict(given)
        model = [known.get(f"x-model-{key}".encode(), b"").decode("latin-1") for key in ("name", "version", "digest")]
        self.model = (model[0], model[1], model[2]) if all(model) else None
        missing = {name.lower().encode(): value.encode() for name, value in self._headers.items()}
        return [*given, *((name, value) for name, value in missing.items() if name not in known)]


def _refuse_strangers(headers: dict[bytes, bytes]) -> None:
    """Refuses what a web page of elsewhere sends through the browser of this machine.

    A name of the attacker's that is made to lead here (DNS rebinding) shows in `Host`; a form or script of another
    site in `Origin`, which browsers send with every POST and DELETE.
    """
    host = headers.get(b"host", b"").decode("latin-1")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    origin = headers.get(b"origin", b"").decode("latin-1")
    if not auth.is_loopback(name) or (origin and origin.partition("://")[2] != host):
        raise RefusedError(403, "other_site", "without tokens only this machine is served, under its own name")
