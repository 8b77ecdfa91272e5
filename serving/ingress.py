"""What speaks HTTP: reads and limits bodies, asks the model, answers. Needs no TensorFlow, no MLflow.

`jobs.serve` runs it in its own process (`front`), `serve deploy` as a deployment behind Ray's proxies.
"""

import asyncio
import logging
import time
from typing import Any

import grpc
from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import ActorDiedError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from rayseg import build, logs
from rayseg.dicom.reading import Slice
from rayseg.records import Reject
from serving import guard, routes
from serving.guard import Protection
from serving.jobs import Jobs, JobsConfig, ServedModel
from serving.messages import Ask, Health, ModelInfo, Refusal, Segmented, Stacked, State
from serving.metrics import Metrics
from serving.refusals import RefusalError
from serving.replica import HEALTH_S, LOGGING
from serving.segment import Settings
from serving.submissions import RayJobs

logger = logging.getLogger(__name__)

# It holds the bodies of its requests in memory: the most at once, and the most that may wait before others get a 503.
REQUESTS = 64
QUEUE = 256
# A message straight to the replica, by gRPC, takes a third of the time of one through Ray's object store. It may have
# 4 MiB; what is larger, and what failed, goes through the store.
_DIRECT: dict[str, Any] = {
    "_by_reference": False,
    "request_serialization": "pickle",
    "response_serialization": "pickle",
}
_DIRECT_BYTES = 3 * 2**20
_HEALTH_KEPT_S = 1.0
_MOST_DEATHS = 2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class IngressReplica:
    """The routes, with a handle to the model deployment as their segmenter."""

    def __init__(
        self,
        *,
        model: DeploymentHandle,
        settings: Settings,
        protection: Protection,
        jobs: JobsConfig | None,
        served: ServedModel,
        pacs: str | None,
        code: str | None = None,
    ) -> None:
        if code:
            build.require(code, "serving")
        logs.adopt({"stage": "serve"})
        self._model, self._settings, self._protection = model, settings, protection
        self._metrics = Metrics()
        self._health: Health | None = None
        self._asked, self._asking = 0.0, asyncio.Lock()
        self._jobs = Jobs(jobs, served, RayJobs(), pacs) if jobs else None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = routes.create(self, self._settings)
        return guard.around(app, self._protection, self._metrics, self._jobs, self.state)

    async def segment(self, body: bytes, ask: Ask) -> Segmented | Reject | Refusal:
        """One object's bytes to its mask or the reason there is none."""
        return await self._ask(ask.until, "segment", body, ask, direct=len(body) <= _DIRECT_BYTES)

    async def segment_stacks(self, slices: list[Slice | None], ask: Ask) -> Stacked | Refusal:
        """The masks of all slices but the first and last few, which are only there as the others' neighbours."""
        return await self._ask(ask.until, "segment_stacks", slices, ask, direct=False)

    async def segment_series(self, slices: list[Slice | Reject], ask: Ask) -> Stacked | Refusal:
        """The masks of a whole series by a model of volumes, in the order of the slices."""
        return await self._ask(ask.until, "segment_series", slices, ask, direct=False)

    async def describe(self, model: str | None = None) -> ModelInfo | Refusal:
        """The version in use, or the one that a version number or alias names."""
        return await self._ask(time.monotonic() + HEALTH_S, "describe", model)

    async def state(self) -> State:
        """What one of the replicas holds."""
        return await self._ask(time.monotonic() + HEALTH_S, "state")

    async def health(self) -> Health:
        """Outcome of the last check of a replica, as of a second ago: anybody may ask, however often."""
        async with self._asking:
            if self._health is None or time.monotonic() - self._asked > _HEALTH_KEPT_S:
                self._health = await self._ask(time.monotonic() + HEALTH_S, "health")
                self._asked = time.monotonic()
            return self._health

    async def _ask(self, until: float, method: str, *arguments: Any, direct: bool = True) -> Any:
        """A model replica's answer; another one's, until there is no time left, where the first one dies over it.

        Of who sees two die nobody else is asked: it may be what they die of.
        """
        pause_s = _FIRST_PAUSE_S
        way = _DIRECT if direct else {}
        died: set[str] = set()
        while True:
            response = self._model.options(method_name=method, **way).remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:  # the client is gone, or its time over
                response.cancel()
                raise
            except BackPressureError:
                raise RefusalError(503, "busy", "too many requests wait") from None
            except (RayActorError, DeploymentUnavailableError, AioRpcError) as error:
                way = {}
                died |= _died(response, error)
                if len(died) == _MOST_DEATHS:
                    logger.error("%s: %d replicas died over one request", method, len(died))
                    raise RefusalError(500, "internal", "replicas of the model ended over this request") from None
                if time.monotonic() + pause_s > until:
                    detail = f"no model replica can answer ({type(error).__name__})"
                    raise RefusalError(503, "unavailable", detail) from None
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _died(response: Any, error: Exception) -> set[str]:
    """The id of the replica that has died with the request: asked again, it is no other one."""
    if isinstance(error, ActorDiedError):
        return {error.actor_id} if error.actor_id else set()
    if isinstance(error, AioRpcError) and error.code() == grpc.StatusCode.UNAVAILABLE:
        # Ray 2.60 does not tell in public whom it has asked.
        actor = getattr(getattr(response, "_replica_result", None), "_actor_id", None)
        return {actor.hex()} if actor else set()
    return set()


Ingress = serve.deployment(
    name="ingress",
    ray_actor_options={"num_cpus": 0},  # it waits for bytes and for the model
    max_ongoing_requests=REQUESTS,
    max_queued_requests=QUEUE,
    logging_config=LOGGING,
)(serve.ingress()(IngressReplica))
