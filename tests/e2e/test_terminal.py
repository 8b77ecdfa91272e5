"""What a person sees of a job that starts its own cluster: our lines, and the result as the last one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayseg.data import synthetic
from tests import bundles

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
WITH_RAY = "from rayseg import work; work.FEW = 0; from jobs.segment import main; main()"


def test_the_result_is_the_last_line_of_both_streams_and_libraries_are_quiet(tmp_path: Path) -> None:
    """Of the job with most stages: it catalogs, then segments in a pool of actors; few slices as they are, with Ray."""
    synthetic.write_studies(str(tmp_path / "studies"), patients=2, slices=3, size=32, seed=5, masks=False)
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    bundles.register(tracking_uri, "brain", bundles.write_bundle(tmp_path / "bundle", 100.0))
    settings = [
        f"source={tmp_path}/studies",
        f"output={tmp_path}/segmented",
        f"tracking_uri={tracking_uri}",
        "model_uri=models:/brain/1",
        "engine.name=openvino",
    ]
    apart = {"RAY_ADDRESS", "RAY_AUTH_MODE", "TF_CPP_MIN_LOG_LEVEL", "PYTHONPATH"}  # what the tests' own cluster needs
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    run = subprocess.run(
        [sys.executable, "-c", WITH_RAY, *(part for one in settings for part in ("--set", one))],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "started a Ray cluster" in run.stdout
    *lines, last = run.stdout.splitlines()
    assert json.loads(last)["segmented"] == 2
    assert [line for line in lines if " rayseg." not in line] == []
