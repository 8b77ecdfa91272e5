"""The frame of every job: arguments in, one JSON line out, one line on a user's error."""

import json
import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from rayseg import job

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    output: str


@dataclass(frozen=True)
class Result:
    written: str


def double(config: Config) -> Result:
    """Doubles."""
    if config.output == "bad":
        raise ValueError("output: cannot be bad")
    print("working")
    return Result(written=config.output * 2)


def test_the_last_line_of_a_job_is_its_result_as_json(capsys):
    job.run("train", Config, double, ["--set", "output=ab"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"written": "abab"}


@pytest.mark.parametrize("value", ["bad", "[1]"])
def test_a_users_error_is_one_line_and_code_2(capsys, value):
    with pytest.raises(SystemExit) as ended:
        job.run("train", Config, double, ["--set", f"output={value}"])
    streams = capsys.readouterr()
    assert ended.value.code == 2
    assert "output" in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    assert streams.out == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: 3 of 4 workers failed", "train: 3 of 4 workers failed"),
        ("train.epochs: 1 or more expected", "train.epochs: 1 or more expected"),
        ("prepared.json: not valid JSON", "train: prepared.json: not valid JSON"),
        ("training data are missing", "train: training data are missing"),
    ],
)
def test_an_error_names_its_job_once(capsys: pytest.CaptureFixture[str], text: str, line: str) -> None:
    def refuse(config: Config) -> Result:
        """Refuses."""
        raise ValueError(text)

    with pytest.raises(SystemExit):
        job.run("train", Config, refuse, ["--set", "output=ab"])
    assert capsys.readouterr().err.strip() == line


@dataclass(frozen=True)
class Refusing:
    output: str

    def __post_init__(self) -> None:
        raise ValueError("train.output: no place for results")


def test_a_wrong_section_is_named_once_and_not_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job.run("train", Refusing, double, ["--set", "output=ab"])
    assert capsys.readouterr().err.splitlines()[-1] == "train.output: no place for results"


def test_the_key_of_a_recipe_is_named_to_all_that_the_job_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("common: {key: secret.key}\ntrain: {output: a}\n")
    monkeypatch.chdir(tmp_path)
    for name in ("RAYSEG_PSEUDONYM_KEY_FILE", "RAYSEG_PSEUDONYM_KEY"):
        monkeypatch.setenv(name, "")
    job.run("train", Config, double, ["--config", str(recipe)])
    assert os.environ["RAYSEG_PSEUDONYM_KEY_FILE"] == str(tmp_path / "secret.key")
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY_FILE", "")
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "given")
    job.run("train", Config, double, ["--config", str(recipe)])
    assert os.environ["RAYSEG_PSEUDONYM_KEY_FILE"] == "", "what the environment says goes before it"


@dataclass(frozen=True)
class Told:
    uri: str
    dice: float
    history: list[int]
    nothing: str = ""


def test_a_file_that_is_named_gets_the_json_and_no_other_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    job.run("train", Config, double, ["--set", "output=ab", "--json", str(file)])
    assert json.loads(file.read_text()) == {"written": "abab"}
    assert capsys.readouterr().out == "working\n"


def test_a_terminal_shows_what_is_short() -> None:
    """A real one: JSON of thirty thousand characters is no line for a person."""
    program = "from tests.unit.test_job import *; job.run('train', Config, lambda c: Told('s3://a', 0.123456, [1]), [])"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program.replace("[])", "['--set', 'output=a'])")],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"},
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs)
        lines = os.read(ours, 10_000).decode().splitlines()
        assert process.wait(60) == 0
    os.close(ours)
    assert lines == ["  uri   s3://a", "  dice  0.1235"]


def test_a_recipe_may_be_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As bulk jobs get theirs, whose settings nobody else should read."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(pipe.write_text, "train: {output: ab}\n")
        job.run("train", Config, double, ["--config", str(pipe)])
        written.result()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"written": "abab"}
