"""Jobs that are killed at random, with another one beside them or started again, leave what undisturbed ones leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.ray]


def kills(count: int, seed: int, *stages: str) -> dict[str, int]:
    """What `tests.kills` says, by a cluster and a store of its own: how many drivers of each stage were killed."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    told = subprocess.run(
        [sys.executable, "-m", "tests.kills", str(count), str(seed), *stages],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert told.returncode == 0, told.stderr[-5000:]
    return json.loads(told.stdout.splitlines()[-1])["killed"]


def test_a_killed_catalog_beside_another_one() -> None:
    assert kills(1, 3, "catalog") == {"catalog": 1}


@pytest.mark.slow
def test_a_killed_run_of_volumes_beside_another_one_and_alone() -> None:
    assert kills(2, 5, "volumes") == {"volumes": 2}


@pytest.mark.slow
def test_every_stage() -> None:
    assert sum(kills(4, 4).values()) == 4
