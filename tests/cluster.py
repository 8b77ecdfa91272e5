"""A Ray cluster of several hosts: a head without CPUs and two workers, with tokens and TLS, an S3 store and MLflow.

All of it is for whoever sits outside, at the switch: the store and MLflow run there, and jobs are submitted from there.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.hosts import DISK, NETWORK, Host, Network, network

ROOT = Path(__file__).parents[1]
BUCKET = "rayseg"  # as in configs/demo.yaml
HEAD, WORKERS = ("head", 2), (("one", 3), ("two", 4))
HEAD_ADDRESS = f"{NETWORK}.{HEAD[1]}"
RAY_PORT, JOBS_PORT, METRICS_PORT, MLFLOW_PORT = 6379, 8265, 9100, 5000
CPUS_PER_WORKER = 2
READY_S = 120.0
OBJECT_STORE_BYTES = 150_000_000
TLS = f"{DISK}/.ray/tls"  # as in the launcher's files; a host's disk is its home
AUTHORITY = 'openssl req -x509 -newkey rsa:3072 -nodes -days 1 -subj "/CN=tests" -keyout ca.key -out ca.crt'
_LOCAL = yaml.safe_load((ROOT / "configs" / "cluster-local.yaml").read_text(encoding="utf-8"))
# What is left out are packages, which these hosts see as they are.
SET_UP = [command for command in _LOCAL["setup_commands"] if "/.ray/" in command]
# Of a host that is silent the cluster knows after some three seconds, not a minute.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
_STORE = """
import json, sys
from rayseg.demo.store import object_store
with object_store(sys.argv[1], sys.argv[2], sys.argv[3]) as environment:
    print(json.dumps(environment), flush=True)
    sys.stdin.read()
