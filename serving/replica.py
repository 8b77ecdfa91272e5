"""The deployment that holds the model: slices of all requests go through its threads, the urgent ones first."""

import asyncio
import dataclasses
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from rayseg import build, logs
from rayseg.dicom.reading import Slice, read_slice
from rayseg.grant import keep_to_grant
from rayseg.inference.judgement import Judgement
from rayseg.inference.predictor import Predictor
from rayseg.inference.quality import look
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.models.engine import Engine, require_gpu
from rayseg.records import Reason, Reject
from serving.health import EXAMPLE_S, Checks
from serving.messages import (
    Agreement,
    Ask,
    Health,
    Masked,
    ModelInfo,
    Priority,
    Refusal,
    Segmented,
    Stacked,
    State,
)
from serving.workers import BusyError, Workers

# The ingress imports this module too, and needs no MLflow.
if TYPE_CHECKING:
    from serving.swap import Loaded

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Ray's access log writes the request id, which a client may choose: it could be a name.
LOGGING = LoggingConfig(encoding=os.environ.get(logs.ENCODING, "TEXT"), enable_access_log=False)
HEALTH_S = 20.0  # for a replica to say how it is
SHADOW_S = 30.0  # a challenger's slice that has not begun by then is left out
WINDOW_S = 120.0  # a window of a volume, with its mirror images, on one core
SERIES_AT_ONCE = 2  # by models of volumes: each holds its slices, and the sums of its windows
_SHADOWS_PER_LINE = 100  # of the log


