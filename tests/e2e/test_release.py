"""A release on a cluster: a node that asks for tokens and has another version lying about; HTTPS; the client."""

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from rayseg import build, release
from rayseg.data import synthetic
from rayseg.data.synthetic import slice_bytes
from tests import bundles
from tests.certificates import Certificates, make
from tests.ports import free_port, free_ports
from tests.releases import ROOT, git, repository

BIN = Path(sys.executable).parent
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # nodes and drivers take no other address
TOKEN, CLUSTER_TOKEN = "token-of-the-service", "0123456789abcdef" * 4

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Cluster:
    """A node of a Ray cluster with three CPUs and the dashboard."""

    gcs: str
    dashboard: str
    logs: Path

    def environment(self) -> dict[str, str]:
        """Of a shell beside it that has the token, with this checkout's code."""
        return shell() | LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": CLUSTER_TOKEN, "RAY_ADDRESS": self.gcs}

    def written(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.logs.glob("*.err"))


def shell() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    other = tmp_path_factory.mktemp("node") / "site-packages"
    shutil.copytree(ROOT / "platform" / "rayseg", other / "rayseg", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "rayseg" / "retry.py").write_text((other / "rayseg" / "retry.py").read_text() + "# of last year\n")
    environment = shell() | {
        "PYTHONPATH": str(other),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": CLUSTER_TOKEN,
        **LOOPBACK,
    }
    for last in (False, False, True):  # another process can take a port before the node does
        with node(environment) as (cluster, ended):
            wait(lambda: asked(cluster.dashboard) == 200 or ended() is not None, lambda: told(cluster))
            if ended() is None:
                yield cluster
                return
            assert not last, f"the node ended by itself with {ended()}:\n{told(cluster)}"


@contextmanager
def node(environment: dict[str, str]) -> Iterator[tuple[Cluster, Callable[[], int | None]]]:
    """A node on its way up, and what tells its exit code once it has ended."""
    folder = Path(tempfile.mkdtemp(prefix="rayseg-"))  # sockets have short paths
    gcs, dashboard, *more = free_ports(7)
    others = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "runtime-env-agent",
        "metrics-export",
        "ray-client-server",
    )
    command = [
        *(BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--{name}-port={port}" for name, port in zip(others, more, strict=True)),
        *("--num-cpus=3", "--object-store-memory=200000000", f"--temp-dir={folder}"),
    ]
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, env=environment, cwd="/", stdout=out, stderr=out)
    try:
        yield (
            Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", folder / "session_latest" / "logs"),
            process.poll,
        )
    finally:
        # Kindly it would first wait for the replicas to move to another node. One that ended by itself has no children.
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def told(cluster: Cluster) -> str:
    """What the node said where it was started, and the ends of its own logs."""
    logs = [path for pattern in ("*.err", "gcs_server.out", "raylet.out") for path in cluster.logs.glob(pattern)]
    ends = [f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in logs]
    return "\n".join([(cluster.logs.parents[1] / "out").read_text(), *ends])


def asked(dashboard: str, token: str | None = CLUSTER_TOKEN) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return httpx.get(f"{dashboard}/api/serve/applications/", headers=headers, timeout=30).status_code
    except httpx.TransportError:
        return 0


