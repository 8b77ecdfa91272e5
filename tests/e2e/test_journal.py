"""The journal against a real MLflow server that goes away and comes back."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from rayseg.tracking import runs
from rayseg.training.journal import Journal
from tests.faults import faulty
from tests.ports import free_port

pytestmark = pytest.mark.e2e

HISTORY = [{"epoch": epoch, "val/loss": 2 / epoch, "val/dice_pooled": None} for epoch in (1, 2, 3)]


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """MLflow on loopback, its store in `folder`."""
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server(tmp_path) as behind, faulty(behind, seed=0) as proxy:
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
        told = runs.client(proxy.url).get_metric_history(run_id, "val/loss")
    assert [(metric.step, metric.value) for metric in told] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
