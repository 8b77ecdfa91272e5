"""Secrets come from the environment or from files: no configuration, shipped or possible, has a place for one."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayseg import config
from rayseg.benchmark.suite import BenchmarkConfig
from rayseg.data.catalog import CatalogConfig
from rayseg.data.prepare import PrepareConfig
from rayseg.demo.pipeline import DemoConfig
from rayseg.evaluation.compare import CompareConfig
from rayseg.evaluation.diff import DiffConfig
from rayseg.evaluation.evaluate import EvaluateConfig
from rayseg.evaluation.promote import PromoteConfig
from rayseg.inference.archive import SegmentConfig
from rayseg.training.settings import TrainConfig
from rayseg.training.tune import TuneConfig
from serving.app import ServeConfig

ROOT = Path(__file__).parents[2]
JOBS = {
    *(BenchmarkConfig, CatalogConfig, PrepareConfig, DemoConfig, CompareConfig, DiffConfig, EvaluateConfig),
    *(PromoteConfig, SegmentConfig, TrainConfig, TuneConfig, ServeConfig),
}
SECRET = re.compile(r"secret|passw|token|credential|api_?key|access_?key|private|_key$|auth$", re.IGNORECASE)
# Paths, numbers and modes, and the names of secrets that are elsewhere.
NO_SECRET = re.compile(
    r"(file|_path|_mode|secretname|ssh_private_key)$|^requests_per_token$|^httptokens$|^/", re.IGNORECASE
)
LOOKS = re.compile(r"AKIA[0-9A-Z]{12}|BEGIN [A-Z ]*PRIVATE KEY|://[^/\s]*:[^/\s]*@|\b[0-9a-f]{32,}\b")


def shipped() -> list[Path]:
    files = [path for path in sorted(ROOT.glob("configs/**/*")) if path.is_file()]
    return [*files, ROOT / "cluster.yaml", ROOT / "serving" / "config.yaml"]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        if {"name", "value"} <= value.keys():  # an environment variable, as Kubernetes has them
            yield str(value["name"]), value["value"]
        for name, inner in value.items():
            if name != "secretKeyRef":  # which of Kubernetes' secrets
                yield from leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, key)
    else:
        yield key, value


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_shipped_configurations_hold_no_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not LOOKS.search(text)
    if path.suffix == ".env":
        found = [line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#")]
    else:
        found = [leaf for document in yaml.safe_load_all(text) for leaf in leaves(document)]
    assert found
    for name, value in found:
        if SECRET.search(name) and not NO_SECRET.search(name):
            is_path = isinstance(value, str) and value.startswith(("/", "~/"))
            assert value in (None, "", "YOUR-KEY") or isinstance(value, bool | int) or is_path, name


def test_what_looks_like_a_secret_is_found() -> None:
    for text in ("password: hunter2", "AWS_SECRET_ACCESS_KEY: abc", "env: [{name: RAYSEG_DICOMWEB_TOKEN, value: abc}]"):
        names = [name for name, value in leaves(yaml.safe_load(text)) if value in ("hunter2", "abc")]
        assert any(SECRET.search(name) and not NO_SECRET.search(name) for name in names), text
    for text in ("x://me:hunter2@host", "k: 0123456789abcdef0123456789abcdef", "-----BEGIN EC PRIVATE KEY-----"):
        assert LOOKS.search(text)


def fields(of: Any) -> Iterator[str]:
    for field in dataclasses.fields(of):
        yield field.name
        for inner in config._dataclasses_of(field.type):
            yield from fields(inner)


def test_no_setting_takes_a_secret() -> None:
    names = {name for job in JOBS for name in fields(job)}
    assert {"tracking_uri", "ssl_keyfile", "requests_per_token"} <= names
    assert [name for name in names if SECRET.search(name) and not NO_SECRET.search(name)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tracking_uri", "http://me:hunter2@mlflow:5000"),
        ("tracking_uri", "postgresql+psycopg://me:hunter2@db/mlflow"),
        ("pacs", "https://:hunter2@pacs/dicom-web"),
    ],
)
def test_a_password_in_a_url_is_refused_and_not_told(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"config key {key}: a URL with a password") as refused:
        config.build(ServeConfig, {"tracking_uri": "sqlite:///x.db", key: value})
    assert "hunter2" not in str(refused.value)


def test_other_urls_are_taken() -> None:
    for uri in ("postgresql+psycopg://mlflow@db:5432/mlflow", "http://mlflow:5000", "s3://a/b@c:d", "sqlite:////a:b@c"):
        assert config.build(ServeConfig, {"tracking_uri": uri}).tracking_uri == uri
