"""The Ray cluster that a job runs on: the one it was submitted to, or a private one on this machine."""

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data
import yaml
from ray._private.parameter import RayParams
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayseg import build, logs
from rayseg.quiet import unheard

logger = logging.getLogger(__name__)

# A laptop's object store: stages stream blocks of a few MiB, so a share of memory (Ray's default 30 %) is not needed.
LOCAL_OBJECT_STORE_BYTES = 512 * 1024 * 1024

# What `ray up` leaves in the home of the head, where drivers run that were submitted: its file, filled out.
_LAUNCHED = "ray_bootstrap_config.yaml"
_NODE_GROUP = "ray.io/node-group"  # label of nodes that a launcher or KubeRay has started
_ROUNDING = 1e-9

# Ray Train asks each second whether a run's controller lives, and takes its workers' places away where the answer is
# that nobody knows it. It asks the API server of the cluster that was started last on the machine, which may be
# somebody else's, or that of this variable. Set for workers alone: in a driver it would redirect `ray job submit`, too.
API_SERVER = "RAY_API_SERVER_ADDRESS"
NOBODY = "http://127.0.0.1:9"  # nothing listens there, and without an answer a run goes on
_LEAST_CALLS, _CALLS_A_CPU = 64, 2  # that are asked for at a time: a launcher starts nodes for those that wait
_NO_KEYS: Mapping[str, str] = {}
_OF_RESTARTS = "has constructor arguments in the object store and max_restarts > 0"
_NO_NODE = "1" * 56  # a node's id that no node has
_private: list[bool] = []  # not empty while this process has a cluster of its own

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def connect(dashboard: bool = False) -> None:
    """Joins the cluster named by RAY_ADDRESS (`ray job submit` sets it), else starts one on loopback for this process.

    The private cluster asks for a token that only this process and its children know (made when `rayseg` is imported),
    and ends with the process. It has at least two logical CPUs, so that two training workers fit on any machine.

    Args:
        dashboard: of a private cluster, on loopback: it has the API of Ray's job submission. Costs a second to start.
    """
    quiet()
    if ray.is_initialized():
        return
    # Added to the runtime environment of a submitted job: Ray merges them, and refuses keys that both have.
    variables = {build.VARIABLE: build.current().told()}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": variables | _api_server()})
        return
    # Nobody takes this machine away with a notice, and the process that would wait for one costs seconds to start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    with own_agent_port():
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 2),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            runtime_env={
                # The driver has said what it runs, of the same files. And a private cluster has no API server.
                "env_vars": variables | {build.SILENT: "1", API_SERVER: NOBODY},
                "worker_process_setup_hook": f"{__name__}.{hush.__name__}",
            },
        )
    _private.append(True)
    _warn_of_restarts()
    logger.info("started a Ray cluster on this machine with %s CPUs", ray.cluster_resources().get("CPU"))


