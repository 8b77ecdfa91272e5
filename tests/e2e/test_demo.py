"""The demo as its user runs it, made small: every stage on its real component, in one process tree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from deltalake import DeltaTable

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = [
    "demo.patients=24", "demo.slices=8", "demo.archive_patients=2", "demo.size=96",
    "prepare.preprocess.size=[64, 64]", "train.model.widths=[8, 16]", "train.epochs=3", "serve.port=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("run") / "demo"
    uris = [
        f"{job}.tracking_uri=sqlite:///{directory}/mlflow.db"
        for job in ("train", "evaluate", "promote", "segment", "serve")
    ]
    overrides = [part for value in [*SMALL, f"demo.directory={directory}", *uris] for part in ("--set", value)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "RAYSEG_"))
    }
    finished = subprocess.run(
        [sys.executable, "-m", "jobs.demo", "--config", "configs/demo.yaml", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-5000:]
    return {**json.loads(finished.stdout.splitlines()[-1]), "directory": directory}


def test_every_stage_ran_and_is_reported(demo):
    assert set(demo["stages"]) == {
        "store", "catalog", "prepare", "train", "evaluate", "promote", "segment", "serve", "report",
    }  # fmt: skip
    assert demo["train_workers"] == 2
    assert demo["model_uri"] == "models:/rayseg/1"
    assert 0 <= demo["val_dice"] <= 1
    assert 0 <= demo["test_dice"] <= 1
    page = Path(demo["report"]).read_text()
    assert "not a medical device" in page
    assert page.count("data:image/png;base64,") >= 3
    assert "http://" not in page.replace("http://127.0.0.1", "").replace("http://www.w3.org", "")


def test_the_archive_has_one_valid_segmentation_a_series_and_its_rejects_in_the_ledger(demo):
    assert demo["segmented_series"] == 2
    assert demo["rejected"] == 3  # the spoiled objects of the phantom archive
    validator = which("dciodvfy", path=str(Path(sys.executable).parent)) or which("dciodvfy")
    assert validator is not None
    assert len(demo["seg_paths"]) == 2
    for path in demo["seg_paths"]:
        told = subprocess.run([validator, path], capture_output=True, text=True)
        assert told.returncode == 0
        assert "Error" not in told.stdout + told.stderr
    ledger = DeltaTable(Path(demo["directory"]) / "segmentations" / "ledger").to_pandas()
    assert list(ledger["verdict"]).count("segmented") == 2
    rejects = DeltaTable(Path(demo["directory"]) / "segmentations" / "rejects").to_pandas()
    assert rejects["uri"].nunique() == 3


def test_the_service_gave_the_masks_of_the_bulk_run(demo):
    assert demo["http_status"] == 200
    assert demo["online_equals_bulk"] is True
    assert demo["slices_compared"] == 8


def test_the_model_that_was_left_serves_a_local_call(demo):
    from rayseg.data import synthetic
    from rayseg.inference.predictor import Prediction, Predictor
    from rayseg.tracking import registry

    bundle, version = registry.fetch(f"sqlite:///{demo['directory']}/mlflow.db", "models:/rayseg@champion")
    assert version.uri == demo["model_uri"]
    (prediction,) = Predictor.load(bundle).segment([synthetic.slice_bytes(seed=5, size=96)])
    assert isinstance(prediction, Prediction)
    assert prediction.mask.shape == (96, 96)
    assert set(np.unique(prediction.mask)) <= {0, 1}
