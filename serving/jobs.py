"""Bulk jobs over HTTP: `python -m jobs.segment` from where it may read to where it may write, told how far it is."""

import asyncio
import contextlib
import os
import re
import secrets
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Protocol, get_args
from urllib.parse import unquote

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from rayseg import storage
from rayseg.inference import ledger
from rayseg.inference.outputs import Profile
from serving.auth import Token
from serving.refusals import Problem, RefusalError

_ENDED = ("succeeded", "failed", "cancelled")
_URI = Annotated[str, Field(min_length=1, max_length=1024)]
_LISTED = 500  # the latest jobs: the only ones that are looked at


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """The section `serve.jobs` of a recipe: a service must not read or write anywhere."""

    records: str  # URI of a folder that all nodes reach, for a small file of each job
    sources: tuple[str, ...]  # URIs of folders, or of DICOMweb services, below which archives may lie
    destinations: tuple[str, ...]  # URIs of folders below which jobs may write
    # Likewise of manifests. Whoever writes one there has the service read any place that it names, with the
    # credentials of the service: none by default.
    manifests: tuple[str, ...] = ()
    at_once: int = 1  # jobs at a time; more are refused until one has ended
    settings: dict[str, Any] = field(default_factory=dict)  # further keys of `segment`, such as concurrency

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise ValueError(f"jobs.at_once: 1 or more expected, got {self.at_once}")
        for key in ("sources", "destinations", "manifests"):
            for uri in getattr(self, key):
                if not (uri.startswith("/") or "://" in uri):
                    raise ValueError(f"jobs.{key}: an absolute path or a URI expected, got {uri}")


class JobRequest(BaseModel):
    """What to segment, and where to: either a source or a manifest."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"source": "s3://archive/ct/2024", "destination": "s3://results/2024", "profiles": ["seg", "report"]}
            ]
        },
    )

    source: _URI | None = Field(
        default=None, description="URI of a folder of DICOM, below one that the service may read"
    )
    manifest: _URI | None = Field(default=None, description="or of a manifest, as the catalog job writes it")
    destination: _URI = Field(description="URI of a folder below one that the service may write")
    profiles: tuple[Profile, ...] = Field(
        default=("seg",), min_length=1, max_length=len(get_args(Profile)), description="what is written"
    )
    model: str | None = Field(
        default=None,
        pattern="^[A-Za-z0-9_-]{1,64}$",
        description="alias or version of the served model",
    )
    pacs: bool = Field(default=False, description="store the DICOM files in the configured PACS, too")


class Progress(BaseModel):
    """How far a job is, as of a few seconds ago."""

    series: int = Field(description="ended, rejected ones among them")
    series_total: int = Field(description="to do in this run: those of earlier runs are skipped")
    slices: int
    slices_total: int
    slices_per_second: float
    eta_s: float | None = Field(description="seconds that remain at this rate")
    reasons: dict[str, int] = Field(description="rejected slices by reason")
    run_id: str = Field(description="the MLflow run that shows the same")


class JobAnswer(BaseModel):
    """A bulk job."""

    id: str
    owner: str | None = Field(description="name of the token that asked for it")
    state: str = Field(
        description="running, cancelling, succeeded, failed, cancelled; interrupted where the cluster lost it: asked "
        "for again, a job goes on where it stopped"
    )
    created: float = Field(description="seconds since 1970")
    ended: float | None = None
    request: JobRequest
    ledger: str = Field(description="URI of the folder with a row for each series that has ended")
    progress: Progress | None = Field(default=None, description="null until the archive is cataloged")
    error: str | None = Field(default=None, description="why it failed")
    result: dict[str, Any] | None = Field(default=None, description="what the job printed at its end")


class Runners(Protocol):
    """What runs jobs: see `runner.RayRunners`."""

    async def start(self, job_id: str, record_uri: str, record: dict[str, Any], settings: dict[str, Any]) -> None:
        """Starts a job and writes its record."""

    async def alive(self, job_id: str) -> bool:
        """Whether it is still looked after."""

    async def cancel(self, job_id: str) -> bool:
        """Ends it; False where it has ended."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Which models jobs may use: versions of the served one."""

    name: str
    uri: str
    tracking_uri: str


