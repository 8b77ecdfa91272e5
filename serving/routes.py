"""The HTTP interface: what is asked, what is refused and why, what is answered. Knows neither Ray nor TensorFlow."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

import rayseg
from rayseg.dicom.reading import read_slice
from rayseg.records import Reason, Reject
from serving import answers
from serving.answers import DICOM, JSON, PNG, ModelAnswer, SegmentAnswer
from serving.replica import Health, ModelInfo, Segmented

ResultT = TypeVar("ResultT")

SEGMENT_DEADLINE_S = 60.0
HEALTH_DEADLINE_S = 20.0
PAGE = Path(__file__).parent / "web" / "index.html"
# The page is one file: nothing may be loaded from elsewhere, and no other site may frame it.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
BODY_TYPES = ("application/dicom", "application/octet-stream", "image/png", "image/jpeg", "image/tiff")

# What bytes can be read but not segmented, or are too many; any other reason means bytes that cannot be read (400).
STATUS = {
    Reason.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Reason.NO_PIXELS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNSUPPORTED_SOP_CLASS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNSUPPORTED_TRANSFER_SYNTAX: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNSUPPORTED_PIXELS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.UNSUPPORTED_MULTIFRAME: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.MISSING_ATTRIBUTE: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.NEEDS_NEIGHBOURS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.WRITE_FAILED: HTTPStatus.INTERNAL_SERVER_ERROR,
    Reason.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}

DESCRIPTION = """
**Research software, not a medical device.** Send one slice, get its mask.

    curl --data-binary @slice.dcm -H 'Content-Type: application/dicom' -H 'Accept: image/png' -o mask.png URL/v1/segment

| Status | When |
|---|---|
| 400 | the bytes cannot be read; `reason` is the code that ledgers use |
| 406 | `Accept` allows none of JSON, PNG and DICOM |
| 413 | the body, or the pixels that it declares, are over the limit |
| 415 | the `Content-Type` or `Content-Encoding` is not one that is read |
| 422 | a readable object that cannot be segmented, or has no geometry for a DICOM SEG; a bad parameter |
| 422 | `needs_neighbours`: the model looks at the slices beside one too; segment the series as a bulk job |
| 503 | the model did not answer in time, or is starting |
"""


class Segmenter(Protocol):
    """The model as the routes see it."""

    async def segment(self, body: bytes) -> Segmented | Reject:
        """One object's bytes to its mask or the reason there is none."""

    async def describe(self) -> ModelInfo:
        """The model in use."""

    async def check(self) -> Health:
        """Outcome of the bundle's example."""


class Problem(BaseModel):
    """Every answer that is not a success."""

    reason: str = Field(description="a code, for programs")
    detail: str = Field(description="what exactly, for people; never anything read from the object's identity")


class HealthAnswer(BaseModel):
    """The JSON answer of `GET /healthz`."""

    status: str
    model: str
    version: str
    seconds: float = Field(description="that the bundle's example took, queue included")


class RefusalError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.detail = status, reason, detail


