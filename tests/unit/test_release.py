import hashlib
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pydicom
import pytest
import yaml
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation import make_schemabased_validator

from rayseg import __version__, release
from rayseg.manual import JOBS
from tests.folders import PATIENTS, SLICES, pictures
from tests.releases import ROOT, git, repository

BUCKET = "s3://hospital/releases"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("release") / "clone")


@pytest.fixture(scope="module")
def made(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = release.build(clone, tmp_path_factory.mktemp("dist"), BUCKET)
    return {file.name: file for file in files}


def test_an_equal_commit_is_equal_bytes(
    clone: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "clone", "--quiet", str(clone), "elsewhere")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    before = os.umask(0o007)
    try:
        again = release.build(tmp_path / "elsewhere", tmp_path / "dist", BUCKET)
    finally:
        os.umask(before)
    assert {file.name for file in again} == made.keys()
    for file in again:
        assert file.read_bytes() == made[file.name].read_bytes(), file.name


def test_the_sums_are_of_all_files(made: dict[str, Path]) -> None:
    sums = dict(reversed(line.split("  ")) for line in made["SHA256SUMS"].read_text().splitlines())
    assert sums.keys() == made.keys() - {"SHA256SUMS"}
    assert all(hashlib.sha256(made[name].read_bytes()).hexdigest() == sum for name, sum in sums.items())


def test_the_zip_is_what_serve_asks_for(clone: Path, made: dict[str, Path], tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import unzip_package
    from ray.serve.schema import ServeDeploySchema

    commit = git(clone, "rev-parse", "HEAD")
    config = yaml.safe_load(made["serve.yaml"].read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    uri = application.runtime_env["working_dir"]
    assert uri == f"{BUCKET}/rayseg-{__version__}-{commit[:12]}.zip"
    package = made[uri.rpartition("/")[2]]
    with zipfile.ZipFile(package) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2026, 1, 2, 3, 4, 6)}
    folder = tmp_path / "node"
    unzip_package(str(package), str(folder), remove_top_level_directory=True, unlink_zip=False)
    assert {path.name for path in folder.iterdir()} == {"serving", "jobs", "configs", "rayseg"}
    assert (folder / "serving" / "web" / "index.html").is_file()
    assert (folder / "rayseg" / "evaluation" / "report.html").is_file()
    module, _, name = application.import_path.partition(":")
    assert f"\ndef {name}(" in (folder / f"{module.replace('.', '/')}.py").read_text()
    program = "from rayseg import build; print(build.current(), build.where())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith(f" {folder / 'rayseg'}\n")
    assert f"(commit {commit[:12]}, code " in done.stdout


def test_the_wheel_holds_the_package_and_says_of_which_commit(clone: Path, made: dict[str, Path]) -> None:
    (wheel,) = [file for name, file in made.items() if name.endswith(".whl")]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("rayseg/COMMIT").decode().strip() == git(clone, "rev-parse", "HEAD")
    package = clone / "platform"
    for file in (package / "rayseg").rglob("*"):
        read_by_ray = file.name == ".rayignore"
        assert file.is_dir() or read_by_ray or file.relative_to(package).as_posix() in names, file
    for file in git(clone, "ls-files", "jobs", "serving").splitlines():
        assert file in names
    top = {"rayseg", "jobs", "serving", f"rayseg-{__version__}.dist-info"}
    assert {name.partition("/")[0] for name in names} == top


def test_the_wheel_runs_a_job_where_there_is_no_clone(made: dict[str, Path], tmp_path: Path) -> None:
    """Unpacked, as pip does it, and with the libraries alone: -S leaves out what else the environment has."""
    (wheel,) = [file for name, file in made.items() if name.endswith(".whl")]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    libraries = str(Path(pydicom.__file__).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "installed"), libraries]), "PATH": os.environ["PATH"]}

    def rayseg(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import sys; from rayseg import command, build; print(build.where(), file=sys.stderr)\n"
            f"assert not any(path.startswith({str(ROOT)!r}) and path != {libraries!r} for path in sys.path)\n"
            "command.main(sys.argv[1:])"
        )
        command = [sys.executable, "-S", "-c", code, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    pictures(str(tmp_path))
    (tmp_path / "pseudonym.key").write_text("a key of a test")
    for arguments in (["init", "source"], ["catalog", "--config", "source.yaml"], ["train", "--help"]):
        done = rayseg(*arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(f"{tmp_path}/installed/rayseg\n")
        if arguments[0] == "catalog":
            assert json.loads(done.stdout.splitlines()[-1])["accepted"] == PATIENTS * SLICES
        # Every job, and the service with its page, is imported from there.
    code = "import importlib, sys; [importlib.import_module(f'jobs.{job}') for job in sys.argv[1:]]; import serving; "
    code += "from serving import page; assert (page.WEB / 'index.html').is_file(); print(serving.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *JOBS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{tmp_path}/installed/serving/__init__.py"


def test_the_bills_of_materials_are_of_what_the_locks_pin(clone: Path, made: dict[str, Path]) -> None:
    validator = make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6)
    for lock in clone.glob("requirements*.lock"):
        text = made[f"{lock.stem}.cdx.json"].read_text()
        assert validator.validate_str(text) is None
        bill = json.loads(text)
        pinned = {tuple(line.split(" ")[0].split("==")) for line in lock.read_text().splitlines()}
        assert {(found["name"], found["version"]) for found in bill["components"]} == pinned
        for component in bill["components"]:
            (source,) = component["externalReferences"]
            assert all(f"sha256:{found['content']}" in lock.read_text() for found in source["hashes"])
            assert component["purl"] == f"pkg:pypi/{component['name']}@{component['version']}"
    bill = json.loads(made["requirements.cdx.json"].read_text())
    assert bill["metadata"]["component"]["version"] == __version__
    licences = {found["name"]: found["licenses"] for found in bill["components"]}
    assert licences["absl-py"] == [{"expression": "Apache-2.0", "acknowledgement": "declared"}]


def test_what_is_no_commit_is_refused(clone: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", str(clone), "changed")
    (tmp_path / "changed" / "README.md").write_text("something else")
    with pytest.raises(ValueError, match=r"commit first, 1 files differ from the commit \(as M README.md\)"):
        release.build(tmp_path / "changed", tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_the_version_stands_in_two_places_that_agree() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
