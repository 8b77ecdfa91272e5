"""Bulk jobs over HTTP: `python -m jobs.segment` from where it may read to where it may write, told how far it is."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, get_args

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from rayseg import storage
from rayseg.inference import ledger
from rayseg.inference.outputs import Profile
from serving.auth import Token
from serving.places import allowed
from serving.refusals import Problem, RefusalError
from serving.submissions import RayJobs, UnavailableError

T = TypeVar("T")

_URI = Annotated[str, Field(min_length=1, max_length=1024)]
_ID = "^[0-9a-f]{16}$"


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """The section `serve.jobs` of a recipe: a service must not read or write anywhere."""

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


class About(BaseModel):
    """What is known of a job before it begins."""

    owner: str | None = Field(description="name of the token that asked for it")
    request: JobRequest
    ledger: str = Field(description="URI of the folder with a row for each series that has ended")


class JobAnswer(About):
    """A bulk job."""

    id: str
    state: str = Field(
        description="running, cancelling, succeeded, failed, cancelled; interrupted where its node was lost: asked "
        "for again, a job goes on where it stopped"
    )
    created: float = Field(description="seconds since 1970")
    ended: float | None = None
    progress: Progress | None = Field(default=None, description="null until the archive is cataloged")
    error: str | None = Field(default=None, description="why it failed")
    result: dict[str, Any] | None = Field(default=None, description="what the job printed at its end; not in lists")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Which models jobs may use: versions of the served one."""

    name: str
    uri: str
    tracking_uri: str


