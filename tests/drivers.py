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
