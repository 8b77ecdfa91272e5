"""What every `python -m jobs.NAME` does around its one function: arguments in, progress, one JSON line out."""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rayseg import config


def run(
    section: str,
    config_class: type[Any],
    function: Callable[[Any], Any],
    arguments: Sequence[str] | None = None,
    *,
    whole_recipe: bool = False,
) -> Any:
    """Loads the section of the recipe, calls `function` with it, prints its dataclass result as the last line, JSON.

    With `whole_recipe` the job reads all sections, not only its own.

    A ValueError (bad config, bad input) ends the process with code 2 and one line on standard error; anything else
    is a defect or a lost machine and keeps its traceback.
    """
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{section}", description=function.__doc__)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="recipe; this job reads its own section")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="change one value"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request
    try:
        result = function(
            config.load(config_class, None if whole_recipe else section, options.config, options.overrides)
        )
    except ValueError as error:
        print(f"{section}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(dataclasses.asdict(result)), flush=True)
    return result
