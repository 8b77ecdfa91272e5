"""Where a stage's tasks run: in a Ray cluster, or in this process where they are few.

Ray takes seconds to start on a machine, and its workers take more to import what they need: longer than some hundred
slices take. The tasks are the same functions, so what they write has the same bytes. Ray itself is imported when it is
needed, as that takes seconds, too.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

FEW = 512  # slices, or objects whose headers are read, that take about as long as Ray takes to start
_NONE: Mapping[str, Any] = {}

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def in_cluster(
    stage: str, amount: int, bundle: Mapping[str, float], count: int = 1, keys: Mapping[str, str] = _NONE
) -> bool:
    """Whether the stage's tasks run in a cluster, which this process then has joined or started.

    They run in this process where they are `FEW`, ask for nothing but CPUs, and this process is in no cluster but
    perhaps its own.

    Args:
        stage: section of the recipe.
        amount: slices, or objects, that its tasks have in all.
        bundle: what one task or actor asks for; see `cluster.require`, as of `count` and `keys`.

    Raises:
        ValueError: the cluster could never give that.
    """
    asked = {name for name, number in bundle.items() if number > 0}
    if amount <= FEW and asked <= {"CPU"} and not os.environ.get("RAY_ADDRESS") and not _joined():
        logger.info("%s: without Ray, in this process: %d slices or objects are few", stage, amount)
        return False
    from rayseg import cluster

    cluster.connect()
    cluster.require(stage, bundle, count, keys)
    return True


def mapped(
    task: Callable[[ItemT], ResultT],
    items: Iterable[ItemT],
    *,
    cluster: bool,
    resources: Mapping[str, float] = _NONE,
    at_once: int | None = None,
) -> Iterator[tuple[int, ResultT]]:
    """Calls of `task`: numbers of the items with the results, as they end. At most `at_once` run at a time.

    In a cluster (what `in_cluster` has said) each has a CPU and `resources`; else they run in threads of this process,
    as many as it has cores.
    """
    if cluster:
        from rayseg.cluster import mapped as in_tasks

        yield from in_tasks(task, items, resources, at_once)
        return
    threads = min(os.cpu_count() or 1, at_once or sys.maxsize)
    numbered = enumerate(items)
    running: dict[Future[ResultT], int] = {}
    with ThreadPoolExecutor(threads, "task") as pool:
        try:
            while True:
                # One waits for each that runs: items may be read from a file as they are asked for.
                for number, item in islice(numbered, 2 * threads - len(running)):
                    running[pool.submit(task, item)] = number
                if not running:
                    return
                for ended in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(ended), ended.result()
        finally:
            pool.shutdown(cancel_futures=True)


def leave() -> None:
    """Ends the private cluster, where this process has started one: no line of its workers comes after this."""
    if "ray" in sys.modules:
        from rayseg import cluster

        cluster.leave()


def _joined() -> bool:
    """Whether this process is in a cluster that others may be in; who has not imported Ray is in none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    from rayseg import cluster

    return not cluster.is_private()
