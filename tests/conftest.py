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
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    TF_CPP_MIN_LOG_LEVEL="3",
    RAYSEG_PSEUDONYM_KEY="a key for tests only",
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

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
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
