"""Whether a model gives what it gave when it was saved: its own code on its own slices, in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rayseg import build
from rayseg.tracking.bundle import describe

PREDICTOR_MODULE = "rayseg.inference.predictor"  # by name: that layer lies above this one
BUNDLE_IN_MODEL = "bundle"
_LIMIT_S = 300


@dataclass(frozen=True)
class Verified:
    """What the clean process took.

    latency_s: median of `repeats` segmentations of the example after one before, from its bytes to the mask, s.
    memory_mb: greatest resident memory of the whole process, 10^6 bytes.
    Both are None where nothing was repeated, or the model's code is of before they were measured.
    """

    latency_s: float | None
    memory_mb: float | None


def verify_folder(model_folder: Path, repeats: int = 0) -> Verified:
    """Runs the code that is saved with an MLflow model on its recorded slices in a new process.

    Raises:
        ValueError: there is no bundle.
        RuntimeError: the model cannot be loaded there, or gives another mask than was recorded.
    """
    bundle = model_folder / "data" / BUNDLE_IN_MODEL
    expected = describe(bundle)
    try:
        done = subprocess.run(
            [sys.executable, "-m", PREDICTOR_MODULE, str(bundle), str(repeats)],
            cwd=bundle,
            env={
                # The model's code is its own, whatever that of this job is.
                **{name: value for name, value in os.environ.items() if name != build.VARIABLE},
                "PYTHONPATH": str(model_folder / "code"),
                "PYTHONDONTWRITEBYTECODE": "1",
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"bundle: a clean process did not finish within {_LIMIT_S} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"bundle: cannot be loaded in a clean process: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    for key in ("digest", "example_mask_sha256", "golden_masks_sha256"):
        # Bundles of before golden slices have none, and code of then tells of none.
        now, then = found.get(key, {}), expected.get(key, {})
        if now != then:
            raise RuntimeError(f"bundle: {key} is {now} in a clean process, {then} when it was saved")
    return Verified(found.get("latency_s"), found.get("memory_mb"))
