"""Tasks on a Ray cluster: all results, few tasks ahead, failures raised."""

from collections.abc import Iterator

import pytest
import ray

from rayseg import cluster

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def add(item: int, more: int) -> int:
    if item < 0:
        raise ValueError("no such item")
    return item + more


@pytest.mark.parametrize("items", [0, 1, 30])
def test_each_item_gives_one_result(items: int) -> None:
    assert sorted(cluster.each(add, range(items), more=100)) == [100 + item for item in range(items)]


@pytest.mark.parametrize(("at_once", "most"), [(None, 8), (3, 3)])  # the cluster has four CPUs
def test_items_are_taken_when_their_tasks_are_due(at_once: int | None, most: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(40):
            taken.append(item)
            yield item

    for results, _ in enumerate(cluster.each(add, items(), at_once, more=0), 1):
        assert len(taken) <= results + most
    assert results == len(taken) == 40


def test_as_many_tasks_run_at_once_as_there_are_cpus() -> None:
    together = ray.remote(num_cpus=0)(Together).remote(4)
    assert list(cluster.each(meet, range(4), together=together)) == [True] * 4


class Together:
    """Counts those who have come."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.here = wanted, 0

    def come(self) -> None:
        self.here += 1

    def all_here(self) -> bool:
        return self.here >= self.wanted


def meet(item: int, together: ray.actor.ActorHandle) -> bool:
    ray.get(together.come.remote())
    return any(ray.get(together.all_here.remote()) for _ in range(20_000))  # some 20 s


def test_a_failing_task_raises_its_error() -> None:
    with pytest.raises(ValueError, match="no such item"):
        list(cluster.each(add, [1, -1, 2], more=0))