"""
# All nodes are there, and MLflow.
_AWAIT = """
import json, sys, time, urllib.request
def ask(url, headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return answer.read()
    except OSError:
        return b""
while True:
    summary = json.loads(ask(sys.argv[1], json.loads(sys.argv[2])) or "{}").get("data", {}).get("summary", [])
    alive = [node for node in summary if node["raylet"].get("state") == "ALIVE"]
    if len(alive) == int(sys.argv[3]) and ask(sys.argv[4], {}):
        break
    time.sleep(0.2)
"""


@dataclass
class Job:
    """A job that was submitted, by its command that follows it."""

    process: subprocess.Popen[str]
    log: Path

    def output(self) -> str:
        """What it has told so far."""
        return self.log.read_text(encoding="utf-8")

    def wait(self, timeout: float = 420) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {timeout} s:\n{self.output()[-5000:]}") from None

    def follow(self, beginning: str, timeout: float = 300) -> dict[str, Any]:
        """The first line, JSON, that begins so, as soon as the job tells it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.output().splitlines():
                if line.startswith(beginning):
                    return json.loads(line)
            time.sleep(0.1)
        raise AssertionError(self.output()[-8000:])

    def result(self, timeout: float = 420) -> dict[str, Any]:
        """The JSON line that a job of ours ends with."""
        code, text = self.wait(timeout), self.output()
        assert code == 0, text[-8000:]
        return json.loads([line for line in text.splitlines() if line.startswith("{") and '"asctime"' not in line][-1])


class Cluster:
    """A running one, seen from outside."""

    def __init__(self, network: Network, folder: Path, environment: dict[str, str]) -> None:
        self.network, self._folder, self._jobs = network, folder, 0
        self.outside = network.outside
        self._environment = environment
        self._authority = folder / "authority"
        self._authority.mkdir()
        subprocess.run(["sh", "-c", AUTHORITY], cwd=self._authority, check=True, capture_output=True)
        self.token = secrets.token_hex(32)  # of Ray
        self.hosts: dict[str, Host] = {}
        self._secure(self.outside)
        self.address = f"http://{HEAD_ADDRESS}:{JOBS_PORT}"
        self.tracking_uri = f"http://{self.outside.address}:{MLFLOW_PORT}"

    def boot(self, name: str, number: int, disk: Path | None = None) -> None:
        """Boots a host and starts Ray on it; with `disk` it has the files of one that was killed."""
        host = self.network.host(name, number, disk)
        self.hosts[name] = host
        self._secure(host)
        host.environment |= {
            **self._environment,
            **QUICK,
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": f"{TLS}/node.crt",
            "RAY_TLS_SERVER_KEY": f"{TLS}/node.key",
            "RAY_TLS_CA_CERT": f"{TLS}/ca.crt",
        }
        if name == HEAD[0]:
            host.environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": f"{DISK}/gcs"}
        role = (
            ["--head", f"--port={RAY_PORT}", f"--dashboard-host={host.address}", "--num-cpus=0"]
            if name == HEAD[0]
            else [
                f"--address={HEAD_ADDRESS}:{RAY_PORT}",
                f"--num-cpus={CPUS_PER_WORKER}",
                '--resources={"decode":2}',
            ]
        )
        common = [f"--node-ip-address={host.address}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        done = host.run(["ray", "start", *role, *common, f"--metrics-export-port={METRICS_PORT}"], timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self, name: str) -> None:
        """A host is gone without a word: first its cable, then its power."""
        host = self.hosts.pop(name)
        self.network.unplug(host)
        host.kill()

    def submit(self, *command: str, environment: Mapping[str, str] = {}) -> Job:
        """`ray job submit` from outside, with the runtime environment of the repository."""
        self._jobs += 1
        log = self._folder / f"job-{self._jobs}.log"
        with log.open("wb") as output:
            process = self.outside.start(
                ["ray", "job", "submit", "--address", self.address, "--runtime-env",
                 "configs/runtime_env.yaml", "--", "python", "-m", *command],
                # Or what the job tells stays in this command's buffer, as it writes to a file.
                {"PYTHONUNBUFFERED": "1", **environment}, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
            )  # fmt: skip
        return Job(process, log)

    def python(self, program: str, *arguments: str, timeout: float = 150) -> Any:
        """Runs a program outside, with the keys of the store; returns the JSON that it prints last."""
        done = self.outside.run(
            [sys.executable, "-c", program, *arguments],
            {**self._environment, "PYTHONPATH": str(ROOT / "platform")},
            timeout,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads(done.stdout.splitlines()[-1])

    def await_ready(self) -> None:
        """Waits until all hosts have joined, and MLflow answers."""
        token = {"Authorization": f"Bearer {self.token}"}
        nodes = f"{self.address}/nodes?view=summary"
        asked = [nodes, json.dumps(token), str(len(self.hosts)), f"{self.tracking_uri}/health"]
        done = self.outside.run([sys.executable, "-c", _AWAIT, *asked], timeout=READY_S)
        assert done.returncode == 0, done.stderr

    def _secure(self, host: Host) -> None:
        """Puts the token and the authority onto the host's disk, and certifies it as the launcher's file does."""
        home = host.folder / ".ray"
        shutil.copytree(self._authority, home / "tls", dirs_exist_ok=True)
        (home / "auth_token").write_text(self.token, encoding="ascii")
        for command in SET_UP:
            done = host.run(["sh", "-e", "-c", command])
            assert done.returncode == 0, done.stderr
        host.environment |= {
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }


@contextlib.contextmanager
def cluster(environment: Mapping[str, str] = {}) -> Iterator[Cluster]:
    """The cluster with all that belongs to it, until the end of the block; `environment` is of the nodes, too.

    The hosts see nothing of our code but what jobs bring.
    """
    with contextlib.ExitStack() as running:
        # Short, as sockets' paths have to be; outside of the hosts' own disks.
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="rayseg-hosts-")))
        code = [ROOT / name for name in ("platform", "jobs", "serving", "tests")]
        hosts = running.enter_context(network(folder, code))
        outside = hosts.outside
        log = running.enter_context((folder / "outside.log").open("wb"))
        store = outside.start(
            [sys.executable, "-c", _STORE, str(folder / "store"), BUCKET, outside.address],
            {"PYTHONPATH": str(ROOT / "platform")}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        outside.start(
            [sys.executable, "-m", "mlflow", "server", "--host", outside.address, "--port", str(MLFLOW_PORT),
             "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", f"s3://{BUCKET}/mlflow",
             "--no-serve-artifacts", "--workers", "1"],
            {
                "MLFLOW_SERVER_ALLOWED_HOSTS": f"{outside.address}:*",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
            stdout=log, stderr=log,
        )  # fmt: skip
        assert store.stdout is not None
        keys = json.loads(store.stdout.readline())
        made = Cluster(hosts, folder, {**keys, "RAYSEG_PSEUDONYM_KEY": "a key for tests only", **environment})
        for name, number in (HEAD, *WORKERS):
            made.boot(name, number)
        made.await_ready()
        yield made
