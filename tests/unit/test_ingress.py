"""How the ingress asks a model replica: straight first, through the object store after any failure."""

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError

from serving.guard import Protection
from serving.ingress import IngressReplica
from serving.jobs import ServedModel
from serving.messages import Ask
from serving.refusals import RefusalError
from serving.segment import Settings

TOO_LARGE = AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata(), "message larger than max")


class Handle:
    """Stands for the handle of the deployment; notes for each call whether it went through the store."""

    def __init__(self, direct: Exception | None, stored: Exception | None = None) -> None:
        self.calls: list[bool] = []
        self._outcomes = {False: direct, True: stored}

    def options(self, *, method_name: str, _by_reference: bool = True, **_: Any) -> "Handle":
        self.calls.append(_by_reference)
        return self

    async def remote(self, *arguments: Any) -> str:
        error = self._outcomes[self.calls[-1]]
        if error:
            raise error
        return "mask"


def asked(handle: Handle, body: bytes, seconds: float = 5.0) -> Any:
    served = ServedModel(name="m", uri="", tracking_uri="")
    protection = Protection(max_body_bytes=1)
    model: Any = handle
    ingress = IngressReplica(
        model=model, settings=Settings(1), protection=protection, jobs=None, served=served, pacs=None
    )
    return asyncio.run(ingress.segment(body, Ask(until=time.time() + seconds)))


def test_small_bodies_go_straight_and_large_ones_through_the_store():
    handle = Handle(direct=None)
    assert asked(handle, b"x") == asked(handle, b"x" * 4 * 2**20) == "mask"
    assert handle.calls == [False, True]


@pytest.mark.parametrize("error", [TOO_LARGE, ActorUnavailableError("gone", None)])
def test_what_fails_on_the_straight_way_goes_through_the_store(error: Exception):
    handle = Handle(direct=error)
    assert asked(handle, b"x") == "mask"
    assert handle.calls == [False, True]


def test_a_model_that_stays_away_is_told_when_the_time_is_over():
    handle = Handle(direct=TOO_LARGE, stored=ActorUnavailableError("gone", None))
    with pytest.raises(RefusalError) as refused:
        asked(handle, b"x", seconds=0.3)
    assert (refused.value.status, refused.value.reason) == (503, "unavailable")
    assert handle.calls[:2] == [False, True]


def test_however_often_health_is_asked_a_replica_is_asked_once_a_second():
    handle = Handle(direct=None)
    model: Any = handle
    served = ServedModel(name="m", uri="", tracking_uri="")
    ingress = IngressReplica(
        model=model, settings=Settings(1), protection=Protection(max_body_bytes=1), jobs=None, served=served, pacs=None
    )

    async def ask() -> None:
        await asyncio.gather(*(ingress.health() for _ in range(100)))

    asyncio.run(ask())
    assert len(handle.calls) == 1