class Jobs:
    """The jobs that Ray knows: nothing about them is held here, so whoever starts the service again sees them all."""

    def __init__(self, config: JobsConfig, model: ServedModel, runs: RayJobs, pacs: str | None = None) -> None:
        self._config, self._model, self._runs, self._pacs = config, model, runs, pacs
        self._starting = asyncio.Lock()

    async def submit(self, request: JobRequest, token: Token | None) -> JobAnswer:
        """Starts a job; raises RefusalError."""
        settings = self._settings(request)
        about = About(
            owner=token.name if token else None,
            request=request,
            ledger=storage.join(settings["output"], ledger.FOLDER),
        )
        async with self._starting:
            running = [job for job in await self._all() if job.state == "running"]
            if any(job.ledger == about.ledger for job in running):
                raise RefusalError(409, "destination_in_use", "a job that runs writes there")
            if len(running) >= self._config.at_once:
                raise RefusalError(429, "too_many_jobs", f"at most {self._config.at_once} at once")
            try:  # figures of an earlier job to the same place are not this one's
                await asyncio.to_thread(storage.delete, _progress(about))
            except OSError as error:
                raise RefusalError(503, "unavailable", f"destination: {type(error).__name__}") from None
            job_id = f"{int(time.time()):08x}{secrets.token_hex(4)}"  # sorts by time
            await self._ask(self._runs.submit, job_id, settings, about.model_dump(mode="json"))
        return JobAnswer(id=job_id, state="running", created=time.time(), **dict(about))

    async def visible(self, token: Token | None, limit: int, before: str | None) -> list[JobAnswer]:
        """The latest `limit` jobs that the bearer may see, of those that began before the job `before`."""
        jobs = [job for job in await self._all() if _sees(token, job) and (before is None or job.id < before)]
        for job in jobs[:limit]:
            if job.state == "running":
                job.progress = await _read_progress(job)
        return jobs[:limit]

    async def get(self, job_id: str, token: Token | None) -> JobAnswer:
        """A job with its progress; raises RefusalError."""
        jobs = await self._all()
        job = next((job for job in jobs if job.id == job_id and _sees(token, job)), None)
        if job is None:
            raise RefusalError(404, "no_such_job", "no job of this id that this token may see")
        if job_id == next(other.id for other in jobs if other.ledger == job.ledger):  # or they are a later one's
            job.progress = await _read_progress(job)
        if job.state == "succeeded":
            job.result = _result(await self._ask(self._runs.log, job_id))
        return job

    async def cancel(self, job_id: str, token: Token | None) -> JobAnswer:
        """Ends a job; series that are done stay so. Raises RefusalError where it has ended."""
        job = await self.get(job_id, token)
        if job.state != "running" or not await self._ask(self._runs.stop, job_id):
            raise RefusalError(409, "job_ended", "the job has ended already")
        job.state = "cancelling"
        return job

    def _settings(self, request: JobRequest) -> dict[str, Any]:
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
        return {
            **self._config.settings,
            **places,
            "output": allowed(request.destination, self._config.destinations, "destination"),
            "profiles": list(request.profiles),
            "model_uri": self._model_uri(request.model),
            "tracking_uri": self._model.tracking_uri,
            "pacs": self._pacs if request.pacs else None,
        }

    def _model_uri(self, wanted: str | None) -> str:
        if wanted is None:
            return self._model.uri
        return f"models:/{self._model.name}{'/' if wanted.isdigit() else '@'}{wanted}"

    async def _all(self) -> list[JobAnswer]:
        """The latest first, without what is to be read elsewhere."""
        known = await self._ask(self._runs.known)
        jobs = [
            JobAnswer(id=job_id, state=job.state, created=job.created, ended=job.ended, error=job.error, **job.about)
            for job_id, job in known.items()
        ]
        return sorted(jobs, key=lambda job: job.id, reverse=True)

    async def _ask(self, ask: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.to_thread(ask, *arguments)
        except UnavailableError as error:
            raise RefusalError(503, "unavailable", f"the cluster's job API does not answer ({error})") from None


async def _read_progress(job: JobAnswer) -> Progress | None:
    with contextlib.suppress(OSError, ValueError):
        return Progress.model_validate(await asyncio.to_thread(storage.read_json, _progress(job)))
    return None


def _progress(job: About) -> str:
    return storage.join(job.ledger.removesuffix(f"/{ledger.FOLDER}"), ledger.PROGRESS)


def _result(log: str) -> dict[str, Any] | None:
    """What a job printed at its end, among what it logged."""
    for line in reversed(log.splitlines()):
        with contextlib.suppress(ValueError):
            printed = json.loads(line)
            if isinstance(printed, dict) and "seg_paths" in printed:
                del printed["seg_paths"]  # as many as there are series: the ledger has them
                return printed
    return None


def router(jobs: Jobs | None) -> APIRouter:
    """The routes of jobs; without jobs each answers 404."""
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])
    problem = {"model": Problem}
    job_id = Annotated[str, Path(pattern=_ID)]

    def configured() -> Jobs:
        if jobs is None:
            raise RefusalError(404, "no_jobs", "this service runs no jobs: serve.jobs is not configured")
        return jobs

    def bearer(request: Request) -> Token | None:
        token: Token | None = getattr(request.state, "token", None)
        return token

    refusals: dict[int | str, dict[str, Any]] = dict.fromkeys((403, 404, 409, 422, 429, 503), problem)

    @routes.post("", status_code=202, summary="Segment an archive", responses=refusals)
    async def submit(request: Request, job: JobRequest) -> JobAnswer:
        return await configured().submit(job, bearer(request))

    @routes.get("", summary="The jobs, the latest first", responses=dict.fromkeys((404, 422, 503), problem))
    async def every(
        request: Request,
        response: Response,
        limit: Annotated[int, Query(ge=1, le=100, description="jobs of a page")] = 20,
        before: Annotated[
            str | None, Query(pattern=_ID, description="id of the last job of the page before: see the header Link")
        ] = None,
    ) -> list[JobAnswer]:
        jobs = await configured().visible(bearer(request), limit, before)
        if len(jobs) == limit:
            response.headers["Link"] = f'</v1/jobs?limit={limit}&before={jobs[-1].id}>; rel="next"'
        return jobs

    @routes.get("/{id}", summary="How far a job is", responses=dict.fromkeys((404, 422, 503), problem))
    async def one(request: Request, id: job_id) -> JobAnswer:
        return await configured().get(id, bearer(request))

    @routes.delete("/{id}", summary="Cancel a job", responses=dict.fromkeys((404, 409, 422, 503), problem))
    async def cancel(request: Request, id: job_id) -> JobAnswer:
        return await configured().cancel(id, bearer(request))

    return routes


def _sees(token: Token | None, job: JobAnswer) -> bool:
    return token is None or token.may("admin") or token.name == job.owner