class ModelReplica:
    """Holds the version in use, and segments slices and stacks of slices in as many threads as it has CPUs."""

    def __init__(
        self,
        *,
        tracking_uri: str,
        model_uri: str,
        fallback: str | None = None,
        engine: Engine = Engine(),  # noqa: B008, it is frozen
        max_queue: int = 256,
        poll_s: float = 10.0,
        shadow: str | None = None,
        shadow_share: float = 0.0,
        code: str | None = None,
    ) -> None:
        if code:
            build.require(code, "serving")
        from serving.swap import Shadowing, Versions

        logs.adopt({"stage": "serve"})
        if ray.is_initialized() and keep_to_grant():
            require_gpu(engine, "serve.gpus_per_replica")
        self._replica, threads = _place()
        self._versions = Versions(
            tracking_uri=tracking_uri,
            model_uri=model_uri,
            engine=engine,
            threads=threads,
            shadow=shadow,
            fallback=fallback,
        )
        self._workers = Workers(threads, max_queue)
        self._series = asyncio.Semaphore(SERIES_AT_ONCE)  # of models of volumes
        self._at_work, self._windows, self._went_on = 0, 0, time.monotonic()  # of such series
        self._shadowing, self._shadow_share = Shadowing(), shadow_share
        self._counting = threading.Lock()
        self._checks = Checks(lambda: self._versions.current, self._workers)
        self._stop_watching = self._versions.watch(poll_s)

    async def segment(self, body: bytes, ask: Ask) -> Segmented | Reject | Refusal:
        """One object's bytes to its mask or the reason there is none."""
        loaded = await self._version(ask)
        if isinstance(loaded, Refusal):
            return loaded

        def work() -> Segmented | Reject:
            return self._slice(loaded, body, ask.threshold)

        return await self._work(work, ask.priority, ask.seconds)

    async def segment_stacks(self, slices: list[Slice | None], ask: Ask) -> Stacked | Refusal:
        """The masks of all slices but the first and last few, which are only there as the others' neighbours.

        As many on each side as the model looks at; None where the series ends, or a slice cannot be used.
        """
        loaded = await self._version(ask)
        if isinstance(loaded, Refusal):
            return loaded
        assert isinstance(loaded.predictor, Predictor), "a model of volumes gets a whole series"
        size = 2 * loaded.predictor.neighbours + 1
        started = time.perf_counter()
        stacks = [slices[first : first + size] for first in range(len(slices) - size + 1)]
        works = [
            self._work(partial(_mask, loaded, stack, ask.threshold), ask.priority, ask.seconds) for stack in stacks
        ]
        masks = []
        for answer in await asyncio.gather(*works):
            if isinstance(answer, Refusal):
                return answer
            masks.append(answer)
        return Stacked(masks, loaded.info, 1000 * (time.perf_counter() - started))

    async def segment_series(self, slices: list[Slice | Reject], ask: Ask) -> Stacked | Refusal:
        """The masks of a whole series by a model of volumes, in the order of the slices.

        Its windows take turns with those of other series; a few series are at work at once, others wait.
        """
        loaded = await self._version(ask)
        if isinstance(loaded, Refusal):
            return loaded
        assert isinstance(loaded.predictor, VolumePredictor), "a model of slices gets them in stacks"
        started = time.perf_counter()
        try:
            async with asyncio.timeout(ask.seconds):
                await self._series.acquire()
        except TimeoutError:
            return Refusal("deadline", "the series' turn did not come in time")
        gone = threading.Event()
        self._at_work += 1
        try:
            masks = await asyncio.to_thread(_masks, loaded, slices, ask, gone)
        except TimeoutError:
            return Refusal("deadline", "the series was not finished in time")
        finally:
            gone.set()  # the caller may have been cancelled
            self._at_work -= 1
            self._series.release()
        for answer in masks:
            self._checks.count(answer)
        return Stacked(masks, loaded.info, 1000 * (time.perf_counter() - started))

    async def describe(self, model: str | None = None) -> ModelInfo | Refusal:
        """The version in use, or the one that a version number or alias names."""
        loaded = await self._version(Ask(model))
        if isinstance(loaded, Refusal):
            return loaded
        alias = self._versions.alias if model is None else None if model.isdigit() else model
        return dataclasses.replace(loaded.info, alias=alias)

    async def state(self) -> State:
        """What this replica holds."""
        versions, workers, shadowing = self._versions, self._workers, self._shadowing
        agreement = None
        if shadowing.slices:
            dice = 2 * shadowing.both / shadowing.sizes if shadowing.sizes else None
            agreement = Agreement(shadowing.version, shadowing.slices, shadowing.identical, dice)
        return State(
            replica=self._replica,
            held=versions.held(),
            failure=versions.failure,
            swaps=versions.swaps,
            failures=versions.failures,
            waiting=workers.waiting,
            running=workers.running,
            dropped=workers.dropped,
            agreement=agreement,
        )

    async def health(self) -> Health:
        """The last check; nothing is run for it."""
        return self._checks.last

    async def check_health(self) -> None:
        """What Serve asks every few seconds; a replica that raises is replaced.

        Raises:
            RuntimeError: the model does not give the example's mask.
            Exception: what it raises in place of a mask.
        """
        if self._walks():
            return
        if not (await self._checks.look()).matches:
            raise RuntimeError("the bundle's example does not give the recorded mask")

    def _walks(self) -> bool:
        """Whether a series is at work and its windows go on: the example's own would wait behind them."""
        predictor, now = self._versions.current.predictor, time.monotonic()
        windows = predictor.windows if isinstance(predictor, VolumePredictor) else 0
        if windows != self._windows:
            self._windows, self._went_on = windows, now
        return self._at_work > 0 and now - self._went_on < WINDOW_S

    async def _version(self, ask: Ask) -> "Loaded | Refusal":
        loaded = self._versions.get(ask.model, load=False)
        if loaded is None:
            try:
                loaded = await asyncio.to_thread(self._versions.get, ask.model)
            except Exception as error:  # MLflow raises many types
                return Refusal("unavailable", f"the registry does not answer ({type(error).__name__})")
        if loaded is None:
            return Refusal("unknown_model", "no such version or alias, or it does not pass its checks")
        if ask.threshold is not None and len(loaded.info.labels) > 1:
            return Refusal("invalid_parameter", "threshold: only for models of one class")
        return loaded

    async def _work(self, work: Callable[[], T], priority: Priority, seconds: float) -> T | Refusal:
        """The work's outcome; it is dropped from the queue where the caller is cancelled."""
        try:
            answer = await asyncio.wrap_future(self._workers.submit(work, priority, seconds))
            self._checks.count(answer)
            return answer
        except BusyError:
            return Refusal("busy", "too many slices wait")
        except TimeoutError:
            return Refusal("deadline", "the slice's turn did not come in time")

    def _slice(self, loaded: "Loaded", body: bytes, threshold: float | None) -> Segmented | Reject:
        started = time.perf_counter()
        at_work = self._workers.running
        judged = _alone(loaded, body, threshold)
        if isinstance(judged, Reject):
            return judged
        slice = judged.slice
        if threshold is None:
            self._shadow(loaded, body, judged.mask)
        return Segmented(
            mask=judged.mask,
            look=look(loaded.info.preprocess, judged),
            geometry=slice.header.geometry if slice.header else slice.geometry,
            model=loaded.info,
            batch_size=at_work,
            forward_ms=1000 * (time.perf_counter() - started),
            series=(slice.header.series_instance_uid,) if slice.header else (),
        )

    def _shadow(self, loaded: "Loaded", body: bytes, mask: np.ndarray) -> None:
        """Lets the challenger segment a share of the slices, when nothing else waits; nobody waits for that."""
        shadow = self._versions.shadow
        if shadow is None or shadow is loaded or loaded is not self._versions.current:
            return
        if random.random() >= self._shadow_share:  # noqa: S311, a sample and no secret
            return

        def work() -> None:
            shadowed = _alone(shadow, body, None)
            with self._counting:
                self._shadowing.add(
                    shadow.info.version, mask, shadowed if isinstance(shadowed, Reject) else shadowed.mask
                )
                tally = dataclasses.replace(self._shadowing)
            if tally.slices % _SHADOWS_PER_LINE == 0:
                logger.info("shadow version %s: %d of %d masks identical", tally.version, tally.identical, tally.slices)

        try:
            self._workers.submit(work, "bulk", SHADOW_S)
        except BusyError:
            return


