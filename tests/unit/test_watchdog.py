"""The watchdog, in a process of its own: it ends one that makes no progress, and no other."""

import signal
import subprocess
import sys

WORK = """
import threading
from rayseg.training.watchdog import Watchdog
with Watchdog(1.0) as watchdog:
    for _ in range(25):
        threading.Event().wait(0.1)
        watchdog.beat()
    print("worked", flush=True)
    if {hangs}:
        threading.Event().wait()
print("ended", flush=True)
"""


def run(hangs: bool) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WORK.format(hangs=hangs)], capture_output=True, text=True, timeout=60)


def test_a_process_that_works_is_left_alone() -> None:
    assert run(hangs=False).stdout.split() == ["worked", "ended"]


def test_one_that_hangs_is_killed_and_says_where() -> None:
    done = run(hangs=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["worked"]
    assert "hang_timeout_s" in done.stderr
    assert "threading.py" in done.stderr
