"""The service as its clients see it: a real process, a real registry, real requests."""

import contextlib
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pydicom
import pytest
from PIL import Image

from rayseg.data.synthetic import slice_bytes
from rayseg.records import Reject
from tests import bundles

ROOT = Path(__file__).parents[2]
DICOM = {"content-type": "application/dicom"}
MAX_BODY = 1024 * 1024
REQUESTS = 300  # while versions come and go; tried with 20,000 by hand

pytestmark = [pytest.mark.e2e, pytest.mark.ray]


@dataclass(frozen=True)
class Service:
    """A running `python -m jobs.serve`, and the predictor of the same bundle in this process."""

    process: subprocess.Popen[str]
    url: str
    tracking_uri: str
    log: Path
    predictor: Any
    version: Any

    def mask(self, body: bytes) -> np.ndarray:
        (result,) = self.predictor.segment([body])
        assert not isinstance(result, Reject)
        return result.mask


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serving")
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    predictor, version = register(folder, tracking_uri)
    process, log = start(folder, tracking_uri)
    try:
        ready = json.loads(process.stdout.readline() or "{}")  # ends with the process; pytest-timeout bounds it
        assert "url" in ready, log.read_text()[-5000:]
        yield Service(process, ready["url"], tracking_uri, log, predictor, version)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


def register(folder: Path, tracking_uri: str) -> tuple[Any, Any]:
    """A tiny network with edges of its own in every mask, registered as `tiny`, alias `champion`."""
    import keras

    from rayseg.data.labels import Labels
    from rayseg.data.preprocess import Preprocess, Window
    from rayseg.inference.predictor import Predictor
    from rayseg.tracking import registry, runs

    keras.utils.set_random_seed(1)
    image = keras.Input((64, 64, 1), dtype="uint8")
    scaled = keras.layers.Rescaling(1 / 255)(image)
    features = keras.layers.Conv2D(8, 5, padding="same", activation="relu")(scaled)
    logits = keras.layers.Conv2D(1, 3, padding="same")(features)
    model = keras.Model(
        image, keras.layers.Activation("sigmoid")(logits - keras.ops.mean(logits, (1, 2), keepdims=True))
    )
    preprocess = Preprocess(size=(64, 64), window=Window(40.0, 80.0), percentiles=None)
    registry.save(folder / "bundle", model, preprocess, Labels(("lesion",)), 0.5, slice_bytes(0, 64))
    run_id = runs.start(tracking_uri, "serving", "tiny", {}, {})
    version = registry.register(tracking_uri, run_id, folder / "bundle", "tiny")
    runs.finish(tracking_uri, run_id, "FINISHED")
    registry.set_alias(tracking_uri, "tiny", "champion", version.version)
    return Predictor.load(folder / "bundle"), version


def start(folder: Path, tracking_uri: str) -> tuple[subprocess.Popen[str], Path]:
    """The job as its user starts it, on a cluster of its own."""
    settings = {
        "tracking_uri": tracking_uri,
        "model_uri": "models:/tiny@champion",
        "port": 0,
        "poll_s": 0.5,
        "max_body_mb": MAX_BODY / 1024**2,
    }
    log = folder / "serve.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jobs.serve",
                *(f"--set={key}={json.dumps(value)}" for key, value in settings.items()),
            ],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    return process, log


