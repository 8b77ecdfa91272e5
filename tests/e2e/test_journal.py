"""The journal and a training's epochs against a real MLflow server that goes away, or is silent, and comes back."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray.train

from rayseg.data.prepared import describe
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import runs
from rayseg.training import loop
from rayseg.training.journal import Journal
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
from rayseg.training.state import State
from rayseg.training.watchdog import Watchdog
from tests.faults import faulty
from tests.ports import free_port

pytestmark = pytest.mark.e2e

HISTORY = [{"epoch": epoch, "val/loss": 2 / epoch, "val/dice_pooled": None} for epoch in (1, 2, 3)]


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow on loopback."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *store], env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(timeout=5) as client:
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                try:
                    if client.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    continue
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_what_a_server_misses_is_told_when_it_is_back_and_nothing_twice(
    behind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with faulty(behind, seed=0) as proxy:
        run_id = runs.start(proxy.url, "experiment", "name")
        journal = Journal(proxy.url, run_id)
        assert journal.publish({"val/loss": 3.0}, HISTORY[:1])
        proxy.share, proxy.kinds = 1.0, ("reset",)
        assert not journal.publish({"val/loss": 3.0}, HISTORY[:2])
        with pytest.raises(runs.UnreachableError):
            runs.finish(proxy.url, run_id, "FINISHED")
        proxy.share = 0.0
        assert journal.publish({"val/loss": 3.0}, HISTORY)
        again = Journal(proxy.url, run_id)
        assert again.publish({"val/loss": 3.0}, HISTORY), "another process, which asks what is there"
    assert logged(behind, run_id, "val/loss") == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 2 / 3)]


def test_what_a_server_took_without_an_answer_is_not_told_twice(behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with faulty(behind, seed=0) as proxy:
        run_id = runs.start(proxy.url, "experiment", "name")
        journal = Journal(proxy.url, run_id)
        assert journal.publish({"val/loss": 3.0}, HISTORY[:1])
        proxy.share, proxy.kinds = 1.0, ("lost",)
        assert not journal.publish({"val/loss": 3.0}, HISTORY[:2])
        proxy.share = 0.0
        assert journal.publish({"val/loss": 3.0}, HISTORY)
    assert logged(behind, run_id, "val/loss") == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 2 / 3)]


def test_an_epoch_of_many_values_is_told_whole(behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go in several requests, and the connection breaks after the first one."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    values = {"val/loss": 2.0} | {f"val/dice_pooled/{number}": number / 2000 for number in range(1500)}
    with faulty(behind, seed=0) as proxy:
        run_id = runs.start(proxy.url, "experiment", "name")

        def break_down(head: bytes) -> None:
            if b"log-batch" in head:
                proxy.share, proxy.kinds = 1.0, ("reset",)

        journal = Journal(proxy.url, run_id)
        assert journal.publish({"val/loss": 3.0}, [])
        proxy.done = break_down
        assert not journal.publish({"val/loss": 3.0}, [{"epoch": 1, **values}])
        proxy.share, proxy.done = 0.0, lambda head: None
        assert Journal(proxy.url, run_id).publish({"val/loss": 3.0}, [{"epoch": 1, **values}]), "another process"
    assert runs.client(behind).get_run(run_id).data.metrics == pytest.approx(values)


def test_training_goes_on_while_mlflow_is_silent_and_nothing_is_lost(
    behind: str, discs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts connections and says nothing until the last epoch is over, and then answers what it was asked."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ended: list[int] = []
    with faulty(behind, seed=0) as proxy, contextlib.ExitStack() as stack:
        small = NetworkConfig(widths=(2, 4), convolutions=1)
        config = TrainConfig(discs, str(tmp_path), proxy.url, epochs=3, num_workers=1, model=small)
        run_id = runs.start(behind, "experiment", "name")
        proxy.share, proxy.kinds = 1.0, ("hold",)
        patience = threading.Timer(180, proxy.released.set)  # or a training that waits would wait for ever
        stack.callback(patience.cancel)
        patience.start()

        def report(values: dict[str, Any]) -> None:
            assert not proxy.released.is_set(), "the training has waited for MLflow"
            ended.append(values["epoch"])
            if values["epoch"] == config.epochs:
                proxy.released.set()

        monkeypatch.setattr(ray.train, "report", report)
        monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
        learner = Learner(config, describe(discs), rank=0, ranks=1, beat=lambda: None)
        state, outputs = State(), tmp_path / "outputs"
        outputs.mkdir()
        with loop._mlflow(config, {"run_id": run_id, "folder": str(tmp_path / "run")}) as publish:
            loop._Run(config, learner, state, str(tmp_path / "run"), outputs, publish, look_s=5.0).to_the_end(
                Watchdog(600)
            )
    assert ended == [1, 2, 3]
    assert state.untrained is not None
    for name in ("val/loss", "val/dice_pooled", "train/loss"):
        values = [(epoch, row.get(name)) for epoch, row in enumerate([state.untrained, *state.history])]
        assert logged(behind, run_id, name) == [(epoch, value) for epoch, value in values if value is not None]


def logged(tracking_uri: str, run_id: str, name: str) -> list[tuple[int, Any]]:
    """Steps and values as MLflow has them."""
    history = runs.client(tracking_uri).get_metric_history(run_id, name)
    return [(metric.step, pytest.approx(metric.value)) for metric in history]
