import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rayseg import build
from tests.releases import ROOT, git

PACKAGE = ROOT / "platform" / "rayseg"


def run(folder: Path, program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A process that has the package at `folder`, and starts elsewhere."""
    kept = {name: value for name, value in os.environ.items() if name != build.VARIABLE}
    kept |= {"PYTHONPATH": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", program], cwd="/", env=kept, capture_output=True, text=True)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a copy of the package, in no repository."""
    shutil.copytree(PACKAGE, tmp_path / "node" / "rayseg", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "node"


def test_equal_code_elsewhere_works_and_says_what_it_is(elsewhere: Path) -> None:
    driver = build.current()
    (elsewhere / "rayseg" / "__pycache__").mkdir()
    (elsewhere / "rayseg" / "__pycache__" / "build.pyc").write_bytes(b"what Python makes")
    worker = run(elsewhere, "import rayseg", **{build.VARIABLE: driver.told()})
    assert worker.returncode == 0
    assert worker.stderr == f"rayseg {driver} from {elsewhere / 'rayseg'}\n"
    silent = run(elsewhere, "import rayseg", **{build.VARIABLE: driver.told(), build.SILENT: "1"})
    assert (silent.returncode, silent.stderr) == (0, "")


@pytest.mark.parametrize("change", ["a comment", "a new module", "a lost module", "a template"])
def test_other_code_is_refused_whatever_differs(elsewhere: Path, change: str) -> None:
    package = elsewhere / "rayseg"
    if change == "a comment":
        (package / "retry.py").write_text((package / "retry.py").read_text() + "# more\n")
    elif change == "a new module":
        (package / "more.py").write_text("")
    elif change == "a lost module":
        (package / "retry.py").unlink()
    else:
        (package / "style.css").write_text("")
    worker = run(elsewhere, "import rayseg", **{build.VARIABLE: build.current().told()})
    assert worker.returncode == 1
    told = worker.stderr.splitlines()[-1]
    assert re.match(r"RuntimeError: rayseg 0.1.0 \(commit unknown, code [0-9a-f]{12}\) at ", told)
    assert f"at {package} is not the driver's, {build.current()}: " in told


def test_a_driver_alone_is_not_asked(elsewhere: Path) -> None:
    done = run(elsewhere, "from rayseg import build; print(build.current())")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"0.1.0 (commit unknown, code {build.sha256('rayseg')[:12]})\n"


def test_the_commit_is_the_repositorys_and_a_plus_says_that_files_differ(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    package = clone / "platform" / "rayseg"
    package.mkdir(parents=True)
    for name in ("__init__.py", "build.py", "quiet.py"):
        shutil.copy(PACKAGE / name, package)
    program = "from rayseg import build; print(build.current().commit)"
    git(clone, "init", "--quiet")
    assert run(package.parent, program).stdout == "None\n", "a repository, but not of this package"
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "all")
    commit = git(clone, "rev-parse", "HEAD")[:12]
    assert run(package.parent, program).stdout == f"{commit}\n"
    (package / "build.py").write_text((package / "build.py").read_text() + "# more\n")
    assert run(package.parent, program).stdout == f"{commit}+\n"


def test_further_packages_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = build.current("serving").told()
    shutil.copytree(ROOT / "serving", tmp_path / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    program = f"from rayseg import build; build.require({told!r}, 'serving')"
    equal = run(tmp_path, program, PYTHONPATH=f"{tmp_path}:{PACKAGE.parent}")
    assert (equal.returncode, equal.stderr.split(" 0.1.0 ")[0]) == (0, "rayseg and serving")
    (tmp_path / "serving" / "web" / "main.js").write_text("")
    other = run(tmp_path, program, PYTHONPATH=f"{tmp_path}:{PACKAGE.parent}")
    assert "RuntimeError: rayseg and serving 0.1.0" in other.stderr
