"""What leaves the working folder: nothing but code goes to a cluster with a job, or into git."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.job.sdk import JobSubmissionClient

from tests.releases import ROOT, git, repository

SECRET = b"of a patient, or a key"
# Where the documentation has its readers put files, and where its commands write them.
PLACES = (
    *("data/studies/1/1.dcm", "data/archive/2.dcm", "data/pictures/images/scan-001.png", "data/pictures/groups.csv"),
    *("work/studies/manifest.parquet", "work/studies/prepared/train/0.parquet", "work/studies/runs/checkpoint.keras"),
    *("work/mlflow.db", "work/mlruns/1/artifacts/model.keras", "work/archive/report.html", "work/split.csv"),
    *("demo/mlflow.db", "demo/storage/studies/1.dcm", "demo/pseudonym.key", "dist/rayseg.zip", "build/docs/index.html"),
    *("mlflow.db", "mlflow.db-wal", "mlruns/0/meta.yaml", "mlartifacts/0/model.keras", "audit.jsonl", "audit.log"),
    *("pseudonym.key", "pseudonym-key", "tokens", "ca.key", "ca.crt", "ca.srl", "node.key", "server.pem"),
    *("slice.dcm", "mask.png", "seg.dcm", "series.zip", "volume.nii.gz", "volume.nii"),
    *("serving/server.pem", "serving/mask.nii.gz", "configs/tokens", "configs/ca.key", "jobs/work.db"),
    *("configs/mlflow.db", "serving/slice.dcm", "platform/rayseg/slice.dcm", "platform/rayseg/pseudonym.key"),
)


def written_by_the_documentation() -> set[str]:
    """Files that commands on our pages, and in the first lines of cluster files, write beside them."""
    pages = [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", *ROOT.glob("configs/*.yaml")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = [line for line in text.splitlines() if line.startswith(("    ", "#   "))]
    names: set[str] = set()
    for line in lines:
        line = re.sub(r"\$\([^)]*\)", "1", line)
        names |= set(re.findall(r"(?:>>? |-o |--output |-keyout |--from-file=|\.backup )([a-z][\w./-]*)", line))
        names |= set(re.findall(r"\b(?:work|data|demo)/[\w./-]+\w", line))
    names = {name for name in names if "." in name.rpartition("/")[2]} | {"tokens", "pseudonym-key"}
    return names - {"node.ext"}  # on a node


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which somebody has worked as the documentation says."""
    clone = repository(tmp_path_factory.mktemp("uploads") / "clone")
    for name in {*PLACES, *written_by_the_documentation()}:
        if (clone / name).exists():
            continue
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(SECRET)
    (clone / "dicom.yaml").write_text("catalog: {source: s3://archive}\n")
    return clone


class Uploads(JobSubmissionClient):
    """Ray's own client: it packs as ever, and puts the packages into a folder in place of a cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.packages = folder, list[Path]()

    def _package_exists(self, package_uri: str) -> bool:
        return False

    def _do_request(self, method: str, endpoint: str, *, data: bytes | None = None, **named: Any) -> Any:
        assert method == "PUT"
        assert data is not None
        self.packages.append(self.folder / endpoint.rpartition("/")[2])
        self.packages[-1].write_bytes(data)
        return type("Response", (), {"status_code": 200})


@pytest.fixture(scope="module")
def unpacked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The working folder and the folder of modules, as nodes get them."""
    from ray._private.runtime_env.packaging import unzip_package
    from ray.runtime_env import RuntimeEnv

    nodes = tmp_path_factory.mktemp("node")
    environment = RuntimeEnv(**yaml.safe_load((folder / "configs" / "runtime_env.yaml").read_text())).to_dict()
    client = Uploads(nodes)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)  # as where `ray job submit` is run
        client._upload_working_dir_if_needed(environment)
        client._upload_py_modules_if_needed(environment)
    for package in client.packages:
        unzip_package(str(package), str(package.with_suffix("")), remove_top_level_directory=False, unlink_zip=False)
    work, modules = (package.with_suffix("") for package in client.packages)
    return work, modules


def test_no_file_of_the_documentations_places_is_uploaded_with_a_job(unpacked: tuple[Path, Path]) -> None:
    uploaded = [
        file.relative_to(top).as_posix()
        for top in unpacked
        for file in top.rglob("*")
        if file.is_file() and file.read_bytes() == SECRET
    ]
    assert not uploaded


def test_all_that_is_uploaded_is_in_git_but_for_recipes(folder: Path, unpacked: tuple[Path, Path]) -> None:
    work, modules = unpacked
    tracked = set(git(folder, "ls-files").splitlines())
    names = {file.relative_to(work).as_posix() for file in work.rglob("*") if file.is_file()}
    assert names - tracked == {"dicom.yaml"}
    assert {name.partition("/")[0] for name in names} == {"jobs", "serving", "configs", "dicom.yaml"}
    package = {f"platform/{file.relative_to(modules).as_posix()}" for file in modules.rglob("*") if file.is_file()}
    assert package <= tracked
    code = {name for name in tracked if name.startswith(("jobs/", "serving/", "platform/rayseg/"))}
    assert {name for name in code - names - package if not name.endswith(".rayignore")} == set()


def test_a_jobs_upload_imports_on_a_machine_that_has_only_the_packages(unpacked: tuple[Path, Path]) -> None:
    work, modules = unpacked
    done = subprocess.run(
        [sys.executable, "-c", "import rayseg, jobs.prepare; print(rayseg.__file__, jobs.__file__)"],
        cwd=work,
        env={"PYTHONPATH": f"{modules}:{work}"},
        capture_output=True,
        text=True,
        check=True,
    )
    for origin in done.stdout.split():
        assert origin.startswith((str(work), str(modules))), "imported from elsewhere"


def test_git_sees_none_of_them_but_the_recipe(folder: Path) -> None:
    new = git(folder, "status", "--porcelain", "--untracked-files=all").splitlines()
    assert {line.removeprefix("?? ") for line in new} <= {"dicom.yaml"}