@contextlib.contextmanager
def own_agent_port() -> Iterator[None]:
    """A node that is started within has a free port for its agent.

    By default each node takes 52365, and job submission fails on the second cluster of a machine, as its agent does
    without. `ray start` has an option for it, `ray.init` has none (Ray 2.60).
    """
    init = RayParams.__init__
    RayParams.__init__ = functools.partialmethod(init, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        RayParams.__init__ = init


def is_private() -> bool:
    """Whether this process has started its cluster for itself, see `connect`."""
    return bool(_private)


def leave() -> None:
    """Ends the private cluster, where this process has started one: no line of its workers comes after this."""
    if _private:
        _private.clear()
        ray.shutdown()


def quiet() -> None:
    """In this process Ray Data does not tell how far its operators are: stages show their own progress, in rows."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that there are none


def hush() -> None:
    """Set-up hook of the private cluster's workers: Ray Train warns each second that no API server answers.

    Of its other lines the same logger has the one that says why workers lost their places.
    """
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").addFilter(
        lambda record: not record.getMessage().startswith("Failed to query Ray Train Controller actor state")
    )


def _api_server() -> dict[str, str]:
    """Where workers of the cluster of RAY_ADDRESS find its API server, where that tells: from the cluster itself."""
    address = os.environ["RAY_ADDRESS"]
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    if address == "auto" or "://" in address or API_SERVER in submitted.get("env_vars", {}):
        return {}
    return {API_SERVER: address}


def _warn_of_restarts() -> None:
    """Has Ray give one of its warnings unheard, as it gives it once a process (seen with Ray 2.60).

    It looks like an error, comes from native code straight to file descriptor 2, and is of every pool of actors of Ray
    Data: these may not start again where the object is gone that they were made of. Ray Data holds it while they live.
    The actor that brings it about is for a node that is not there: none starts. Where a later Ray warns each time, the
    line is merely back.
    """
    placed = NodeAffinitySchedulingStrategy(_NO_NODE, soft=False)
    actor = ray.remote(_NeverStarted).options(num_cpus=0, max_restarts=1, scheduling_strategy=placed)
    argument = ray.put(0)
    with unheard(_OF_RESTARTS):
        actor.remote(argument)


class _NeverStarted:
    """See `_warn_of_restarts`."""

    def __init__(self, _: int) -> None:
        pass


def mapped(
    task: Callable[[ItemT], ResultT],
    items: Iterable[ItemT],
    resources: Mapping[str, float],
    at_once: int | None = None,
) -> Iterator[tuple[int, ResultT]]:
    """Calls of `task` in the cluster, a CPU and `resources` each: numbers of the items with the results, as they end.

    Some calls wait for a CPU, so that none idles; the others are asked for when some have ended. With `at_once` no more
    calls than that run or wait.
    """
    call = ray.remote(num_cpus=1, resources=dict(resources), scheduling_strategy="SPREAD")(logs.carried(task))
    numbered = enumerate(items)
    running: dict[Any, int] = {}
    try:
        while True:
            most = at_once or max(_LEAST_CALLS, _CALLS_A_CPU * int(ray.cluster_resources().get("CPU", 1)))
            for number, item in islice(numbered, most - len(running)):
                running[call.remote(item)] = number
            if not running:
                return
            for ended in ray.wait(list(running))[0]:
                yield running.pop(ended), ray.get(ended)
    finally:
        for reference in running:
            ray.cancel(reference)


def require(stage: str, bundle: Mapping[str, float], count: int = 1, keys: Mapping[str, str] = _NO_KEYS) -> None:
    """Refuses what the cluster could never give: Ray would let it wait for ever, as another node might come.

    Args:
        stage: section of the recipe.
        bundle: what one worker, actor, task or replica asks for, all of it on one node; amounts by resource.
        count: so many at once.
        keys: names of the stage's keys that ask for a resource, and of that for the number under "count".

    Raises:
        ValueError: it never fits, see `room`; the key and what is missing are named.
    """
    fits = room(bundle)
    if fits >= count:
        return
    wanted = {name: amount for name, amount in bundle.items() if amount > 0}
    told = in_words(bundle)
    for name, amount in wanted.items():
        largest = max((shape.get(name, 0.0) for shape, _ in _most() or ()), default=0.0)
        if largest < amount:
            key = f"{stage}.{keys[name]}" if name in keys else stage
            has = f"the largest node has {largest:g} {name}" if largest else f"no node has any {name}"
            raise ValueError(f"{key}: needs {told} on one node, but {has}; lower it, or add such nodes")
    key = f"{stage}.{keys['count']}" if "count" in keys else stage
    raise ValueError(
        f"{key}: needs {count} times {told} at once, but the cluster has room for {fits:g}; lower it, or add nodes"
    )


def in_words(bundle: Mapping[str, float]) -> str:
    """What a worker asks for, in words."""
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items() if amount > 0)


def room(bundle: Mapping[str, float]) -> float:
    """How many of such bundles the cluster holds at once when nothing else runs, each on one node.

    Of a cluster that Ray's launcher scales, when it is as large as its file lets it become; infinite where something
    else has started the nodes (KubeRay), as nothing tells how many there may be.
    """
    wanted = {name: amount for name, amount in bundle.items() if amount > 0}
    shapes = _most()
    if shapes is None or not wanted:
        return math.inf
    return sum(
        number * min(math.floor(shape.get(name, 0.0) / amount + _ROUNDING) for name, amount in wanted.items())
        for shape, number in shapes
    )


def _most() -> list[tuple[dict[str, float], int]] | None:
    """Resources of nodes, and how many of such there are or can become; None: nothing tells."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    shapes: list[tuple[dict[str, float], int]] = [(node["Resources"], 1) for node in nodes]
    if not any(_NODE_GROUP in node["Labels"] for node in nodes):
        return shapes
    file = Path.home() / _LAUNCHED
    if not file.exists():
        return None
    launched = yaml.safe_load(file.read_text(encoding="utf-8"))
    kinds = launched["available_node_types"]
    if not any(kind.get("resources") for kind in kinds.values()):
        return shapes  # hosts of one's own: they are as many as they are
    head, most = launched["head_node_type"], launched.get("max_workers", 0)
    return [
        (kind.get("resources", {}), 1 if name == head else min(kind.get("max_workers", 0), most))
        for name, kind in kinds.items()
    ]
