"""Series that lie in a PACS: fetched by WADO-RS, segmented as uploads are, their SEG stored by STOW-RS."""

import asyncio
import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pydicom
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from rayseg import pacs
from rayseg.retry import CredentialsError
from serving import answers, audit, findings, upload
from serving.answers import DICOM
from serving.findings import Found, SeriesAnswer
from serving.messages import Ask, Segmenter
from serving.refusals import Problem, RefusalError, accepted, deadline
from serving.segment import Settings
from serving.series import segment

_UID = r"^[0-9]+(\.[0-9]+)*$"  # PS3.5 section 9.1
_AT_ONCE = 8  # instances that are fetched


class PacsRequest(BaseModel):
    """A series of the configured PACS."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"study": "1.2.840.1", "series": "1.2.840.1.7"}]}
    )

    study: str = Field(pattern=_UID, max_length=64, description="StudyInstanceUID")
    series: str = Field(pattern=_UID, max_length=64, description="SeriesInstanceUID")
    model: str | None = Field(default=None, pattern="^[A-Za-z0-9_.-]{1,64}$", description="alias or version")
    threshold: float | None = Field(default=None, gt=0, lt=1, description="in the place of the model's own")


class PacsAnswer(BaseModel):
    """What was stored, and the figures of an upload of the same series."""

    stored: str = Field(description="where the PACS has the SEG, by QIDO-RS")
    series_instance_uid: str = Field(description="of the SEG")
    sop_instance_uid: str = Field(description="of the SEG")
    figures: SeriesAnswer


def router(model: Segmenter, settings: Settings, room: asyncio.Semaphore) -> APIRouter:
    """The routes, for the PACS of the settings; `room` bounds the series that are in memory."""
    routes = APIRouter()
    problem = {"model": Problem}

    @routes.post(
        "/v1/dicomweb/segment",
        summary="Segment a series of the configured PACS, and store its SEG there",
        responses=dict.fromkeys((400, 404, 413, 422, 500, 502, 503), problem),
    )
    async def from_pacs(request: Request, wanted: PacsRequest, response: Response) -> PacsAnswer:
        if settings.pacs is None:
            raise RefusalError(422, "no_pacs", "this service has no PACS: serve.pacs is not configured")
        started = time.perf_counter()
        async with deadline(settings.series_deadline_s), room:
            info = accepted(await model.describe(wanted.model))
            objects = await asyncio.to_thread(_fetch, settings.pacs, wanted, settings.limits)
            fetched = time.perf_counter()
            series = accepted(await asyncio.to_thread(upload.arrange, objects, settings.limits))
            audit.about(request.scope, [wanted.series])
            preprocess = info.preprocess
            ask = Ask(info.version, wanted.threshold, "normal", time.monotonic() + settings.series_deadline_s)
            masks = await segment(model, series, ask, preprocess)
            found = accepted(findings.found(series, info, wanted.threshold, masks))
            answer = await asyncio.to_thread(_stored, settings.pacs, found)
        seconds = {"receive": fetched - started, "total": time.perf_counter() - started}
        answer.figures.timings_ms = {name: round(1000 * value, 2) for name, value in seconds.items()}
        response.headers.update(answers.model_headers(info))
        return answer

    return routes


def _fetch(service: str, wanted: PacsRequest, limits: upload.Limits) -> Sequence[bytes]:
    """The instances of the series."""
    query = f"dicomweb+{service}?StudyInstanceUID={wanted.study}&SeriesInstanceUID={wanted.series}"
    try:
        uris = list(pacs.instances(query))
        if not uris:
            raise RefusalError(404, "unknown_series", "the PACS has no such series of that study")
        if len(uris) > limits.objects:
            raise RefusalError(413, "too_large", f"the series has more than {limits.objects} instances")
        objects: list[bytes] = []
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="wado") as pool:
            for first in range(0, len(uris), _AT_ONCE):  # no more is under way than is about to be counted
                objects += pool.map(pacs.read, uris[first : first + _AT_ONCE])
                if sum(map(len, objects)) > limits.inflated_bytes:
                    raise RefusalError(413, "too_large", f"the series has more than {limits.inflated_bytes} bytes")
    except (OSError, ValueError, CredentialsError) as error:  # their texts are ours, but may say where the PACS is
        raise RefusalError(502, "pacs_failed", f"the PACS does not give the series ({type(error).__name__})") from None
    return objects


def _stored(service: str, found: Found) -> PacsAnswer:
    data = accepted(findings.encode(DICOM, found))
    instance = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    try:
        address = pacs.store(service, str(instance.SOPInstanceUID), data)
    except (OSError, CredentialsError) as error:
        raise RefusalError(502, "pacs_failed", f"the PACS does not take the SEG ({type(error).__name__})") from None
    return PacsAnswer(
        stored=address,
        series_instance_uid=str(instance.SeriesInstanceUID),
        sop_instance_uid=str(instance.SOPInstanceUID),
        figures=findings.measure(found, {}),
    )
