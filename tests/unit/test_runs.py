import threading
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from rayseg.tracking import runs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_a_run_is_as_mlflow_itself_reads_it(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = {f"model.key{index}": index for index in range(120)} | {"none": None}
    run_id = runs.start(store, "brain", "train", params, {"purpose": "test"})
    runs.log_metrics(store, run_id, {"val/dice_pooled": 0.25, "train/loss": 2}, step=0)
    runs.log_metrics(store, run_id, {"val/dice_pooled": 0.5}, step=1)
    (tmp_path / "curve.txt").write_bytes(b"a curve")
    runs.log_file(store, run_id, "figures/curve.txt", tmp_path / "curve.txt")
    runs.log_bytes(store, run_id, "summary.json", b"{}")
    runs.finish(store, run_id, "FINISHED")

    client = MlflowClient(store)
    run = client.get_run(run_id)
    assert run.info.run_name == "train"
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "brain"
    assert run.data.params == {key: str(value) for key, value in params.items()}
    assert run.data.tags["purpose"] == "test"
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "val/dice_pooled")] == [(0, 0.25), (1, 0.5)]
    assert runs.metric(store, run_id, "val/dice_pooled") == 0.5
    assert runs.metric(store, run_id, "test/dice_pooled") is None
    artifacts = Path(store.removeprefix("sqlite:///")).parent / "artifacts" / "brain" / run_id / "artifacts"
    assert (artifacts / "figures" / "curve.txt").read_bytes() == b"a curve"
    assert (artifacts / "summary.json").read_bytes() == b"{}"
    assert [path.name for path in tmp_path.iterdir()] == ["curve.txt"]  # nothing falls into the current folder


def test_an_experiment_is_made_once_and_any_name_will_do(store: str) -> None:
    ids = [runs.start(store, "ward/7: 'MR'", name) for name in ("a", "b")]
    first, second = (MlflowClient(store).get_run(run_id).info for run_id in ids)
    assert first.experiment_id == second.experiment_id
    runs.log_bytes(store, ids[0], "a.txt", b"a")
    assert [item.path for item in MlflowClient(store).list_artifacts(ids[0])] == ["a.txt"]


def test_a_deleted_experiment_is_refused_by_name(store: str) -> None:
    run_id = runs.start(store, "gone", "a")
    client = MlflowClient(store)
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(ValueError, match="experiment gone: was deleted"):
        runs.start(store, "gone", "b")


def test_a_metric_of_no_run_is_an_error(store: str) -> None:
    with pytest.raises(ValueError, match="not found"):
        runs.metric(store, "0" * 32, "val/loss")


def test_the_use_of_the_machine_is_logged_within_the_block(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run_id = runs.start(store, "experiment", "name")
    waiting = threading.Event()  # never set: a pause that the monitor's thread may use
    with runs.system_metrics(store, run_id):
        while runs.metric(store, run_id, "system/cpu_utilization_percentage") is None:
            waiting.wait(0.1)
    memory = runs.metric(store, run_id, "system/system_memory_usage_megabytes")
    assert memory is not None
    assert 100 < memory < psutil.virtual_memory().total / 1e6


def test_a_run_that_ended_runs_again_and_one_that_is_not_there_is_told(store: str) -> None:
    run_id = runs.start(store, "experiment", "name")
    runs.finish(store, run_id, "FAILED")
    runs.resume(store, run_id)
    assert runs.client(store).get_run(run_id).info.status == "RUNNING"
    assert runs.exists(store, run_id)
    assert not runs.exists(store, "0" * 32)
    with pytest.raises(ValueError, match="it has no nothing"):
        runs.read_bytes(store, run_id, "nothing.json")
    assert runs.last_step(store, run_id, "loss") is None
    runs.log_metrics(store, run_id, {"loss": 1.0}, step=3)
    assert runs.last_step(store, run_id, "loss") == 3
