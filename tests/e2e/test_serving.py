"""The service as its clients see it: a real process, a real registry, real requests."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from PIL import Image

from rayseg.data.synthetic import slice_bytes
from rayseg.records import Reject

ROOT = Path(__file__).parents[2]
DICOM = {"content-type": "application/dicom"}
MAX_BODY = 1024 * 1024

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
    """The job as its user starts it, on a cluster of its own; batches wait long enough to be shared."""
    settings = {
        "tracking_uri": tracking_uri,
        "model_uri": "models:/tiny@champion",
        "port": 0,
        "batch_wait_ms": 100,
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


def test_concurrent_clients_share_batches_and_get_their_own_masks(service: Service):
    bodies = [slice_bytes(seed, 64 + 8 * (seed % 3)) for seed in range(16)]
    expected = [service.mask(body) for body in bodies]
    assert len({mask.tobytes() for mask in expected}) == 16, "masks that cannot be mistaken for each other"

    def ask(body: bytes) -> tuple[np.ndarray, int]:
        mask = read_png(post(service, body, "image/png").content)
        return mask, post(service, body, "application/json").json()["batch_size"]

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, bodies))
    for (mask, _), own in zip(answers, expected, strict=True):
        assert mask.shape == own.shape
        assert mask.tobytes() == own.tobytes()
    sizes = [size for _, size in answers]
    assert max(sizes) > 1, "no batch was shared"
    assert max(sizes) <= 8


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


def test_a_slice_without_a_place_is_segmented_but_gets_no_seg(service: Service):
    body = without("ImagePositionPatient")
    assert post(service, body, "image/png").status_code == 200
    refused = post(service, body, "application/dicom")
    assert refused.status_code == 422
    assert refused.json() == {"reason": "missing_attribute", "detail": "ImagePositionPatient"}


def test_a_body_without_end_is_refused_while_it_arrives(service: Service):
    """Chunked, so no length tells; the client never says that it is done, so an answer cannot have waited for that."""
    host, port = service.url.removeprefix("http://").split(":")
    fields = ["POST /v1/segment HTTP/1.1", "Host: x", "Content-Type: application/dicom", "Transfer-Encoding: chunked"]
    chunk = b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join([*fields, "", ""]).encode())
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
    zipped = httpx.post(f"{service.url}/v1/segment", content=body, headers={**DICOM, "content-encoding": "gzip"})
    assert (zipped.status_code, zipped.json()["reason"]) == (415, "unsupported_media_type")
    doubtful = httpx.post(f"{service.url}/v1/segment?preview=perhaps", content=body, headers=DICOM)
    assert (doubtful.status_code, doubtful.json()["reason"]) == (422, "invalid_parameter")
    assert "perhaps" not in doubtful.text
    assert httpx.get(f"{service.url}/v1/segment").status_code == 405
    lost = httpx.get(f"{service.url}/nowhere")
    assert (lost.status_code, lost.json()["reason"]) == (404, "not_found")


def test_healthz_and_model(service: Service):
    health = httpx.get(f"{service.url}/healthz", timeout=30)
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    model = httpx.get(f"{service.url}/v1/model").json()
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
            "color": False,
            "neighbours": 0,
        },
        "threshold": 0.5,
    }


def test_description_and_pages_need_no_other_machine(service: Service):
    description = httpx.get(f"{service.url}/openapi.json").json()
    assert "not a medical device" in description["info"]["description"]
    operation = description["paths"]["/v1/segment"]["post"]
    assert "application/dicom" in operation["requestBody"]["content"]
    assert {"application/json", "image/png", "application/dicom"} == set(operation["responses"]["200"]["content"])
    assert {"400", "406", "413", "415", "422", "503"} <= set(operation["responses"])
    for path in ("/", "/docs"):
        page = httpx.get(f"{service.url}{path}")
        assert page.status_code == 200
        loaded = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path
        for address in loaded:
            if not address.startswith("data:"):
                assert httpx.get(httpx.URL(f"{service.url}{path}").join(address)).status_code == 200, address
    assert "Research software, not a medical device" in httpx.get(f"{service.url}/").text


def test_logs_hold_no_identity(service: Service):
    """Whatever a client writes into a request: path, query, headers, and the object itself."""
    dataset = pydicom.dcmread(io.BytesIO(slice_bytes(3, 64)))
    dataset.PatientName, dataset.PatientID, dataset.SeriesDescription = "Canary^Carla", "CANARY-1", "CANARY-2"
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    headers = {**DICOM, "x-request-id": "CANARY-3", "user-agent": "CANARY-4", "accept": "application/dicom"}
    address = f"{service.url}/v1/segment?name=CANARY-5"
    assert httpx.post(address, content=buffer.getvalue(), headers=headers, timeout=60).status_code == 200
    assert httpx.post(address, content=buffer.getvalue()[:3000], headers=headers, timeout=60).status_code == 400
    assert httpx.get(f"{service.url}/CANARY-6").status_code == 404
    session = ray_session(service)
    written = [
        service.log,
        *(path for path in session.rglob("*") if path.is_file() and path.suffix in {".log", ".out", ".err"}),
    ]
    assert len(written) > 5
    for path in written:
        assert b"CANARY" not in path.read_bytes().upper(), path


def ray_session(service: Service) -> Path:
    """The log folder of the service's own cluster, from the command line of one of its children."""
    for children in Path(f"/proc/{service.process.pid}/task").glob("*/children"):
        for child in children.read_text().split():
            line = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
            if found := re.search(r"(/[^\0= ]*/session_[^/\0]+)/logs", line):
                return Path(found[1]) / "logs"
    raise AssertionError("no child of the service names its session folder")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model_uri=models:/tiny@nobody", "models:/tiny@nobody"),
        ("port=PORT", "port: 127.0.0.1:PORT"),  # listeners of Serve can share a port: two models would answer by turns
        ("max_batch_size=0", "max_batch_size"),
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
