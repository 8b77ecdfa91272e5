"""The stages of a recipe in a chain: which are asked, with what, and which were done before."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rayseg import chain, command, storage
from rayseg.data.prepared import DESCRIPTION
from rayseg.tracking import registry
from rayseg.tracking.version import ModelVersion

RECIPE = """
common: {tracking_uri: "sqlite:///none.db"}
segment: {manifest: m, model_uri: "models:/m@champion", output: o}
train: {prepared: set, storage: runs, epochs: 2}
evaluate: {prepared: set, model_uri: models:/m/latest}
catalog: {source: s, output: m}
"""


class Stages:
    """Stands for the processes of the stages, whose results it makes up; training registers a version."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.version = 0
        self.fails = ""
        self._folder = folder
        monkeypatch.chdir(folder)
        monkeypatch.setattr(registry, "resolve", self._resolve)
        self.prepare("one")

    def prepare(self, digest: str) -> None:
        storage.write_json(str(self._folder / "set" / DESCRIPTION), {"digest": digest})

    def _resolve(self, tracking_uri: str, model_uri: str) -> ModelVersion:
        assert tracking_uri == "sqlite:///none.db", "of the common section"
        if not self.version:
            raise ValueError("not registered")
        return ModelVersion("m", str(self.version), f"m/{self.version}", f"digest {self.version}", "")

    def __call__(self, stage: str, arguments: Sequence[str]) -> dict[str, Any]:
        self.asked.append((stage, list(arguments)))
        if stage == self.fails:
            raise subprocess.CalledProcessError(2, stage)
        if stage == "train":
            self.version += 1
        return {"stage": stage, "number": len(self.asked)}

    def run(self, *overrides: str) -> tuple[list[str], dict[str, Any]]:
        self.asked = []
        results = chain.run(self._folder / "recipe.yaml", overrides, self)
        return [stage for stage, _ in self.asked], results


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return Stages(tmp_path, monkeypatch)


def test_stages_run_in_the_order_of_the_work_and_what_is_done_is_not_done_again(stages: Stages) -> None:
    asked, results = stages.run()
    assert asked == ["catalog", "train", "evaluate", "segment"]
    assert list(results) == asked
    asked, again = stages.run()
    assert asked == ["catalog", "segment"], "these see for themselves what is new"
    assert again["train"] == results["train"]
    assert again["evaluate"] == results["evaluate"]


def test_another_set_another_key_or_another_model_is_work_again(stages: Stages) -> None:
    stages.run()
    stages.prepare("two")
    assert stages.run()[0] == ["catalog", "train", "evaluate", "segment"]
    assert stages.run("train.epochs=3")[0] == ["catalog", "train", "evaluate", "segment"]
    assert ("train", ["--config", str(Path("recipe.yaml").absolute()), "--set", "train.epochs=3"]) in stages.asked
    assert stages.run("train.epochs=3")[0] == ["catalog", "segment"]
    stages.version += 1  # somebody else's, which is the latest one now
    assert stages.run("train.epochs=3")[0] == ["catalog", "evaluate", "segment"]


def test_after_an_error_it_goes_on_where_it_was(stages: Stages) -> None:
    stages.fails = "evaluate"
    with pytest.raises(subprocess.CalledProcessError):
        stages.run()
    stages.fails = ""
    assert stages.run()[0] == ["catalog", "evaluate", "segment"]


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        ("diff: {}", None, "no section of catalog, prepare"),
        (RECIPE, "epochs=3", "begins with one of catalog, train, evaluate, segment"),
        (RECIPE, "prepare.limit=3", "begins with one of"),
    ],
)
def test_what_it_cannot_run_is_refused(stages: Stages, text: str, override: str | None, words: str) -> None:
    Path("recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        stages.run(*filter(None, [override]))


def test_the_command_ends_as_its_stage_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real process: catalog of a folder that is not there."""
    (tmp_path / "recipe.yaml").write_text(f"catalog: {{source: {tmp_path}/none, output: {tmp_path}/m}}")
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "a test")
    with pytest.raises(SystemExit) as ended:
        command.main(["run", str(tmp_path / "recipe.yaml")])
    assert ended.value.code == 2
    assert "[1/1] catalog" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        command.main(["run", str(tmp_path / "none.yaml")])
    assert ended.value.code == 2
    assert "no such file" in capsys.readouterr().err


def test_a_broken_memory_is_told(stages: Stages) -> None:
    Path("recipe.run.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.run\.json is not valid JSON; remove it"):
        stages.run()
    Path("recipe.run.json").write_text(json.dumps({}))
    assert len(stages.run()[0]) == 4
