"""Leases on a real store and on the local disk: processes that wait, die and are paused."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

from rayseg import bucket, lease, retry, storage
from tests.faults import faulty

pytestmark = pytest.mark.e2e

STALE_S = 2.0
HOLDER = f"""
import sys
from rayseg import lease
lease.STALE_S, lease.RENEW_S, lease.LOOK_S = {STALE_S}, 0.2, 0.05
with lease.held(sys.argv[1], "first") as held:
    print("has it", flush=True)
    for line in sys.stdin:
        held.check()
        print("kept", flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease, "STALE_S", STALE_S)
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    base = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_store")
    return storage.join(base, request.node.name.partition("[")[0], "output.lease")


@contextmanager
def holder(uri: str) -> Iterator[subprocess.Popen]:
    """A process that has the lease."""
    environment = os.environ | {"PYTHONPATH": str(Path("platform").absolute())}
    command = [sys.executable, "-c", HOLDER, uri]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "has it\n"
            yield process
        finally:
            process.kill()


def asked(process: subprocess.Popen) -> str:
    """What the holder says when it is to look whether it has the lease still."""
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def within(seconds: float, state: Callable[[], object]) -> None:
    deadline = monotonic() + seconds
    while not state():
        assert monotonic() < deadline
        sleep(0.02)


def test_the_second_waits_and_says_for_whom(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rayseg.lease")
    ended = threading.Event()

    def second() -> bool:
        with lease.held(uri, "second"):
            return ended.is_set()

    with holder(uri) as first, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(second)
        within(30, lambda: caplog.messages)
        assert f"the first job on {os.uname().nodename}, process {first.pid}, since 20" in caplog.messages[0]
        sleep(STALE_S + 0.5)  # a holder that lives is not stale, however long it takes
        assert asked(first) == "kept\n"
        assert not waits.done()
        ended.set()
        first.stdin.close()
        assert waits.result(30)
        assert first.wait(30) == 0
    assert len(caplog.messages) == 1
    assert not storage.exists(uri)


def test_who_was_killed_is_followed(uri: str) -> None:
    with holder(uri) as first:
        first.kill()
        first.wait()
        began = monotonic()
        with lease.held(uri, "second") as held:
            waited = monotonic() - began
            held.check()
    assert waited < STALE_S + 3
    if uri.startswith("s3://"):
        assert waited > STALE_S - 1.5  # times of a store are of whole seconds
    assert not storage.exists(uri)


def test_who_was_paused_notices_before_it_changes_anything(uri: str) -> None:
    with holder(uri) as first:
        assert asked(first) == "kept\n"
        first.send_signal(signal.SIGSTOP)
        second = lease.Lease(uri, "second")
        if not uri.startswith("s3://"):  # the kernel's lock is kept
            assert second._way.take(second.holder).process == first.pid
            first.send_signal(signal.SIGCONT)
            assert asked(first) == "kept\n"
            return
        second.wait()
        first.send_signal(signal.SIGCONT)
        assert asked(first) == ""
        assert "LostError: first: another job has taken" in first.stderr.read()
        second.check()
        assert storage.exists(uri)  # what the other one has is not given up by the first
        second.release()
    assert not storage.exists(uri)


def test_of_many_who_follow_one_has_it(uri: str) -> None:
    with holder(uri) as first:
        first.kill()
    if uri.startswith("s3://"):
        within(10, lambda: bucket.version(uri.removeprefix("s3://")).age_s > STALE_S)
    leases = [lease.Lease(uri, f"job {number}") for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        others = list(pool.map(lambda one: one._way.take(one.holder), leases))
    (winner,) = [one for one, other in zip(leases, others, strict=True) if other is None]
    winner.check()
    assert {other.job for other in others if other is not None} <= {winner.holder.job, "first", "another"}
    winner.release()
    assert not storage.exists(uri)


def test_answers_that_are_lost_lose_no_lease(
    s3_store: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    uri = f"{s3_store}/lost/answers.lease"
    with faulty(s3_environment["AWS_ENDPOINT_URL"], seed=3) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        faults.share, faults.kinds = 0.3, ("lost",)
        with lease.held(uri, "first") as held:
            for _ in range(10):
                held.check()
        assert faults.counts["lost"] > 3
        faults.share = 0.0
        assert not storage.exists(uri)


def test_who_lives_is_listed_and_who_has_ended_removed(uri: str) -> None:
    folder = storage.join(uri.rpartition("/")[0], "readers")
    assert lease.living(folder) == []
    one, other = (storage.join(folder, f"{name}{lease.SUFFIX}") for name in ("one", "other"))
    with holder(one) as first, holder(other) as second:
        assert [found.process for found in lease.living(folder)] == [first.pid, second.pid]
        first.kill()
        within(10, lambda: len(lease.living(folder)) == 1)
        assert not storage.exists(one)
        assert [found.process for found in lease.living(folder)] == [second.pid]