def create(model: Segmenter, max_body_bytes: int) -> FastAPI:
    """The application around a model; bodies over `max_body_bytes` are refused while they arrive."""
    app = FastAPIOffline(  # Swagger UI from the package's own files: the machines that run this may have no network
        title="rayseg",
        version=rayseg.__version__,
        description=DESCRIPTION,
        redoc_url=None,
    )
    _answer_errors(app)
    problem = {"model": Problem}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    @app.post(
        "/v1/segment",
        summary="Segment one slice",
        response_model=SegmentAnswer,
        response_model_exclude_none=False,
        openapi_extra={
            "requestBody": {
                "required": True,
                "description": "one DICOM instance, or a grey PNG, JPEG or TIFF image",
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in BODY_TYPES},
            }
        },
        responses={
            200: {
                "description": "The mask: JSON figures, an 8-bit label map on the slice's own grid, or a DICOM SEG",
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (PNG, DICOM)},
                "headers": {
                    name: {"schema": {"type": "string"}}
                    for name in ("X-Model-Name", "X-Model-Version", "X-Model-Digest")
                },
            },
            **dict.fromkeys((400, 406, 413, 415, 422, 500, 503), problem),
        },
    )
    async def segment(
        request: Request,
        preview: Annotated[bool, Query(description="put pictures of slice and mask into the JSON answer")] = False,
    ) -> Response:
        started = time.perf_counter()
        kind = answers.negotiate(request.headers.get("accept"))
        if kind is None:
            raise RefusalError(406, "not_acceptable", f"offered: {JSON}, {PNG}, {DICOM}")
        body = await _read_body(request, max_body_bytes)
        received = time.perf_counter()
        async with _deadline(SEGMENT_DEADLINE_S):
            result = _accepted(await model.segment(body))
        timings_ms = {
            "receive": 1000 * (received - started),
            "segment": 1000 * (time.perf_counter() - received),
            "forward": result.forward_ms,
        }
        # Encoding takes milliseconds of computing: in a thread, so that other requests go on.
        content = await asyncio.to_thread(_encode, kind, body, result, timings_ms, preview, started)
        return Response(content, media_type=kind, headers=answers.model_headers(result.model))

    @app.get("/v1/model", summary="The model in use", responses={503: problem})
    async def describe(response: Response) -> ModelAnswer:
        async with _deadline(HEALTH_DEADLINE_S):
            info = await model.describe()
        response.headers.update(answers.model_headers(info))
        return ModelAnswer.model_validate(info, from_attributes=True)

    @app.get("/healthz", summary="Whether the model gives the right mask, now", responses={503: problem})
    async def healthz(response: Response) -> HealthAnswer:
        async with _deadline(HEALTH_DEADLINE_S):
            health = await model.check()
        if not health.matches:
            raise RefusalError(503, "wrong_mask", "the bundle's example does not give the recorded mask")
        info = health.model
        response.headers.update(answers.model_headers(info))
        return HealthAnswer(status="ok", model=info.name, version=info.version, seconds=health.seconds)

    return app


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The body, refused as soon as its header or its length so far says that it must be."""
    media_type = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if media_type not in BODY_TYPES:
        raise RefusalError(415, "unsupported_media_type", f"Content-Type: one of {', '.join(BODY_TYPES)}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusalError(415, "unsupported_media_type", "Content-Encoding: only identity")
    too_large = RefusalError(413, Reason.TOO_LARGE, f"the body is over {max_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _encode(
    kind: str, body: bytes, result: Segmented, timings_ms: dict[str, float], preview: bool, started: float
) -> bytes:
    if kind == PNG:
        return answers.png(result.mask)
    if kind == DICOM:
        return _accepted(answers.dicom_seg(body, result))
    pictures = (
        answers.preview(_accepted(read_slice(body, color=result.model.preprocess.color)), result) if preview else None
    )
    timings_ms["total"] = 1000 * (time.perf_counter() - started)
    rounded = {name: round(value, 2) for name, value in timings_ms.items()}
    return answers.measure(result, rounded, pictures).model_dump_json().encode()


def _accepted(result: ResultT | Reject) -> ResultT:
    if isinstance(result, Reject):
        raise RefusalError(STATUS.get(result.reason, HTTPStatus.BAD_REQUEST), result.reason, result.detail)
    return result


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise RefusalError(503, "deadline", f"the model did not answer within {seconds:.0f} s") from None


def _answer_errors(app: FastAPI) -> None:
    """Makes every answer that is not a success a `Problem`."""

    @app.exception_handler(RefusalError)
    async def refused(_: Request, error: RefusalError) -> JSONResponse:
        return _problem(error.status, error.reason, error.detail)

    @app.exception_handler(HTTPException)
    async def routing(_: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, HTTPStatus(error.status_code).name.lower(), str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]  # its input value is the client's, and stays out of the answer
        return _problem(422, "invalid_parameter", f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _problem(500, Reason.INTERNAL, type(error).__name__)


def _problem(status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    retry = {"Retry-After": "5"} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return JSONResponse({"reason": reason, "detail": detail}, status, {**(headers or {}), **retry})
