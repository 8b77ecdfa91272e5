"""Typed configuration: frozen dataclasses read from one section of a YAML recipe.

A recipe is a YAML file with one section a job (`catalog:`, `prepare:`, `train:`, ...), and `common:` for what several
sections share. A job reads its own section into its dataclass; `--set a.b=c` changes single values, parsed as YAML.
Every error is one line that names the key.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

ConfigT = TypeVar("ConfigT")

SECTIONS = frozenset(
    {
        "catalog",
        "plan",
        "prepare",
        "train",
        "tune",
        "crossvalidate",
        "evaluate",
        "compare",
        "promote",
        "segment",
        "diff",
        "serve",
        "demo",
        "benchmark",
    }
)
NAMES = SECTIONS | {"common"}  # of all sections of a recipe
_TRACKING = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class Common:
    """What sections of a recipe share: a section that does not name such a key has it from here."""

    tracking_uri: str | None = None  # URI of MLflow
    storage: str | None = None  # URI of a folder for checkpoints
    prepared: str | None = None  # URI of a prepared set
    experiment: str | None = None  # experiment in MLflow
    registered_model: str | None = None  # name of the model that is registered
    # path of the file with the secret behind the pseudonyms; RAYSEG_PSEUDONYM_KEY_FILE goes before it
    key: str | None = None


def load(
    config_class: type[ConfigT], section: str | None, path: str | Path | None = None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Reads section `section` of the YAML recipe at `path` into `config_class`, a frozen dataclass.

    What the section does not name is as the section `common` has it, see `Common`; a `tracking_uri` that neither names
    is that of the environment, MLFLOW_TRACKING_URI.

    Args:
        config_class: the dataclass; nested dataclasses, tuples, literals and optional values are understood.
        section: the recipe's section (one that the recipe lacks gives the defaults), or None for all sections that
            the class has a field for.
        path: the recipe, or None for defaults plus `overrides`.
        overrides: `dotted.key=value` strings, relative to what is read; values are YAML.

    Raises:
        ValueError: missing or unreadable file, unknown section or key, wrong type, missing value: one line, key named.
    """
    return of_recipe(config_class, section, read_recipe(path) if path is not None else {}, overrides)


def of_recipe(
    config_class: type[ConfigT], section: str | None, recipe: Mapping[str, Any], overrides: Sequence[str] = ()
) -> ConfigT:
    """As `load`, of a recipe's plain values."""
    values = _sections(config_class, recipe, section)
    own = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for override in overrides:
        # `train.epochs=3` says the same to the job train as `epochs=3`.
        named = section is not None and section not in own and override.startswith(f"{section}.")
        _override(values, override.removeprefix(f"{section}.") if named else override)
    return build(config_class, _with_shared(config_class, values, plain(common(recipe)), nested=section is None))


def common(recipe: Mapping[str, Any]) -> Common:
    """The section `common` of a recipe."""
    values = recipe.get("common") or {}
    if not isinstance(values, dict):
        raise ValueError(f"config key common: expected a mapping, got {values!r:.60}")
    try:
        return build(Common, values)
    except ValueError as error:
        raise ValueError(str(error).replace("config key ", "config key common.", 1)) from None


def shared(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values that all sections of the recipe have in common, the tracking store of the environment among them."""
    values = {name: value for name, value in plain(common(recipe)).items() if value is not None}
    return ({"tracking_uri": os.environ[_TRACKING]} if os.environ.get(_TRACKING) else {}) | values


def _with_shared(config_class: Any, values: dict[str, Any], shared: dict[str, Any], *, nested: bool) -> dict[str, Any]:
    """The values with those that the class has keys for and the section does not name."""
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    filled = {name: value for name, value in shared.items() if name in fields and value is not None} | values
    if fields.get("tracking_uri") is str and not filled.get("tracking_uri") and os.environ.get(_TRACKING):
        filled["tracking_uri"] = os.environ[_TRACKING]
    if nested:
        for name, hint in fields.items():
            inner = filled.get(name) or {}
            if dataclasses.is_dataclass(hint) and isinstance(inner, dict):
                with_shared = _with_shared(hint, inner, shared, nested=False)
                if with_shared:
                    filled[name] = with_shared
    return filled


def build(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Makes `config_class` from plain values (as `plain` gives them); raises ValueError naming the offending key."""
    _refuse_unknown(config_class, values, "")
    _refuse_passwords(values, "")
    try:
        # JSON mode is strict about types (no "3" for 3) yet takes a list for a tuple, which YAML needs.
        return TypeAdapter(config_class).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        # Where several types are allowed, what is wrong is told best by the one that fits furthest.
        first = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))
        # The names of such types, `Window` or `tuple[...]`, stand between the keys.
        key = ".".join(str(part) for part in first["loc"] if re.fullmatch(r"[a-z0-9_]+", str(part)))
        text = first["msg"].removeprefix("Value error, ")
        of_group = first["type"] == "value_error" and isinstance(first["input"], dict)  # says itself what is wrong
        if of_group and not key:
            raise ValueError(text) from None
        given = "" if of_group or first["type"] == "missing" else f", got {first['input']!r}"
        raise ValueError(f"config key {key or '(top level)'}: {text}{given}") from None
    except TypeError as error:
        raise ValueError(f"config: a value is not plain YAML data: {error}") from None


