"""The whole way on three hosts, submitted from outside with a token over TLS; workers' hosts die on the way.

A head and two workers, each in namespaces of its own with its own address, disk and shared memory (see `tests.hosts`).
The tests stand in the order of the stages and share the cluster: each needs what those before it have left.
"""

import hashlib
import secrets
from collections.abc import Iterator

import pytest

from tests import hosts
from tests.cluster import CPUS_PER_WORKER, HEAD, RAY_PORT, TLS, WORKERS, Cluster, Job, cluster

REASON = hosts.unsupported()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"hosts cannot be made: {REASON}"),
]

RECIPE = ("--config", "configs/demo.yaml")
TOKEN = secrets.token_hex(32)  # of the service
SERVE_PORT = 8000
ARCHIVE_PATIENTS, ARCHIVE_SLICES = 40, 6

FILL = """
import sys
from rayseg.data import synthetic
synthetic.write_studies("s3://rayseg/studies", 16, 4, 64)
synthetic.write_studies("s3://rayseg/archive", int(sys.argv[1]), int(sys.argv[2]), 192, seed=1, masks=False)
print("{}")
"""
# Waits until so many objects of this kind are below the prefix.
AWAIT = """
import sys, time
from rayseg import storage
prefix, suffix, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
found = 0
while found < count:
    time.sleep(0.1)
    if storage.exists(prefix):
        found = sum(info.uri.endswith(suffix) for info in storage.list_files(prefix))
print("{}")
"""
LEDGER = """
import hashlib, json, sys
from rayseg import storage, tables
from rayseg.inference import ledger
rows = tables.read("s3://rayseg/segmentations/ledger").to_pylist()
kept = {row["series_key"]: row["verdict"] for row in rows}
stored = {uri: hashlib.sha256(storage.read(uri)).hexdigest() for row in rows for uri in ledger.uris(row, "seg")}
print(json.dumps({"rows": len(rows), "kept": kept, "stored": stored}))
"""
# Asks the service for a mask until it gives one; tells what it said before.
ASK = """
import json, sys, time
import httpx
from rayseg.data.synthetic import slice_bytes
url, token, authority = sys.argv[1:]
client = httpx.Client(verify=authority, timeout=20)
headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/dicom"}
stranger = {**headers, "Authorization": "Bearer nobody"}
path = f"{url}/v1/segment"
statuses = []
while 200 not in statuses:
    try:
        answer = client.post(path, content=slice_bytes(), headers=headers)
        statuses.append(answer.status_code)
    except httpx.TransportError as error:
        statuses.append(type(error).__name__)
        time.sleep(0.2)
refused = [client.post(path, content=slice_bytes(), headers=one).status_code for one in ({}, stranger)]
told = {"refused": refused, "statuses": statuses, "answer": answer.json()}
print(json.dumps(told))
"""
# Waits until so many replicas run.
AWAIT_REPLICAS = """
import sys, time
import httpx
url, token, count = sys.argv[1:]
states = []
while states != ["RUNNING"] * int(count):
    time.sleep(0.1)
    applications = httpx.get(url, headers={"Authorization": f"Bearer {token}"}).json()["applications"]
    states = [one["state"] for one in applications["rayseg"]["deployments"]["model"]["replicas"]]
print("{}")
"""
# The bulk job that the service runs over HTTP, once it has ended.
JOBS = "{sources: [s3://rayseg/archive], destinations: [s3://rayseg/again]}"
ASK_JOB = """
import json, sys, time
import httpx
url, token, authority = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}"}
client = httpx.Client(base_url=url, verify=authority, timeout=120, headers=headers)
asked = client.post("/v1/jobs", json={"source": "s3://rayseg/archive", "destination": "s3://rayseg/again"})
asked.raise_for_status()
while (job := client.get(f"/v1/jobs/{asked.json()['id']}").json())["state"] == "running":
    time.sleep(0.2)
print(json.dumps(job))
"""
# What a stranger in the neighbourhood gets: statuses of the dashboard, and what becomes of a TLS call without a
# certificate and of a call in the clear to the port that nodes talk to.
STRANGER = """
import json, socket, ssl, sys
import httpx
address, head, port, authority = sys.argv[1:]
paths = ("/api/jobs/", "/nodes?view=summary", "/api/serve/applications/", "/api/cluster_status")
statuses = [httpx.get(address + path).status_code for path in paths]
statuses.append(httpx.post(address + "/api/jobs/", json={"entrypoint": "id"}).status_code)
def call(wrap):
    try:
        with wrap(socket.create_connection((head, int(port)), timeout=10)) as line:
            line.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes(3) + bytes([4]) + bytes(5))
            return line.recv(9).hex()
    except OSError as error:
        return type(error).__name__
context = ssl.create_default_context(cafile=authority)
print(json.dumps({
    "statuses": statuses,
    "without certificate": call(lambda line: context.wrap_socket(line, server_hostname=head)),
    "in the clear": call(lambda line: line),
}))
"""
AUTHORITY = f"{TLS}/ca.crt"


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    """The cluster, with studies and an archive in its store."""
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    with cluster({"RAYSEG_TOKENS": f"tests:submit:{digest}"}) as made:
        made.python(FILL, str(ARCHIVE_PATIENTS), str(ARCHIVE_SLICES))
        yield made


