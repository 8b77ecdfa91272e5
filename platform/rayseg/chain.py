"""Run: the stages of a recipe one after the other, and of these only what is not done.

catalog, prepare and segment see for themselves what is new, and are asked each time. train, evaluate and promote begin
again whenever they are asked: a file beside the recipe, `NAME.run.json`, remembers what they were given and gave.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rayseg import config, storage
from rayseg.data.prepared import DESCRIPTION

STAGES = ("catalog", "prepare", "train", "evaluate", "promote", "segment")
_REMEMBERED = {"train": "prepared", "evaluate": "prepared", "promote": None}  # with the key of their set
# Of a stage's result, what the table at the end shows.
_SHOWN = {
    "catalog": ("accepted", "rejected"),
    "prepare": ("rows", "patients", "rejected"),
    "train": ("model_uri", "val_dice", "best_epoch"),
    "evaluate": ("dice_pooled", "cases"),
    "promote": ("promoted", "reason"),
    "segment": ("series", "segmented", "rejected"),
}
Run = Callable[[str, Sequence[str]], dict[str, Any]]


def main(arguments: Sequence[str]) -> None:
    """Runs the command line; the last line, but on a terminal, is JSON: the result of each stage by its name."""
    parser = argparse.ArgumentParser(prog="rayseg run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "--set", metavar="STAGE.KEY=VALUE", action="append", default=[], dest="overrides", help="sets a key of a stage"
    )
    options = parser.parse_args(arguments)
    try:
        results = run(Path(options.recipe), options.overrides, _process)
    except ValueError as error:
        print(f"run: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except subprocess.CalledProcessError as error:  # it has said why
        raise SystemExit(error.returncode) from None
    if not sys.stdout.isatty():
        print(json.dumps(results), flush=True)


def run(recipe: Path, overrides: Sequence[str], process: Run) -> dict[str, dict[str, Any]]:
    """Asks the stages that the recipe has a section of, in order; returns the result of each by its name.

    Args:
        recipe: the recipe's file.
        overrides: `STAGE.KEY=VALUE` strings.
        process: runs a stage with these arguments and returns its result.

    Raises:
        ValueError: no recipe, a recipe without a stage, or an override of no stage of it.
        subprocess.CalledProcessError: a stage ended with an error; those before it are remembered.
    """
    sections = config.read_recipe(recipe)
    stages = [stage for stage in STAGES if stage in sections]
    if not stages:
        raise ValueError(f"{recipe} has no section of {', '.join(STAGES)}")
    for override in overrides:
        if override.partition(".")[0] not in stages:
            raise ValueError(f"--set {override}: it begins with one of {', '.join(stages)}, as in train.epochs=3")
    memory = recipe.with_suffix(".run.json")
    remembered = _read(memory)
    results, rows = {}, []
    for number, stage in enumerate(stages, 1):
        began = time.monotonic()
        own = [one for one in overrides if one.startswith(f"{stage}.")]
        given = _given(stage, sections, own)
        before = remembered.get(stage, {})
        if given is not None and before.get("given") == given:
            results[stage], state = before["result"], "done before"
        else:
            _say(f"[{number}/{len(stages)}] {stage}")
            settings = [word for one in own for word in ("--set", one)]
            results[stage] = process(stage, ["--config", str(recipe), *settings])
            state = f"{time.monotonic() - began:.0f} s"
            if stage in _REMEMBERED:
                # Asked again: the model that `latest` names may be another one now.
                remembered[stage] = {"given": _given(stage, sections, own), "result": results[stage]}
                memory.write_text(json.dumps(remembered, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        rows.append((stage, state, _shown(stage, results[stage])))
    width = max(len(state) for _, state, _ in rows)
    for stage, state, shown in rows:
        _say(f"  {stage:10}{state:>{width}}  {shown}")
    return results


def _process(stage: str, arguments: Sequence[str]) -> dict[str, Any]:
    """A process of its own: each stage starts and ends its own Ray."""
    command = [sys.executable, "-m", "rayseg.command", stage, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _given(stage: str, sections: dict[str, Any], overrides: Sequence[str]) -> str | None:
    """A digest of all that decides about the stage's result; None where that is the stage's own matter, or unknown."""
    if stage not in _REMEMBERED:
        return None
    values = config.shared(sections) | (sections[stage] or {})
    for override in overrides:
        key, _, text = override.removeprefix(f"{stage}.").partition("=")
        config.put(values, key, config.read_yaml(text))
    content: list[Any] = [stage, values]
    try:
        if _REMEMBERED[stage]:
            uri = storage.join(storage.absolute(values[_REMEMBERED[stage]]), DESCRIPTION)
            content.append(storage.read_json(uri)["digest"])
        if stage != "train":
            from rayseg.tracking import registry

            version = registry.resolve(values["tracking_uri"], values["model_uri"])
            content.append([version.name, version.version, version.digest])
    except (KeyError, TypeError, FileNotFoundError, ValueError):
        return None  # the stage itself says what is missing
    return config.digest(content)


def _read(memory: Path) -> dict[str, Any]:
    try:
        remembered = json.loads(memory.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{memory} is not valid JSON; remove it, and train begins again") from None
    return remembered if isinstance(remembered, dict) else {}


def _shown(stage: str, result: dict[str, Any]) -> str:
    values = ((key, result.get(key)) for key in _SHOWN[stage])
    return ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in values)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
