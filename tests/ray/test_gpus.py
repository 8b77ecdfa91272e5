"""A GPU that Ray gives, and one that it does not give: on a cluster that pretends to have two, which nobody sees."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayseg import storage
from rayseg.tracking import runs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]

# `ray.init` first: `fit` then joins this cluster. All else as a job does it.
PROGRAM = """
import json, sys
import ray
from rayseg.config import build
from rayseg.grant import keep_to_grant
from rayseg.training.settings import TrainConfig
from rayseg.training.trainer import fit
ray.init(address="local", num_cpus=3, num_gpus=2, include_dashboard=False, object_store_memory=200_000_000)

def grant():
    import os
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return visible, keep_to_grant(), os.environ["CUDA_VISIBLE_DEVICES"]

told = {}
if sys.argv[2:]:
    told["grants"] = [ray.get(ray.remote(grant).options(num_gpus=gpus).remote()) for gpus in (0, 0.5, 1)]
try:
    told |= {"finished": fit(build(TrainConfig, json.loads(sys.argv[1]))).run_id}
except Exception as error:
    told |= {"kind": type(error).__name__, "error": str(error)}
print(json.dumps(told))
"""


def trained(prepared: str, folder: Path, *more: str, **changes: object) -> tuple[dict[str, Any], str]:
    """What comes out of a run in a process of its own, and what was logged."""
    config = {
        "prepared": prepared,
        "storage": str(folder / "runs"),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "model": {"widths": [4, 8]},
        "batch_size": 4,
        "epochs": 1,
        "max_failures": 3,
        "mixed_precision": "float32",
        **changes,
    }
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(config), *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr + done.stdout


def test_a_gpu_that_tensorflow_does_not_see_is_refused_at_once(discs: str, tmp_path: Path) -> None:
    told, _ = trained(discs, tmp_path, "grants", gpus_per_worker=1, num_workers=2)
    none, half, whole = told["grants"]
    assert none == ["all", False, ""], "Ray leaves all visible to who asks for none"
    assert half[1] is whole[1] is True
    assert half[2] in {"0", "1"}
    assert whole[2] in {"0", "1"}
    assert told.get("kind") == "ValueError", told
    assert told["error"].startswith("train.gpus_per_worker: 1 is asked for")
    assert "the extra gpu" in told["error"]
    [attempts] = (tmp_path / "runs").glob("*/attempts.json")
    assert storage.read_json(str(attempts)) == {"attempts": 1}, "no restart was spent"
    client = runs.client(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("rayseg").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_a_run_says_first_what_it_computes_on(discs: str, tmp_path: Path) -> None:
    told, log = trained(discs, tmp_path, num_workers=1, mixed_precision="mixed_bfloat16")
    assert told.get("finished"), told
    assert "rank 0 of 1 computes in mixed_bfloat16 on the CPU, 1 threads" in log
    assert "TF32 is off, ops are deterministic" in log
    tags = runs.client(f"sqlite:///{tmp_path}/mlflow.db").get_run(told["finished"]).data.tags
    assert (tags["rayseg.tf32"], tags["rayseg.deterministic_ops"]) == ("off", "on")
