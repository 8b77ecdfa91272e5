"""The team's MLflow: PostgreSQL, S3 and a server by `configs/mlflow-server.env`, which is killed and comes back."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import keras
import psycopg
import pytest

from rayseg import storage
from rayseg.data import synthetic
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.tracking import limits, registry, runs
from rayseg.training.journal import Journal
from tests import long_names
from tests.ports import free_port
from tests.postgres import postgres, programs

pytestmark = pytest.mark.e2e

SETTINGS = Path(__file__).parents[2] / "configs" / "mlflow-server.env"
HISTORY = [{"epoch": epoch, "val/loss": 2 / epoch} for epoch in (1, 2, 3)]
READY_LIMIT_S = 180


def settings(backend: str, bucket: str, port: int) -> dict[str, str]:
    """What the file says, with the places of this test."""
    lines = [line for line in SETTINGS.read_text().splitlines() if line and not line.startswith("#")]
    told = dict(line.split("=", 1) for line in lines)
    own = {
        "MLFLOW_BACKEND_STORE_URI": backend,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": f"{bucket}/mlflow",
        "MLFLOW_PORT": str(port),
        "MLFLOW_WORKERS": "1",
    }
    assert own.keys() <= told.keys()
    return told | own


@contextmanager
def server(environment: dict[str, str], folder: Path) -> Iterator[int]:
    """`mlflow server` and nothing more on the command line; yields its process group once it answers."""
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server"],
            cwd=folder, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + READY_LIMIT_S
        with httpx.Client(timeout=5) as client:
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                try:
                    if client.get(f"http://127.0.0.1:{environment['MLFLOW_PORT']}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.05)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def save(folder: Path) -> registry.Bundle:
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(1, 1, activation="sigmoid")]
    model = keras.Sequential([keras.Input((32, 32, 1), dtype="uint8"), *layers])
    return registry.save(folder, model, Preprocess(size=(32, 32)), Labels(), 0.5, synthetic.slice_bytes())


@pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)")
def test_runs_survive_a_killed_server_and_artifacts_do_not_pass_it(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(registry, "verify_folder", lambda folder: None)  # another process; test_registry has it
    port = free_port()
    tracking_uri = f"http://127.0.0.1:{port}"
    bundle_dir = tmp_path / "bundle"
    saved = save(bundle_dir)
    with postgres() as (backend, password):
        environment = settings(backend, s3_store, port) | password
        with server(environment, tmp_path):
            run_id = runs.start(tracking_uri, "team", "run", {"epochs": 3})
            journal = Journal(tracking_uri, run_id)
            assert journal.publish({"val/loss": 3.0}, HISTORY[:1])
        # Killed: nobody said good-bye.
        assert not journal.publish({"val/loss": 3.0}, HISTORY[:2])
        with server(environment, tmp_path):
            assert journal.publish({"val/loss": 3.0}, HISTORY)
            version = registry.register(tracking_uri, run_id, bundle_dir, "brain")
            registry.set_alias(tracking_uri, "brain", "champion", version.version)
            runs.log_bytes(tracking_uri, run_id, "test/table.csv", b"patient,dice\n")
            fetched, _ = registry.fetch(tracking_uri, "models:/brain@champion", tmp_path / "cache")
            assert runs.read_bytes(tracking_uri, run_id, "test/table.csv") == b"patient,dice\n"
            runs.finish(tracking_uri, run_id, "FINISHED")
            run = runs.client(tracking_uri).get_run(run_id)
            told = runs.client(tracking_uri).get_metric_history(run_id, "val/loss")
            # What MLflow's columns hold, of which SQLite knows nothing.
            long_id, long_version = long_names.write(tracking_uri, bundle_dir)
            long = runs.client(tracking_uri).get_run(long_id).data
            uncut = json.loads(runs.read_bytes(tracking_uri, long_id, limits.UNCUT))
            description = runs.client(tracking_uri).get_model_version(long_version.name, "1").description
            proxied = httpx.get(f"{tracking_uri}/api/2.0/mlflow-artifacts/artifacts", timeout=30)
        with psycopg.connect(backend.replace("+psycopg", ""), passfile=password["PGPASSFILE"]) as database:
            (row,) = database.execute("SELECT status FROM runs WHERE run_uuid = %s", (run_id,)).fetchall()
    assert registry.load(fetched).digest == saved.digest
    assert (run.info.status, run.data.params["epochs"], row) == ("FINISHED", "3", ("FINISHED",))
    assert [(one.step, one.value) for one in told] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert run.info.artifact_uri.startswith(f"{s3_store}/mlflow/")
    assert storage.read(storage.join(run.info.artifact_uri, "test/table.csv")) == b"patient,dice\n"
    assert long.params["value"] == long_names.LONG[:5994] + " [...]"
    assert (uncut["params"]["value"], uncut["tags"]["note"]) == (long_names.LONG, long_names.LONG)
    assert (math.isnan(long.metrics["nan"]), len(description)) == (True, 5000)
    assert proxied.status_code == 503, "the server hands out no artifacts"
    calls = (tmp_path / "server.log").read_text()
    assert "mlflow-artifacts/artifacts" in calls, "it tells what it is asked for"
    assert "artifacts" not in calls.replace("mlflow-artifacts/artifacts", ""), "nor was it asked for any"


@pytest.mark.slow
@pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)")
def test_a_dump_of_the_database_brings_runs_and_aliases_back(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into another PostgreSQL, beside the same artifacts: the way of docs/how-to/back-up.md."""
    monkeypatch.setattr(registry, "verify_folder", lambda folder: None)  # another process; test_registry has it
    dump, found = tmp_path / "mlflow.dump", {}
    saved = save(tmp_path / "bundle")
    for name, arguments in (
        ("pg_dump", ("--format=custom", f"--file={dump}")),
        ("pg_restore", ("--no-owner", "--exit-on-error", str(dump))),
    ):
        with postgres() as (backend, password):
            port = free_port()
            tracking_uri = f"http://127.0.0.1:{port}"
            command = [programs() / name, f"--dbname={backend.replace('+psycopg', '')}", *arguments]
            if name == "pg_restore":
                subprocess.run(command, check=True, env=os.environ | password)
            with server(settings(backend, s3_store, port) | password, tmp_path):
                if name == "pg_dump":
                    run_id = runs.start(tracking_uri, "team", "run", {"epochs": 3})
                    assert Journal(tracking_uri, run_id).publish({"val/loss": 3.0}, HISTORY)
                    version = registry.register(tracking_uri, run_id, tmp_path / "bundle", "brain")
                    registry.set_alias(tracking_uri, "brain", "champion", version.version)
                    subprocess.run(command, check=True, env=os.environ | password)  # while it works
                fetched, of = registry.fetch(tracking_uri, "models:/brain@champion", tmp_path / f"cache-{name}")
                told = runs.client(tracking_uri).get_metric_history(run_id, "val/loss")
                found[name] = (registry.load(fetched).digest, of.version, [one.value for one in told])
    assert found["pg_restore"] == found["pg_dump"]
    assert found["pg_dump"][0] == saved.digest
    assert len(found["pg_dump"][2]) == 4
