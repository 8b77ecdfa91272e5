"""Bulk jobs over HTTP: what they may read and write, whose they are, and what is told of them."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rayseg import storage
from serving.jobs import Jobs, JobsConfig, ServedModel, allowed
from serving.refusals import RefusalError
from serving.runner import Runner
from tests.unit.guarded import asked, get, service
from tests.unit.test_guard import KNOWN, bearing

JSON = {"content-type": "application/json"}


class Recorded:
    """Runners that run nothing; what is in `living` is alive."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.living: set[str] = set()

    async def start(self, job_id: str, record_uri: str, record: dict[str, Any], settings: dict[str, Any]) -> None:
        storage.write_json(record_uri, record)
        self.settings.append(settings)
        self.living.add(job_id)

    async def alive(self, job_id: str) -> bool:
        return job_id in self.living

    async def cancel(self, job_id: str) -> bool:
        was = job_id in self.living
        self.living.discard(job_id)
        return was


@pytest.fixture
def places(tmp_path: Path) -> Path:
    for name in ("in", "out", "secret", "out-of-bounds"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    return tmp_path


def jobs(places: Path, runners: Recorded, **config: Any) -> Jobs:
    roots = {"sources": (str(places / "in"), "s3://archive/ct"), "destinations": (str(places / "out"),)}
    settings = JobsConfig(**{"records": str(places / "records"), **roots, **config})
    model = ServedModel(name="brain", uri="models:/brain@champion", tracking_uri="sqlite:///x.db")
    return Jobs(settings, model, runners, pacs="https://pacs.example/dicom-web")


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
    runners.living.clear()
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


@pytest.mark.parametrize(
    ("program", "record"),
    [
        (
            "echo noise >&2; echo 'segment: no such model' >&2; exit 2",
            {"state": "failed", "error": "segment: no such model"},
        ),
        ("echo 'Traceback of a PATIENT' >&2; exit 1", {"state": "failed", "error": "ended with code 1"}),
        (
            'echo noise; echo \'{"series": 4, "seg_paths": ["s3://x"]}\'',
            {"state": "succeeded", "result": {"series": 4}},
        ),
    ],
)
def test_how_a_jobs_process_ends_is_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, record: dict[str, Any]
):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("ray.actor.exit_actor", lambda: None)
    uri = str(tmp_path / "id.json")

    async def run() -> None:
        runner = Runner(
            uri, {"id": "id", "state": "running"}, {"output": str(tmp_path / "out")}, {"RAY_ADDRESS": "there"}
        )
        await runner.begin()
        await runner.watch()

    asyncio.run(run())
    told = storage.read_json(uri)
    assert told.pop("ended") > 0
    assert told == {"id": "id", **record}
