"""Figures for Prometheus: of requests, as the guard sees them, and of the model behind."""

import re

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.messages import State

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One ingress replica's figures; label values are the service's own words, never a client's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "rayseg_http_requests", "Requests", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "rayseg_http_seconds", "From head to answered", ("route",), buckets=_SECONDS, registry=self._registry
        )
        self._received = Counter("rayseg_http_received_bytes", "Bytes of bodies", ("route",), registry=self._registry)
        self._sent = Counter("rayseg_http_sent_bytes", "Bytes of answers", ("route",), registry=self._registry)
        self._rejects = Counter(
            "rayseg_http_rejects", "Answers that are no success", ("reason",), registry=self._registry
        )
        self._model = Gauge(
            "rayseg_model_info", "1 for the model that answers", ("name", "version", "digest"), registry=self._registry
        )
        self.in_flight = Gauge("rayseg_http_in_flight", "Requests at work", registry=self._registry)
        self._state = {
            key: Gauge(f"rayseg_replica_{key}", told, registry=self._registry)
            for key, told in (
                ("waiting", "Slices that wait for the model"),
                ("running", "Slices in the model"),
                ("dropped", "Slices that nobody waited for any more, since the start"),
                ("swaps", "Versions taken since the start"),
                ("failures", "Versions refused since the start"),
            )
        }
        self._current: tuple[str, str, str] | None = None

    def answered(self, method: str, route: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Counts one request that has ended; `route` is the template."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        self._received.labels(route).inc(received)
        self._sent.labels(route).inc(sent)

    def rejected(self, reason: str) -> None:
        """Counts one Problem."""
        self._rejects.labels(reason if re.fullmatch("[a-z][a-z0-9_]{0,39}", reason) else "other").inc()

    def model(self, name: str, version: str, digest: str) -> None:
        """Notes the model that has answered."""
        labels = (name, version, digest)
        if labels == self._current:
            return
        if self._current:
            self._model.remove(*self._current)
        self._model.labels(*labels).set(1)
        self._current = labels

    def replica(self, state: State) -> None:
        """Notes what the model replica that was asked last holds and does."""
        for key, gauge in self._state.items():
            gauge.set(getattr(state, key))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