def submit(three: Cluster, stage: str, *assignments: str) -> Job:
    """A stage as docs/how-to/submit.md submits it, on the demo's recipe."""
    settings = [part for one in assignments for part in ("--set", one)]
    return three.submit(f"jobs.{stage}", *RECIPE, *settings)


def at_work(three: Cluster, name: str, what: str) -> bool:
    """Whether a process of Ray with these words in its title runs on the host."""
    titles = three.hosts[name].run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'"]).stdout
    return any(line.startswith("ray::") and what in line for line in titles.splitlines())


def test_a_stranger_is_refused(three: Cluster) -> None:
    head = three.hosts[HEAD[0]].address
    found = three.python(STRANGER, three.address, head, str(RAY_PORT), AUTHORITY)
    assert found["statuses"] == [401] * 5
    assert found["without certificate"] in ("SSLError", "ConnectionResetError", ""), found
    assert found["in the clear"] in ("ConnectionResetError", ""), found
    for token in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        job = three.submit("jobs.catalog", *RECIPE, environment=token)
        assert job.wait() != 0
        assert "oken" in job.output()


def test_catalog_and_prepare(three: Cluster) -> None:
    cataloged = submit(three, "catalog", "resources={decode: 1}").result()
    assert (cataloged["accepted"], cataloged["rejected"]) == (64, 0)
    prepared = submit(three, "prepare", "preprocess.size=[32, 32]", "resources={decode: 1}").result()
    assert prepared["rows"] == 64
    hopeless = submit(three, "prepare", "output=s3://rayseg/other", "resources={decode: 3}")
    assert hopeless.wait() != 0
    assert "prepare.resources: needs 1 CPU + 3 decode on one node, but the largest node has 2 decode" in (
        hopeless.output()
    )


def test_training_outlives_a_host(three: Cluster) -> None:
    """Its two workers fill a host each; when one goes they begin again, on the other and on what replaces it."""
    epochs = 12
    job = submit(
        three, "train", f"tracking_uri={three.tracking_uri}", f"epochs={epochs}", "model.widths=[4, 8]",
        f"cpus_per_worker={CPUS_PER_WORKER}",
    )  # fmt: skip
    three.python(AWAIT, "s3://rayseg/runs", "/latest.json", "1", timeout=300)
    assert all(at_work(three, name, "TrainWorker") for name, _ in WORKERS)
    name, number = WORKERS[1]
    three.kill(name)
    three.boot(name, number)
    trained = job.result()
    assert trained["restarts"] == 1
    assert [row["epoch"] for row in trained["history"]] == list(range(1, epochs + 1))


