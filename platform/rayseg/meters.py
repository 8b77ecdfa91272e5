"""Figures of all stages for Prometheus, through Ray: each node's agent exports them, with `ray_` before the name.

A counter of a process that has ended keeps its value there; a gauge goes with it. The service has figures of requests
and of its model beside these, at its own `/metrics`: see `serving.metrics`.
"""

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal


@dataclass(frozen=True)
class Meter:
    """A figure."""

    kind: Literal["Counter", "Gauge"]
    told: str
    tags: tuple[str, ...]


METERS = {
    "rayseg_slices_total": Meter("Counter", "Slices that a stage is done with", ("stage", "verdict")),
    "rayseg_rejects_total": Meter("Counter", "Slices that a stage has rejected", ("stage", "reason")),
    "rayseg_series_total": Meter("Counter", "Series that an archive run is done with", ("verdict",)),
    "rayseg_seconds_total": Meter("Counter", "Where the time of a stage goes", ("stage", "step")),
    "rayseg_epochs_total": Meter("Counter", "Epochs trained", ("stage",)),
    "rayseg_trials_total": Meter("Counter", "Trials of sweeps that have ended", ("status",)),
    "rayseg_jobs_total": Meter("Counter", "Jobs that have ended, on a cluster that goes on", ("stage", "outcome")),
    "rayseg_waiting": Meter("Gauge", "Slices that a stage has still to do", ("stage",)),
}


# Ray exports a gauge when it was set, and its agent forgets it after two intervals of 10 s.
_AGAIN_S = 5.0
_shown: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}


def add(name: str, value: float = 1, **tags: str) -> None:
    """Adds to a counter."""
    if value > 0 and _connected():  # Ray refuses to add nothing
        _metric(name).inc(value, tags)


def show(name: str, value: float, **tags: str) -> None:
    """Sets a gauge, until the process ends: a stage that hangs goes on showing it."""
    if _connected():
        _shown[name, tuple(tags.items())] = value
        _metric(name).set(value, tags)
        _repeat()


def slices(stage: str, accepted: int, reasons: Mapping[str, int]) -> None:
    """Counts slices that a stage is done with: accepted, and rejected by reason."""
    add("rayseg_slices_total", accepted, stage=stage, verdict="accepted")
    add("rayseg_slices_total", sum(reasons.values()), stage=stage, verdict="rejected")
    for reason, count in reasons.items():
        add("rayseg_rejects_total", count, stage=stage, reason=reason)


def _connected() -> bool:
    """Whether there is who takes figures; a job that needs no cluster does not import Ray for them."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@cache
def _repeat() -> None:
    """Sets all gauges again and again, in a thread."""

    def run() -> None:
        while True:
            time.sleep(_AGAIN_S)
            for (name, tags), value in list(_shown.items()):
                if _connected():
                    _metric(name).set(value, dict(tags))

    threading.Thread(target=run, name="rayseg-meters", daemon=True).start()


@cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    meter = METERS[name]
    return getattr(metrics, meter.kind)(name, meter.told, meter.tags)
