"""Configuration: what a user types is either taken exactly or refused in one line that names the key."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rayseg import config


@dataclass(frozen=True)
class Window:
    center: float
    width: float

    def __post_init__(self):
        if self.width < 1:
            raise ValueError("width must be at least 1")


@dataclass(frozen=True)
class Stage:
    output: str
    epochs: int = 3
    rate: float = 1e-3
    kind: Literal["one", "two"] = "one"
    sizes: tuple[int, ...] = (8, 16)
    window: Window | None = None


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_section_and_its_overrides_become_the_dataclass(tmp_path):
    path = recipe(
        tmp_path, "train: {output: out, sizes: [1, 2, 3], window: {center: 40, width: 80}}\nprepare: {x: 1}\n"
    )
    loaded = config.load(Stage, "train", path, ["epochs=5", "window.width=100.5", "kind=two"])
    assert loaded == Stage(output="out", epochs=5, kind="two", sizes=(1, 2, 3), window=Window(center=40.0, width=100.5))


def test_an_override_can_make_a_group_that_the_recipe_lacks():
    loaded = config.load(Stage, "train", None, ["output=out", "window.center=1", "window.width=2"])
    assert loaded.window == Window(1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "overrides", "key"),
    [
        ("train: {output: o, epohcs: 1}", [], "epohcs"),
        ("train: {output: o}", ["window.centre=1"], "window.centre"),
        ("train: {output: o}", ["epochs=three"], "epochs"),
        ("train: {output: o}", ["epochs=1.5"], "epochs"),
        ("train: {output: o}", ["epochs='3'"], "epochs"),
        ("train: {output: 7}", [], "output"),
        ("train: {}", [], "output"),
        ("train: {output: o, kind: three}", [], "kind"),
        ("train: {output: o, sizes: [1, two]}", [], "sizes.1"),
        ("train: {output: o, window: {center: 1, width: 0}}", [], "width must be at least 1"),
        ("train: {output: o}", ["epochs"], "epochs"),
        ("train: {output: o}", ["epochs.deep=1", "epochs.deep.deeper=1"], "epochs.deep"),
        ("train: {output: o, epochs: 2026-01-01}", [], "plain YAML"),
        ("trian: {output: o}", [], "trian"),
        ("[1, 2]", [], "sections"),
        ("train: [", [], "not valid YAML"),
        ("train: 3", [], "train"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(tmp_path, text, overrides, key):
    with pytest.raises(ValueError) as error:
        config.load(Stage, "train", recipe(tmp_path, text), overrides)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_group_finds_wrong_is_told_without_the_whole_group():
    with pytest.raises(ValueError, match=r"^width must be at least 1$"):
        config.build(Window, {"center": 1.0, "width": 0.0})
    with pytest.raises(ValueError, match=r"^config key window: width must be at least 1$"):
        config.build(Stage, {"output": "o", "window": {"center": 1.0, "width": 0.0}})


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("2E+1", 20.0), ("1.5e2", 150.0), (".5e1", 5.0), ("-1e0", -1.0)]
)
def test_numbers_may_be_written_as_everybody_does(tmp_path, text, value):
    assert config.load(Stage, "train", None, ["output=o", f"rate={text}"]).rate == value
    assert config.load(Stage, "train", recipe(tmp_path, f"train: {{output: o, rate: {text}}}")).rate == value


@pytest.mark.parametrize("text", ["e3", "1e", "12e5x", "0x1e3g"])
def test_a_text_that_looks_like_a_number_is_a_text(text):
    assert config.load(Stage, "train", None, [f"output={text}"]).output == text


def test_a_key_may_be_named_with_its_section():
    assert config.load(Stage, "train", None, ["output=o", "train.epochs=5"]).epochs == 5
    with pytest.raises(ValueError, match=r"prepare: unknown"):
        config.load(Stage, "train", None, ["output=o", "prepare.limit=5"])


def test_a_key_that_is_nearly_right_is_named():
    with pytest.raises(ValueError, match=r"^config key epohcs: unknown; did you mean epochs\?$"):
        config.load(Stage, "train", None, ["epohcs=5"])
    with pytest.raises(ValueError, match=r"^config key xyz: unknown; there are: epochs, kind, output, "):
        config.load(Stage, "train", None, ["xyz=5"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        config.load(Stage, "train", tmp_path / "nowhere.yaml")


def test_plain_values_come_back_as_the_same_dataclass_and_digest():
    stage = Stage(output="o", window=Window(1.5, 2.5))
    assert config.build(Stage, config.plain(stage)) == stage
    assert config.digest(stage) == config.digest(config.build(Stage, config.plain(stage)))
    assert config.digest(stage) != config.digest(Stage(output="o", window=Window(1.5, 2.6)))


def test_flat_keys_are_what_set_takes():
    stage = Stage(output="o", window=Window(1.5, 2.5))
    overrides = [f"{key}={value}" for key, value in config.flat(stage).items()]
    assert config.load(Stage, "train", None, overrides) == stage


@dataclass(frozen=True)
class Scored:
    prepared: str
    tracking_uri: str
    name: str = "scored"


@dataclass(frozen=True)
class Kept:
    tracking_uri: str | None = None


@dataclass(frozen=True)
class Whole:
    train: Scored
    diff: Kept = field(default_factory=Kept)


SHARED = "common: {tracking_uri: 'sqlite:///a.db', prepared: set}\n"


def test_a_section_has_what_it_does_not_name_from_the_common_one(tmp_path):
    path = recipe(tmp_path, SHARED + "train: {prepared: own}\n")
    assert config.load(Scored, "train", path) == Scored("own", "sqlite:///a.db")
    assert config.load(Scored, "evaluate", path, ["tracking_uri=http://b"]) == Scored("set", "http://b")
    assert config.load(Stage, "prepare", path, ["output=out"]) == Stage("out"), "a class without such keys"


def test_sections_that_a_job_reads_together_have_it_each(tmp_path):
    path = recipe(tmp_path, SHARED + "train: {name: one}\n")
    assert config.load(Whole, None, path) == Whole(Scored("set", "sqlite:///a.db", "one"), Kept("sqlite:///a.db"))


def test_the_environment_names_the_tracking_store_where_nobody_does(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
    path = recipe(tmp_path, "train: {prepared: own}\n")
    assert config.load(Scored, "train", path).tracking_uri == "http://tracking"
    assert config.load(Whole, None, path) == Whole(Scored("own", "http://tracking")), "diff writes to none by itself"
    assert config.load(Scored, "evaluate", recipe(tmp_path, SHARED)).tracking_uri == "sqlite:///a.db"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("common: {tracking_url: a}", "config key common.tracking_url: unknown; did you mean tracking_uri?"),
        ("common: 3", "config key common: expected a mapping, got 3"),
        ("common: {storage: 3}", "config key common.storage: "),
        ("comon: {}", "did you mean common?"),
    ],
)
def test_a_common_section_is_refused_as_others_are(tmp_path, text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        config.load(Scored, "train", recipe(tmp_path, text))
