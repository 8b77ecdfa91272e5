"""The Serve application, a light ingress in front of the model deployment, and the job that runs it."""

import dataclasses
import json
import logging
import math
import os
import signal
import socket
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import HTTPOptions

from rayseg import cluster, config
from rayseg.tracking import registry
from serving.ingress import Ingress
from serving.replica import LOGGING, Model

logger = logging.getLogger(__name__)

APP_NAME = "rayseg"
READY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The `serve` section of a recipe."""

    tracking_uri: str
    model_uri: str = "models:/rayseg@champion"
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    max_batch_size: int = 8
    batch_wait_ms: float = 5.0  # how long a batch waits for more slices
    max_body_mb: float = 64.0
    num_replicas: int = 1
    cpus_per_replica: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: 0 to 65535 expected, got {self.port}")
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


def build(config: ServeConfig) -> serve.Application:
    """The application of one registered version: an alias is resolved here, once, so that all replicas agree.

    Raises:
        ValueError: the registry has no such model, version or alias.
    """
    return _bind(config, registry.resolve(config.tracking_uri, config.model_uri))


def _bind(config: ServeConfig, version: registry.ModelVersion) -> serve.Application:
    _, _, alias = config.model_uri.partition("@")
    model = Model.options(
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica},
        # One batch at work, the next ones gathering.
        max_ongoing_requests=4 * config.max_batch_size,
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
    version = registry.resolve(config.tracking_uri, config.model_uri)
    if private:
        config = dataclasses.replace(config, port=_free_port(config))
    cluster.connect()
    if not private and not serve.status().proxies:
        config = dataclasses.replace(config, port=_free_port(config))
    url = f"http://{config.host}:{config.port}"
    serve.start(http_options=HTTPOptions(host=config.host, port=config.port), logging_config=LOGGING)
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        serve.run(_bind(config, version), name=APP_NAME, route_prefix="/")
        _await_ready(url, version)
        print(json.dumps({"url": url}), flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        logger.info("stopping")
    finally:
        for number in previous:  # a second signal must not cut the clean end short
            signal.signal(number, signal.SIG_IGN)
        serve.delete(APP_NAME)  # lets requests at work end
        if private:
            ray.shutdown()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return ServeResult(url=url, model_uri=version.uri, seconds=round(time.perf_counter() - started, 1))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _free_port(config: ServeConfig) -> int:
    """The configured port, or any where that is 0.

    Raises:
        ValueError: it is taken. Serve would not notice: its listeners share a port, and each gets some of the requests.
    """
    with socket.socket() as probe:
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ValueError(f"port: {config.host}:{config.port} cannot be used ({error.strerror})") from None
        return int(probe.getsockname()[1])


def _await_ready(url: str, version: registry.ModelVersion) -> None:
    """Waits until the proxy routes to the application, and the model that answers there is ours and healthy."""
    deadline = time.monotonic() + READY_S
    problem = "no answer"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/healthz", timeout=READY_S)
            if answer.status_code == 200 and answer.headers.get("X-Model-Digest") == version.digest:
                return
            problem = f"status {answer.status_code}, model {answer.headers.get('X-Model-Version', 'unknown')}"
        except httpx.TransportError as error:
            problem = type(error).__name__
        time.sleep(0.1)
    raise RuntimeError(f"{url}/healthz: {version.uri} is not ready there after {READY_S:.0f} s ({problem})")
