"""Serving: against the bare network, MLflow's own server and BentoML, with one model on the same cores.

MLflow's server has the model twice: the Keras network as MLflow keeps one, which takes and gives arrays as JSON and
leaves decoding, scaling and the way back to its client; and this package's bundle, which is a model of MLflow's too,
takes DICOM in base64 and runs the same `Predictor`. BentoML's service is written by hand around OpenVINO: DICOM in, PNG
out. All have the defaults of their servers, one worker.
"""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from rayseg.benchmark.archive import bare, images, registered
from rayseg.benchmark.data import figure
from rayseg.data import synthetic
from rayseg.demo import online
from rayseg.models.engine import Engine

_NETWORK, _SIZE, _SLICES = 256, 512, 40
_CLIENTS = (1, 8, 64)
_PEERS_CLIENTS = 8
_SECONDS = 8.0  # of load, after two for warming up
_READY_S, _STOP_S = 120.0, 15.0
# Clients in a process of their own, each with a connection: prints requests a second, seconds of each, failures.
_LOAD = """
import http.client, json, sys, threading, time
host, path, kind, accept, file, clients, seconds = *sys.argv[1:6], int(sys.argv[6]), float(sys.argv[7])
body = open(file, "rb").read()
took, failed = [], []
begin = time.perf_counter() + 2
def client():
    connection = http.client.HTTPConnection(host, timeout=60)
    while True:
        began = time.perf_counter()
        if began > begin + seconds:
            return
        connection.request("POST", path, body, {"Content-Type": kind, "Accept": accept})
        answer = connection.getresponse()
        answer.read()
        if began >= begin:
            took.append(time.perf_counter() - began)
            if answer.status != 200:
                failed.append(answer.status)
threads = [threading.Thread(target=client) for _ in range(clients)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([len(took) / seconds, took, failed]))
"""
# What its documentation has for models of its own; it also needs no other package of ours.
_BENTO = """
import io
from pathlib import Path
import bentoml, numpy as np, openvino, pydicom
from PIL import Image
SIZE = {size}
@bentoml.service(workers=1, traffic={{"timeout": 60}})
class Segment:
    def __init__(self):
        self.model = openvino.Core().compile_model({network!r}, "CPU", {{"PERFORMANCE_HINT": "THROUGHPUT"}})
    @bentoml.api
    def segment(self, dicom: Path, /) -> bytes:
        slice = pydicom.dcmread(io.BytesIO(dicom.read_bytes()))
        values = slice.pixel_array * float(slice.RescaleSlope) + float(slice.RescaleIntercept)
        grey = np.clip(values / 80 * 255, 0, 255).astype(np.uint8)
        small = np.asarray(Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        found = self.model.create_infer_request().infer([small[None, :, :, None]])[0][0, :, :, 0]
        whole = np.asarray(Image.fromarray(found).resize(grey.shape[::-1], Image.Resampling.BILINEAR))
        buffer = io.BytesIO()
        Image.fromarray((whole >= 0.5).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()
"""
# The network as MLflow's users keep one: its own flavour for Keras, with a signature.
_KERAS = """
import sys
import mlflow, numpy as np
from rayseg.tracking.bundle import load_keras
bundle, folder, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
image = np.zeros((1, size, size, 1), np.uint8)
signature = mlflow.models.infer_signature(image, np.zeros((1, size, size, 1), np.float32))
mlflow.tensorflow.save_model(load_keras(bundle), folder, signature=signature)
"""


