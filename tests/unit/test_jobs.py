"""Bulk jobs over HTTP: what they may read and write, whose they are, and what is told of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest

from rayseg import storage
from serving.jobs import Jobs, JobsConfig, ServedModel
from serving.places import allowed
from serving.refusals import RefusalError
from serving.submissions import RayJobs, State, Submission, UnavailableError
from tests.unit.guarded import asked, get, service
from tests.unit.test_guard import KNOWN, bearing

JSON = {"content-type": "application/json"}


class Recorded:
    """Stands for Ray's job submission, whose own part is in tests/ray/test_archive.py; what runs, runs until it is told
    how it ends."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.jobs: dict[str, Submission] = {}
        self.asked: list[str] = []
        self.away = False
        self.logs = ""

    def submit(self, job_id: str, settings: dict[str, Any], about: dict[str, Any]) -> None:
        self.settings.append(settings)
        self._note("submit")
        self.jobs[job_id] = Submission(json.loads(json.dumps(about)), "running", 1.7e9, None, None)

    def known(self) -> dict[str, Submission]:
        self._note("known")
        return dict(self.jobs)

    def stop(self, job_id: str) -> bool:
        self._note("stop")
        was = self.jobs[job_id].state == "running"
        self.end(job_id, "cancelled")
        return was

    def log(self, job_id: str) -> str:
        self._note("log")
        return self.logs

    def end(self, job_id: str, state: State, error: str | None = None) -> None:
        self.jobs[job_id] = dataclasses.replace(self.jobs[job_id], state=state, ended=1.8e9, error=error)

    def _note(self, call: str) -> None:
        if self.away:
            raise UnavailableError("RaySystemError")
        self.asked.append(call)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    for name in ("in", "out", "secret", "out-of-bounds"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    return tmp_path


def jobs(places: Path, runners: Recorded, **config: Any) -> Jobs:
    roots = {"sources": (str(places / "in"), "s3://archive/ct"), "destinations": (str(places / "out"),)}
    settings = JobsConfig(**{**roots, **config})
    model = ServedModel(name="brain", uri="models:/brain@champion", tracking_uri="sqlite:///x.db")
    return Jobs(settings, model, cast(RayJobs, runners), pacs="https://pacs.example/dicom-web")


def submit(token: str, **request: Any) -> Any:
    headers = {**JSON, **bearing(token)}
    return lambda client: client.post("/v1/jobs", content=json.dumps(request), headers=headers)


@pytest.mark.parametrize(
    ("uri", "passes"),
    [
        ("{}/in", True),
        ("{}/in/2024/ct", True),
        ("file://{}/in/2024", True),
        ("s3://archive/ct/2024", True),
        ("s3://archive/ct", True),
        ("{}/in-other", False),
        ("{}/secret", False),
        ("{}/in/../secret", False),
        ("{}/in/%2e%2e/secret", False),
        ("{}/in/%2e%2e%2fsecret", False),
        ("{}/in/link", False),  # leads to a place outside
        ("{}/in/link/deeper", False),
        ("file://{}/in/link", False),
        ("in", False),  # relative to whatever
        ("s3://archive/ct-other", False),
        ("s3://archive/ct/../mr", False),
        ("s3://archive", False),
        ("S3://archive/ct", False),
        ("gs://archive/ct", False),
        ("http://archive/ct", False),
        ("/etc/passwd", False),
        ("", False),
        ("{}/in\x00/etc", False),
        ("s3://archive/ct\n", False),
        ("s3://archive\\ct", False),
        ("dicomweb+https://pacs/dicom-web?Modality=CT", True),
        ("dicomweb+https://pacs/dicom-web/studies/1.2", True),
        ("dicomweb+https://pacs/dicom-web.evil/", False),
        ("dicomweb+https://pacs/dicom-web@evil/", False),
        ("dicomweb+https://pacs:443/dicom-web", False),
    ],
)
def test_only_what_lies_below_a_configured_place_passes(places: Path, uri: str, passes: bool):
    prefixes = (str(places / "in"), "s3://archive/ct/", "dicomweb+https://pacs/dicom-web")
    uri = uri.format(places)
    if passes:
        assert allowed(uri, prefixes, "source")
    else:
        with pytest.raises(RefusalError) as refused:
            allowed(uri, prefixes, "source")
        assert (refused.value.status, refused.value.reason) == (403, "place_not_allowed")
        assert str(places) not in refused.value.detail


def test_a_job_is_what_was_asked_for_with_the_services_own_settings(places: Path):
    runners = Recorded()
    app = service(jobs(places, runners, settings={"concurrency": 4}), tokens=KNOWN)
    request = {"source": f"{places}/in/ct", "destination": f"{places}/out/ct", "profiles": ["seg", "report"]}
    started, told = asked(
        app, submit("s-token", **request, model="7", pacs=True), get("/v1/jobs", **bearing("s-token"))
    )
    assert started.status_code == 202
    assert runners.settings == [
        {
            "concurrency": 4,
            "source": f"{places}/in/ct",
            "output": f"{places}/out/ct",
            "profiles": ["seg", "report"],
            "model_uri": "models:/brain/7",
            "tracking_uri": "sqlite:///x.db",
            "pacs": "https://pacs.example/dicom-web",
        }
    ]
    job = started.json()
    assert (job["state"], job["owner"], job["progress"]) == ("running", "lab", None)
    assert [one["id"] for one in told.json()] == [job["id"]]
    progress = {"series": 1, "series_total": 4, "slices": 30, "slices_total": 120, "slices_per_second": 3.0}
    storage.write_json(f"{places}/out/ct/progress.json", {**progress, "eta_s": 30.0, "reasons": {}, "run_id": "r"})
    (told,) = asked(app, get(f"/v1/jobs/{job['id']}", **bearing("s-token")))
    assert (told.json()["progress"]["slices"], told.json()["progress"]["eta_s"]) == (30, 30.0)
    runners.end(job["id"], "interrupted")
    (told,) = asked(app, get(f"/v1/jobs/{job['id']}", **bearing("s-token")))
    assert told.json()["state"] == "interrupted"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"source": None}, 422),
        ({"manifest": "s3://archive/ct/manifest.parquet"}, 422),
        ({"source": None, "manifest": "s3://archive/ct/manifest.parquet"}, 403),  # none are allowed by default
        ({"destination": "/etc"}, 403),
        ({"source": "/etc"}, 403),
        ({"profiles": ["seg", "seg"]}, 422),
        ({"profiles": ["exe"]}, 422),
        ({"profiles": []}, 422),
        ({"model": "other/7"}, 422),
        ({"tracking_uri": "http://evil"}, 422),
        ({"output": "/etc"}, 422),
    ],
)
def test_what_a_job_may_not_be_is_refused(places: Path, change: dict[str, Any], status: int):
    runners = Recorded()
    request = {"source": f"{places}/in", "destination": f"{places}/out", **change}
    (answer,) = asked(service(jobs(places, runners), tokens=KNOWN), submit("s-token", **request))
    assert answer.status_code == status
    assert set(answer.json()) == {"reason", "detail"}
    assert not runners.settings