def environment() -> dict[str, str]:
    """What a user's shell has: none of the test session's settings of Ray, so the job makes its own token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": "platform"}


def post(
    service: Service, body: bytes, accept: str | None = None, content_type: str = "application/dicom"
) -> httpx.Response:
    headers = {"content-type": content_type, **({"accept": accept} if accept else {})}
    return httpx.post(f"{service.url}/v1/segment", content=body, headers=headers, timeout=60)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def read_png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_png_is_the_predictors_mask_on_the_native_grid(service: Service):
    body = slice_bytes(3, 96)
    expected = service.mask(body)
    assert 0 < expected.sum() < expected.size, "a mask that tells something"
    answer = post(service, body, "image/png")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-model-name"] == "tiny"
    assert answer.headers["x-model-version"] == service.version.version
    assert answer.headers["x-model-digest"] == service.version.digest
    assert answer.headers["cache-control"] == "no-store"
    mask = read_png(answer.content)
    assert mask.shape == (96, 96)
    assert mask.tobytes() == expected.tobytes()


def test_json_tells_counts_and_areas(service: Service):
    body = slice_bytes(3, 96)
    expected = service.mask(body)
    told = post(service, body).json()
    spacing = [float(value) for value in pydicom.dcmread(io.BytesIO(body)).PixelSpacing]
    assert (told["rows"], told["columns"]) == (96, 96)
    assert told["foreground_pixels"] == int(expected.sum())
    assert told["area_mm2"] == pytest.approx(expected.sum() * spacing[0] * spacing[1], abs=1e-3)
    (label,) = told["labels"]
    assert label == {"value": 1, "name": "lesion", "pixels": int(expected.sum()), "area_mm2": told["area_mm2"]}
    assert (told["model"], told["version"], told["digest"]) == ("tiny", service.version.version, service.version.digest)
    assert told["timings_ms"]["forward"] <= told["timings_ms"]["total"]
    assert told["preview"] is None


def test_json_previews_slice_and_mask_on_request(service: Service):
    import base64

    body = slice_bytes(3, 96)
    answer = httpx.post(f"{service.url}/v1/segment?preview=true", content=body, headers=DICOM, timeout=60).json()
    pictures = {name: read_png(base64.b64decode(data)) for name, data in answer["preview"].items()}
    assert pictures["mask_png"].tobytes() == service.mask(body).tobytes()
    stored = pydicom.dcmread(io.BytesIO(body))
    hu = stored.pixel_array.astype(float) * float(stored.RescaleSlope) + float(stored.RescaleIntercept)
    windowed = np.clip(((hu - 39.5) / 79 + 0.5) * 255, 0, 255)  # PS3.3 C.11.2.1.2.1, center 40, width 80
    assert np.abs(pictures["slice_png"] - windowed).max() <= 0.51


def test_dicom_seg_decodes_to_the_same_mask(service: Service):
    from rayseg.dicom import segmentation

    body = slice_bytes(3, 96)
    source = pydicom.dcmread(io.BytesIO(body))
    answer = post(service, body, "application/dicom")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/dicom"
    written = pydicom.dcmread(io.BytesIO(answer.content))
    assert written.SOPClassUID.name == "Segmentation Storage"
    assert written.StudyInstanceUID == source.StudyInstanceUID
    ((instance, mask),) = segmentation.decode(answer.content).items()
    assert instance == source.SOPInstanceUID
    assert mask.tobytes() == service.mask(body).tobytes()
    assert post(service, body, "application/dicom").content == answer.content, "nothing twice"


@pytest.mark.parametrize(("image_format", "content_type"), [("PNG", "image/png"), ("TIFF", "image/tiff")])
def test_image_files_are_segmented_but_have_no_place_for_a_seg(service: Service, image_format: str, content_type: str):
    buffer = io.BytesIO()
    Image.fromarray((np.indices((48, 80)).sum(0) * 2 % 256).astype(np.uint8)).save(buffer, image_format)
    body = buffer.getvalue()
    answer = post(service, body, "image/png", content_type)
    assert read_png(answer.content).tobytes() == service.mask(body).tobytes()
    told = post(service, body, "application/json", content_type).json()
    assert (told["rows"], told["columns"]) == (48, 80)
    assert told["area_mm2"] is None
    refused = post(service, body, "application/dicom", content_type)
    assert refused.status_code == 422
    assert refused.json()["reason"] == "missing_attribute"


def test_a_mask_too_large_for_a_direct_message_comes_all_the_same(service: Service):
    """A small file of a large image: gRPC takes 4 MiB, and the mask is more."""
    image = np.zeros((2100, 2100), np.uint8)
    image[500:1500, 300:900] = 200
    body = png(image)
    assert len(body) < MAX_BODY < 4 * 2**20 < image.size
    answer = post(service, body, "image/png", "image/png")
    assert answer.status_code == 200, answer.text
    mask = read_png(answer.content)
    assert mask.shape == image.shape
    assert mask.tobytes() == service.mask(body).tobytes()


def test_concurrent_clients_get_their_own_masks(service: Service):
    bodies = [slice_bytes(seed, 64 + 8 * (seed % 3)) for seed in range(16)]
    expected = [service.mask(body) for body in bodies]
    assert len({mask.tobytes() for mask in expected}) == 16, "masks that cannot be mistaken for each other"
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda body: read_png(post(service, body, "image/png").content), bodies))
    for mask, own in zip(answers, expected, strict=True):
        assert mask.shape == own.shape
        assert mask.tobytes() == own.tobytes()


def test_a_series_is_the_bulk_jobs_segmentation(service: Service, tmp_path: Path):
    """Byte for byte, whatever the order and the names in the zip: UIDs, settings and engine included."""
    from rayseg.data import synthetic
    from rayseg.inference.outputs import settings_digest
    from rayseg.inference.postprocess import Postprocess
    from rayseg.inference.series import Task, segment_series
    from rayseg.models.engine import Engine

    written = synthetic.write_studies(str(tmp_path / "studies"), patients=1, slices=20, size=128, masks=False)
    files = list(Path(written.images.removeprefix("file://")).rglob("*.dcm"))
    files.sort(key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    settings = settings_digest(Postprocess(), Engine(), None)
    row = segment_series(
        service.predictor,
        Task(str(tmp_path / "bulk"), service.version, "", settings=settings),
        series_key="s",
        patient_key="p",
        uris=[str(path) for path in files],
        frames=[None] * len(files),
    )
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for number, path in enumerate(reversed(files)):
            archive.writestr(f"../{number}.dcm", path.read_bytes())
    answer = post(service, body.getvalue(), "application/dicom", "application/zip")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-version"] == service.version.version
    (output,) = row["outputs"]
    assert answer.content == Path(output["uri"].removeprefix("file://")).read_bytes()
    told = post(service, body.getvalue(), "application/json", "application/zip").json()
    assert (told["slices"], told["rejected"]) == (20, {})
    assert told["foreground_pixels"] == row["foreground_pixels"]
    assert told["volume_ml"] == pytest.approx(row["volume_ml"], abs=1e-3)


def without(keyword: str) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(slice_bytes(3, 64)))
    delattr(dataset, keyword)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "empty_object"),
        (b"no image, though somebody says so" * 10, 400, "not_dicom"),
        (slice_bytes(3, 64)[:3000], 400, "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, 400, "not_an_image"),
        (without("PixelData"), 422, "no_pixels"),
        (without("Rows"), 422, "missing_attribute"),
        (slice_bytes(3, 64) + b"\0" * MAX_BODY, 413, "too_large"),
    ],
)
def test_bad_bodies_are_told_why(service: Service, body: bytes, status: int, reason: str):
    answer = post(service, body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["reason"] == reason
    assert set(answer.json()) == {"reason", "detail"}
    assert post(service, slice_bytes(3, 64)).status_code == 200, "the next one is served"


def test_the_seg_of_a_slice_without_a_place_names_the_slice(service: Service):
    body = without("ImagePositionPatient")
    answer = post(service, body, "application/dicom")
    assert answer.status_code == 200
    segmentation = pydicom.dcmread(io.BytesIO(answer.content))
    [frame] = segmentation.PerFrameFunctionalGroupsSequence
    assert "PlanePositionSequence" not in frame
    [source] = frame.DerivationImageSequence[0].SourceImageSequence
    assert source.ReferencedSOPInstanceUID == pydicom.dcmread(io.BytesIO(body)).SOPInstanceUID


def test_a_body_without_end_is_refused_while_it_arrives(service: Service):
    """Chunked, so no length tells; the client never says that it is done, so an answer cannot have waited for that."""
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST /v1/segment HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/dicom\r\n"
    chunk = b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(MAX_BODY // 65536 + 1):
            connection.sendall(chunk)
        answer = connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("accept", "status", "kind"),
    [
        (None, 200, "application/json"),
        ("*/*", 200, "application/json"),
        ("image/*", 200, "image/png"),
        ("application/json;q=0.5, image/png;q=0.9", 200, "image/png"),
        ("image/png;q=0, */*;q=0.1", 200, "application/json"),
        ("application/*;q=0.2, application/json;q=0", 200, "application/dicom"),
        ("text/html", 406, "application/json"),
        ("image/png;q=0", 406, "application/json"),
    ],
)
def test_accept_decides(service: Service, accept: str | None, status: int, kind: str):
    request = httpx.Request("POST", f"{service.url}/v1/segment", content=slice_bytes(3, 64), headers=DICOM)
    if accept is not None:
        request.headers["accept"] = accept
    answer = httpx.Client(timeout=60).send(request)
    assert (answer.status_code, answer.headers["content-type"]) == (status, kind)
    if status == 406:
        assert answer.json()["reason"] == "not_acceptable"


def test_other_refusals_are_json_too(service: Service):
    body = slice_bytes(3, 64)
    form = post(service, body, content_type="application/x-www-form-urlencoded")
    assert (form.status_code, form.json()["reason"]) == (415, "unsupported_media_type")
    zipped = httpx.post(
        f"{service.url}/v1/segment", content=body, headers={**DICOM, "content-encoding": "gzip"}, timeout=60
    )
    assert (zipped.status_code, zipped.json()["reason"]) == (415, "unsupported_media_type")
    doubtful = httpx.post(f"{service.url}/v1/segment?preview=perhaps", content=body, headers=DICOM, timeout=60)
    assert (doubtful.status_code, doubtful.json()["reason"]) == (422, "invalid_parameter")
    assert "perhaps" not in doubtful.text
    assert httpx.get(f"{service.url}/v1/segment", timeout=60).status_code == 405
    lost = httpx.get(f"{service.url}/nowhere", timeout=60)
    assert (lost.status_code, lost.json()["reason"]) == (404, "not_found")


def test_healthz_and_model(service: Service):
    health = httpx.get(f"{service.url}/healthz", timeout=30)
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    model = httpx.get(f"{service.url}/v1/model", timeout=60).json()
    assert model == {
        "name": "tiny",
        "version": service.version.version,
        "alias": "champion",
        "digest": service.version.digest,
        "run_id": service.version.run_id,
        "labels": ["lesion"],
        "preprocess": {
            "size": [64, 64],
            "window": {"center": 40.0, "width": 80.0},
            "percentiles": None,
            "z_score": None,
            "mask_filter": "image",
            "color": False,
            "neighbours": 0,
        },
        "threshold": 0.5,
        "engine": service.predictor.engine,
    }


def test_description_and_pages_need_no_other_machine(service: Service):
    description = httpx.get(f"{service.url}/openapi.json", timeout=60).json()
    assert "not a medical device" in description["info"]["description"]
    operation = description["paths"]["/v1/segment"]["post"]
    assert "application/dicom" in operation["requestBody"]["content"]
    assert {"application/zip", "multipart/form-data"} <= set(operation["requestBody"]["content"])
    offered = {"application/json", "image/png", "application/dicom", "application/nifti", "model/gltf-binary"}
    offered |= {"multipart/form-data"}
    assert offered == set(operation["responses"]["200"]["content"])
    assert {"400", "406", "413", "415", "422", "503"} <= set(operation["responses"])
    for path in ("/", "/docs"):
        page = httpx.get(f"{service.url}{path}", timeout=60)
        assert page.status_code == 200
        loaded = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path
        for address in loaded:
            if not address.startswith("data:"):
                assert httpx.get(httpx.URL(f"{service.url}{path}").join(address), timeout=60).status_code == 200, (
                    address
                )
    assert "Research software, not a medical device" in httpx.get(f"{service.url}/", timeout=60).text


@dataclass(frozen=True)
class Answered:
    """What a client got, and when it asked and was answered."""

    number: int  # of its body
    began: float
    ended: float
    status: int
    version: str | None
    mask: bytes


def test_nobody_notices_swaps_a_bad_version_and_a_killed_replica(service: Service, tmp_path: Path):
    """Under load: the alias moves twice, a version that gives other masks than recorded is promoted, `kill -9`."""
    from rayseg.inference.predictor import Predictor
    from rayseg.tracking import registry

    uri, name, first = service.tracking_uri, "tiny", service.version.version
    second = bundles.register(uri, name, bundles.write_bundle(tmp_path / "second", 140)).version
    other = Predictor.load(tmp_path / "second")
    bad = bundles.spoil(bundles.write_bundle(tmp_path / "bad", 140), example_mask_sha256="0" * 64)
    bad_version = bundles.register(uri, name, bad).version
    bodies = [slice_bytes(seed, 64) for seed in range(4)]
    expected = {
        first: [service.mask(body).tobytes() for body in bodies],
        second: [made.mask.tobytes() for made in other.segment(bodies)],
    }
    assert not set(expected[first]) & set(expected[second]), "masks that tell which version made them"
    ended, answers = threading.Event(), []
    moves: list[tuple[str, float, float]] = []  # a version, when it was asked for, when it was seen in use

    def client(number: int) -> None:
        with httpx.Client(timeout=90) as session:
            while not ended.is_set():
                headers = {**DICOM, "accept": "image/png"}
                began = time.monotonic()
                answer = session.post(f"{service.url}/v1/segment", content=bodies[number], headers=headers)
                mask = read_png(answer.content).tobytes() if answer.status_code == 200 else b""
                version = answer.headers.get("x-model-version")
                answers.append(Answered(number, began, time.monotonic(), answer.status_code, version, mask))

    def until(told: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 90
        while not told(state := httpx.get(f"{service.url}/v1/models", timeout=90).json()):
            assert time.monotonic() < deadline, state
            time.sleep(0.1)
        return state

    def in_use(version: str) -> Callable[[dict[str, Any]], bool]:
        return lambda state: state["models"][0]["version"] == version

    def move(version: str) -> None:
        asked = time.monotonic()
        registry.set_alias(uri, name, "champion", version)
        until(in_use(version))
        moves.append((version, asked, time.monotonic()))

    def load(share: float) -> None:
        wanted, deadline = share * REQUESTS, time.monotonic() + 90 + REQUESTS / 20
        while len(answers) < wanted:
            assert time.monotonic() < deadline, f"{len(answers)} answers"
            time.sleep(0.1)

    with ThreadPoolExecutor(4) as clients:
        running = [clients.submit(client, number) for number in range(4)]
        try:
            load(0.2)
            move(second)
            load(0.4)
            registry.set_alias(uri, name, "champion", bad_version)
            state = until(lambda state: state["failed_swaps"] == 1)
            assert state["last_failure"]["version"] == bad_version
            assert in_use(second)(state)
            load(0.6)
            replicas(service)[0].kill()
            state = until(lambda told: told["replica"] != state["replica"])
            assert in_use(second)(state), "not the bad one, which bears the alias"
            load(0.8)
            move(first)
            load(1.0)
        finally:
            ended.set()
    for client_ended in running:
        client_ended.result()
    assert len(answers) >= REQUESTS
    assert {answer.status for answer in answers} == {200}
    uses = [(first, -math.inf, -math.inf), *moves, (bad_version, math.inf, math.inf)]
    for answer in answers:
        # A version is in use from when it was asked for, at the earliest, until the next one was seen, at the latest.
        possible = {use[0] for use, after in pairwise(uses) if use[1] <= answer.ended and answer.began <= after[2]}
        assert answer.version in possible
        assert answer.mask == expected[answer.version][answer.number]
    assert {answer.version for answer in answers} == {first, second}


def replicas(service: Service) -> list[psutil.Process]:
    """The processes of the model's replicas."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    return [process for process in children if "ray::ServeReplica:rayseg:model" in " ".join(process.cmdline())]


