"""A replica with a model of volumes: what it does about health, deadlines and turns while series are at work."""

import asyncio
import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rayseg.data import phantom_volumes
from rayseg.dicom.reading import Slice
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.records import Reject
from rayseg.tracking.bundle import read_example
from serving.messages import Ask, Refusal, Stacked
from serving.replica import SERIES_AT_ONCE, ModelReplica
from tests import bundles


class Gate:
    """A network that waits until it is let through."""

    def __init__(self, replica: ModelReplica) -> None:
        predictor = replica._versions.current.predictor
        assert isinstance(predictor, VolumePredictor)
        (compiled,) = predictor._compiled
        self.open, self.asked, self.most = threading.Event(), threading.Event(), 0
        self._behind = compiled.exact
        predictor._compiled = (dataclasses.replace(compiled, exact=self, screen=None),)

    def __call__(self, image_NDHWC: np.ndarray) -> np.ndarray:
        self.asked.set()
        assert self.open.wait(60)
        return self._behind(image_NDHWC)


@pytest.fixture
def replica(tmp_path: Path) -> ModelReplica:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    bundles.register(uri, "volumes", bundles.write_volume_bundle(tmp_path / "bundle", 55.0), "champion")
    return ModelReplica(tracking_uri=uri, model_uri="models:/volumes@champion", poll_s=3600)


@pytest.fixture
def slices(replica: ModelReplica) -> list[Slice | Reject]:
    (recorded, *_) = phantom_volumes.of_bundle(replica._versions.current.info.preprocess)  # type: ignore[arg-type]
    read = read_example(recorded)
    assert not isinstance(read, Reject)
    return list(read)


def test_a_long_series_is_no_illness(replica: ModelReplica, slices: list[Slice | Reject]) -> None:
    """The example, which would wait behind the series, is run again when there is none at work."""
    gate = Gate(replica)

    async def through() -> None:
        await asyncio.gather(at_work := asyncio.ensure_future(replica.segment_series(slices, Ask())), checked())
        answer = await at_work
        assert isinstance(answer, Stacked)
        assert [mask.mask.shape for mask in answer.masks if not isinstance(mask, Reject)] == [slices[0].shape] * len(
            slices
        )

    async def checked() -> None:
        await asyncio.to_thread(gate.asked.wait, 60)
        await asyncio.wait_for(replica.check_health(), 5)
        gate.open.set()

    asyncio.run(through())
    gate.open.clear()

    async def alone() -> None:
        task = asyncio.ensure_future(replica.check_health())
        gate.asked.clear()
        await asyncio.to_thread(gate.asked.wait, 60)
        assert not task.done()
        gate.open.set()
        await task

    replica._checks._checked = -100.0
    replica._checks._passed = 0
    asyncio.run(alone())


def test_a_series_has_a_deadline_and_a_turn(replica: ModelReplica, slices: list[Slice | Reject]) -> None:
    gate = Gate(replica)

    async def through() -> list[Stacked | Refusal]:
        long = Ask(until=time.monotonic() + 60)
        tasks = [asyncio.ensure_future(replica.segment_series(slices, long)) for _ in range(SERIES_AT_ONCE)]
        await asyncio.to_thread(gate.asked.wait, 60)
        late = await replica.segment_series(slices, Ask(until=time.monotonic() + 0.2))
        gate.open.set()
        past = await replica.segment_series(slices, Ask(until=time.monotonic() - 1))
        return [*await asyncio.gather(*tasks), late, past]

    *made, late, past = asyncio.run(through())
    assert all(isinstance(one, Stacked) for one in made)
    for one in (late, past):
        assert isinstance(one, Refusal)
        assert one.reason == "deadline"
