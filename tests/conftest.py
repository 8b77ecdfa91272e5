"""Fixtures that several test folders share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports Ray or MLflow: no telemetry, no token written to the home folder, a key for pseudonyms.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # loopback
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # a process for each training, which costs seconds
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    TF_CPP_MIN_LOG_LEVEL="3",
    TF_ENABLE_ONEDNN_OPTS="1",  # as `rayseg` has it: tests may import TensorFlow first
    RAYSEG_PSEUDONYM_KEY="a key for tests only",
    RAYSEG_DICOMWEB_USER="tests",  # of the Orthanc that tests start: processes of the Ray cluster know it, too
    RAYSEG_DICOMWEB_PASSWORD="a password for tests only",
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; skips where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data (../shared/data) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for the whole session, four logical CPUs on loopback."""
    import ray

    from rayseg import cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(cluster.API_SERVER, cluster.NOBODY)  # nodes inherit it
        with cluster.own_agent_port():
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=True,  # has the API of bulk jobs
                dashboard_host="127.0.0.1",
                object_store_memory=300_000_000,
                log_to_driver=False,
            )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server (SeaweedFS) with the bucket `tests`; yields the AWS_* variables that reach it."""
    from rayseg.demo.store import object_store

    with object_store(tmp_path_factory.mktemp("store"), "tests") as environment:
        yield environment


@pytest.fixture
def s3_store(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Base URI of the bucket, with the environment set for this process."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return "s3://tests"


@pytest.fixture
def tracking_uri(tmp_path: Path) -> str:
    """A fresh MLflow SQLite store."""
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a prepared set of 22, 7 and 3 bright discs on noise, 32x32, a patient a row."""
    import numpy as np
    import pyarrow as pa

    from rayseg import storage
    from rayseg.config import plain
    from rayseg.data.labels import Labels
    from rayseg.data.prepared import DESCRIPTION, PATIENTS, VERSION
    from rayseg.data.preprocess import Preprocess
    from rayseg.records import PREPARED

    root, size, wanted = str(tmp_path_factory.mktemp("discs")), 32, {"train": 22, "val": 7, "test": 3}
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    for split, rows in wanted.items():
        table = []
        for row in range(rows):
            centre_y, centre_x, radius = [*random.uniform(8, 24, 2).tolist(), random.uniform(3, 8)]
            mask = ((y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2).astype(np.uint8)
            image = np.clip(random.normal(90, 20, mask.shape) + 70 * mask, 0, 255).astype(np.uint8)
            table.append(
                {
                    "row_id": f"{split}{row}",
                    "patient_key": f"{split}{row}",
                    "split": split,
                    "foreground_pixels": int(mask.sum()),
                    "image": image.tobytes(),
                    "mask": mask.tobytes(),
                }
            )
        path = storage.join(root, f"split={split}/part-00000.parquet")
        storage.write_table(path, pa.Table.from_pylist(table, schema=PREPARED), 4)
    description = {
        "version": VERSION,
        "digest": "0" * 64,
        "preprocess": plain(Preprocess(size=(size, size))),
        "labels": plain(Labels()),
        "shape": [size, size, 1],
        "rows": wanted,
        "shards": {split: [f"split={split}/part-00000.parquet"] for split in wanted},
        "shard_rows": {split: [rows] for split, rows in wanted.items()},
        "row_group_rows": 4,
    }
    storage.write_json(storage.join(root, DESCRIPTION), description)
    storage.write(storage.join(root, PATIENTS), b"patient_key,part,split,rows,positive\ntrain0,train,train,1,1\n")
    return root
