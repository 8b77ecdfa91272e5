"""The client against the real routes behind a real server."""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from rayseg import client
from rayseg.client import Client, RefusedError
from rayseg.data.synthetic import slice_bytes
from tests.unit.guarded import INFO, listening, service
from tests.unit.test_guard import KNOWN
from tests.unit.test_jobs import Recorded, jobs


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def url(places: Path) -> Iterator[str]:
    with listening(service(jobs(places, Recorded()), tokens=KNOWN)) as address:
        yield address


def test_a_slice_by_bytes_and_by_path(url: str, tmp_path: Path):
    body = slice_bytes(3, 64)
    (tmp_path / "slice.dcm").write_bytes(body)
    with Client(url, "r-token") as service:
        told = service.segment(body)
        mask = service.segment(tmp_path / "slice.dcm", "png")
    assert json.loads(told.content)["rows"] == 64
    assert (told.model, told.digest) == (f"{INFO.name} {INFO.version}", INFO.digest)
    with Image.open(io.BytesIO(mask.content)) as image:
        assert np.asarray(image).sum() == json.loads(told.content)["foreground_pixels"]


def test_the_command_asks_where_neither_ray_nor_tensorflow_is_installed(url: str, tmp_path: Path) -> None:
    """A process in which their import fails, as it does without them."""
    (tmp_path / "slice.dcm").write_bytes(slice_bytes(3, 64))
    (tmp_path / "token").write_text("r-token")
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "tensorflow", "keras", "mlflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
try:
    import ray
except ModuleNotFoundError:
    from rayseg import command
    command.main(sys.argv[1:])
"""
    asked = ["ask", "slice.dcm", "--server", url, "--token-file", "token", "--format", "png", "--output", "mask.png"]
    done = subprocess.run([sys.executable, "-c", code, *asked], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "mask.png") as image:
        assert image.size == (64, 64)


def test_refusals_have_their_reason(url: str):
    with Client(url, "r-token") as service:
        with pytest.raises(RefusedError, match="not_dicom") as refused:
            service.segment(b"no image" * 100)
        assert refused.value.status == 400
        with pytest.raises(RefusedError, match="forbidden"):
            service.jobs()
    with Client(url) as stranger, pytest.raises(RefusedError, match="401 unauthorized"):
        stranger.segment(b"")


def test_jobs(url: str, places: Path):
    with Client(url, "s-token") as service:
        job = service.submit(source=f"{places}/in", destination=f"{places}/out")
        assert [one["id"] for one in service.jobs()] == [job["id"]]
        assert service.job(job["id"])["owner"] == "lab"
        service.cancel(job["id"])
        with pytest.raises(RefusedError, match="409 job_ended"):
            service.cancel(job["id"])


def test_a_folder_goes_as_a_zip_without_names(tmp_path: Path):
    (tmp_path / "Doe^Jane" / "deeper").mkdir(parents=True)
    contents = {"a.dcm": b"one" * 100_000, "deeper/b.dcm": b"two", ".hidden": b"three"}
    for name, content in contents.items():
        (tmp_path / "Doe^Jane" / name).write_bytes(content)
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, json={})

    with Client("https://x", transport=httpx.MockTransport(answer)) as service:
        service.segment(tmp_path / "Doe^Jane", model="7", priority="bulk")
    (request,) = sent
    assert request.headers["content-type"] == "application/zip"
    assert dict(request.url.params) == {"model": "7", "priority": "bulk"}
    body = request.read()
    assert int(request.headers["content-length"]) == len(body)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert sorted(map(archive.read, archive.namelist())) == [b"one" * 100_000, b"two"]
        assert not any("Doe" in name or ".dcm" in name for name in archive.namelist())


def test_a_busy_service_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    paused: list[float] = []
    monkeypatch.setattr(client, "sleep", paused.append)
    answers = iter([httpx.Response(429, headers={"Retry-After": "7"}), httpx.Response(503), httpx.Response(200)])
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        return next(answers)

    with Client("https://x", transport=httpx.MockTransport(answer)) as service:
        service.segment(b"body")
    assert (bodies, paused) == ([b"body"] * 3, [7.0, 4.0])


@pytest.mark.parametrize("address", ["http://example.org", "ftp://127.0.0.1", "127.0.0.1:8000"])
def test_a_token_does_not_go_out_in_the_clear(address: str):
    with pytest.raises(ValueError, match="server"):
        Client(address, "secret")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["slice.dcm"], 0, ""),
        (["slice.dcm", "--format", "seg"], 0, "slice.seg.dcm: "),
        (["slice.dcm", "--format", "png", "--output", "mask.png"], 0, "mask.png: "),
        (["text.dcm"], 3, "not_dicom"),
        (["none.dcm"], 2, "none.dcm"),
        (["slice.dcm", "--token-file", "wrong"], 3, "401 unauthorized"),
        (["slice.dcm", "--token-file", "nowhere"], 2, "nowhere"),
        (["slice.dcm", "--server", "http://127.0.0.1:1"], 4, "ConnectError"),
        (["slice.dcm", "--server", "nonsense"], 2, "http(s)://"),
    ],
)
def test_the_commands_exit_codes_and_files(
    url: str,
    arguments: list[str],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYSEG_TOKEN", "r-token")
    files: dict[str, Any] = {"slice.dcm": slice_bytes(3, 64), "text.dcm": b"text" * 100, "wrong": b"x-token\n"}
    for name, content in files.items():
        Path(name).write_bytes(content)
    ended = 0
    try:
        client.main(["--server", url, *arguments])
    except SystemExit as error:
        ended = error.code
    captured = capfdbinary.readouterr()
    assert (ended, told in captured.err.decode()) == (code, True), captured.err
    assert b"Traceback" not in captured.err
    if arguments == ["slice.dcm"]:
        assert json.loads(captured.out)["rows"] == 64
    made = {path.name for path in tmp_path.iterdir()} - set(files)
    assert made == ({told.removesuffix(": ")} if code == 0 and told else set())
