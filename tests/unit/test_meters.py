"""Figures of the stages, and what becomes of them without a cluster."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rayseg import meters


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What Ray would be told, as if there were a cluster."""
    calls: list[tuple] = []

    def metric(name: str) -> SimpleNamespace:
        def call(value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(meters.METERS[name].tags)
            calls.append((name, value, *tags.values()))

        return SimpleNamespace(inc=call, set=call)

    monkeypatch.setattr(meters, "_metric", metric)
    monkeypatch.setattr(meters, "_connected", lambda: True)
    return calls


def test_slices_are_counted_by_verdict_and_reason(told: list[tuple]) -> None:
    meters.slices("catalog", 7, {"truncated": 2, "no_pixels": 1})
    meters.slices("catalog", 0, {})  # Ray refuses to add nothing
    assert told == [
        ("rayseg_slices_total", 7, "catalog", "accepted"),
        ("rayseg_slices_total", 3, "catalog", "rejected"),
        ("rayseg_rejects_total", 2, "catalog", "truncated"),
        ("rayseg_rejects_total", 1, "catalog", "no_pixels"),
    ]


def test_a_gauge_is_set_again_while_nothing_happens(told: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_AGAIN_S", 0.01)
    meters._repeat.cache_clear()
    meters.show("rayseg_waiting", 5, stage="segment")
    deadline = time.monotonic() + 10
    while len(told) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.undo()
    meters._shown.clear()
    assert set(told) == {("rayseg_waiting", 5, "segment")}


def test_a_job_without_a_cluster_imports_no_ray_for_them() -> None:
    program = (
        "import sys; from rayseg import meters; meters.add('rayseg_jobs_total', stage='promote', outcome='failed')"
    )
    folder = Path(meters.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", f"{program}; assert 'ray' not in sys.modules"], check=True, env={"PYTHONPATH": folder}
    )
