"""Where tasks run: in threads of this process where they are few, else in a cluster."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from rayseg import cluster, work


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that have asked for a cluster; none is started."""
    stages: list[str] = []
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "require", lambda stage, *_: stages.append(stage))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return stages


def test_few_slices_need_no_cluster(connected: list[str]) -> None:
    assert not work.in_cluster("prepare", work.FEW, {"CPU": 1, "GPU": 0})
    assert connected == []


@pytest.mark.parametrize(
    ("slices", "bundle", "address"),
    [(work.FEW + 1, {"CPU": 1}, None), (1, {"CPU": 1, "decode": 1}, None), (1, {"CPU": 1}, "127.0.0.1:6379")],
)
def test_many_slices_resources_and_a_cluster_that_is_named_need_one(
    connected: list[str], monkeypatch: pytest.MonkeyPatch, slices: int, bundle: dict[str, float], address: str | None
) -> None:
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert work.in_cluster("prepare", slices, bundle)
    assert connected == ["prepare"]


def test_each_result_comes_once_with_its_number() -> None:
    results = dict(work.mapped(lambda item: item * item, iter(range(50)), cluster=False))
    assert results == {number: number * number for number in range(50)}


def test_no_more_run_at_once_than_asked_for() -> None:
    running = threading.Semaphore(1)

    def task(_: int) -> bool:
        alone = running.acquire(blocking=False)
        running.release()
        return alone

    assert all(alone for _, alone in work.mapped(task, range(200), cluster=False, at_once=1))


def test_items_are_asked_for_as_tasks_end() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            asked.append(number)
            yield number

    results = work.mapped(lambda item: item, items(), cluster=False, at_once=1)
    next(results)
    assert len(asked) < 10
    results.close()  # type: ignore[attr-defined]


def test_an_error_of_a_task_ends_the_others() -> None:
    begun: list[int] = []

    def task(item: int) -> None:
        begun.append(item)
        raise ValueError("prepare.labels: no such class")

    with pytest.raises(ValueError, match="no such class"):
        list(work.mapped(task, range(1000), cluster=False))
    assert len(begun) < 100


@pytest.mark.parametrize("job", ["catalog", "prepare", "evaluate", "promote", "compare"])
def test_a_job_begins_without_ray_and_tensorflow(job: str) -> None:
    code = f"import sys, jobs.{job}; print(sorted({{'ray', 'tensorflow', 'keras'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