def test_a_job_is_its_owners_and_the_administrators(places: Path):
    runners = Recorded()
    app = service(jobs(places, runners), tokens=(*KNOWN, *other_token()))
    (started,) = asked(app, submit("s-token", source=f"{places}/in", destination=f"{places}/out"))
    address = f"/v1/jobs/{started.json()['id']}"
    for token, status, listed in (("o-token", 404, 0), ("s-token", 200, 1), ("a-token", 200, 1)):
        told, every = asked(app, get(address, **bearing(token)), get("/v1/jobs", **bearing(token)))
        assert (told.status_code, len(every.json())) == (status, listed)

    def cancel(token: str) -> Any:
        return lambda client: client.delete(address, headers=bearing(token))

    strange, own, again = asked(app, cancel("o-token"), cancel("s-token"), cancel("a-token"))
    assert [strange.status_code, own.status_code, again.status_code] == [404, 200, 409]


def other_token() -> tuple[Any, ...]:
    from tests.unit.test_guard import line, tokens

    return tokens(line("other", "submit", "o-token"))


def test_more_jobs_than_allowed_and_two_to_one_place_are_refused(places: Path):
    app = service(jobs(places, Recorded(), at_once=2))
    source = f"{places}/in"
    answers = asked(
        app,
        *(submit("", source=source, destination=f"{places}/out/{name}") for name in ("a", "a", "b", "c")),
    )
    assert [(answer.status_code, answer.json().get("reason")) for answer in answers] == [
        (202, None),
        (409, "destination_in_use"),
        (202, None),
        (429, "too_many_jobs"),
    ]


