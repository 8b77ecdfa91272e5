"""The files that a cluster is started and fed with, by the checks of those who read them."""

import copy
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def check_cluster(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_cluster_file_passes_the_launchers_own_check():
    prepared = check_cluster(read("cluster.yaml"))
    workers = {name: kind for name, kind in prepared["available_node_types"].items() if name != "head"}
    assert any(kind["resources"].get("GPU") for kind in workers.values())
    assert all(kind["min_workers"] < kind["max_workers"] for kind in workers.values()), "autoscaled"


def test_the_launchers_check_refuses_what_it_should():
    cluster = read("cluster.yaml")
    with pytest.raises(jsonschema.ValidationError, match="worker_start_commands"):
        check_cluster({**cluster, "worker_start_commands": ["ray start"]})
    with pytest.raises(ValueError, match="head_node_type"):
        check_cluster({**cluster, "head_node_type": "none"})


def test_every_node_asks_for_a_token_and_sends_no_telemetry():
    cluster = read("cluster.yaml")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in cluster[key] if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_USAGE_STATS_ENABLED=0" in start
        assert "--dashboard-host=127.0.0.1" in start or "--head" not in start
    assert "~/.ray/auth_token" in cluster["file_mounts"].values()
    for permission in cluster["provider"]["security_group"]["IpPermissions"]:
        assert permission["ToPort"] == 22
        assert all(network["CidrIp"] != "0.0.0.0/0" for network in permission["IpRanges"])


def test_cluster_files_hold_no_secret():
    for name in ("cluster.yaml", "configs/runtime_env.yaml", "configs/mlflow-server.env", "serving/config.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        secret = r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|(?i:secret|password|token)\s*[:=]\s*['\"]?[0-9a-f]{8}"
        assert not re.search(secret, text)


def test_nodes_have_the_ray_and_the_python_of_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ray_version = next(re.findall(r"==(\S+)$", line)[0] for line in project["dependencies"] if line.startswith("ray["))
    minor = re.findall(r">=3\.(\d+)", project["requires-python"])[0]
    assert f"ray:{ray_version}-py3{minor}" in read("cluster.yaml")["docker"]["image"]
    lock = (ROOT / "requirements-gpu.lock").read_text(encoding="utf-8")
    assert f"\nray=={ray_version} " in lock
    assert read("cluster.yaml")["file_mounts"]["/home/ray/requirements-gpu.lock"] == "requirements-gpu.lock"


def test_a_jobs_upload_imports_on_a_machine_that_has_only_the_packages(tmp_path: Path):
    """Packs what `ray job submit` would, with Ray's own code, and runs from the unpacked copy alone."""
    from ray._private.runtime_env.packaging import create_package
    from ray.runtime_env import RuntimeEnv

    environment = RuntimeEnv(**read("configs/runtime_env.yaml"))
    assert environment["working_dir"] == "."
    (module,) = environment["py_modules"]
    arguments = {"include_gitignore": True, "excludes": environment["excludes"]}
    create_package(str(ROOT), tmp_path / "work.zip", **arguments)
    create_package(str(ROOT / module), tmp_path / "module.zip", include_parent_dir=True, **arguments)
    for name in ("work", "module"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as package:
            package.extractall(tmp_path / name)
    for source in (ROOT / module).rglob("*.py"):
        assert (tmp_path / "module" / source.relative_to((ROOT / module).parent)).is_file()
    top = {path.name for path in (tmp_path / "work").iterdir()}
    assert {"jobs", "serving", "configs"} <= top
    assert not top & {".venv", ".git", "tests", "demo", "platform"}
    assert (tmp_path / "work" / "serving" / "web" / "index.html").is_file()
    program = "import rayseg, jobs.prepare; print(rayseg.__file__, jobs.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "work",
        env={"PYTHONPATH": f"{tmp_path / 'module'}:{tmp_path / 'work'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    for origin in done.stdout.split():
        assert origin.startswith(str(tmp_path)), "imported from elsewhere"


def test_serve_config_is_what_serve_takes_and_names_our_deployments():
    from ray.serve.schema import ServeDeploySchema

    from rayseg import config
    from serving.app import APP_NAME, ServeConfig
    from serving.ingress import Ingress
    from serving.replica import Model

    schema = ServeDeploySchema.model_validate(read("serving/config.yaml"))
    assert schema.http_options.host == "127.0.0.1"
    assert schema.logging_config is not None
    assert not schema.logging_config.enable_access_log
    (application,) = schema.applications
    assert (application.name, application.import_path) == (APP_NAME, "serving.app:application")
    assert config.build(ServeConfig, application.args).max_batch_size == 16
    assert {deployment.name for deployment in application.deployments} <= {Ingress.name, Model.name}
