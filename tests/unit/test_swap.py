"""Going from one version to the next in a replica: who gets which, and what is not taken."""

import asyncio
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from rayseg.data.synthetic import slice_bytes
from rayseg.dicom.reading import Slice, read_slice
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.models.engine import Engine
from rayseg.records import Reason, Reject
from rayseg.tracking import registry
from serving import routes, series
from serving.messages import Ask, Segmented, Stacked
from serving.replica import ModelReplica
from serving.segment import Settings
from serving.swap import Shadowing, UnsoundError, Versions, check
from serving.upload import Series
from tests import bundles

NAME = "tiny"
EXACT = Engine("openvino", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swap")


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    """Versions 1 and 2 are sound; 3 records another mask than it gives, 4 has a damaged file, 5 another golden mask."""
    uri = f"sqlite:///{folder}/mlflow.db"
    for name, level in (("1", 100), ("2", 160)):
        bundles.register(uri, NAME, bundles.write_bundle(folder / name, level))
    spoiled = bundles.spoil(bundles.write_bundle(folder / "3", 100), example_mask_sha256="0" * 64)
    bundles.register(uri, NAME, spoiled)
    bundles.register(uri, NAME, bundles.write_bundle(folder / "4", 100))
    (folder / "4-artifact" / "data" / "bundle" / "model.xml").write_text("<net/>")
    golden = bundles.spoil(bundles.write_bundle(folder / "5", 100), golden_masks_sha256={"golden-1.dcm": "0" * 64})
    bundles.register(uri, NAME, golden)
    return uri


def point(uri: str, version: str, alias: str = "champion") -> None:
    registry.set_alias(uri, NAME, alias, version)


def versions(uri: str, **settings: Any) -> Versions:
    return Versions(tracking_uri=uri, model_uri=f"models:/{NAME}@champion", engine=EXACT, threads=1, **settings)


def test_a_sound_version_is_taken_and_the_one_before_is_kept(uri: str) -> None:
    point(uri, "1")
    held = versions(uri)
    before = held.current
    held.poll()
    assert held.current is before, "the alias has not moved"
    point(uri, "2")
    held.poll()
    assert (held.current.info.version, held.previous, held.swaps) == ("2", before, 1)
    assert [(one.model.version, one.roles, one.aliases) for one in held.held()] == [
        ("2", ("current",), ("champion",)),
        ("1", ("previous",), ()),
    ]
    point(uri, "1")
    held.poll()
    assert held.current is before, "was not loaded again"


@pytest.mark.parametrize(("bad", "told"), [("3", "recorded mask"), ("4", "cannot be loaded"), ("5", "golden-1")])
def test_an_unsound_version_is_not_taken_not_even_by_a_replica_that_starts(uri: str, bad: str, told: str) -> None:
    point(uri, "1")
    held = versions(uri)
    point(uri, "2")
    held.poll()
    point(uri, bad)
    held.poll()
    held.poll()
    assert held.current.info.version == "2"
    assert (held.failures, held.swaps) == (1, 1)
    assert held.failure is not None
    assert held.failure.version == bad
    assert told in held.failure.detail
    assert held.get(bad) is None
    started = versions(uri, fallback="1")
    assert started.current.info.version == "2", "what was in use, not what the service began with"
    point(uri, "1")
    held.poll()
    assert held.current.info.version == "1", "the alias is followed again"


def test_a_service_whose_only_version_is_unsound_does_not_start(uri: str) -> None:
    with pytest.raises(UnsoundError, match="recorded mask"):
        Versions(tracking_uri=uri, model_uri=f"models:/{NAME}/3", engine=EXACT, threads=1)


class Off:
    """A predictor that is off by so many pixels of one of the slices."""

    engine = "another"

    def __init__(self, exact: Predictor, name: bytes, pixels: int) -> None:
        self.exact, self.name, self.pixels = exact, name, pixels

    def segment_alone(self, recorded: bytes) -> Prediction:
        made = self.exact.segment_alone(recorded)
        if recorded == self.name:
            made.mask.flat[np.flatnonzero(made.mask)[: self.pixels]] = 0
        return made


@pytest.mark.parametrize("name", ["example.dcm", "golden-1.dcm"])
def test_an_engine_may_differ_in_one_pixel_of_a_hundred_found(folder: Path, uri: str, name: str) -> None:
    exact, blob = Predictor.load(folder / "1", engine=EXACT), (folder / "1" / name).read_bytes()
    few = np.count_nonzero(exact.segment_alone(blob).mask) // 100
    assert few > 3
    check(folder / "1", Off(exact, blob, few), exact)  # type: ignore[arg-type]
    with pytest.raises(UnsoundError, match=f"{name}: {few + 1} of"):
        check(folder / "1", Off(exact, blob, few + 1), exact)  # type: ignore[arg-type]


def replica(uri: str, **settings: Any) -> ModelReplica:
    return ModelReplica(tracking_uri=uri, model_uri=f"models:/{NAME}@champion", engine=EXACT, poll_s=3600, **settings)


class SwappingMeanwhile:
    """A replica in which the alias moves after the first group of a series."""

    def __init__(self, uri: str) -> None:
        self.replica, self.uri, self.groups = replica(uri), uri, 0

    async def segment_stacks(self, slices: list[Slice | None], ask: Ask) -> Stacked:
        made = await self.replica.segment_stacks(slices, ask)
        self.groups += 1
        if self.groups == 1:
            point(self.uri, "2")
            self.replica._versions.poll()
        assert isinstance(made, Stacked)
        return made


def test_a_series_ends_on_the_version_that_it_began_on(uri: str, folder: Path) -> None:
    point(uri, "1")
    blobs = [slice_bytes(seed, 64) for seed in range(20)]
    found = Series(blobs, [(index, None) for index in range(20)], None, [None] * 20, {})
    model = SwappingMeanwhile(uri)
    masks = asyncio.run(series.segment(model, found, Ask(model="1"), model.replica._versions.current.info.preprocess))  # type: ignore[arg-type]
    assert model.groups == 3
    assert model.replica._versions.current.info.version == "2"
    expected = Predictor.load(folder / "1", engine=EXACT).segment(blobs)
    assert [made.mask.tobytes() for made in masks] == [one.mask.tobytes() for one in expected]


def test_a_shadow_sees_the_same_slices_and_its_agreement_is_counted(uri: str, folder: Path) -> None:
    point(uri, "1")
    point(uri, "2", "challenger")
    model = replica(uri, shadow="challenger", shadow_share=1.0)
    blobs = [slice_bytes(seed, 64) for seed in range(5)]
    answered = [asyncio.run(model.segment(blob, Ask())) for blob in blobs]
    model._workers.submit(lambda: None, "bulk", 60).result(60)  # what is of the shadow was before
    state = asyncio.run(model.state())
    one, two = (
        np.stack([made.mask for made in Predictor.load(folder / name, engine=EXACT).segment(blobs)]) for name in "12"
    )
    assert all(isinstance(made, Segmented) and made.model.version == "1" for made in answered)
    assert state.agreement is not None
    assert (state.agreement.version, state.agreement.slices) == ("2", 5)
    assert state.agreement.identical == sum(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert state.agreement.dice == pytest.approx(2 * (one & two).sum() / (one.sum() + two.sum()))
    assert [held.roles for held in state.held] == [("current",), ("shadow",)]


def test_agreement_of_several_classes_by_hand() -> None:
    counted = Shadowing()
    counted.add("7", np.array([[0, 1, 2, 2]], np.uint8), np.array([[1, 1, 2, 1]], np.uint8))
    assert (counted.both, counted.sizes, counted.identical) == (2, 7, 0)  # of 3 and 4 pixels, 2 in common
    counted.add("8", np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert (counted.slices, counted.both, counted.sizes, counted.identical) == (1, 0, 0, 1)


def break_engine(model: ModelReplica) -> None:
    """From here on each forward pass raises."""

    def fail(_: np.ndarray) -> np.ndarray:
        raise RuntimeError("the device is lost")

    predictor = model._versions.current.predictor
    predictor._compiled = tuple(dataclasses.replace(one, exact=fail, screen=None) for one in predictor._compiled)


def test_a_replica_without_work_runs_its_example_now_and_then(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point(uri, "1")
    model = replica(uri)
    first = asyncio.run(model.health())
    assert first.matches, "checked before anybody asks"
    asyncio.run(model.check_health())
    assert (asyncio.run(model.health()), model._workers.done) == (first, 0), "a moment ago"
    monkeypatch.setattr("serving.health.IDLE_S", 0.0)
    asyncio.run(model.check_health())
    assert model._workers.done == 1
    assert asyncio.run(model.health()).at > first.at
    model._versions.current.predictor.threshold = 1e-9
    with pytest.raises(RuntimeError, match="recorded mask"):
        asyncio.run(model.check_health())
    assert not asyncio.run(model.health()).matches


def test_a_replica_whose_slices_all_fail_is_unhealthy_at_the_next_look(uri: str) -> None:
    point(uri, "1")
    model = replica(uri)
    assert isinstance(asyncio.run(model.segment(slice_bytes(0, 64), Ask())), Segmented)
    break_engine(model)
    for stack in (False, True):  # a slice alone, and of a series
        slice = read_slice(slice_bytes(0, 64))
        assert isinstance(slice, Slice)
        if stack:
            answer = asyncio.run(model.segment_stacks([slice], Ask()))
            assert isinstance(answer, Stacked)
            (failed,) = answer.masks
        else:
            asyncio.run(model.check_health())  # a slice has passed since the last look
            failed = asyncio.run(model.segment(slice_bytes(0, 64), Ask()))
        assert isinstance(failed, Reject)
        assert failed.reason == Reason.INTERNAL
        with pytest.raises(RuntimeError, match="device is lost"):
            asyncio.run(model.check_health())
        assert not asyncio.run(model.health()).matches


def test_slices_that_a_client_made_to_fail_do_not_end_a_replica(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point(uri, "1")
    model = replica(uri)
    predictor, judge = model._versions.current.predictor, model._versions.current.predictor.judge_alone
    bad = slice_bytes(1, 64)

    def fail(slice: Any, threshold: float | None = None) -> Any:
        raise IndexError("a defect of ours")

    for broken in (True, False):
        monkeypatch.setattr(predictor, "judge_alone", fail if broken else judge)
        answer = asyncio.run(model.segment(bad, Ask()))
        assert isinstance(answer, Reject) == broken
        asyncio.run(model.check_health())
        assert asyncio.run(model.health()).matches


def test_too_much_to_do_is_no_illness_and_a_thread_that_hangs_is(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point(uri, "1")
    model, go, begun = replica(uri, max_queue=1), threading.Event(), threading.Event()
    monkeypatch.setattr("serving.health.IDLE_S", 0.0)
    model._workers.submit(lambda: (begun.set(), go.wait(60)), "urgent", 60)
    assert begun.wait(60)
    waits = model._workers.submit(lambda: None, "urgent", 60)  # takes the only place
    asyncio.run(model.check_health())
    assert asyncio.run(model.health()).matches
    monkeypatch.setattr("serving.health.EXAMPLE_S", 0.0)
    with pytest.raises(TimeoutError, match="no slice ends"):
        asyncio.run(model.check_health())
    go.set()
    waits.result(60)
    monkeypatch.setattr("serving.health.EXAMPLE_S", 20.0)
    asyncio.run(model.check_health())
    assert asyncio.run(model.health()).matches


def test_health_runs_nothing_and_readiness_is_another_question(uri: str) -> None:
    point(uri, "1")
    model = replica(uri)
    client = TestClient(routes.create(model, Settings(2**20)))
    answers = [client.get("/healthz") for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    assert model._workers.done == 0
    assert len({answer.json()["checked"] for answer in answers}) == 1
    assert client.get("/readyz").json() == {"status": "ready", "version": "1", "waiting": 0}
    break_engine(model)
    assert client.get("/healthz").status_code == 200, "of the last check"
    client.post("/v1/segment", content=slice_bytes(0, 64), headers={"content-type": "application/dicom"})
    with pytest.raises(RuntimeError):
        asyncio.run(model.check_health())
    assert (client.get("/healthz").status_code, client.get("/healthz").json()["reason"]) == (503, "wrong_mask")


def test_a_version_that_could_not_be_loaded_is_tried_again(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point(uri, "1")
    one, other = versions(uri), versions(uri)
    point(uri, "2")
    now, load = time.monotonic(), Predictor.load
    monkeypatch.setattr("serving.swap.time.monotonic", lambda: now)
    tries = 0

    def full(*folders: Any, **named: Any) -> Predictor:
        nonlocal tries
        tries += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Predictor, "load", full)
    for pause_s in (10.0, 20.0, 40.0):  # doubled each time
        one.poll()
        one.poll()
        assert (one.current.info.version, one.failures) == ("1", 1)
        assert one.failure is not None
        assert "OSError" in one.failure.detail
        now += pause_s - 0.1
        one.poll()
        now += 0.2
    assert tries == 3
    monkeypatch.setattr(Predictor, "load", load)
    for held in (one, other):
        held.poll()
    assert {one.current.info.version, other.current.info.version} == {"2"}, "replicas serve one version"


def test_who_goes_or_waits_too_long_or_comes_too_late_costs_nothing(uri: str) -> None:
    point(uri, "1")
    model, go, begun = replica(uri, max_queue=4), threading.Event(), threading.Event()
    model._workers.submit(lambda: (begun.set(), go.wait(60)), "urgent", 60)
    assert begun.wait(60)
    client = TestClient(routes.create(model, Settings(2**20, deadline_s=0.5)))
    body, kind = slice_bytes(0, 64), {"content-type": "application/dicom"}

    late = client.post("/v1/segment", content=body, headers=kind)
    assert (late.status_code, late.json()["reason"]) == (503, "deadline")
    assert int(late.headers["retry-after"]) > 0

    async def gone() -> None:
        asked = asyncio.create_task(model.segment(body, Ask()))
        while not model._workers.waiting:
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(gone())
    assert model._workers.waiting == 0, "neither of them holds a place"
    for _ in range(2):
        model._workers.submit(lambda: None, "bulk", 60)
    refused = client.post("/v1/segment", content=body, headers=kind, params={"priority": "bulk"})
    assert (refused.status_code, refused.json()["reason"]) == (503, "busy")
    assert int(refused.headers["retry-after"]) > 0
    go.set()
    assert client.post("/v1/segment", content=body, headers=kind).status_code == 200
    assert client.get("/v1/models").json()["dropped"] == 2
