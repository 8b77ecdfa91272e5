"""Request bodies in memory: refused as soon as they are too large, and no more of them at once than there is room."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import Request

from rayseg.records import Reason
from serving.refusals import RefusalError


class Bodies:
    """The bodies of all requests at work; `most_bytes` of them together."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, types: tuple[str, ...], max_bytes: int) -> AsyncIterator[tuple[bytes, str]]:
        """The body and its media type, as long as the block lasts; raises RefusalError as soon as it must be."""
        content_type = request.headers.get("content-type", "application/octet-stream")
        if content_type.partition(";")[0].strip().lower() not in types:
            raise RefusalError(415, "unsupported_media_type", f"Content-Type: one of {', '.join(types)}")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusalError(415, "unsupported_media_type", "Content-Encoding: only identity")
        too_large = RefusalError(413, Reason.TOO_LARGE, f"the body is over {max_bytes} bytes")
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > max_bytes:
            raise too_large
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self._held += len(chunk)
                if len(body) > max_bytes:
                    raise too_large
                if self._held > self._most_bytes:
                    raise RefusalError(503, "busy", "other requests' bodies fill the memory")
            yield bytes(body), content_type
        finally:
            self._held -= len(body)
