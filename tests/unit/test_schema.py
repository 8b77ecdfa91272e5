"""The JSON schema of recipes: current, true of every recipe, and strict about what editors are to mark."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rayseg import config, keys, schema

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMA = json.loads((CONFIGS / "recipe.schema.json").read_text())
LINE = "# yaml-language-server: $schema=recipe.schema.json"


def recipes() -> list[Path]:
    return [path for path in sorted(CONFIGS.glob("*.yaml")) if "$schema" in path.read_text().partition("\n")[0]]


def plain(recipe: dict[str, Any]) -> Any:
    """As JSON has it: keys are texts."""
    return json.loads(json.dumps(recipe))


def test_the_file_is_what_the_command_prints() -> None:
    assert (CONFIGS / "recipe.schema.json").read_text() == schema.text(), "rayseg schema > configs/recipe.schema.json"


def test_it_is_a_schema_with_every_section_and_the_meaning_of_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]) == config.NAMES
    described = SCHEMA["$defs"]["TrainConfig"]["properties"]
    for key in keys.of_job("train").keys:
        assert described[key.name].get("description", "") == key.meaning
    undescribed = [
        (name, key)
        for name, definition in SCHEMA["$defs"].items()
        for key, value in definition["properties"].items()
        if not value.get("description") and "$ref" not in json.dumps(value) and name != "Window"
    ]
    assert undescribed == []
    assert [name for name, one in SCHEMA["$defs"].items() if not one.get("description")] == []


def test_every_recipe_names_it_and_keeps_to_it() -> None:
    with_sections = [
        path
        for path in sorted(CONFIGS.glob("*.yaml"))
        if isinstance(content := config.read_yaml(path.read_text().partition("\n---")[0]), dict)
        and content.keys() <= config.NAMES
    ]
    assert recipes() == with_sections
    assert len(with_sections) >= 11
    for path in with_sections:
        assert path.read_text().startswith(LINE + "\n"), path
        jsonschema.validate(plain(config.read_recipe(path)), SCHEMA)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "epoch", 3),
        ("train", "epochs", "three"),
        ("train", "schedule", "linear"),
        ("prepare", "labels", {"name": ["lesion"]}),
        ("trian", "epochs", 3),
    ],
)
def test_what_a_job_refuses_is_marked(section: str, key: str, value: Any) -> None:
    recipe = copy.deepcopy(plain(config.read_recipe(CONFIGS / "demo.yaml")))
    recipe.setdefault(section, {})[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, SCHEMA)
