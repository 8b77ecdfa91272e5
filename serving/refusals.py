"""Answers that are not a success, and which status a reason has."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import TypeVar

from pydantic import BaseModel, Field
from starlette.requests import Request

from rayseg.records import Reason, Reject
from serving.messages import Refusal

T = TypeVar("T")

# What bytes can be read but not segmented, or are too many; any other reason means bytes that cannot be read (400).
STATUS: dict[str, HTTPStatus] = {
    Reason.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Reason.NO_PIXELS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNSUPPORTED_SOP_CLASS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNSUPPORTED_TRANSFER_SYNTAX: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNSUPPORTED_PIXELS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNSUPPORTED_MULTIFRAME: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.MOSAIC: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.MISSING_ATTRIBUTE: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.NEEDS_NEIGHBOURS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.LOCALIZER: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.SERIES_MIXED: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.SERIES_DUPLICATES: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNEVEN_SLICES: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.WRITE_FAILED: HTTPStatus.INTERNAL_SERVER_ERROR,
    Reason.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    "busy": HTTPStatus.SERVICE_UNAVAILABLE,
    "deadline": HTTPStatus.SERVICE_UNAVAILABLE,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "unknown_model": HTTPStatus.NOT_FOUND,
    "invalid_parameter": HTTPStatus.UNPROCESSABLE_ENTITY,
}


class Problem(BaseModel):
    """Every answer that is not a success."""

    reason: str = Field(description="a code, for programs")
    detail: str = Field(description="what exactly, for people; never anything read from the object's identity")


class RefusalError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.detail = status, reason, detail


def accepted(result: T | Reject | Refusal) -> T:
    """The result; raises RefusalError where it is none."""
    if isinstance(result, Reject | Refusal):
        raise RefusalError(STATUS.get(result.reason, HTTPStatus.BAD_REQUEST), result.reason, result.detail)
    return result


@contextlib.asynccontextmanager
async def deadline(seconds: float, request: Request | None = None) -> AsyncIterator[None]:
    """Refuses what takes longer; with a request, whose body has been read, also what its client does not wait for."""
    try:
        async with asyncio.timeout(seconds) as bound:
            watching = asyncio.create_task(_client_gone(request, bound)) if request else None
            try:
                yield
            finally:
                if watching:
                    watching.cancel()
    except TimeoutError:
        raise RefusalError(503, "deadline", f"the model did not answer within {seconds:.0f} s") from None


async def _client_gone(request: Request, bound: asyncio.Timeout) -> None:
    """Servers tell of it only who asks: the work would go on."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    bound.reschedule(asyncio.get_running_loop().time())