def plain(config: Any) -> dict[str, Any]:
    """The dataclass as JSON-able plain values: what goes to workers, MLflow and bundles; `build` is the inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(config: Any) -> dict[str, Any]:
    """The dataclass as one level of dotted keys, as `--set` spells them and as MLflow shows them."""
    leaves: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            leaves[prefix] = value

    walk("", plain(config))
    return leaves


def digest(values: Any) -> str:
    """SHA-256 (hex, 64 characters) of a dataclass or plain value in canonical JSON: equal content, equal digest."""
    content = plain(values) if dataclasses.is_dataclass(values) else values
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Yaml(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, to which 1e-3 is a text; to YAML 1.2, and to everybody who writes it, it is a number."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text. Raises yaml.YAMLError where it is none."""
    return yaml.load(text, _Yaml)  # noqa: S506 (it is a SafeLoader)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The sections of the recipe at `path` as plain values; raises ValueError where it is none."""
    try:
        recipe = read_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ValueError(f"config file {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path}: cannot be read ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"config file {path}: expected sections ({', '.join(sorted(SECTIONS))}), got {recipe!r:.60}")
    for key in recipe:
        if key not in NAMES:
            raise ValueError(f"config key {key}: unknown section in {path}{_meant(str(key), NAMES)}")
    return recipe


def _sections(config_class: type[Any], recipe: Mapping[str, Any], section: str | None) -> dict[str, Any]:
    if section is None:
        return {
            name: recipe[name] for name in recipe.keys() & {field.name for field in dataclasses.fields(config_class)}
        }
    values = recipe.get(section) or {}
    if not isinstance(values, dict):
        raise ValueError(f"config key {section}: expected a mapping, got {values!r:.60}")
    return dict(values)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {override}: expected key=value, as in --set train.epochs=3")
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        raise ValueError(f"config key {key}: {text!r} is not a YAML value") from None
    put(values, key.strip(), value)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets the dotted key in plain values; groups on the way are made. Raises ValueError where one is no group."""
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        inner = values.get(parent)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ValueError(f"config key {'.'.join(parents[: depth + 1])}: not a group of keys, cannot set {key}")
        values[parent] = dict(inner)
        values = values[parent]
    values[leaf] = value


def _refuse_unknown(config_class: Any, values: Any, prefix: str) -> None:
    """Walks nested dataclasses, lists of them too, and refuses keys that they lack, with the near ones named."""
    if isinstance(values, list):
        for number, value in enumerate(values):
            _refuse_unknown(config_class, value, f"{prefix}{number}.")
    if not (dataclasses.is_dataclass(config_class) and isinstance(values, Mapping)):
        return
    hints = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"config key {prefix}{key}: unknown{_meant(str(key), hints)}")
        for candidate in _dataclasses_of(hints[key]):
            _refuse_unknown(candidate, value, f"{prefix}{key}.")


def _meant(key: str, known: Iterable[str]) -> str:
    """The key that was probably meant, or all that there are."""
    names = sorted(known)
    near = get_close_matches(key, names, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}"


def _refuse_passwords(values: Any, key: str) -> None:
    """Refuses URLs with a password, as configurations go to logs, MLflow and workers; it is not told in the error."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            _refuse_passwords(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            _refuse_passwords(value, f"{key}.{number}")
    elif isinstance(values, str) and re.search(r"://[^/?#]*:[^/?#]*@", values):
        raise ValueError(
            f"config key {key}: a URL with a password in it; give it by the environment or a file instead "
            "(MLFLOW_TRACKING_PASSWORD, PGPASSFILE, AWS_SHARED_CREDENTIALS_FILE, RAYSEG_DICOMWEB_PASSWORD_FILE)"
        )


def _dataclasses_of(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for argument in getattr(hint, "__args__", ()) for found in _dataclasses_of(argument)]
