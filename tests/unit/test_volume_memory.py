"""Long series in bounded memory, in a process that may not have more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 8 * 10**9


def segmented(*arguments: float) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.volume_memory", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_is_of_what_windows_touch() -> None:
    """Ten times as many slices take the memory of their own pixels, not of sums: those would be 2 GB."""
    short, long = (segmented(count, 8, 0.8, 32, LIMIT) for count in (40, 120))
    pixels_mb = 80 * 512 * 512 * 2 / 1e6
    assert long["slices"] == 120
    assert long["memory_mb"] - short["memory_mb"] < 2 * pixels_mb + 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slices", "channels", "grid_mm", "patch"), [(800, 25, 1.5, 128), (2000, 3, 0.8, 128), (300, 25, 0.8, 128)]
)
def test_a_long_series_takes_less_than_8_gb(slices: int, channels: int, grid_mm: float, patch: int) -> None:
    """The last one, on the pixels' own grid, holds most: a patch's depth of sums of 25 classes."""
    found = segmented(slices, channels, grid_mm, patch, LIMIT)
    assert found["slices"] == slices
    assert found["memory_mb"] < LIMIT / 1e6
