"""MLflow runs by explicit tracking URI and run id: no active run, no `set_tracking_uri`, nothing global.

So any process that is told both may write to a run: the driver and rank 0 of a training do.
"""

import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag
from mlflow.protos import databricks_pb2 as codes
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from rayseg import __version__, build
from rayseg.tracking import limits
from rayseg.tracking.courier import LEAVE_S

_PARAMS_A_BATCH, _METRICS_A_BATCH = 100, 1000  # MLflow's limits for one request
_SQLITE = "sqlite:///"
_FOLDER = 60  # characters, of up to four bytes: a file system takes 255 bytes
# What stays so however often it is asked. Anything else (INTERNAL_ERROR for a server that does not answer) may pass.
_FINAL = {
    codes.ErrorCode.Name(code)
    for code in (
        codes.RESOURCE_DOES_NOT_EXIST,
        codes.INVALID_PARAMETER_VALUE,
        codes.INVALID_STATE,
        codes.PERMISSION_DENIED,
        codes.UNAUTHENTICATED,
    )
}


class UnreachableError(RuntimeError):
    """MLflow does not answer, after its client's own attempts (some minutes of them for a server)."""


@contextmanager
def _reaching(tracking_uri: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code in _FINAL:
            raise
        raise UnreachableError(f"{tracking_uri}: {error.error_code}") from error


def absolute(tracking_uri: str) -> str:
    """The URI as it holds in every folder: the path of a SQLite store made absolute."""
    if not tracking_uri.startswith(_SQLITE):
        return tracking_uri
    return _SQLITE + str(Path(tracking_uri.removeprefix(_SQLITE)).absolute())


def client(tracking_uri: str) -> MlflowClient:
    """A client for the tracking store and the model registry at `tracking_uri`."""
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def start(
    tracking_uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Creates a run, and its experiment where that is new, and returns the run's id.

    Args:
        tracking_uri: `sqlite:///ABSOLUTE/PATH.db` or the URL of an MLflow server. With SQLite the artifacts of a new
            experiment go to `artifacts/` beside the database, wherever the process runs.
        experiment: the experiment's name.
        name: the run's name in the UI.
        params: flat configuration (see `config.flat`); values are shown as text.
        tags: further tags.

    What is longer than MLflow's columns (see `limits`) is cut, and whole in the run's artifact `limits.UNCUT`.

    Raises:
        ValueError: the experiment was deleted, or its name is too long.
    """
    limits.require("experiment", experiment, limits.EXPERIMENT)
    mlflow = client(tracking_uri)
    whole = {"params": {key: str(value) for key, value in (params or {}).items()}, "tags": {**_code(), **(tags or {})}}
    run = mlflow.create_run(
        _experiment_id(mlflow, tracking_uri, experiment),
        run_name=limits.text(name, limits.RUN_NAME),
        tags=_fitting(whole["tags"], limits.TAG),
    )
    values = [Param(key, value) for key, value in _fitting(whole["params"], limits.PARAM).items()]
    for first in range(0, len(values), _PARAMS_A_BATCH):
        mlflow.log_batch(run.info.run_id, params=values[first : first + _PARAMS_A_BATCH])
    lost = {
        kind: dict(all_of_it.items() - _fitting(all_of_it, most).items())
        for (kind, all_of_it), most in zip(whole.items(), (limits.PARAM, limits.TAG), strict=True)
    }
    if any(lost.values()):
        log_bytes(tracking_uri, run.info.run_id, limits.UNCUT, json.dumps(lost, indent=2, sort_keys=True).encode())
    return run.info.run_id


def _fitting(values: Mapping[str, str], most: int) -> dict[str, str]:
    return {limits.key(key): limits.text(value, most) for key, value in values.items()}


@contextmanager
def running(
    tracking_uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    models_of: Sequence[str] = (),
) -> Iterator[str]:
    """A run, by its id, that ends as the block does: FINISHED or FAILED.

    Arguments as `start` has them; the models that the runs `models_of` gave are the run's inputs.
    """
    run_id = start(tracking_uri, experiment, name, params, tags)
    try:
        _log_models_used(tracking_uri, run_id, models_of)
        yield run_id
    except BaseException:
        finish(tracking_uri, run_id, "FAILED")
        raise
    finish(tracking_uri, run_id, "FINISHED")


def _code() -> dict[str, str]:
    """What made the run. The commit is tagged as MLflow does it, where it is known."""
    tags = {"rayseg.version": __version__, "rayseg.code_sha256": build.sha256("rayseg")}
    if known := build.git():
        tags |= {"mlflow.source.git.commit": known["commit"], "rayseg.git_changed": known["changed"]}
    return tags


def log_metrics(tracking_uri: str, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Logs values of one step (an epoch, or 0 for final ones), in their order; raises UnreachableError."""
    now_ms = int(time.time() * 1000)
    values = [Metric(limits.key(name), float(value), now_ms, step) for name, value in metrics.items()]
    with _reaching(tracking_uri):
        for first in range(0, len(values), _METRICS_A_BATCH):
            client(tracking_uri).log_batch(run_id, metrics=values[first : first + _METRICS_A_BATCH])


def last_step(tracking_uri: str, run_id: str, name: str) -> int | None:
    """The greatest step at which the run has the metric, None where it has none; raises UnreachableError."""
    with _reaching(tracking_uri):
        return max((metric.step for metric in client(tracking_uri).get_metric_history(run_id, name)), default=None)


def log_dataset(tracking_uri: str, run_id: str, uri: str, digest: str, profile: str, context: str) -> None:
    """Names a data set as an input of the run.

    Args:
        tracking_uri: of MLflow.
        run_id: of the run.
        uri: where the set lies.
        digest: of its content; MLflow has room for its beginning.
        profile: what is in it, as JSON.
        context: what for: `training`.
    """
    name = uri.rstrip("/").rpartition("/")[2]
    dataset = Dataset(
        limits.text(name, limits.DATASET_NAME),
        digest[: limits.DATASET_DIGEST],
        "rayseg.prepared",
        source=uri,
        profile=profile,
    )
    tag = InputTag("mlflow.data.context", context)
    client(tracking_uri).log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[tag])])