def test_what_nobody_waits_for_is_not_computed(service: Service):
    """Clients that leave: their slices are taken from the replica's queue, and their requests end."""
    image = png(np.zeros((2000, 2000), np.uint8))
    host, port = service.url.removeprefix("http://").split(":")
    lines = ("POST /v1/segment HTTP/1.1", f"Host: {host}", "Content-Type: image/png", f"Content-Length: {len(image)}")
    head = "".join(f"{line}\r\n" for line in (*lines, ""))

    def state() -> dict[str, Any]:
        return httpx.get(f"{service.url}/v1/models", timeout=30).json()

    before = state()["dropped"]
    with contextlib.ExitStack() as there:
        for _ in range(40):
            connection = there.enter_context(socket.create_connection((host, int(port)), timeout=30))
            connection.sendall(head.encode() + image)
        deadline = time.monotonic() + 30
        while (waiting := state()["waiting"]) < 10:
            assert time.monotonic() < deadline, waiting
    while (told := state())["waiting"] or told["running"]:
        assert time.monotonic() < deadline, told
    assert told["dropped"] - before >= waiting / 2
    metrics = httpx.get(f"{service.url}/metrics", timeout=30).text
    assert re.search(r"^rayseg_http_in_flight 1\.0$", metrics, re.M), "that one"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model_uri=models:/tiny@nobody", "models:/tiny@nobody"),
        ("port=PORT", "port: 127.0.0.1:PORT"),  # listeners of Serve can share a port: two models would answer by turns
        ("max_queue=0", "max_queue"),
    ],
)
def test_a_service_that_cannot_start_says_why_in_one_line(service: Service, setting: str, told: str):
    port = service.url.split(":")[-1]
    settings = [
        f"tracking_uri={service.tracking_uri}",
        "model_uri=models:/tiny@champion",
        setting.replace("PORT", port),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.serve", *(f"--set={value}" for value in settings)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert told.replace("PORT", port) in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_sigterm_ends_it_cleanly(service: Service):
    """Last: the fixture's service is gone afterwards."""
    service.process.send_signal(signal.SIGTERM)
    output, _ = service.process.communicate(timeout=60)
    assert service.process.returncode == 0
    result = json.loads(output.splitlines()[-1])
    assert result["url"] == service.url
    assert result["model_uri"] == service.version.uri
    assert "Traceback" not in service.log.read_text()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{service.url}/healthz", timeout=5)
