"""The command `rayseg`: jobs by name, help without heavy imports, and the doctor's looks at real places."""

import dataclasses
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from rayseg import command, config, doctor, keys, manual

ROOT = Path(__file__).parents[2]


def run(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rayseg.command", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "platform")} | environment,
        capture_output=True,
        text=True,
    )


def test_every_section_is_a_job_of_the_command() -> None:
    assert set(manual.JOBS) == config.SECTIONS == {path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")}


def test_help_names_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for job in manual.JOBS:
        assert any(line.strip().startswith(f"{job} ") for line in lines), job


def names_of(config_class: Any, job: str, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys, from the dataclasses themselves; sections of other jobs have theirs there."""
    others = config.SECTIONS - {job}
    for field in dataclasses.fields(config_class):
        yield f"{prefix}{field.name}"
        for hint in (field.type, *get_args(field.type)):
            if dataclasses.is_dataclass(hint) and field.name not in others and hint.__name__ != "Window":
                yield from names_of(hint, job, f"{prefix}{field.name}.")


def listed(group: keys.Group) -> Iterator[str]:
    for key in group.keys:
        yield key.name
        if key.group:
            yield from listed(key.group)


@pytest.mark.parametrize("job", manual.JOBS)
def test_the_keys_that_are_told_are_those_of_the_dataclass(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("rayseg.job.run", lambda section, config_class, *_, **__: seen.append(config_class))
    importlib.import_module(f"jobs.{job}").main()
    assert sorted(listed(keys.of_job(job))) == sorted(names_of(seen[0], job))


def test_help_of_a_job_shows_type_default_and_meaning_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rayseg import command; command.main(['train', '--help']); "
        "print({'ray', 'tensorflow', 'keras', 'mlflow', 'numpy', 'pyarrow'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"
    lines = done.stdout.splitlines()
    at = lines.index("  batch_size: whole number, default 8")
    assert lines[at + 1].startswith("      ")


def test_help_of_init_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rayseg.starter import init\n"
        "try: init.main(['--help'])\n"
        "finally: print({'ray', 'numpy', 'pyarrow', 'pydicom'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"
    assert "--output RECIPE.yaml" in done.stdout


def test_a_job_runs_from_any_folder_and_its_own_help_is_the_same(tmp_path: Path) -> None:
    refused = run("catalog", "--set", "sauce=3", folder=tmp_path)
    assert refused.returncode == 2
    assert "catalog: config key sauce: unknown; did you mean source?" in refused.stderr
    module = subprocess.run([sys.executable, "-m", "jobs.catalog", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert module.stdout == run("catalog", "--help", folder=tmp_path).stdout


def test_a_name_that_is_nearly_right_is_named() -> None:
    done = run("trian")
    assert (done.returncode, done.stderr) == (2, "rayseg: there is no trian; did you mean train?\n")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def levels(recipe: Path) -> dict[str, tuple[str, str]]:
    return {one.about: (one.level, one.text) for one in doctor.findings(str(recipe))}


def test_the_doctor_looks_at_the_places_of_a_recipe(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "x" * 32)
    (tmp_path / "images").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
catalog: {{source: {tmp_path}/images, output: {tmp_path}/work/manifest.parquet}}
prepare: {{manifest: {tmp_path}/work/manifest.parquet, output: {tmp_path}/set}}
train: {{prepared: {tmp_path}/other, tracking_uri: "http://127.0.0.1:{closed_port}"}}
"""
    )
    found = levels(recipe)
    assert found["catalog.source"][0] == "good"
    assert found["catalog.output"][0] == "good"
    assert "prepare.manifest" not in found, "catalog writes it"
    assert found["train.prepared"] == ("bad", f"there is no {tmp_path}/other")
    level, text = found["MLflow"]
    assert level == "bad"
    assert f"127.0.0.1:{closed_port} does not answer" in text
    assert found["pseudonym key"][0] == "good"
    assert {*tmp_path.iterdir()} == {tmp_path / "images", recipe}, "it writes nothing"


def test_the_doctor_knows_a_store_that_is_away(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("catalog: {source: 's3://bucket/ct', output: work/manifest.parquet}")
    level, text = levels(recipe)["catalog.source"]
    assert level == "bad"
    assert "does not answer" in text
    assert "AWS_ENDPOINT_URL" in text


def test_the_doctor_knows_a_path_that_lacks_its_prefix(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {tracking_uri: work/mlflow.db}")
    assert levels(recipe)["MLflow"] == (
        "bad",
        "work/mlflow.db is a path: MLflow's databases are written sqlite:///work/mlflow.db",
    )


def test_the_doctor_ends_with_1_where_something_will_not_work(tmp_path: Path) -> None:
    good = run("doctor", RAYSEG_PSEUDONYM_KEY="x" * 32)
    assert good.returncode == 0, good.stdout
    assert not [line for line in good.stdout.splitlines() if line.startswith("bad")]
    bad = run("doctor", RAYSEG_PSEUDONYM_KEY="", RAYSEG_PSEUDONYM_KEY_FILE="")
    assert bad.returncode == 1
    assert "RAYSEG_PSEUDONYM_KEY_FILE" in bad.stdout