class Jobs:
    """The jobs of the records' folder; nothing about them is held in memory, so a new service knows them all."""

    def __init__(self, config: JobsConfig, model: ServedModel, runners: Runners, pacs: str | None = None) -> None:
        self._config, self._model, self._runners, self._pacs = config, model, runners, pacs
        self._starting = asyncio.Lock()

    async def submit(self, request: JobRequest, token: Token | None) -> JobAnswer:
        """Starts a job; raises RefusalError."""
        if (request.source is None) == (request.manifest is None):
            raise RefusalError(422, "invalid_parameter", "give either source or manifest")
        if len(set(request.profiles)) < len(request.profiles):
            raise RefusalError(422, "invalid_parameter", "profiles: each once")
        places = {
            key: allowed(uri, prefixes, key)
            for key, uri, prefixes in (
                ("source", request.source, self._config.sources),
                ("manifest", request.manifest, self._config.manifests),
            )
            if uri is not None
        }
        if request.pacs and self._pacs is None:
            raise RefusalError(422, "no_pacs", "this service has no PACS: serve.pacs is not configured")
        output = allowed(request.destination, self._config.destinations, "destination")
        settings = {
            **self._config.settings,
            **places,
            "output": output,
            "profiles": list(request.profiles),
            "model_uri": self._model_uri(request.model),
            "tracking_uri": self._model.tracking_uri,
            "pacs": self._pacs if request.pacs else None,
        }
        async with self._starting:
            running = [job for job in await self._all() if job.state not in (*_ENDED, "interrupted")]
            if any(job.ledger == _ledger(output) for job in running):
                raise RefusalError(409, "destination_in_use", "a job that runs writes there")
            if len(running) >= self._config.at_once:
                raise RefusalError(429, "too_many_jobs", f"at most {self._config.at_once} at once")
            job = JobAnswer(
                id=f"{int(time.time()):08x}{secrets.token_hex(4)}",  # the names of records sort by time
                owner=token.name if token else None,
                state="running",
                created=time.time(),
                request=request,
                ledger=_ledger(output),
            )
            await self._runners.start(job.id, self._uri(job.id), job.model_dump(mode="json"), settings)
        return job

    async def visible(self, token: Token | None) -> list[JobAnswer]:
        """The jobs that the bearer may see, the latest first."""
        return [job for job in await self._all() if _sees(token, job)]

    async def get(self, job_id: str, token: Token | None) -> JobAnswer:
        """A job with its progress; raises RefusalError."""
        job = await self._read(self._uri(job_id))
        if job is None or not _sees(token, job):
            raise RefusalError(404, "no_such_job", "no job of this id that this token may see")
        return job

    async def cancel(self, job_id: str, token: Token | None) -> JobAnswer:
        """Ends a job; series that are done stay so. Raises RefusalError where it has ended."""
        await self.get(job_id, token)
        if not await self._runners.cancel(job_id):
            raise RefusalError(409, "job_ended", "the job has ended already")
        return await self.get(job_id, token)

    def _uri(self, job_id: str) -> str:
        return storage.join(self._config.records, f"{job_id}.json")

    def _model_uri(self, wanted: str | None) -> str:
        if wanted is None:
            return self._model.uri
        return f"models:/{self._model.name}{'/' if wanted.isdigit() else '@'}{wanted}"

    async def _all(self) -> list[JobAnswer]:
        records = await asyncio.to_thread(self._records)
        jobs = await asyncio.gather(*map(self._read, records))
        return sorted((job for job in jobs if job), key=lambda job: job.created, reverse=True)

    def _records(self) -> list[str]:
        try:
            files = sorted(file.uri for file in storage.list_files(self._config.records, (".json",)))
        except FileNotFoundError:
            return []
        return files[-_LISTED:]

    async def _read(self, uri: str) -> JobAnswer | None:
        try:
            job = JobAnswer.model_validate(await asyncio.to_thread(storage.read_json, uri))
        except FileNotFoundError:
            return None
        if job.state in _ENDED:
            return job
        if not await self._runners.alive(job.id):
            job.state = "interrupted"
            return job
        progress = storage.join(job.ledger.removesuffix(f"/{ledger.FOLDER}"), ledger.PROGRESS)
        with contextlib.suppress(FileNotFoundError):
            job.progress = Progress.model_validate(await asyncio.to_thread(storage.read_json, progress))
        return job


def router(jobs: Jobs | None) -> APIRouter:
    """The routes of jobs; without jobs each answers 404."""
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])
    problem = {"model": Problem}
    job_id = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]

    def configured() -> Jobs:
        if jobs is None:
            raise RefusalError(404, "no_jobs", "this service runs no jobs: serve.jobs is not configured")
        return jobs

    def bearer(request: Request) -> Token | None:
        token: Token | None = getattr(request.state, "token", None)
        return token

    @routes.post(
        "", status_code=202, summary="Segment an archive", responses=dict.fromkeys((403, 404, 409, 422, 429), problem)
    )
    async def submit(request: Request, job: JobRequest) -> JobAnswer:
        return await configured().submit(job, bearer(request))

    @routes.get("", summary="The jobs", responses={404: problem})
    async def every(request: Request) -> list[JobAnswer]:
        return await configured().visible(bearer(request))

    @routes.get("/{id}", summary="How far a job is", responses=dict.fromkeys((404, 422), problem))
    async def one(request: Request, id: job_id) -> JobAnswer:
        return await configured().get(id, bearer(request))

    @routes.delete("/{id}", summary="Cancel a job", responses=dict.fromkeys((404, 409, 422), problem))
    async def cancel(request: Request, id: job_id) -> JobAnswer:
        return await configured().cancel(id, bearer(request))

    return routes


def allowed(uri: str, prefixes: tuple[str, ...], key: str) -> str:
    """The URI where it lies below one of the prefixes, a local path with its links followed; raises RefusalError."""
    refusal = RefusalError(HTTPStatus.FORBIDDEN, "place_not_allowed", f"{key}: not below a place that is configured")
    # Whoever reads it may decode it once more: what leads upwards then does not pass either.
    if re.search(r"[\x00-\x1f\x7f\\]", uri) or {".", ".."} & set(re.split("[/\\\\]", unquote(uri))):
        raise refusal
    canonical = _canonical(uri)
    if canonical is None or not any(_below(canonical, _canonical(prefix)) for prefix in prefixes):
        raise refusal
    return canonical


def _canonical(uri: str) -> str | None:
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        return uri.rstrip("/")
    path = rest if separator else uri
    return os.path.realpath(path) if path.startswith("/") else None


def _below(uri: str, prefix: str | None) -> bool:
    if prefix is None:
        return False
    ends = ("/", "?") if prefix.startswith("dicomweb+") else ("/",)
    return uri == prefix or uri.startswith(tuple(prefix.rstrip("/") + end for end in ends))


def _sees(token: Token | None, job: JobAnswer) -> bool:
    return token is None or token.may("admin") or token.name == job.owner


def _ledger(output: str) -> str:
    return storage.join(output, ledger.FOLDER)
