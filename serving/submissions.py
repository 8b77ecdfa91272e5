"""Bulk jobs in the hands of Ray's own job submission: it starts, watches, stops and lists them, and keeps their logs.

Its API listens on the head node, often on loopback alone: it is asked from there, by tasks.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from rayseg import build, cluster

T = TypeVar("T")
State = Literal["running", "succeeded", "failed", "cancelled", "interrupted"]

_ROOT = Path(__file__).parents[1]  # holds serving/ and jobs/
_SETTINGS = "BULK_JOB_SETTINGS"  # variable of the job's environment: other users of the machine can read command lines
_COMMAND = f'printf %s "${_SETTINGS}" | {shlex.quote(sys.executable)} -m jobs.segment --config /dev/stdin'
_ABOUT = "rayseg"  # key of the job's metadata: what the service wants to know of it again
_HEAD = "node:__internal_head__"  # a resource that Ray gives the head node
_ANSWER_S = 60.0  # for the job API
_LOG_CHARACTERS = 64 * 1024
_STATES: dict[JobStatus, State] = {JobStatus.STOPPED: "cancelled", JobStatus.SUCCEEDED: "succeeded"}


@dataclass(frozen=True)
class Submission:
    """A bulk job, as Ray knows it."""

    about: dict[str, Any]  # as it was submitted
    state: State  # `interrupted`: its process was lost with its node
    created: float  # seconds since the epoch
    ended: float | None
    error: str | None  # why it failed, in one line


class UnavailableError(Exception):
    """Ray's job API does not answer, or refuses."""


class RayJobs:
    """The bulk jobs of the cluster that this process has joined; each call takes up to seconds.

    Raises UnavailableError.
    """

    def submit(self, job_id: str, settings: dict[str, Any], about: dict[str, Any]) -> None:
        """Starts `jobs.segment` with these settings."""
        environment = _environment({_SETTINGS: json.dumps({"segment": settings})})
        _on_head(_submit, job_id, environment, {_ABOUT: json.dumps(about)})

    def known(self) -> dict[str, Submission]:
        """The bulk jobs by their ids, ended ones too."""
        return _on_head(_known)

    def stop(self, job_id: str) -> bool:
        """Asks the job to end, kindly first; False where it has ended."""
        return _on_head(_stop, job_id)

    def log(self, job_id: str) -> str:
        """The end of what the job has written."""
        return _on_head(_log, job_id)


def _on_head(ask: Callable[..., T], *arguments: Any) -> T:
    # In a worker's environment it goes before the address, see `cluster.connect`.
    nobody = {"env_vars": {cluster.API_SERVER: ""}}
    task = ray.remote(num_cpus=0, max_retries=0, resources={_HEAD: 0.001}, runtime_env=nobody)(ask)
    address = ray.get_runtime_context().gcs_address
    try:
        answer: T = ray.get(task.remote(address, *arguments), timeout=_ANSWER_S)
    except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
        raise UnavailableError(type(error).__name__) from error
    return answer


def _submit(address: str, job_id: str, environment: dict[str, Any], metadata: dict[str, str]) -> None:
    client = JobSubmissionClient(address)
    client.submit_job(submission_id=job_id, entrypoint=_COMMAND, runtime_env=environment, metadata=metadata)


def _known(address: str) -> dict[str, Submission]:
    jobs = JobSubmissionClient(address).list_jobs()
    return {job.submission_id: _submission(job) for job in jobs if _ABOUT in (job.metadata or {})}


def _submission(job: JobDetails) -> Submission:
    state, error = _STATES.get(job.status, "running"), None
    if job.status == JobStatus.FAILED:
        state = "interrupted" if job.driver_exit_code is None else "failed"
        # Code 2 is a bad setting or too many rejects, told in one line; else it is a defect or a lost machine.
        last = (job.message or "").strip().splitlines()[-1:]
        error = last[0] if job.driver_exit_code == 2 and last else f"ended with code {job.driver_exit_code}"
    ended = job.end_time / 1000 if job.end_time else None
    return Submission(json.loads(job.metadata[_ABOUT]), state, (job.start_time or 0) / 1000, ended, error)


def _stop(address: str, job_id: str) -> bool:
    return JobSubmissionClient(address).stop_job(job_id)


def _log(address: str, job_id: str) -> str:
    return JobSubmissionClient(address).get_job_logs(job_id)[-_LOG_CHARACTERS:]


def _environment(variables: dict[str, str]) -> dict[str, Any]:
    """What the job runs in: the code that this process got with the service, as Ray's packages or as it lies here."""
    ours = ray.get_runtime_context().runtime_env
    code = {key: ours[key] for key in ("working_dir", "py_modules") if ours.get(key)}
    if not code:
        variables = variables | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])}
    # The job says itself what it is, and Ray refuses to be told twice.
    own = (build.VARIABLE, build.SILENT, cluster.API_SERVER)
    kept = {name: value for name, value in ours.get("env_vars", {}).items() if name not in own}
    return code | {"env_vars": kept | variables}
