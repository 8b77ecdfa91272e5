"""A registered model in processes that know nothing but MLflow."""

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rayseg.data import synthetic
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.tracking import registry, runs
from tests.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

READY_LIMIT_S = 180


def network() -> keras.Model:
    keras.utils.set_random_seed(5)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((32, 32, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.GroupNormalization(4),
            layers.Conv2D(1, 1, activation="sigmoid"),
        ]
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store in which `brain` has version 1, the champion."""
    folder = tmp_path_factory.mktemp("mlflow")
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    example = synthetic.slice_bytes(0, 64)
    registry.save(folder / "bundle", network(), Preprocess(size=(32, 32)), Labels(), 0.5, example)
    version = registry.register(tracking_uri, runs.start(tracking_uri, "e2e", "train"), folder / "bundle", "brain")
    registry.set_alias(tracking_uri, "brain", "champion", version.version)
    return tracking_uri


@pytest.fixture(scope="module")
def environment(store: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | {"MLFLOW_TRACKING_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow models serve` on a free port; yields its URL once it answers."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("mlflow")), "models", "serve", "--model-uri", "models:/brain/1"]
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it starts workers, which end with its group
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + READY_LIMIT_S
            while not answers(f"{url}/ping"):
                assert time.monotonic() < deadline, log.read_text()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                assert process.poll() is None, log.read_text()
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


BLOBS = [synthetic.slice_bytes(seed, 64) for seed in (0, 1)] + [b"no image"]
TEXTS = [base64.b64encode(blob).decode() for blob in BLOBS]
PARQUET = io.BytesIO()
pd.DataFrame({"dicom": BLOBS}).to_parquet(PARQUET)
FORMS: dict[str, tuple[str, bytes]] = {
    **{
        name: ("application/json", json.dumps({name.partition(" ")[0]: body}).encode())
        for name, body in {
            "dataframe_split": {"columns": ["dicom"], "data": [[text] for text in TEXTS]},
            "dataframe_records": [{"dicom": text} for text in TEXTS],
            "inputs": {"dicom": TEXTS},
            "inputs of a list": TEXTS,
            "inputs of records": [{"dicom": text} for text in TEXTS],
            "instances": [{"dicom": text} for text in TEXTS],
        }.items()
    },
    "csv": ("text/csv", pd.DataFrame({"dicom": TEXTS}).to_csv(index=False).encode()),
    "csv with an index": ("text/csv", pd.DataFrame({"dicom": TEXTS}).to_csv().encode()),
    "parquet": ("application/vnd.apache.parquet", PARQUET.getvalue()),
}


def ask(server: str, kind: str, body: bytes) -> list[dict[str, Any]]:
    request = urllib.request.Request(f"{server}/invocations", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as response:
        rows: list[dict[str, Any]] = json.load(response)["predictions"]
    return rows


@pytest.mark.parametrize("form", FORMS)
def test_mlflow_models_serve_gives_the_mask_of_the_predictor_in_each_of_its_forms(
    server: str, store: str, form: str
) -> None:
    rows = ask(server, *FORMS[form])
    predictor = Predictor.load(registry.fetch(store, "models:/brain/1")[0])
    for row, expected in zip(rows, predictor.segment(BLOBS), strict=True):
        if isinstance(expected, Prediction):
            mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["mask_png"]))))
            assert mask.tobytes() == expected.mask.tobytes()
            assert row["foreground_pixels"] == np.count_nonzero(expected.mask) > 0
        else:
            assert (row["mask_png"], row["reason"]) == (None, "not_dicom")
    assert len(rows) == 3


def test_what_is_no_base64_costs_its_own_row_only(server: str) -> None:
    cells = f'dicom\n"{TEXTS[0]}"\n""\n"?!"\n"AAA"\n'
    rows = ask(server, "text/csv", cells.encode())
    assert [(row["foreground_pixels"] is None, row["reason"], row["detail"]) for row in rows] == [
        (False, None, None),
        (True, "empty_object", "an empty cell"),
        (True, "not_dicom", "text that is not base64"),
        (True, "not_dicom", "base64 that is cut short"),
    ]


def test_a_request_without_the_column_is_refused(server: str) -> None:
    body = json.dumps({"dataframe_split": {"columns": ["png"], "data": [["AAAA"]]}}).encode()
    request = urllib.request.Request(f"{server}/invocations", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 400


def test_mlflow_loads_the_champion_with_the_code_that_came_with_it(environment: dict[str, str], tmp_path: Path) -> None:
    script = (
        "import json, mlflow, pandas\n"
        "model = mlflow.pyfunc.load_model('models:/brain@champion')\n"
        "found = model.predict(model.input_example)\n"
        "import rayseg\n"
        "print(json.dumps([rayseg.__file__, int(found['foreground_pixels'][0])]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    code, foreground_pixels = json.loads(done.stdout.splitlines()[-1])
    assert Path(code).parent.parent.name == "code"
    assert str(Path(environment["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")).parent / "artifacts") in code
    assert foreground_pixels > 0
