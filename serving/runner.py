"""A bulk job on the cluster: an actor of its own that runs `python -m jobs.segment` and outlives the service.

Ray's job submission does the same behind a dashboard, which a cluster may lack; this needs none.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.runtime_context import RuntimeContext

from rayseg import build, storage
from rayseg.inference import ledger

NAMESPACE = "rayseg-jobs"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the name is Ray's, the variable of its job submission
_ROOT = Path(__file__).parents[1]  # holds serving/ and jobs/
_STOP_S = 20.0  # between SIGTERM and SIGKILL
_LOG_BYTES = 256 * 1024


class Runner:
    """Runs one job and keeps its record up to date."""

    def __init__(
        self, record_uri: str, record: dict[str, Any], settings: dict[str, Any], environment: dict[str, str]
    ) -> None:
        self._uri, self._record, self._settings = record_uri, record, settings
        self._progress = storage.join(settings["output"], ledger.PROGRESS)
        self._environment = environment  # of the job, beside the actor's own
        self._process: asyncio.subprocess.Process | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="rayseg-job-")

    async def begin(self) -> None:
        """Starts the process."""
        folder = Path(self._folder.name)
        # A file and not the command line, which other users of the machine can read.
        (folder / "recipe.yaml").write_text(json.dumps({"segment": self._settings}), encoding="utf-8")
        # Figures of an earlier job to the same place are not this one's.
        await asyncio.to_thread(storage.delete, self._progress)
        path = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
        with (folder / "log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "jobs.segment", "--config", str(folder / "recipe.yaml")),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=os.environ | self._environment | {"PYTHONPATH": path},
                start_new_session=True,
            )
        await self._note(state="running")

    async def watch(self) -> None:
        """Waits for the end, notes how it was, and ends the actor."""
        assert self._process
        output, _ = await self._process.communicate()
        log = (Path(self._folder.name) / "log").read_bytes()[-_LOG_BYTES:]
        await asyncio.to_thread(storage.write, f"{self._uri.removesuffix('.json')}.log", log)
        ended: dict[str, Any] = {"ended": time.time()}
        if self._record["state"] == "cancelling":
            ended |= {"state": "cancelled"}
        elif self._process.returncode == 0:
            result = json.loads(output.splitlines()[-1])
            result.pop("seg_paths")  # as many as there are series: the ledger has them
            ended |= {"state": "succeeded", "result": result}
        else:
            # Code 2 is a bad setting or too many rejects, told in one line; else it is a defect or a lost machine.
            lines = log.decode(errors="replace").strip().splitlines() or [""]
            why = lines[-1] if self._process.returncode == 2 else f"ended with code {self._process.returncode}"
            ended |= {"state": "failed", "error": why}
        with contextlib.suppress(FileNotFoundError):
            ended["progress"] = await asyncio.to_thread(storage.read_json, self._progress)
        await self._note(**ended)
        self._folder.cleanup()
        ray.actor.exit_actor()

    async def cancel(self) -> None:
        """Ends the process, kindly first; its finished series stay finished."""
        assert self._process
        await self._note(state="cancelling")
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _STOP_S)
                return

    async def _note(self, **changes: Any) -> None:
        self._record |= changes
        await asyncio.to_thread(storage.write_json, self._uri, self._record)


def _code(context: RuntimeContext) -> dict[str, str]:
    """The variable by which the job's workers, on any node, get the code that this process got with the service.

    As Ray's job submission does it; empty where it lies on the nodes.
    """
    ours = context.runtime_env
    code = {key: ours[key] for key in ("working_dir", "py_modules") if ours.get(key)}
    if not code:
        return {}
    # The job says itself what it is, and Ray refuses to be told twice.
    variables = {name: value for name, value in ours.get("env_vars", {}).items() if name != build.VARIABLE}
    return {_JOB_CONFIG: json.dumps({"runtime_env": code | {"env_vars": variables}, "metadata": {}})}


class RayRunners:
    """The runners of this cluster, by the ids of their jobs."""

    async def start(self, job_id: str, record_uri: str, record: dict[str, Any], settings: dict[str, Any]) -> None:
        """Starts a job; returns when its process runs and its record is written."""
        environment = {"env_vars": {build.VARIABLE: build.current().told()}}
        actor = ray.remote(num_cpus=0, name=job_id, namespace=NAMESPACE, lifetime="detached", runtime_env=environment)(
            Runner
        )
        context = ray.get_runtime_context()
        runner = actor.remote(record_uri, record, settings, {"RAY_ADDRESS": context.gcs_address, **_code(context)})
        await runner.begin.remote()
        runner.watch.remote()

    async def alive(self, job_id: str) -> bool:
        """Whether the job's runner lives."""
        return await asyncio.to_thread(_find, job_id) is not None

    async def cancel(self, job_id: str) -> bool:
        """Ends the job; False where it has ended."""
        runner = await asyncio.to_thread(_find, job_id)
        if runner is None:
            return False
        try:
            await runner.cancel.remote()
        except RayActorError:  # it ended meanwhile
            return False
        return True


def _find(job_id: str) -> ActorHandle | None:
    try:
        return ray.get_actor(job_id, NAMESPACE)
    except ValueError:
        return None
