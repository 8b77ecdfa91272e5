"""The Serve application: a light ingress in front of the model deployment, and the job that runs it."""

import json
import logging
import math
import os
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from rayseg import cluster, config
from rayseg.records import Reject
from serving import routes
from serving.replica import Health, Model, ModelInfo, Segmented

if TYPE_CHECKING:
    from rayseg.tracking.registry import ModelVersion

logger = logging.getLogger(__name__)

APP_NAME = "rayseg"
READY_S = 60.0
# An ingress holds a request's body in memory: the most at once, and the most that may wait before others get a 503.
INGRESS_REQUESTS = 64
INGRESS_QUEUE = 256
# Ray's access log writes the request id, which a client may choose: it could be a name.
LOGGING = LoggingConfig(enable_access_log=False)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The `serve` section of a recipe."""

    tracking_uri: str
    model_uri: str = "models:/rayseg@champion"
    host: str = "127.0.0.1"
    port: int = 8000
    max_batch_size: int = 8
    batch_wait_ms: float = 5.0  # how long a batch waits for more slices
    max_body_mb: float = 64.0
    num_replicas: int = 1
    cpus_per_replica: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"port: 1 to 65535 expected, got {self.port}")
        if self.batch_wait_ms < 0:
            raise ValueError(f"batch_wait_ms: not negative expected, got {self.batch_wait_ms}")
        for key in ("max_batch_size", "max_body_mb", "num_replicas", "cpus_per_replica"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: more than 0 expected, got {getattr(self, key)}")


@dataclass(frozen=True)
class ServeResult:
    """What was served, once it has ended."""

    url: str
    model_uri: str  # the version that was served
    seconds: float


@serve.deployment(
    name="ingress",
    ray_actor_options={"num_cpus": 0},  # it waits for bytes and for the model
    max_ongoing_requests=INGRESS_REQUESTS,
    max_queued_requests=INGRESS_QUEUE,
    logging_config=LOGGING,
)
@serve.ingress()
class Ingress:
    """Reads and answers HTTP; imports neither TensorFlow nor MLflow."""

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
            raise routes.Refusal(503, "unavailable", f"no model replica can answer ({type(error).__name__})") from None


def build(config: ServeConfig) -> serve.Application:
    """The application of one registered version: an alias is resolved here, once, so that all replicas agree.

    Raises:
        ValueError: the registry has no such model, version or alias.
    """
    return _bind(config, _resolve(config))


def _resolve(config: ServeConfig) -> "ModelVersion":
    # Here and not above: the ingress imports this module and needs no MLflow.
    from rayseg.tracking import registry

    return registry.resolve(config.tracking_uri, config.model_uri)


def _bind(config: ServeConfig, version: "ModelVersion") -> serve.Application:
    _, _, alias = config.model_uri.partition("@")
    model = Model.options(
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica},
        # One batch at work, the next ones gathering.
        max_ongoing_requests=4 * config.max_batch_size,
        logging_config=LOGGING,
    ).bind(
        tracking_uri=config.tracking_uri,
        model_uri=version.uri,
        alias=alias or None,
        max_batch_size=config.max_batch_size,
        batch_wait_ms=config.batch_wait_ms,
    )
    return Ingress.bind(model=model, max_body_bytes=math.floor(config.max_body_mb * 1024 * 1024))


def application(args: dict[str, Any]) -> serve.Application:
    """What `serve deploy serving/config.yaml` builds; `args` are `ServeConfig`'s keys."""
    return build(config.build(ServeConfig, args))


def run(config: ServeConfig) -> ServeResult:
    """Serves the model over HTTP until SIGTERM or SIGINT; a line {"url": ...} says when it is ready.

    Joins the Ray cluster of RAY_ADDRESS, where it ends only its own application, or starts a private one.
    """
    started = time.perf_counter()
    private = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    version = _resolve(config)
    cluster.connect()
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    url = f"http://{config.host}:{config.port}"
    try:
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port), logging_config=LOGGING)
        serve.run(_bind(config, version), name=APP_NAME, route_prefix="/")
        _await_ready(url)
        print(json.dumps({"url": url}), flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        logger.info("stopping")
    finally:
        for number in previous:  # a second signal must not cut the clean end short
            signal.signal(number, signal.SIG_IGN)
        if private:
            serve.shutdown()
            ray.shutdown()
        else:
            serve.delete(APP_NAME)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return ServeResult(url=url, model_uri=version.uri, seconds=round(time.perf_counter() - started, 1))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _await_ready(url: str) -> None:
    """Waits until the proxy routes to the application and the model gives its example's mask."""
    deadline = time.monotonic() + READY_S
    problem = "no answer"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/healthz", timeout=READY_S)
            if answer.status_code == 200:
                return
            problem = f"status {answer.status_code}: {answer.text[:200]}"
        except httpx.TransportError as error:
            problem = type(error).__name__
        time.sleep(0.1)
    raise RuntimeError(f"{url}/healthz: not ready after {READY_S:.0f} s ({problem})")
