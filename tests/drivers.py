"""Drivers: jobs as processes of their own, which are killed in the middle."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ray


def kill_when(job: str, recipe: Path, folder: Path, pattern: str) -> None:
    """Starts `jobs.JOB` on the test's cluster and kills it as soon as a file below the folder matches."""
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": f"{Path('platform').absolute()}:{Path.cwd()}",
    }
    command = [sys.executable, "-m", f"jobs.{job}", "--config", str(recipe)]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ended = threading.Event()

    def watch() -> None:
        while not list(folder.glob(pattern)):
            if ended.wait(0.02):
                return
        driver.kill()

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, printed = driver.communicate()
    ended.set()
    watcher.join()
    assert driver.returncode == -signal.SIGKILL, printed.decode()


def dying_at_the_first_rows(config: object) -> str:
    """A program that begins `archive.segment(config)` and dies by SIGKILL when a series stands in the ledger.

    All series are one task, of the cluster of RAY_ADDRESS.
    """
    return f"""
import os
from rayseg import cluster
from rayseg.inference import archive, ledger, stream
from rayseg.inference.plan import Estimate
from rayseg.inference.postprocess import Postprocess
from rayseg.models.engine import Engine

append = ledger.append

def append_and_die(output, rows, rejects):
    append(output, rows, rejects)
    if rows:
        os.kill(os.getpid(), {signal.SIGKILL.value})

ledger.append = append_and_die
stream._TASKS_PER_ACTOR = 1
cluster.connect()
archive.segment(archive.{config!r})
"""