def wait(there: Any, told: Any, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make(tmp_path_factory.mktemp("certificates"), "IP:127.0.0.1")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    synthetic.write_studies(str(folder / "studies"), 2, 3, 64, masks=False)
    return folder


@pytest.fixture(scope="module")
def service(
    cluster: Cluster, certificates: Certificates, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """`make release`, and `serve deploy` of what it made; the URL, once it answers there."""
    folder = tmp_path_factory.mktemp("service")
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    bundles.register(tracking_uri, "tiny", bundles.write_bundle(folder / "bundle", 100), "champion")
    (folder / "tokens").write_text(f"ward:submit:{sha256(TOKEN.encode()).hexdigest()}\n")
    clone = repository(folder / "clone")
    release.build(clone, folder / "dist", f"file://{folder}/dist")
    config = yaml.safe_load((folder / "dist" / "serve.yaml").read_text())
    port = free_port()
    config["http_options"] |= {
        "port": port,
        "ssl_certfile": str(certificates.certificate),
        "ssl_keyfile": str(certificates.key),
    }
    (application,) = config["applications"]
    application["runtime_env"]["env_vars"]["RAYSEG_TOKENS_FILE"] = str(folder / "tokens")
    places = {"sources": [str(archive)], "destinations": [str(archive)]}
    application["args"] = {"tracking_uri": tracking_uri, "model_uri": "models:/tiny@champion", "jobs": places}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    deploy = [BIN / "serve", "deploy", folder / "serve.yaml", "--address", cluster.dashboard]
    subprocess.run(deploy, check=True, env=cluster.environment(), cwd="/")
    url = f"https://127.0.0.1:{port}"
    context = ssl.create_default_context(cafile=certificates.authority)

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/healthz", verify=context, timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    wait(
        ready,
        lambda: (
            subprocess.run(
                [BIN / "serve", "status", "--address", cluster.dashboard],
                capture_output=True,
                text=True,
                env=cluster.environment(),
            ).stdout
        ),
    )
    assert f"commit {git(clone, 'rev-parse', 'HEAD')[:12]}" in cluster.written()
    return url


def segment(url: str, source: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "rayseg.command", "ask", str(source), "--server", url]
    return subprocess.run(command, env=shell() | environment, capture_output=True, text=True, timeout=120)


def test_the_release_answers_over_https(
    service: str, cluster: Cluster, certificates: Certificates, tmp_path: Path
) -> None:
    source = tmp_path / "slice.dcm"
    source.write_bytes(slice_bytes(3, 64))
    trusted = {"SSL_CERT_FILE": str(certificates.authority)}
    done = segment(service, source, RAYSEG_TOKEN=TOKEN, **trusted)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "tiny"
    for refused, told in (
        (segment(service, source, **trusted), "401 unauthorized"),
        (segment(service, source, RAYSEG_TOKEN=TOKEN), "CERTIFICATE_VERIFY_FAILED"),
        (segment(service.replace("https", "http"), source, RAYSEG_TOKEN=TOKEN), "rayseg: http://127.0.0.1"),
    ):
        assert refused.returncode in (3, 4), refused.stderr
        assert told in refused.stderr
        assert TOKEN not in refused.stderr


def test_replicas_run_the_release_and_not_what_lies_on_the_node(service: str, cluster: Cluster) -> None:
    told = re.findall(r"^rayseg and serving (.*) from (.*)$", cluster.written(), flags=re.MULTILINE)
    assert len(told) >= 2, "the ingress and the model"
    assert {code.rpartition("code ")[2] for code, _ in told} == {f"{build.sha256('rayseg', 'serving')[:12]})"}
    assert all("/working_dir_files/" in where for _, where in told)


def test_bulk_jobs_run_the_release_too(service: str, certificates: Certificates, archive: Path, tmp_path: Path) -> None:
    context = ssl.create_default_context(cafile=certificates.authority)
    with httpx.Client(
        base_url=service, verify=context, timeout=30, headers={"Authorization": f"Bearer {TOKEN}"}
    ) as client:
        ask = {"source": str(archive / "studies"), "destination": str(archive / "results")}
        asked = client.post("/v1/jobs", json=ask)
        assert asked.status_code == 202, asked.text
        wait(
            lambda: client.get(f"/v1/jobs/{asked.json()['id']}").json()["state"] not in ("running", "cancelling"),
            lambda: client.get(f"/v1/jobs/{asked.json()['id']}").text,
        )
        ended = client.get(f"/v1/jobs/{asked.json()['id']}").json()
    assert ended["state"] == "succeeded", ended
    assert ended["result"]["segmented"] == 2


def test_other_code_on_a_node_is_refused_unless_the_jobs_own_travels_with_it(cluster: Cluster) -> None:
    lines = ("import ray", "from rayseg import cluster, retry", "cluster.connect()")
    program = "; ".join((*lines, "print(ray.get(ray.remote(num_cpus=0)(retry.tried).remote(lambda: 'done')))"))
    driver = [sys.executable, "-c", program]
    options = {"env": cluster.environment(), "cwd": "/", "capture_output": True, "text": True, "timeout": 120}
    refused = subprocess.run(driver, **options)
    assert refused.returncode == 1
    own = re.escape(str(build.current()))
    assert re.search(rf"rayseg 0.1.0 .*/site-packages/rayseg is not the driver's, {own}", refused.stderr)
    environment = json.dumps({"py_modules": [str(ROOT / "platform" / "rayseg")]})
    submit = [BIN / "ray", "job", "submit", "--address", cluster.dashboard, "--runtime-env-json", environment]
    done = subprocess.run([*submit, "--", *driver], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\ndone\n" in done.stdout


def test_nobody_without_the_token_gets_into_the_cluster(cluster: Cluster) -> None:
    assert asked(cluster.dashboard) == 200
    assert [asked(cluster.dashboard, token) for token in (None, "fedcba9876543210" * 4)] == [401, 403]