def test_tune_evaluate_and_promote(three: Cluster) -> None:
    tracked = f"tracking_uri={three.tracking_uri}"
    swept = submit(
        three, "tune", f"train.{tracked}", "train.epochs=1", "train.model.widths=[4, 8]", "train.num_workers=1",
        f"train.cpus_per_worker={CPUS_PER_WORKER}", "tune.trials=2", "tune.grace_epochs=1",
    ).result()  # fmt: skip
    assert (swept["completed"], swept["failed"]) == (2, 0)
    evaluated = submit(three, "evaluate", tracked).result()
    assert evaluated["model_uri"] == swept["model_uri"]
    assert submit(three, "promote", tracked).result()["promoted"]


def test_an_archive_run_outlives_a_host(three: Cluster) -> None:
    """Two actors that fill a host each; the one that is left does the rest, and every series has one row."""
    job = submit(
        three, "segment", f"tracking_uri={three.tracking_uri}", "manifest=null", "source=s3://rayseg/archive",
        "concurrency=2", f"cpus_per_actor={CPUS_PER_WORKER}",
    )  # fmt: skip
    three.python(AWAIT, "s3://rayseg/segmentations", ".dcm", "3", timeout=300)
    name, number = WORKERS[0]
    assert at_work(three, name, "Segment")
    three.kill(name)
    segmented = job.result()
    three.boot(name, number)
    assert (segmented["series"], segmented["segmented"]) == (ARCHIVE_PATIENTS, ARCHIVE_PATIENTS)
    found = three.python(LEDGER)
    assert found["rows"] == len(found["kept"]) == ARCHIVE_PATIENTS
    assert set(found["kept"].values()) == {"segmented"}
    assert sorted(found["stored"]) == sorted(segmented["seg_paths"]), "its files, and no others"


def serve(three: Cluster, host: str, replicas: int) -> str:
    job = submit(
        three, "serve", f"tracking_uri={three.tracking_uri}", f"host={host}", f"port={SERVE_PORT}",
        f"num_replicas={replicas}", f"cpus_per_replica={CPUS_PER_WORKER}",
        f"ssl_keyfile={TLS}/node.key", f"ssl_certfile={TLS}/node.crt", f"jobs={JOBS}",
    )  # fmt: skip
    return str(job.follow('{"url"')["url"])


def test_the_service_outlives_a_host(three: Cluster) -> None:
    head = three.hosts[HEAD[0]].address
    url = serve(three, head, replicas=2)
    before = three.python(ASK, url, TOKEN, AUTHORITY)
    assert before["refused"] == [401, 401]
    assert before["statuses"] == [200]
    name, number = WORKERS[1]
    assert at_work(three, name, "model"), "each host has a replica"
    three.kill(name)
    after = three.python(ASK, url, TOKEN, AUTHORITY, timeout=300)
    assert after["statuses"][-1] == 200
    assert after["answer"]["foreground_pixels"] == before["answer"]["foreground_pixels"]
    three.boot(name, number)
    # Before the next test kills the head: of an actor that waits, or begins, then Ray would not give the CPUs back
    # when it has ended (ray#66199).
    three.python(AWAIT_REPLICAS, f"{three.address}/api/serve/applications/", three.token, "2", timeout=300)


def test_the_head_comes_back_to_its_cluster(three: Cluster) -> None:
    """Its host dies and is started again with the same disk, where Ray has what it knows: its workers are there again,
    and the service, which ended with its job, when it is asked for.
    """
    name, number = HEAD
    disk = three.hosts[name].folder
    three.kill(name)
    three.boot(name, number, disk)
    three.await_ready()
    url = serve(three, three.hosts[name].address, replicas=2)
    found = three.python(ASK, url, TOKEN, AUTHORITY, timeout=300)
    assert found["statuses"][-1] == 200
    assert three.hosts.keys() == {name, *dict(WORKERS)}


def test_a_bulk_job_over_http_has_its_code_on_every_host(three: Cluster) -> None:
    """No host has any of ours lying about, and the model's replicas leave no room but on the one that has come."""
    three.boot("three", 5)
    three.await_ready()
    url = f"https://{three.hosts[HEAD[0]].address}:{SERVE_PORT}"
    ended = three.python(ASK_JOB, url, TOKEN, AUTHORITY, timeout=300)
    assert ended["state"] == "succeeded", ended
    assert ended["result"]["segmented"] == ARCHIVE_PATIENTS
