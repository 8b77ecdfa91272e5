"""The HTTP interface: what is asked, what is refused and why, what is answered. Knows neither Ray nor TensorFlow."""

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

import rayseg
from rayseg.records import Reason, Reject
from serving import answers, audit, dicomweb, page, upload, volumes
from serving.answers import DICOM, GLB, KINDS, NIFTI, PNG, ModelAnswer, SegmentAnswer
from serving.bodies import Bodies
from serving.findings import Grid, SeriesAnswer
from serving.held import ModelsAnswer, VersionAnswer, models_answer, version_answer
from serving.messages import Priority, Segmenter
from serving.refusals import Problem, RefusalError, accepted, deadline
from serving.segment import Settings, Wanted, series_content, slice_content
from serving.upload import FORM, ZIP

HEALTH_DEADLINE_S = 20.0
READY_DEADLINE_S = 2.0
IMAGE_TYPES = ("image/png", "image/jpeg", "image/tiff")
BODY_TYPES = (
    *("application/dicom", "application/octet-stream", *IMAGE_TYPES),
    *(ZIP, "application/x-zip-compressed", FORM, NIFTI, "application/gzip", "application/x-gzip"),
)

DESCRIPTION = """
**Research software, not a medical device.** Send a slice, or a series, get its masks.

    curl --data-binary @slice.dcm -H 'Content-Type: application/dicom' -H 'Accept: image/png' URL/v1/segment -o mask.png
    curl --data-binary @series.zip -H 'Content-Type: application/zip' -H 'Accept: application/dicom' URL/v1/segment
    curl -F file=@1.dcm -F file=@2.dcm URL/v1/segment

| Status | When |
|---|---|
| 400 | the bytes cannot be read; `reason` is the code that ledgers use |
| 404 | `model` is no version or alias, or one that does not pass its checks |
| 406 | `Accept` allows none of JSON, PNG, DICOM, NIfTI, GLB and a form; or PNG for a series without `slice` |
| 413 | the body, or what it declares or inflates to, is over a limit |
| 415 | the `Content-Type` or `Content-Encoding` is not one that is read |
| 422 | a readable object that cannot be segmented, or lacks what the format needs; several series; a bad parameter |
| 422 | `needs_neighbours`: the model looks at the slices beside one too; send the whole series |
| 503 | too much waits, the model did not answer in time, or is starting: `Retry-After` says when to come again |
"""


class HealthAnswer(BaseModel):
    """The JSON answer of `GET /healthz`."""

    status: str
    model: str
    version: str
    seconds: float = Field(description="that the bundle's example took, queue included, when it was run last")
    checked: datetime = Field(description="when that was")


class ReadyAnswer(BaseModel):
    """The JSON answer of `GET /readyz`."""

    status: str
    version: str = Field(description="that requests without a model get from the replica that answered")
    waiting: int = Field(description="slices in its queue")


