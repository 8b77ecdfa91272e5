"""The first hour: a stranger's folder becomes a served model in five commands."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayseg import storage
from tests.folders import encoded

ROOT = Path(__file__).parents[2]
SIDE, GROUPS, EACH = 48, 8, 4

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture with a bright disc, and the disc."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    row, column, radius = (int(random.integers(least, most)) for least, most in ((12, 36), (12, 36), (5, 10)))
    disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
    return np.clip(random.normal(70, 20, disc.shape) + 120 * disc, 0, 255), disc * 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scans/NAME.png`, `truth/NAME_mask.png`, and a CSV of who is who."""
    folder = tmp_path_factory.mktemp("stranger")
    table = ["file,group"]
    for number in range(GROUPS * EACH):
        image, mask = blobs(number)
        storage.write(f"{folder}/mine/scans/k{number:02d}.png", encoded(image, "PNG"))
        storage.write(f"{folder}/mine/truth/k{number:02d}_mask.png", encoded(mask, "PNG"))
        table.append(f"k{number:02d}.png,{number // EACH}")
    (folder / "mine" / "who.csv").write_text("\n".join(table))
    return folder


def test_five_commands_from_a_folder_to_an_answer(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYSEG_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    rayseg = [sys.executable, "-m", "rayseg.command"]

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    said = run(*rayseg, "init", "mine")
    assert f"{GROUPS * EACH} of {GROUPS * EACH} images pair" in said
    assert "doubt" not in said
    run("sh", "-c", "umask 077; openssl rand -hex 32 > pseudonym.key")
    small = ["prepare.preprocess.size=[48, 48]", "train.epochs=2", "train.num_workers=1", "train.model.widths=[8, 16]"]
    results = run(*rayseg, "run", "mine.yaml", *(word for value in small for word in ("--set", value)))
    assert '"promoted": true' in results.splitlines()[-1]

    serving = subprocess.Popen(
        [*rayseg, "serve", "--config", "mine.yaml", "--set", "port=0"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert serving.stdout is not None
        url = next(found[0] for line in serving.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        image = folder / "mine" / "scans" / "k00.png"
        run(*rayseg, "ask", str(image), "--server", url, "--format", "png", "--output", "mask.png")
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=60)
    mask = np.asarray(Image.open(folder / "mask.png"))
    assert mask.shape == (SIDE, SIDE)