def measure(folder: Path, repeats: int, bentoml: str | None) -> dict[str, Any]:
    """All figures of the suite; `folder` is for its files, `bentoml` the python of an environment that has it."""
    cores = os.cpu_count() or 2
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    study = folder / "study"
    synthetic.write_studies(str(study), patients=1, slices=_SLICES, size=_SIZE, masks=False)
    bundle = registered(folder / "bundle", tracking_uri, "unet-small", _NETWORK)
    files = sorted(study.rglob("*.dcm"))
    slice_file, row_file = files[len(files) // 2], folder / "row.json"
    encoded = base64.b64encode(slice_file.read_bytes()).decode()
    row_file.write_text(json.dumps({"dataframe_split": {"columns": ["dicom"], "data": [[encoded]]}}))
    images_NHWC = images(study)
    array_file = folder / "array.json"
    array_file.write_text(json.dumps({"inputs": images_NHWC[len(files) // 2][np.newaxis].tolist()}))
    arguments = [str(bundle), str(folder / "keras"), str(_NETWORK)]
    subprocess.run([sys.executable, "-c", _KERAS, *arguments], check=True, capture_output=True)
    found: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    settings = {
        "model_uri": "models:/bench/1",
        "tracking_uri": tracking_uri,
        "port": 0,
        "cpus_per_replica": cores,
    }
    with contextlib.ExitStack() as running:
        url = running.enter_context(online.service(settings, folder / "serve.log"))
        keras_url = running.enter_context(_mlflow(folder / "keras.log", str(folder / "keras"), tracking_uri))
        bundle_url = running.enter_context(_mlflow(folder / "bundle.log", "models:/bench/1", tracking_uri))
        bento_url = running.enter_context(_bento(folder, bundle, bentoml)) if bentoml else None
        for _ in range(repeats):  # all of them run, and one at a time has work
            keep("rps.bare_forward", bare(bundle, images_NHWC, Engine().precision, cores))
            keep("ms.bare_forward_one_at_a_time", 1000 / bare(bundle, images_NHWC, Engine().precision, 1))
            for clients in _CLIENTS:
                rate, took_s = _load(url, "/v1/segment", "application/dicom", "image/png", slice_file, clients)
                keep(f"rps.clients_{clients}", rate)
                for percent in (50, 95, 99):
                    keep(f"ms.p{percent}_clients_{clients}", 1000 * took_s[(len(took_s) - 1) * percent // 100])
            keep("scan_of_40_slices_s", _scan(url, files))
            kind = "application/json"
            for name, peer, file in (("mlflow_serve", keras_url, array_file), ("mlflow_bundle", bundle_url, row_file)):
                keep(f"rps.{name}", _load(peer, "/invocations", kind, kind, file, _PEERS_CLIENTS)[0])
            if bento_url is not None:
                kind = "application/dicom"
                keep("rps.bentoml", _load(bento_url, "/segment", kind, "*/*", slice_file, _PEERS_CLIENTS)[0])
    best = [max(found[f"rps.clients_{clients}"][turn] for clients in _CLIENTS) for turn in range(repeats)]
    compared = {
        "rps_vs_bare_forward": [a / b for a, b in zip(best, found["rps.bare_forward"], strict=True)],
        **{
            f"rps_vs_{peer}": [
                a / b for a, b in zip(found[f"rps.clients_{_PEERS_CLIENTS}"], found[f"rps.{peer}"], strict=True)
            ]
            for peer in ("mlflow_serve", "mlflow_bundle", "bentoml")
            if f"rps.{peer}" in found
        },
        "added_latency_ms": [
            a - b for a, b in zip(found["ms.p50_clients_1"], found["ms.bare_forward_one_at_a_time"], strict=True)
        ],
    }
    figures: dict[str, Any] = {name: figure(values) for name, values in (compared | found).items()}
    if "rps.bentoml" not in found:
        figures["rps.bentoml"] = {"reason": "bentoml names no python"}
    return figures


def _load(url: str, path: str, kind: str, accept: str, body: Path, clients: int) -> tuple[float, list[float]]:
    """Requests a second, and the seconds of each, sorted.

    Raises:
        RuntimeError: a request failed.
    """
    arguments = [url.removeprefix("http://"), path, kind, accept, str(body), str(clients), str(_SECONDS)]
    done = subprocess.run([sys.executable, "-c", _LOAD, *arguments], check=True, capture_output=True, text=True)
    rate, took_s, failed = json.loads(done.stdout)
    if failed:
        raise RuntimeError(f"{path}: {len(failed)} of {len(took_s)} requests failed, the first with {failed[0]}")
    return rate, sorted(took_s)


def _scan(url: str, files: list[Path]) -> float:
    """Seconds from the upload of a zip of a series to its DICOM SEG."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for file in files:
            archive.write(file, file.name)
    headers = {"Content-Type": "application/zip", "Accept": "application/dicom"}
    began = time.perf_counter()
    answer = httpx.post(f"{url}/v1/segment", content=body.getvalue(), headers=headers, timeout=120)
    answer.raise_for_status()
    return time.perf_counter() - began


def _mlflow(log: Path, model_uri: str, tracking_uri: str) -> contextlib.AbstractContextManager[str]:
    command = [str(Path(sys.executable).with_name("mlflow")), "models", "serve", "--model-uri", model_uri]
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return _server([*command, "--env-manager", "local"], "/ping", log, environment)


def _bento(folder: Path, bundle: Path, python: str) -> contextlib.AbstractContextManager[str]:
    (folder / "bento_service.py").write_text(_BENTO.format(network=str(bundle / "model.xml"), size=_NETWORK))
    command = [python, "-m", "bentoml", "serve", "bento_service:Segment"]
    return _server(command, "/readyz", folder / "bento.log", {"BENTOML_DO_NOT_TRACK": "True"})


@contextlib.contextmanager
def _server(command: list[str], ready: str, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server on a free port of loopback, from when it answers to the end of the block; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=log.parent,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it starts workers, which end with its group
        )
    try:
        deadline = time.monotonic() + _READY_S
        while not _answers(url + ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]}: not ready; see {log}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()  # it ends its workers, some of which are in groups of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