def create(model: Segmenter, settings: Settings) -> FastAPI:
    """The application around a model."""
    app = FastAPIOffline(  # Swagger UI from the package's own files: the machines that run this may have no network
        title="rayseg",
        version=rayseg.__version__,
        description=DESCRIPTION,
        redoc_url=None,
    )
    _answer_errors(app)
    problem = {"model": Problem}
    unavailable: dict[int | str, dict[str, Any]] = {503: problem}
    bodies = Bodies(settings.bodies_at_once * settings.max_body_bytes)
    room = asyncio.Semaphore(settings.series_at_once)

    page.add(app)
    app.include_router(dicomweb.router(model, settings, room))

    @app.post(
        "/v1/segment",
        summary="Segment a slice or a series",
        response_model=SegmentAnswer | SeriesAnswer,
        response_model_exclude_none=False,
        openapi_extra={
            "requestBody": {
                "required": True,
                "description": "a DICOM instance, a grey PNG, JPEG or TIFF image: a slice; a multi-frame instance, a "
                "NIfTI, NRRD or MetaImage volume, a zip, or a form whose parts named `file` are any of these: a series",
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in BODY_TYPES},
            }
        },
        responses={
            200: {
                "description": "JSON figures, an 8-bit label map on a slice's own grid, a DICOM SEG, a gzipped NIfTI "
                "volume of label maps, surfaces as GLB, or all that a viewer needs: a form of the parts `answer` (the "
                "JSON of a series), `image` and `mask` (gzipped NIfTI volumes of equal grids) and `numbers`",
                "content": {
                    kind: {"schema": {"type": "string", "format": "binary"}} for kind in (PNG, DICOM, NIFTI, GLB, FORM)
                },
                "headers": {
                    name: {"schema": {"type": "string"}}
                    for name in ("X-Model-Name", "X-Model-Version", "X-Model-Digest", "X-Warning")
                },
            },
            **dict.fromkeys((400, 404, 406, 413, 415, 422, 500, 503), problem),
        },
    )
    async def segment(
        request: Request,
        preview: Annotated[bool, Query(description="put pictures of slice and mask into a slice's JSON")] = False,
        picture: Annotated[Literal["mask", "overlay"], Query(description="what a PNG shows")] = "mask",
        slice: Annotated[int | None, Query(ge=0, description="of a series, from 0: that a PNG is wanted of")] = None,
        grid: Annotated[
            Grid, Query(description="of NIfTI: the source's own, or one with right angles, which ITK reads when tilted")
        ] = "source",
        threshold: Annotated[
            float | None, Query(gt=0, lt=1, description="in the place of the model's own; models of one class")
        ] = None,
        of: Annotated[
            str | None,
            Query(alias="model", pattern="^[A-Za-z0-9_.-]{1,64}$", description="alias or version of the model"),
        ] = None,
        priority: Annotated[Priority | None, Query(description="by default a slice is urgent, a series normal")] = None,
    ) -> Response:
        started = time.perf_counter()
        kind = answers.negotiate(request.headers.get("accept"))
        if kind is None:
            raise RefusalError(406, "not_acceptable", f"offered: {', '.join(KINDS)}")
        wanted = Wanted(kind, picture, slice, grid, preview, of, threshold, priority, started)
        async with bodies.read(request, BODY_TYPES, settings.max_body_bytes) as (body, content_type):
            received = time.perf_counter()
            several = upload.is_several(body, content_type.partition(";")[0].strip().lower())
            if not several:
                async with deadline(settings.deadline_s, request):
                    outcome = await model.segment(body, wanted.ask("urgent", settings.deadline_s))
                several = isinstance(outcome, Reject) and outcome.reason == Reason.UNSUPPORTED_MULTIFRAME
            if several:
                async with deadline(settings.series_deadline_s, request), room:
                    answer = await series_content(model, body, content_type, settings, wanted, received)
                content, headers = answer.content, answers.model_headers(answer.model)
                if answer.warning is not None:
                    headers["X-Warning"] = answer.warning
                audit.about(request.scope, answer.uids)
            else:
                result = accepted(outcome)
                headers = answers.model_headers(result.model)
                # Encoding takes milliseconds of computing: in a thread, so that other requests go on.
                content = await asyncio.to_thread(slice_content, body, result, wanted, received)
                audit.about(request.scope, result.series)
        media_type = volumes.MEDIA_TYPE if kind == FORM else kind
        return Response(content, media_type=media_type, headers=headers)

    @app.get("/v1/model", summary="The model in use", responses={503: problem})
    async def describe(response: Response) -> ModelAnswer:
        async with deadline(HEALTH_DEADLINE_S):
            info = accepted(await model.describe())
        response.headers.update(answers.model_headers(info))
        return ModelAnswer.model_validate(info, from_attributes=True)

    @app.get("/v1/models", summary="The versions that a replica holds", responses={503: problem})
    async def models() -> ModelsAnswer:
        async with deadline(HEALTH_DEADLINE_S):
            return models_answer(await model.state())

    @app.get("/v1/models/{which}", summary="A version that a replica holds", responses={404: problem, 503: problem})
    async def version(which: str) -> VersionAnswer:
        async with deadline(HEALTH_DEADLINE_S):
            answer = version_answer(await model.state(), which)
        if answer is None:
            raise RefusalError(404, "unknown_model", "not one of those that are held: see /v1/models")
        return answer

    @app.get("/healthz", summary="Whether the last check of the model passed", responses=unavailable)
    async def healthz(response: Response) -> HealthAnswer:
        async with deadline(HEALTH_DEADLINE_S):
            health = await model.health()
        if not health.matches:
            raise RefusalError(503, "wrong_mask", "the bundle's example does not give the recorded mask")
        info = health.model
        response.headers.update(answers.model_headers(info))
        checked = datetime.fromtimestamp(health.at, UTC)
        return HealthAnswer(status="ok", model=info.name, version=info.version, seconds=health.seconds, checked=checked)

    @app.get("/readyz", summary="Whether a replica takes requests, now", responses=unavailable)
    async def readyz() -> ReadyAnswer:
        async with deadline(READY_DEADLINE_S):
            state = await model.state()
        return ReadyAnswer(status="ready", version=state.held[0].model.version, waiting=state.waiting)

    return app


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
