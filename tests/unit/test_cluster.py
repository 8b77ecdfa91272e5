"""What a cluster can never give is refused; its nodes are told here as Ray would tell them."""

import inspect
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.state.util import is_actor_alive
from ray.util.state.exception import RayStateApiException

from rayseg import cluster
from rayseg.grant import keep_to_grant
from rayseg.models.presets import NetworkConfig
from rayseg.training import record, trainer
from rayseg.training.settings import TrainConfig

ROOT = Path(__file__).parents[2]
KEYS = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker", "decode": "resources", "count": "num_workers"}


def node(labels: dict[str, str] | None = None, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources, "Labels": labels or {}}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The nodes that Ray tells of; there is no launcher."""
    known: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "nodes", lambda: known)
    monkeypatch.setenv("HOME", str(tmp_path))
    return known


def launched(folder: Path, **changes: Any) -> None:
    """As `ray up` leaves the repository's file on the head."""
    file = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    (folder / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump({**file, **changes}), encoding="utf-8")


def test_a_bundle_lies_on_one_node(nodes):
    nodes += [node(CPU=0), node(CPU=3), node(CPU=5, GPU=1), node(alive=False, CPU=64)]
    assert cluster.room({"CPU": 2}) == 3, "one on the second node, two on the third"
    assert cluster.room({"CPU": 1, "GPU": 0.25}) == 4
    assert cluster.room({"CPU": 2, "GPU": 0.25}) == 2
    assert cluster.room({"CPU": 0.1}) == 80
    assert cluster.room({"CPU": 6}) == 0, "eight CPUs in all, but no node has six"
    assert cluster.room({"CPU": 0, "GPU": 0}) == math.inf


@pytest.mark.parametrize(
    ("bundle", "count", "told"),
    [
        ({"CPU": 6}, 1, r"^train\.cpus_per_worker: needs 6 CPU on one node, but the largest node has 5 CPU;"),
        (
            {"CPU": 1, "GPU": 1},
            1,
            r"^train\.gpus_per_worker: needs 1 CPU \+ 1 GPU on one node, but no node has any GPU;",
        ),
        ({"CPU": 1, "decode": 1}, 1, r"^train\.resources: .* no node has any decode;"),
        ({"CPU": 2, "GPU": 0}, 4, r"^train\.num_workers: needs 4 times 2 CPU at once, .* has room for 3;"),
    ],
)
def test_the_key_and_what_is_missing_are_named(nodes, bundle, count, told):
    nodes += [node(CPU=3), node(CPU=5)]
    with pytest.raises(ValueError, match=told):
        cluster.require("train", bundle, count, KEYS)
    cluster.require("train", {"CPU": 2}, 3, KEYS)


def test_resources_that_no_node_has_together_are_refused(nodes):
    nodes += [node(CPU=8), node(GPU=1, CPU=1)]
    with pytest.raises(ValueError, match=r"^train\.num_workers: needs 1 times 4 CPU \+ 1 GPU .* has room for 0"):
        cluster.require("train", {"CPU": 4, "GPU": 1}, 1, KEYS)


def test_a_launched_cluster_counts_as_large_as_it_may_become(nodes, tmp_path):
    nodes += [node({"ray.io/node-group": "head"}, CPU=0)]
    kinds = {
        "head": {"resources": {"CPU": 0}},
        "gpu": {"resources": {"CPU": 8, "GPU": 2}, "max_workers": 3},
        "cpu": {"resources": {"CPU": 16, "decode": 16}, "max_workers": 50},
    }
    launched(tmp_path, available_node_types=kinds, head_node_type="head", max_workers=4)
    assert cluster.room({"GPU": 1}) == 6
    assert cluster.room({"CPU": 1, "decode": 1}) == 64, "no more than max_workers of all kinds"
    with pytest.raises(ValueError, match=r"^train\.gpus_per_worker: needs 4 GPU .* the largest node has 2"):
        cluster.require("train", {"GPU": 4}, 1, KEYS)


def test_hosts_of_ones_own_are_as_many_as_have_joined(nodes, tmp_path):
    group = {"ray.io/node-group": "local.cluster.node"}
    nodes += [node(group, CPU=4), node(group, CPU=4)]
    kinds = {"local.cluster.node": {"resources": {}, "max_workers": 5}}
    launched(tmp_path, available_node_types=kinds, head_node_type="local.cluster.node")
    assert cluster.room({"CPU": 4}) == 2


def test_nothing_is_refused_where_nothing_tells_how_far_it_grows(nodes):
    nodes += [node({"ray.io/node-group": "headgroup"}, CPU=0)]
    assert cluster.room({"GPU": 1}) == math.inf
    cluster.require("train", {"GPU": 1}, 100, KEYS)


