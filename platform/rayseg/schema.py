"""Schema: a JSON schema of recipes, so that an editor completes keys, shows their meaning and marks what is wrong.

It is made of the dataclasses of the jobs, as pydantic describes them, with the meanings that `keys` reads. A recipe
names it in its first line: `# yaml-language-server: $schema=recipe.schema.json`.
"""

import argparse
import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import TypeAdapter

from rayseg import config, keys

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def main(arguments: Sequence[str]) -> None:
    """Prints the schema."""
    argparse.ArgumentParser(prog="rayseg schema", description=(__doc__ or "").partition("\n")[0]).parse_args(arguments)
    print(text(), end="")


def text() -> str:
    """The schema as it lies in `configs/recipe.schema.json`."""
    return json.dumps(recipe(), indent=1, ensure_ascii=False) + "\n"


def recipe() -> dict[str, Any]:
    """The schema of a recipe: its sections, none of which it needs to have.

    A section lacks nothing either: what it does not name may come from `common`, from `--set` or from its job.
    """
    classes = {section: _section(section) for section in sorted(config.SECTIONS)} | {"common": config.Common}
    adapters: list[tuple[str, Any, TypeAdapter[Any]]] = [
        (section, "validation", TypeAdapter(of_section)) for section, of_section in classes.items()
    ]
    references, shared = TypeAdapter.json_schemas(adapters)
    definitions = shared["$defs"]
    for one in {one for of_section in classes.values() for one in _dataclasses(of_section)}:
        definition = definitions[one.__name__]
        definition["additionalProperties"] = False
        for key in keys.of_class(one.__module__, one.__name__).keys:
            if key.meaning:  # of a group the class itself says it
                definition["properties"][key.name]["description"] = key.meaning
    for one in classes.values():
        definitions[one.__name__].pop("required", None)
    properties = {
        section: {
            "anyOf": [references[section, "validation"], {"type": "null"}],
            "description": "What sections share." if section == "common" else keys.summary(section),
        }
        for section in classes
    }
    schema = {"$schema": _DIALECT, "title": "A recipe of rayseg", "type": "object", "properties": properties}
    untitled: dict[str, Any] = _untitled(schema | {"additionalProperties": False, "$defs": definitions})
    return untitled | {"title": schema["title"]}


def _section(name: str) -> Any:
    """The dataclass of a section: that of its job, or, where the job reads the whole recipe, of its field."""
    module = importlib.import_module(f"jobs.{name}")
    of_job = getattr(module, keys.class_name(name))
    fields = {field.name: field.type for field in dataclasses.fields(of_job)}
    of_section = fields.get(name, of_job)
    return of_section if dataclasses.is_dataclass(of_section) else of_job


def _dataclasses(hint: Any) -> Iterator[Any]:
    """The dataclass and all that its fields are made of."""
    if dataclasses.is_dataclass(hint):
        yield hint
        for field in dataclasses.fields(hint):
            yield from _dataclasses(field.type)
    for argument in get_args(hint):
        yield from _dataclasses(argument)


def _untitled(node: Any) -> Any:
    """Without the titles that pydantic makes of names of fields."""
    if isinstance(node, dict):
        return {key: _untitled(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}
    return [_untitled(one) for one in node] if isinstance(node, list) else node