def _log_models_used(tracking_uri: str, run_id: str, trained_by: Sequence[str]) -> None:
    mlflow = client(tracking_uri)
    given = [output for one in trained_by for output in mlflow.get_run(one).outputs.model_outputs]
    if given:
        mlflow.log_inputs(run_id, models=[LoggedModelInput(output.model_id) for output in given])


def resume(tracking_uri: str, run_id: str) -> None:
    """Marks a run that had ended as running again; raises UnreachableError."""
    with _reaching(tracking_uri):
        client(tracking_uri).update_run(run_id, status="RUNNING")


@contextmanager
def system_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Logs this machine's use of CPU, memory, disk, network and GPUs (`system/...`) every ten seconds of the block.

    The block waits for MLflow at its end alone, and no longer than `courier.LEAVE_S`.
    """
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # it tells of its start and end
    over = threading.Event()

    def watch() -> None:
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri)  # asks for the last step
        monitor.start()
        over.wait()
        monitor.finish()

    thread = threading.Thread(target=watch, daemon=True, name="rayseg-system-metrics")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LEAVE_S)


def exists(tracking_uri: str, run_id: str) -> bool:
    """Whether there is such a run, and it is not deleted; raises UnreachableError."""
    with _reaching(tracking_uri):
        try:
            return client(tracking_uri).get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code in _FINAL:
                return False
            raise


def tagged(tracking_uri: str, experiment: str, tags: Mapping[str, str]) -> list[str]:
    """Ids of the experiment's runs that have all these tags and are not deleted, the newest first."""
    mlflow = client(tracking_uri)
    with _reaching(tracking_uri):
        found = mlflow.get_experiment_by_name(experiment)
        if found is None:
            return []
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        return [run.info.run_id for run in mlflow.search_runs([found.experiment_id], wanted)]


def set_tags(tracking_uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Sets tags of the run, what is too long for one cut; raises UnreachableError."""
    values = [RunTag(name, value) for name, value in _fitting(tags, limits.TAG).items()]
    with _reaching(tracking_uri):
        client(tracking_uri).log_batch(run_id, tags=values)


def discard(tracking_uri: str, run_id: str) -> None:
    """Deletes the run, as MLflow's UI does: it can be restored."""
    with _reaching(tracking_uri):
        client(tracking_uri).delete_run(run_id)


def read_bytes(tracking_uri: str, run_id: str, path_in_run: str) -> bytes:
    """The run's artifact `path_in_run`; raises ValueError where there is no such run or artifact."""
    try:
        with _reaching(tracking_uri), tempfile.TemporaryDirectory() as temporary:
            return Path(client(tracking_uri).download_artifacts(run_id, path_in_run, temporary)).read_bytes()
    except (MlflowException, OSError) as error:
        raise ValueError(f"run {run_id}: it has no {path_in_run} in {tracking_uri}") from error


def log_file(tracking_uri: str, run_id: str, path_in_run: str, path: str | Path) -> None:
    """Keeps the local file `path` as the run's artifact `path_in_run`; it is not read into memory."""
    folder, _, file_name = path_in_run.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        named = Path(temporary, file_name)
        named.symlink_to(Path(path).absolute())
        client(tracking_uri).log_artifact(run_id, str(named), folder or None)


def log_bytes(tracking_uri: str, run_id: str, path_in_run: str, data: bytes) -> None:
    """Keeps `data` as the run's artifact `path_in_run` (`folder/name.png`)."""
    folder, _, file_name = path_in_run.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, file_name)
        file.write_bytes(data)
        client(tracking_uri).log_artifact(run_id, str(file), folder or None)


def finish(tracking_uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Ends the run; raises UnreachableError."""
    with _reaching(tracking_uri):
        client(tracking_uri).set_terminated(run_id, status)


def metric(tracking_uri: str, run_id: str, name: str) -> float | None:
    """The metric's last value, None where the run has no such metric; raises ValueError where there is no such run."""
    try:
        return client(tracking_uri).get_run(run_id).data.metrics.get(name)
    except MlflowException as error:
        raise ValueError(f"run {run_id}: not found in {tracking_uri}") from error


def _experiment_id(mlflow: MlflowClient, tracking_uri: str, name: str) -> str:
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return mlflow.create_experiment(name, artifact_location=_artifact_location(tracking_uri, name))
        except MlflowException as error:
            # Another process may have made it since.
            found = mlflow.get_experiment_by_name(name)
            if found is None:
                raise ValueError(f"experiment {name}: cannot be created ({error.error_code})") from error
    if found.lifecycle_stage != "active":
        raise ValueError(f"experiment {name}: was deleted; restore it (mlflow experiments restore) or use another name")
    return found.experiment_id


def _artifact_location(tracking_uri: str, experiment: str) -> str | None:
    """None leaves it to the server. For SQLite MLflow would take `./mlruns` of whoever comes first."""
    if not tracking_uri.startswith(_SQLITE):
        return None
    database = Path(tracking_uri.removeprefix(_SQLITE))
    # Experiments whose names begin alike may share a folder: below it everything has the id of a run or a model.
    return (database.resolve().parent / "artifacts" / re.sub(r"[^\w.-]+", "-", experiment)[:_FOLDER]).as_uri()