def test_a_training_worker_asks_for_its_share_of_a_gpu():
    places = {"prepared": "p", "storage": "s", "tracking_uri": "t"}
    assert TrainConfig(**places).bundle == {"CPU": 1}
    shared = TrainConfig(**places, num_workers=1, gpus_per_worker=0.5, cpus_per_worker=4)
    assert shared.bundle == {"CPU": 4, "GPU": 0.5}
    kept = TrainConfig(**places, resources={"train": 1})
    assert kept.bundle == {"CPU": 1, "train": 1}
    with pytest.raises(ValueError, match=r"train\.resources"):
        TrainConfig(**places, resources={"GPU": 1})
    for count, share in ((2, 0.5), (1, 2), (1, -1)):
        with pytest.raises(ValueError, match=r"train\.gpus_per_worker"):
            TrainConfig(**places, num_workers=count, gpus_per_worker=share, batch_size=8)


def test_an_elastic_run_needs_room_for_its_least_workers(nodes, discs, tmp_path, monkeypatch):
    def begun(*arguments: Any) -> None:
        raise RuntimeError("begun")

    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(record, "begin", begun)
    nodes += [node(CPU=3), node(CPU=3)]
    model = NetworkConfig(widths=(4,), convolutions=1)
    places = {"prepared": discs, "storage": str(tmp_path), "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    with pytest.raises(ValueError, match=r"^train\.num_workers: needs 3 times 2 CPU at once, .* has room for 2;"):
        trainer.fit(TrainConfig(**places, model=model, cpus_per_worker=2, num_workers=(3, 8)))
    with pytest.raises(RuntimeError, match="begun"):
        trainer.fit(TrainConfig(**places, model=model, cpus_per_worker=2, num_workers=(2, 8)))


def test_trials_that_share_gpus_fit_twice_as_often(nodes):
    nodes += [node(CPU=16, GPU=2)]
    places = {"prepared": "p", "storage": "s", "tracking_uri": "t", "num_workers": 1}
    assert cluster.room(TrainConfig(**places, gpus_per_worker=1).bundle) == 2
    assert cluster.room(TrainConfig(**places, gpus_per_worker=0.5).bundle) == 4


def test_of_the_lines_on_a_runs_controller_only_the_one_without_news_is_hidden(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(placement_group_cleaner.__name__)
    monkeypatch.setattr(logger, "filters", [])
    cluster.hush()
    often = "Failed to query Ray Train Controller actor state. "
    assert often in inspect.getsource(placement_group_cleaner), "it is called so still"
    logger.warning(often)
    logger.warning("Detected that the Ray Train controller actor (%s) is dead. Cleaning up placement group", "1f")
    assert [record.getMessage() for record in caplog.records if record.name == logger.name] == [
        "Detected that the Ray Train controller actor (1f) is dead. Cleaning up placement group"
    ]


def test_whether_a_controller_lives_has_no_answer_in_a_private_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray Train goes on where this error comes, whatever cluster was started last on the machine."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379", encoding="ascii")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv(cluster.API_SERVER, cluster.NOBODY)
    with pytest.raises(RayStateApiException, match=f"request to {cluster.NOBODY}/"):
        is_actor_alive("ab" * 16, timeout=5)


@pytest.mark.parametrize(
    ("address", "submitted", "expected"),
    [
        ("10.0.0.1:6379", None, {"RAY_API_SERVER_ADDRESS": "10.0.0.1:6379"}),
        ("10.0.0.1:6379", {"env_vars": {"OTHER": "1"}}, {"RAY_API_SERVER_ADDRESS": "10.0.0.1:6379"}),
        ("10.0.0.1:6379", {"env_vars": {"RAY_API_SERVER_ADDRESS": "http://one:1"}}, {}),
        ("ray://one:10001", None, {}),
        ("auto", None, {}),
    ],
)
def test_workers_of_a_cluster_that_is_joined_ask_that_one(monkeypatch, address, submitted, expected):
    """Ray takes an address of this kind for that of the cluster, and asks it for its API server."""
    environments: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **named: environments.append(named["runtime_env"]["env_vars"]))
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if submitted is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": submitted, "metadata": {}}))
    cluster.connect()
    (variables,) = environments
    assert {name: value for name, value in variables.items() if name != "RAYSEG_CODE"} == expected


@pytest.mark.parametrize(("ids", "visible"), [([], ""), (["1"], "1")])
def test_a_machines_gpus_are_hidden_from_who_was_given_none(
    monkeypatch: pytest.MonkeyPatch, ids: list[str], visible: str
) -> None:
    class Context:
        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": ids, "TPU": []}

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # as Ray sets it for who was given that one
    assert keep_to_grant() is bool(ids)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
