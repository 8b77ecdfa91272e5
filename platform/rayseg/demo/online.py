"""The served model as a client sees it: the service as a process of its own, and its masks against the bulk ones."""

import contextlib
import io
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from PIL import Image

from rayseg import storage
from rayseg.dicom import segmentation
from rayseg.dicom.reading import read_header
from rayseg.records import Reject

READY_S = 180.0
STOP_S = 60.0
REQUEST_S = 60.0


@dataclass(frozen=True)
class Answers:
    """What the service said to the slices of one series."""

    http_status: int  # of the JSON request
    answer: dict[str, Any]  # its body
    slices: int
    online_equals_bulk: bool  # every mask, byte for byte


@contextlib.contextmanager
def service(settings: Mapping[str, Any], log: Path) -> Iterator[str]:
    """Runs `python -m jobs.serve` until the end of the block; yields its URL.

    On the Ray cluster of this process, or on one of its own where this process has none.

    Args:
        settings: the serve job's configuration, plain values.
        log: file that gets the service's output.

    Raises:
        RuntimeError: it ended or was not ready in time; the log is named.
    """
    assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray.is_initialized() else {}
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", *assignments],
            env={**os.environ, **address},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_follow, args=(process, lines), daemon=True).start()
    try:
        yield _url(lines, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(url: str, uris: list[str], segmentation_uri: str) -> Answers:
    """Sends every slice of a series to the service and compares the masks with those of the bulk run's DICOM SEG.

    Args:
        url: of the service.
        uris: the series' DICOM objects.
        segmentation_uri: the SEG that the bulk run wrote for the series.
    """
    bulk = segmentation.decode(storage.read(segmentation_uri))
    equal = len(bulk) > 0
    compared = 0
    with httpx.Client(base_url=url, timeout=REQUEST_S) as client:
        first = _post(client, storage.read(uris[0]), "application/json")
        for uri in uris:
            data = storage.read(uri)
            header = read_header(data)
            if isinstance(header, Reject) or header.sop_instance_uid not in bulk:
                continue  # a slice that the bulk run rejected has no mask to compare with
            answer = _post(client, data, "image/png")
            online = np.asarray(Image.open(io.BytesIO(answer.content))) if answer.status_code == 200 else None
            expected = bulk[header.sop_instance_uid]
            equal = equal and online is not None and online.shape == expected.shape
            equal = equal and online is not None and online.astype(np.uint8).tobytes() == expected.tobytes()
            compared += 1
    return Answers(
        http_status=first.status_code,
        answer=first.json(),
        slices=compared,
        online_equals_bulk=equal and compared == len(bulk),
    )


def _post(client: httpx.Client, data: bytes, accept: str) -> httpx.Response:
    return client.post("/v1/segment", content=data, headers={"content-type": "application/dicom", "accept": accept})


def _follow(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")  # the process is gone


def _url(lines: queue.Queue[str], log: Path) -> str:
    while True:
        try:
            line = lines.get(timeout=READY_S)
        except queue.Empty:
            raise RuntimeError(f"serve: not ready after {READY_S:.0f} s; see {log}") from None
        if not line:
            raise RuntimeError(f"serve: ended before it was ready; see {log}")
        if line.startswith("{"):
            return str(json.loads(line)["url"])
