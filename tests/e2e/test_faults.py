"""A store that fails one call in ten: what is read, listed, cataloged and prepared is as from one that never does."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rayseg import bucket, retry, storage
from rayseg.data import synthetic
from tests.faults import KINDS, Faults, faulty

pytestmark = pytest.mark.e2e

# A process of its own, as the workers of a Ray cluster keep the environment that it was started with. It waits for a
# line before each run.
PROGRAM = """
import sys
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.preprocess import Preprocess
from rayseg.data.split import Split

base = sys.argv[1]
for line in sys.stdin:
    output = f"{base}/{line.strip()}"
    found = catalog(CatalogConfig(f"{base}/studies", f"{output}/manifest", Layout(images="images", masks="masks"), 0.0))
    split = Split(val=0.25, test=0.25)
    prepare(PrepareConfig(found.manifest, f"{output}/set", Preprocess((32, 32)), split=split, rows_per_shard=7))
    print("done", flush=True)
"""


@pytest.fixture
def faults(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy before the store, which the environment names."""
    with faulty(s3_environment["AWS_ENDPOINT_URL"], seed=1) as proxy:
        for name, value in {**s3_environment, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_fails_once_is_made_again(faults: Faults, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timeout_s = 1.0 if kind == "stall" else 5.0  # what is waited for, but for a store that is slow on a busy machine
    for module in (storage, bucket):
        monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", timeout_s + KINDS.index(kind) / 1000)
    monkeypatch.setenv("AWS_EXECUTION_ENV", kind)  # other clients, with this timeout
    uri, data = f"s3://tests/once/{kind}.bin", os.urandom(50_000)
    faults.kinds, faults.stall_s = (kind,), 60.0  # longer than the client waits

    def fail_next() -> None:
        before = faults.counts[kind]
        faults.share = 1.0
        monkeypatch.setattr(retry, "sleep", lambda pause: setattr(faults, "share", 0.0))
        failed.append(lambda: faults.counts[kind] > before)

    failed: list = []
    fail_next()
    storage.write(uri, data)
    fail_next()
    assert storage.read(uri) == data
    fail_next()
    assert storage.read(uri, 1000) == data[:1000]
    fail_next()
    assert uri in [info.uri for info in storage.list_files("s3://tests/once")]
    assert all(happened() for happened in failed)
    assert faults.counts[kind] >= 4


def test_catalog_and_prepare_give_the_same_bytes(faults: Faults) -> None:
    base = "s3://tests/faults"
    synthetic.write_studies(f"{base}/studies", patients=10, slices=4, size=32, seed=2)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, base],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    found = {}
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        for name, share in (("without", 0.0), ("with", 0.1)):
            faults.share = share
            faults.counts.clear()
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            faults.share = 0.0
            output = f"{base}/{name}"
            uris = [info.uri for info in storage.list_files(output) if "/_delta_log/" not in info.uri]  # tells the time
            found[name] = {uri.removeprefix(output): storage.read(uri) for uri in uris}
        failed = faults.counts.total() - faults.counts["ok"]
        process.stdin.close()
    assert failed >= 15
    assert len(found["without"]) > 8
    assert found["with"] == found["without"]
