"""The model deployment with what speaks HTTP in front of it, and the job that runs both."""

import dataclasses
import json
import logging
import math
import os
import signal
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import ray
from ray import serve

from rayseg import build, cluster, config
from rayseg.models.engine import Engine
from rayseg.tracking import registry
from serving import auth, front
from serving.guard import Protection
from serving.ingress import Ingress, IngressReplica
from serving.jobs import JobsConfig, ServedModel
from serving.limits import Limits
from serving.replica import LOGGING, Model
from serving.segment import Settings

logger = logging.getLogger(__name__)

APP_NAME = "rayseg"
_KEYS = {"CPU": "cpus_per_replica", "GPU": "gpus_per_replica", "count": "num_replicas"}


@dataclass(frozen=True, kw_only=True)
class Autoscaling:
    """The section `serve.autoscaling` of a recipe, in Ray Serve's words: replicas come and go with what is asked."""

    min_replicas: int = 1  # replicas at least
    max_replicas: int = 2  # replicas at most
    # Slices, or groups of a series' slices, at work or waiting in a replica on average: above it others are started.
    target_ongoing_requests: float = 8.0
    upscale_delay_s: float = 30.0  # seconds of high load before a replica is started
    downscale_delay_s: float = 600.0  # seconds of low load before a replica is ended

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ValueError(f"autoscaling.min_replicas: 1 or more expected, got {self.min_replicas}")
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"autoscaling.max_replicas: at least min_replicas ({self.min_replicas}) expected, "
                f"got {self.max_replicas}"
            )
        if not self.target_ongoing_requests > 0:
            raise ValueError(
                f"autoscaling.target_ongoing_requests: more than 0 expected, got {self.target_ongoing_requests}"
            )
        for key in ("upscale_delay_s", "downscale_delay_s"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"autoscaling.{key}: 0 or more expected, got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The `serve` section of a recipe."""

    tracking_uri: str  # URI of the MLflow server or database, such as sqlite:///work/mlflow.db
    model_uri: str = "models:/rayseg@champion"  # models:/NAME@ALIAS follows the alias; models:/NAME/VERSION stays
    host: str = "127.0.0.1"  # address to listen at; others than loopback need tokens and TLS
    port: int = 8000  # port to listen at; 0 takes any free one
    engine: Engine = field(default_factory=Engine)
    max_body_mb: float = 256.0  # greatest body of a request
    max_queue: int = 256  # slices that may wait in a replica; more get a 503
    deadline_s: float = 60.0  # seconds for a slice
    series_deadline_s: float = 600.0  # seconds for a series
    poll_s: float = 10.0  # seconds between two looks where the alias is
    shadow: str | None = None  # alias of a challenger that also segments a share of the single slices
    shadow_share: float = 0.1  # that share
    num_replicas: int = 1  # replicas of the model
    autoscaling: Autoscaling | None = None  # in place of num_replicas
    cpus_per_replica: float = 1.0  # CPUs of a replica: as many slices at a time
    gpus_per_replica: float = 0.0  # GPUs of a replica; fractions share one
    limits: Limits = field(default_factory=Limits)
    ssl_keyfile: str | None = None  # PEM file of the key, for TLS
    ssl_certfile: str | None = None  # PEM file of the certificate
    behind_proxy: bool = False  # a proxy in front speaks TLS and asks for credentials
    audit: str | None = None  # file for a JSON line of each request, on each node with an ingress
    pacs: str | None = None  # URL of a DICOMweb service, for jobs and single series
    jobs: JobsConfig | None = None  # places that jobs may read and write; null for no jobs

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: 0 to 65535 expected, got {self.port}")
        if not 0 <= self.shadow_share <= 1:
            raise ValueError(f"shadow_share: 0 to 1 expected, got {self.shadow_share}")
        for key in (
            *("max_body_mb", "max_queue", "deadline_s", "series_deadline_s", "poll_s"),
            *("num_replicas", "cpus_per_replica"),
        ):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: more than 0 expected, got {getattr(self, key)}")
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError("num_replicas, autoscaling: give one of them")
        if self.gpus_per_replica < 0:
            raise ValueError(f"gpus_per_replica: 0 or more expected, got {self.gpus_per_replica}")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile, ssl_certfile: give both or none")


@dataclass(frozen=True)
class ServeResult:
    """What was served, once it has ended."""

    url: str
    model_uri: str  # the version that was served first
    seconds: float


def _model(config: ServeConfig, version: registry.ModelVersion) -> serve.Application:
    follows = "@" in config.model_uri
    scale: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.autoscaling is not None:
        scale = {"autoscaling_config": dataclasses.asdict(config.autoscaling)}
    resources = {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica}
    return Model.options(ray_actor_options=resources, **scale).bind(
        tracking_uri=config.tracking_uri,
        model_uri=config.model_uri if follows else version.uri,
        fallback=version.version if follows else None,
        engine=config.engine,
        max_queue=config.max_queue,
        poll_s=config.poll_s,
        shadow=config.shadow,
        shadow_share=config.shadow_share,
        code=build.current("serving").told(),
    )


def _ingress(config: ServeConfig, version: registry.ModelVersion, tokens: tuple[auth.Token, ...]) -> dict[str, Any]:
    """What the ingress is made of, but for its model."""
    settings = Settings(
        max_body_bytes=math.floor(config.max_body_mb * 1024 * 1024),
        deadline_s=config.deadline_s,
        series_deadline_s=config.series_deadline_s,
        pacs=config.pacs,
    )
    protection = Protection(
        tokens=tokens,
        limits=config.limits,
        max_body_bytes=settings.max_body_bytes,
        audit=config.audit,
        local=not config.behind_proxy,
        tls=config.ssl_keyfile is not None,
    )
    served = ServedModel(name=version.name, uri=config.model_uri, tracking_uri=config.tracking_uri)
    return {
        "settings": settings,
        "protection": protection,
        "jobs": config.jobs,
        "served": served,
        "pacs": config.pacs,
    }


def application(args: dict[str, Any]) -> serve.Application:
    """What `serve deploy` of `serving/config.yaml` builds; `args` are `ServeConfig`'s keys.

    Raises:
        ValueError: the registry has no such model, version or alias, the tokens are wrong, the cluster could never hold
            the replicas, or nobody asks who is there. The host is Serve's own setting, so it cannot be known to be
            loopback.
    """
    built = config.build(ServeConfig, args)
    tokens = auth.from_environment()
    if not (built.behind_proxy or tokens):
        raise ValueError(f"behind_proxy: set {auth.FILE}, or true where a proxy asks who is there")
    version = registry.resolve(built.tracking_uri, built.model_uri)
    _require(built)
    return Ingress.bind(
        model=_model(built, version), code=build.current("serving").told(), **_ingress(built, version, tokens)
    )


def run(config: ServeConfig) -> ServeResult:
    """Serves the model over HTTP until SIGTERM or SIGINT; a line {"url": ...} says when it is ready.

    Joins the Ray cluster of RAY_ADDRESS, where it ends only its own application, or starts a private one. HTTP is
    spoken in this process, whatever Serve's proxies do on that cluster.
    """
    started = time.perf_counter()
    private = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    tokens = auth.from_environment()
    _check_exposure(config, tokens)
    if config.ssl_keyfile and config.ssl_certfile:
        front.check_certificate(config.ssl_keyfile, config.ssl_certfile)
    version = registry.resolve(config.tracking_uri, config.model_uri)
    listener = front.bound(config.host, config.port)
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"{'https' if config.ssl_certfile else 'http'}://{host}:{listener.getsockname()[1]}"
    cluster.connect(dashboard=config.jobs is not None)
    _require(config)
    serve.start(proxy_location="Disabled", logging_config=LOGGING)
    first = version.version

    def ready(number: str) -> None:
        nonlocal first
        first = number
        print(json.dumps({"url": url}), flush=True)

    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        handle = serve.run(_model(config, version), name=APP_NAME, route_prefix=None)
        ingress = IngressReplica(model=handle, **_ingress(config, version, tokens))
        front.run(ingress, listener, config.ssl_keyfile, config.ssl_certfile, ready)
    except KeyboardInterrupt:
        pass
    finally:
        logger.info("stopping")
        for number in previous:  # a second signal must not cut the clean end short
            signal.signal(number, signal.SIG_IGN)
        listener.close()
        serve.delete(APP_NAME)
        if private:
            ray.shutdown()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return ServeResult(
        url=url, model_uri=f"models:/{version.name}/{first}", seconds=round(time.perf_counter() - started, 1)
    )


def _require(config: ServeConfig) -> None:
    bundle = {"CPU": config.cpus_per_replica, "GPU": config.gpus_per_replica}
    least = config.autoscaling.min_replicas if config.autoscaling else config.num_replicas
    cluster.require("serve", bundle, least, _KEYS)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_exposure(config: ServeConfig, tokens: tuple[auth.Token, ...]) -> None:
    """Raises ValueError where other machines would get to a service that asks nobody, or speaks in the clear."""
    if auth.is_loopback(config.host) or config.behind_proxy:
        return
    if not tokens:
        raise ValueError(
            f"host: {config.host} is reached from other machines, and nobody is asked who is there: set {auth.FILE} or "
            f"{auth.VALUE}, or behind_proxy=true where a proxy asks"
        )
    if not config.ssl_certfile:
        raise ValueError(
            f"host: at {config.host} tokens and images would cross the network in the clear: set ssl_keyfile and "
            "ssl_certfile, or behind_proxy=true where a proxy speaks TLS"
        )