@pytest.mark.parametrize("job_id", ["x", "../../etc/passwd", "0123456789abcde", "0123456789ABCDEF", "0" * 17])
def test_ids_are_ids(places: Path, job_id: str):
    (answer,) = asked(service(jobs(places, Recorded())), get(f"/v1/jobs/{job_id}"))
    assert answer.status_code in {404, 422}


def test_the_list_is_paged_and_asks_ray_once(places: Path):
    runners = Recorded()
    app = service(jobs(places, runners, at_once=50))
    ids = []
    for number in range(7):
        (started,) = asked(app, submit("", source=f"{places}/in", destination=f"{places}/out/{number}"))
        ids.append(started.json()["id"])
    runners.asked.clear()
    pages, path = [], "/v1/jobs?limit=3"
    while path:
        (page,) = asked(app, get(path))
        pages.append([job["id"] for job in page.json()])
        path = page.headers.get("link", "").partition(">")[0].removeprefix("<")
    latest = sorted(ids, reverse=True)
    assert pages == [latest[:3], latest[3:6], latest[6:]]
    assert runners.asked == ["known"] * 3
    assert asked(app, get("/v1/jobs?limit=101"))[0].status_code == 422


def test_how_a_job_ends_is_what_ray_says(places: Path):
    runners = Recorded()
    app = service(jobs(places, runners, at_once=3))
    ids = []
    for name in ("done", "bad", "gone"):
        (started,) = asked(app, submit("", source=f"{places}/in", destination=f"{places}/out/{name}"))
        ids.append(started.json()["id"])
    runners.end(ids[0], "succeeded")
    runners.end(ids[1], "failed", "segment: no such model")
    runners.end(ids[2], "cancelled")
    runners.logs = '{"level": "INFO"}\n{"series": 4, "seg_paths": ["s3://x"]}\nat exit\n'
    done, bad, gone = (asked(app, get(f"/v1/jobs/{one}"))[0].json() for one in ids)
    assert (done["state"], done["result"], done["ended"]) == ("succeeded", {"series": 4}, 1.8e9)
    assert (bad["state"], bad["error"]) == ("failed", "segment: no such model")
    assert (gone["state"], gone["result"]) == ("cancelled", None)
    (another,) = asked(app, submit("", source=f"{places}/in", destination=f"{places}/out/done"))
    assert another.status_code == 202, "those that ended hold no place"


def test_a_job_that_ray_does_not_take_is_no_job(places: Path):
    runners = Recorded()
    app = service(jobs(places, runners))
    request = submit("", source=f"{places}/in", destination=f"{places}/out")
    runners.away = True
    refused, listed = asked(app, request, get("/v1/jobs"))
    for answer in (refused, listed):
        assert (answer.status_code, answer.json()["reason"]) == (503, "unavailable")
        assert answer.headers["retry-after"]
    runners.away = False
    listed, started = asked(app, get("/v1/jobs"), request)
    assert (listed.json(), started.status_code) == ([], 202)


def test_progress_at_a_place_is_the_last_jobs(places: Path):
    runners = Recorded()
    app = service(jobs(places, runners))
    request = submit("", source=f"{places}/in", destination=f"{places}/out")
    (first,) = asked(app, request)
    runners.end(first.json()["id"], "cancelled")
    runners.jobs["0" * 16] = runners.jobs.pop(first.json()["id"])  # of an earlier second
    (second,) = asked(app, request)
    progress = {"series": 1, "series_total": 4, "slices": 30, "slices_total": 120, "slices_per_second": 3.0}
    storage.write_json(f"{places}/out/progress.json", {**progress, "eta_s": 30.0, "reasons": {}, "run_id": "r"})
    told = [asked(app, get(f"/v1/jobs/{one}"))[0].json()["progress"] for one in ("0" * 16, second.json()["id"])]
    assert told[0] is None
    assert told[1]["slices"] == 30
