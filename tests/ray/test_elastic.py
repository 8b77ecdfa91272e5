"""A run on nodes that leave and join: the model of the run that nobody disturbed, and no failure spent."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray._private.node import Node
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from rayseg.tracking import registry, runs
from rayseg.training import trainer
from rayseg.training.trainer import TrainConfig, fit
from tests import long_runs
from tests.long_runs import EPOCHS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

# Of weights, with group normalisation: Adam turns rounding into steps of its own. Losses are equal to 1e-4.
TOLERANCE = 5e-3
CPUS = 3  # of a worker: one on the cluster's own node of four, and one on each that joins


def config(prepared: str, folder: Path, num_workers: int | tuple[int, int]) -> TrainConfig:
    return long_runs.config(
        prepared,
        folder,
        num_workers=num_workers,
        batch_size=7,  # two workers have four and three
        tensorboard=False,
        cpus_per_worker=CPUS,
        max_failures=0,
        hang_timeout_s=200.0,
    )


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The session's cluster, to which nodes can be added."""
    cluster = Cluster(initialize_head=False, shutdown_at_exit=False)
    cluster.head_node = ray._private.worker.global_worker.node
    cluster.redis_address = cluster.head_node.redis_address
    yield cluster
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)


@pytest.mark.slow
def test_a_node_that_is_taken_away_and_one_that_comes_change_rounding_only(
    discs: str, tmp_path: Path, nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "register", lambda *arguments: registry.ModelVersion("m", "1", "m/1", "", ""))
    alone = config(discs, tmp_path / "alone", num_workers=1)
    fixed = fit(alone)

    monkeypatch.setattr(trainer, "RESIZE_S", 5.0)
    monkeypatch.setattr(trainer, "LOOK_S", 0.0)  # at each step: a fast machine is through an epoch in five seconds
    for name, value in {"ENABLE_PREEMPTION_WATCHER": "1", "PREEMPTION_POLL_INTERVAL_S": "0.3"}.items():
        monkeypatch.setenv(f"RAY_TRAIN_{name}", value)
    copied = tmp_path / "prepared"
    shutil.copytree(discs, copied)
    job = config(str(copied), tmp_path / "elastic", num_workers=(1, 2))
    shard, whole, pipe = copied / "split=train/part-00000.parquet", tmp_path / "whole", tmp_path / "pipe"
    shutil.copy(shard, whole)
    os.mkfifo(pipe)
    spot = nodes.add_node(num_cpus=CPUS, object_store_memory=100_000_000)
    look_at_nodes()

    def said(file: str, key: str) -> int:
        with suppress(ValueError):  # none yet
            [path] = (tmp_path / "elastic/runs").glob(f"*/{file}")
            return int(json.loads(path.read_text())[key])
        return 0

    kept: list[tuple[int, int]] = []

    def disturb() -> None:
        until(lambda: said("attempts.json", "attempts") == 1)
        drain(spot)
        # A step of the first epoch is kept as soon as the workers know.
        until(lambda: said("latest.json", "step") > 0)
        kept.append((said("latest.json", "epoch"), said("latest.json", "step")))
        [worker] = workers_of(spot)
        worker.suspend()  # and with it the run, until all know that the node has gone
        nodes.remove_node(spot, allow_graceful=False)
        until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
        look_at_nodes()
        with suppress(psutil.NoSuchProcess):
            worker.kill()
        until(lambda: said("attempts.json", "attempts") >= 2)
        # Who opens a pipe to read waits for somebody to write: the run stands still until it has the node.
        pipe.replace(shard)
        nodes.add_node(num_cpus=CPUS, object_store_memory=100_000_000)
        look_at_nodes()
        until(lambda: said("attempts.json", "attempts") >= 3)
        whole.replace(shard)

    with beside(disturb):
        result = fit(job)
    assert kept[0][0] == 0, "it was in the first epoch"
    assert (result.preemptions, result.failures) == (1, 0)
    # Ray may resize once more before the workers have begun, where it has not heard of all nodes yet.
    assert result.resizes >= 1
    assert result.restarts >= 2
    assert [row["epoch"] for row in result.history] == list(range(1, EPOCHS + 1))
    assert result.train_workers == 2
    mlflow = runs.client(job.tracking_uri)
    for name, steps in (("val/loss", range(EPOCHS + 1)), ("workers", range(1, EPOCHS + 1))):
        points = mlflow.get_metric_history(result.run_id, name)
        assert sorted(point.step for point in points) == list(steps), "each epoch once"
    metrics = mlflow.get_run(result.run_id).data.metrics
    expected = [result.resizes, 1, 0, 2]
    assert [metrics[name] for name in ("resizes", "preemptions", "failures", "workers")] == expected

    for row, other in zip(result.history, fixed.history, strict=True):
        for name in ("train/loss", "val/loss", "learning_rate"):
            assert row[name] == pytest.approx(other[name], abs=1e-4)
    assert result.best_epoch == fixed.best_epoch
    ours, others = final(job), final(alone)
    assert ours.keys() == others.keys()
    apart = {name: float(np.abs(ours[name] - others[name]).max()) for name in ours if name.startswith("model/")}
    assert max(apart.values()) < TOLERANCE, apart
    [steps] = [name for name in ours if name.endswith("iteration")]
    assert ours[steps] == others[steps], "each step once"


def final(job: TrainConfig) -> dict[str, np.ndarray]:
    """Variables of the model and the optimizer in the last checkpoint."""
    [folder] = Path(job.storage).glob("*/epoch-*")
    assert folder.name == f"epoch-{EPOCHS:05d}"
    with np.load(folder / "state.npz") as arrays:
        return dict(arrays)


def drain(node: Node) -> None:
    """As `ray drain-node` does, for a node that will be gone in a minute."""
    accepted, why = GcsClient(address=node.gcs_address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test",
        int(time.time() * 1000) + 60_000,
    )
    assert accepted, why


def workers_of(node: Node) -> list[psutil.Process]:
    """Its training workers."""
    [raylet] = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children()
    return [one for one in children if "".join(one.cmdline()[:1]).startswith("ray::RayTrainWorker")]


def look_at_nodes() -> None:
    """Ray looks which nodes there are every 20 seconds; now it does so at once."""
    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    ray.get(coordinator.get_reserved_resources.remote("", recompute=True))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


@contextmanager
def beside(act: Callable[[], None]) -> Any:
    """Calls `act` meanwhile, which must have come to its end."""
    ended = threading.Event()

    def run() -> None:
        act()
        ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join()
    assert ended.is_set()
