"""What is made of a request to segment: a slice's answer, or a series', from the body to the bytes of the answer."""

import asyncio
import dataclasses
import time
from dataclasses import dataclass, field
from typing import Literal

from rayseg.data.grey import sees_color
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice, read_headers, read_slice
from rayseg.records import Reject
from serving import answers, findings, series, upload, volumes
from serving.answers import FORM, JSON, PNG
from serving.findings import Grid
from serving.messages import Ask, Masked, ModelInfo, Priority, Segmented, Segmenter
from serving.refusals import RefusalError, accepted
from serving.upload import Limits, Series


@dataclass(frozen=True)
class Settings:
    """What bounds a request."""

    max_body_bytes: int
    limits: Limits = field(default_factory=Limits)
    deadline_s: float = 60.0  # of a slice
    series_deadline_s: float = 600.0
    series_at_once: int = 4  # in memory, unpacked
    bodies_at_once: int = 8  # of the greatest size
    pacs: str | None = None  # URL of a DICOMweb service, whose series may be segmented


@dataclass(frozen=True, eq=False)
class OfSeries:
    """An answer about a series."""

    content: bytes
    model: ModelInfo  # the version that all masks are of
    uids: set[str]  # of the series, where it has one
    warning: str | None  # what who reads the content should know


@dataclass(frozen=True)
class Wanted:
    """What a request to segment asks for."""

    kind: str
    picture: Literal["mask", "overlay"]
    number: int | None  # of the slice of a series that PNG is wanted of
    grid: Grid  # of NIfTI
    preview: bool
    model: str | None
    threshold: float | None
    priority: Priority | None
    started: float

    def ask(self, default: Priority, seconds: float) -> Ask:
        """The same for the model."""
        return Ask(self.model, self.threshold, self.priority or default, time.monotonic() + seconds)


def slice_content(body: bytes, result: Segmented, wanted: Wanted, received: float) -> bytes:
    """The answer about one slice."""
    segmented = time.perf_counter()
    preprocess = result.model.preprocess

    def source() -> Slice:
        return accepted(read_slice(body, color=sees_color(preprocess)))

    if wanted.kind == PNG:
        if wanted.picture == "overlay":
            return answers.overlay(source(), result.mask, preprocess)
        return answers.png(result.mask)
    if wanted.kind == JSON:
        pictures = answers.preview(source(), result.mask, preprocess) if wanted.preview else None
        timings_ms = _timings(wanted, received, segmented) | {"forward": round(result.forward_ms, 2)}
        return answers.measure(result, timings_ms, pictures).model_dump_json().encode()
    headers = read_headers(body)
    alone = Series([body], [(0, None)], None if isinstance(headers, Reject) else headers, [result.geometry], {})
    found = accepted(findings.found(alone, result.model, wanted.threshold, [Masked(result.mask, result.look)]))
    if wanted.kind == FORM:
        return volumes.view(found, findings.measure(found, _timings(wanted, received, segmented)))
    return accepted(findings.encode(wanted.kind, found, wanted.grid))


async def series_content(
    model: Segmenter, body: bytes, content_type: str, settings: Settings, wanted: Wanted, received: float
) -> OfSeries:
    """The answer about a series."""
    arranged = accepted(await asyncio.to_thread(upload.read, body, content_type, settings.limits))
    number = wanted.number
    if wanted.kind == PNG and number is None and len(arranged.places) > 1:
        raise RefusalError(406, "not_acceptable", f"image/png is of one slice: ?slice=0 to {len(arranged.places) - 1}")
    number = number or 0
    if number >= len(arranged.places):
        raise RefusalError(422, "invalid_parameter", f"slice: 0 to {len(arranged.places) - 1} expected")
    info = accepted(await model.describe(wanted.model))
    preprocess = info.preprocess
    ask = dataclasses.replace(wanted.ask("normal", settings.series_deadline_s), model=info.version)
    if wanted.kind == PNG and isinstance(preprocess, Preprocess):
        arranged, number = arranged.around(number, preprocess.neighbours)
    masks = await series.segment(model, arranged, ask, preprocess)

    def content() -> tuple[bytes, str | None]:
        segmented = time.perf_counter()
        if wanted.kind == PNG:
            mask = accepted(masks[number]).mask
            if wanted.picture == "mask":
                return answers.png(mask), None
            near, _ = arranged.around(number, 0)
            return answers.overlay(accepted(next(near.slices(sees_color(preprocess)))), mask, preprocess), None
        found = accepted(findings.found(arranged, info, wanted.threshold, masks))
        warning = findings.warning(wanted.kind, found, wanted.grid)
        if wanted.kind not in (JSON, FORM):
            return accepted(findings.encode(wanted.kind, found, wanted.grid)), warning
        answer = findings.measure(found, {})
        answer.timings_ms = _timings(wanted, received, segmented)
        return volumes.view(found, answer) if wanted.kind == FORM else answer.model_dump_json().encode(), warning

    uids = {header.series_instance_uid for header in arranged.headers or ()}
    data, warning = await asyncio.to_thread(content)
    return OfSeries(data, info, uids, warning)


def _timings(wanted: Wanted, received: float, segmented: float) -> dict[str, float]:
    seconds = {
        "receive": received - wanted.started,
        "segment": segmented - received,
        "total": time.perf_counter() - wanted.started,
    }
    return {name: round(1000 * value, 2) for name, value in seconds.items()}