def _place() -> tuple[str, int]:
    """The name of this replica and its CPUs; outside of a cluster it has one."""
    if not ray.is_initialized():
        return "", 1
    context = ray.get_runtime_context()
    return context.get_actor_id() or "", max(1, int(context.get_assigned_resources().get("CPU", 1.0)))


def _alone(loaded: "Loaded", body: bytes, threshold: float | None) -> Judgement | Reject:
    """A slice that is no part of a series, with its mask."""
    try:
        slice = read_slice(body, color=loaded.predictor.color)
        return loaded.predictor.judge_alone(slice, threshold)
    except Exception as error:  # a defect of ours must cost this slice only
        return Reject(Reason.INTERNAL, type(error).__name__)


def _mask(loaded: "Loaded", stack: list[Slice | None], threshold: float | None) -> Masked | Reject:
    if stack[len(stack) // 2] is None:
        return Reject(Reason.INTERNAL, "no slice")  # who asked knows why
    try:
        assert isinstance(loaded.predictor, Predictor), "a model of volumes gets no stacks"
        judged = loaded.predictor.judge_stack(stack, threshold)
        return judged if isinstance(judged, Reject) else Masked(judged.mask, look(loaded.info.preprocess, judged))
    except Exception as error:
        return Reject(Reason.INTERNAL, type(error).__name__)


def _masks(
    loaded: "Loaded", slices: Sequence[Slice | Reject], ask: Ask, gone: threading.Event
) -> list[Masked | Reject]:
    """Of a whole series; raises TimeoutError after the deadline, or where nobody waits any more."""
    assert isinstance(loaded.predictor, VolumePredictor)
    masks: dict[int, Masked | Reject] = {}
    for number, judged in loaded.predictor.judge_series(slices, ask.threshold):
        if gone.is_set() or ask.seconds < 0:
            raise TimeoutError
        if isinstance(judged, Reject):
            masks[number] = judged
        else:
            masks[number] = Masked(judged.mask, look(loaded.info.preprocess, judged))
    return [masks[number] for number in range(len(slices))]


Model = serve.deployment(
    name="model",
    logging_config=LOGGING,
    # The queue with priorities is the replica's own: what waits before it would wait in the order of arrival.
    max_ongoing_requests=1024,
    max_queued_requests=1024,
    health_check_period_s=2,
    health_check_timeout_s=EXAMPLE_S + 10,
)(ModelReplica)
