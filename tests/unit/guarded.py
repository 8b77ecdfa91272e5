"""The service without Ray: its routes and its guard around a model that thresholds, and clients in this process."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import uvicorn

from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice, read_slice
from rayseg.geometry.grid import Geometry
from rayseg.inference.quality import Look
from rayseg.records import Reason, Reject
from serving import guard, routes
from serving.guard import Guard, Protection
from serving.jobs import Jobs
from serving.messages import Ask, Health, Held, Masked, ModelInfo, Refusal, Segmented, Stacked, State
from serving.metrics import Metrics
from serving.routes import Settings

MAX_BODY = 256 * 1024
INFO = ModelInfo("m", "3", "champion", "d" * 64, "run", ("lesion",), Preprocess(), 0.5)

LOOK = Look("CT", None, None, 100.0, 10.0, 0.0, 0, 0.001)


class Threshold:
    """A model of one comparison, which holds one version."""

    async def segment(self, body: bytes, ask: Ask) -> Segmented | Reject | Refusal:
        if ask.model not in (None, "champion", "3"):
            return Refusal("unknown_model", "")
        found = await asyncio.to_thread(read_slice, body)
        if isinstance(found, Reject):
            return found
        series = (found.header.series_instance_uid,) if found.header else ()
        return Segmented(mask(found), LOOK, place(found), INFO, 1, 1.0, series)

    async def segment_stacks(self, slices: list[Slice | None], ask: Ask) -> Stacked | Refusal:
        masks = [Reject(Reason.CORRUPT, "") if one is None else Masked(mask(one), LOOK) for one in slices]
        return Stacked(masks, INFO, 1.0)

    async def describe(self, model: str | None = None) -> ModelInfo | Refusal:
        return INFO if model in (None, "champion", "3") else Refusal("unknown_model", "")

    async def state(self) -> State:
        return State(
            replica="r",
            held=(Held(model=INFO, roles=("current",), aliases=("champion",), since=0.0),),
            failure=None,
            swaps=2,
            failures=0,
            waiting=5,
            running=1,
            dropped=0,
            agreement=None,
        )

    async def health(self) -> Health:
        return Health(INFO, True, 0.01, 0.0)


def mask(found: Slice) -> np.ndarray:
    return (found.values() > 40).astype(np.uint8)


def place(found: Slice) -> Geometry | None:
    return found.header.geometry if found.header else None


def service(jobs: Jobs | None = None, pacs: str | None = None, **protection: Any) -> Guard:
    app = routes.create(Threshold(), Settings(MAX_BODY, pacs=pacs))
    return guard.around(app, Protection(max_body_bytes=MAX_BODY, **protection), Metrics(), jobs, Threshold().state)


def asked(
    app: Any, *requests: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]], address: str = "http://127.0.0.1"
) -> list[httpx.Response]:
    """The answers to requests that are made one after the other."""

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=address) as client:
            return [await request(client) for request in requests]

    return asyncio.run(ask())


def get(path: str, **headers: str) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
    return lambda client: client.get(path, headers=headers)


def post(path: str, content: Any, **headers: str) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
    return lambda client: client.post(path, content=content, headers=headers)


@contextlib.contextmanager
def listening(app: Any, **options: Any) -> Iterator[str]:
    """The URL of a real server around the application, in a thread of this process."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
