"""What every `python -m jobs.NAME` does around its one function: arguments in, progress, one JSON line out."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayseg import build, config, logs, manual, meters, retry, work
from rayseg.dicom import pseudonyms

logger = logging.getLogger(__name__)


def run(
    section: str,
    config_class: type[Any],
    function: Callable[[Any], Any],
    arguments: Sequence[str] | None = None,
    *,
    whole_recipe: bool = False,
) -> Any:
    """Loads the section of the recipe, calls `function` with it, prints its dataclass result as the last line, JSON.

    It goes to a file where `--json` names one, and a terminal shows a table instead, see `tell`.
    That line is the last one of both streams: a cluster that the job has started for itself has ended before it.

    With `whole_recipe` the job reads all sections, not only its own.

    A ValueError (bad config, bad input) and credentials that a store refuses, wherever a process of the job met them,
    end the process with code 2 and one line on standard error; anything else
    is a defect or a lost machine and gives a traceback and code 1. Texts of errors that are not ours are left out:
    they quote names of files, or what was read.
    """
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{section}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", metavar="RECIPE.yaml")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.help:
        print(manual.of_job(section))
        raise SystemExit(0)
    logs.begin(section)
    logs.set_up()
    logger.info("rayseg %s from %s", build.current(), build.where())
    try:
        recipe = config.read_recipe(options.config) if options.config else {}  # once: it may be a pipe
        _give_key(recipe)
        result = function(config.of_recipe(config_class, None if whole_recipe else section, recipe, options.overrides))
        work.leave()
    except Exception as error:
        work.leave()
        credentials = retry.said_of_credentials(error)
        # ValueErrors of ours; libraries and Ray's workers raise kinds of it.
        refused = type(error) is ValueError or credentials is not None
        meters.add("rayseg_jobs_total", stage=section, outcome="refused" if refused else "failed")
        print(_refusal(section, credentials or str(error)) if refused else logs.without_texts(error), file=sys.stderr)
        raise SystemExit(2 if refused else 1) from None
    meters.add("rayseg_jobs_total", stage=section, outcome="succeeded")
    tell(dataclasses.asdict(result), options.json)
    return result


def tell(result: dict[str, Any], file: str | None) -> None:
    """The result as one line of JSON: in a file where one is named, else on standard output.

    A person at a terminal gets a table of what is short in it instead.
    """
    line = json.dumps(result)
    if file is not None:
        Path(file).write_text(f"{line}\n", encoding="utf-8")
    if sys.stdout.isatty():
        short = {key: value for key, value in result.items() if isinstance(value, str | int | float) and value != ""}
        width = max(map(len, short), default=0)
        for key, value in short.items():
            print(f"  {key:{width}}  {value:.4g}" if isinstance(value, float) else f"  {key:{width}}  {value}")
    elif file is None:
        print(line, flush=True)


def _give_key(recipe: Mapping[str, Any]) -> None:
    """Names the file of the pseudonyms' key by the environment, as all that a job starts has it from there."""
    key = config.common(recipe).key
    if key and not any(os.environ.get(name) for name in pseudonyms.VARIABLES):
        os.environ[pseudonyms.VARIABLES[0]] = str(Path(key).absolute())


def _refusal(section: str, text: str) -> str:
    """The error's text, which begins with the section's name, or one of its keys, once."""
    return text if text.startswith((f"{section}:", f"{section}.")) else f"{section}: {text}"
