"""The deployment that speaks HTTP: reads and limits bodies, asks the model, answers. Needs no TensorFlow, no MLflow."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from rayseg.records import Reject
from serving import routes
from serving.replica import LOGGING, Health, ModelInfo, Segmented

# It holds the bodies of its requests in memory: the most at once, and the most that may wait before others get a 503.
REQUESTS = 64
QUEUE = 256


class IngressReplica:
    """The routes, with a handle to the model deployment as their segmenter."""

    def __init__(self, *, model: DeploymentHandle, max_body_bytes: int) -> None:
        self._model = model
        self._max_body_bytes = max_body_bytes

    def __serve_build_asgi_app__(self) -> FastAPI:
        return routes.create(self, self._max_body_bytes)

    async def segment(self, body: bytes) -> Segmented | Reject:
        """One object's bytes to its mask or the reason there is none."""
        return await self._ask("segment", body)

    async def describe(self) -> ModelInfo:
        """The model in use."""
        return await self._ask("describe")

    async def check(self) -> Health:
        """Outcome of the bundle's example."""
        return await self._ask("check")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._model, method).remote(*arguments)
        except (RayActorError, BackPressureError, DeploymentUnavailableError) as error:
            detail = f"no model replica can answer ({type(error).__name__})"
            raise routes.RefusalError(503, "unavailable", detail) from None


Ingress = serve.deployment(
    name="ingress",
    ray_actor_options={"num_cpus": 0},  # it waits for bytes and for the model
    max_ongoing_requests=REQUESTS,
    max_queued_requests=QUEUE,
    logging_config=LOGGING,
)(serve.ingress()(IngressReplica))
