"""How the ingress asks a model replica: straight first, through the object store after any failure."""

import asyncio
import pickle
import time
from typing import Any

import grpc
import numpy as np
import pytest
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, ActorUnavailableError

from serving.guard import Protection
from serving.ingress import IngressReplica
from serving.jobs import ServedModel
from serving.messages import Ask, Segmented
from serving.refusals import RefusalError
from serving.segment import Settings
from tests.unit import guarded

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
    return asyncio.run(ingress.segment(body, Ask(until=time.monotonic() + seconds)))


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


def test_a_deadline_holds_on_a_machine_whose_clock_is_another(monkeypatch: pytest.MonkeyPatch):
    sent = pickle.dumps(Ask("7", 0.25, "bulk", until=time.monotonic() + 60))
    here = time.monotonic()
    monkeypatch.setattr("serving.messages.time.monotonic", lambda: here + 5000.0)
    monkeypatch.setattr("serving.messages.time.time", lambda: -1e6)
    arrived = pickle.loads(sent)
    assert (arrived.model, arrived.threshold, arrived.priority) == ("7", 0.25, "bulk")
    assert arrived.seconds == pytest.approx(60, abs=1)


def test_a_large_mask_takes_the_straight_way():
    mask = np.zeros((6000, 5000), np.uint8)
    mask[1000:3000, 500:4000] = np.random.default_rng(1).integers(0, 4, (2000, 3500), np.uint8)  # noise, at its worst
    segmented = Segmented(mask, guarded.LOOK, None, guarded.INFO, 1, 1.0, ("1.2.3",))
    sent = pickle.dumps(segmented)
    assert len(sent) < 4 * 2**20 < mask.nbytes
    arrived = pickle.loads(sent)
    assert np.array_equal(arrived.mask, mask)
    assert (arrived.mask.dtype, arrived.series, arrived.model) == (np.uint8, ("1.2.3",), guarded.INFO)
    small = Segmented(mask[:9, :9], guarded.LOOK, None, guarded.INFO, 1, 1.0)
    assert np.array_equal(pickle.loads(pickle.dumps(small)).mask, mask[:9, :9])


class Dying:
    """Stands for a deployment of replicas, each of which ends when it is asked, and once more says that it is dead."""

    def __init__(self, replicas: int, deadly: int) -> None:
        self.left = [f"{number:032x}" for number in range(replicas)]
        self.deadly, self.ended, self.last = deadly, list[str](), ""

    def options(self, **_: Any) -> "Dying":
        return self

    async def remote(self, *arguments: Any) -> str:
        if len(self.ended) == self.deadly:
            return "mask"
        if not self.last:
            self.last = self.left.pop()
            self.ended.append(self.last)
        else:  # asked for once more before it is known to be dead: no further death
            self.last, gone = "", self.last
            raise died(gone)
        raise died(self.last)


def died(replica: str) -> ActorDiedError:
    error = ActorDiedError()
    error.actor_id = replica
    return error


def test_a_request_that_ends_replicas_is_not_sent_to_all_of_them():
    handle = Dying(5, deadly=5)
    with pytest.raises(RefusalError) as refused:
        asked(handle, b"x", seconds=60)  # type: ignore[arg-type]
    assert (refused.value.status, refused.value.reason) == (500, "internal")
    assert len(handle.ended) == 2
    assert asked(Dying(5, deadly=1), b"x") == "mask", "a replica that ends for another reason costs no answer"  # type: ignore[arg-type]
