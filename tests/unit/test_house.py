"""What must stay true of the repository itself."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("platform", "jobs", "serving") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_platform_never_shadows_the_standard_library():
    assert not (ROOT / "platform" / "__init__.py").exists()
    # From the root, as `python -m jobs.train` runs: uuid imports platform.
    program = "import platform, uuid; assert platform.system(); import rayseg"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, env={"PYTHONPATH": "platform"})


def test_ignore_patterns_are_anchored_so_that_uploads_keep_the_package():
    patterns = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    anywhere = [pattern.lstrip("!") for pattern in patterns if not pattern.lstrip("!").startswith("/")]
    assert [pattern for pattern in anywhere if pattern.endswith("/")] == ["__pycache__/"]
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert not subprocess.run(command, capture_output=True, text=True, check=True).stdout, "ignored files of ours"


def test_locks_pin_every_package_by_hash_and_name_no_host():
    for name in ("requirements.lock", "requirements-gpu.lock"):
        text = (ROOT / name).read_text()
        requirements = re.findall(r"^([A-Za-z0-9._-]+)(\[[^]]*\])?==[^ ]+ .*\\$", text, flags=re.MULTILINE)
        assert len(requirements) > 100
        assert text.count("\n    --hash=sha256:") >= len(requirements)
        assert "://" not in text


def test_modules_stay_small_and_named_by_what_they_hold():
    assert len(SOURCES) > 30
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in {"utils", "helpers", "common"}, path


def test_recipes_hold_only_sections_that_jobs_read():
    from rayseg.config import NAMES, SECTIONS

    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
    assert jobs == SECTIONS
    for path in (ROOT / "configs").glob("demo*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= NAMES, path
