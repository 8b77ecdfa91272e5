"""The command `rayseg`: every job by its name, from any folder, and what helps around them.

Nothing heavy is imported before a job is chosen, so that help comes in well under a second.
"""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from rayseg import manual

_HELP = {"-h", "--help"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in _HELP:
        print(manual.overview())
    elif name == "--version":
        from rayseg import build

        print(build.current())
    elif name == "ask" or (name == "segment" and any(one.partition("=")[0] == "--server" for one in rest)):
        from rayseg import client  # `segment` is what this was called before jobs had a command

        client.main(rest)
    elif name == "doctor":
        from rayseg import doctor

        doctor.main(rest)
    elif name == "init":
        from rayseg.starter import init

        init.main(rest)
    elif name == "schema":
        _see_jobs()
        from rayseg import schema

        schema.main(rest)
    elif name == "run":
        from rayseg import chain

        chain.main(rest)
    elif name in manual.JOBS:
        _job(name, rest)
    else:
        near = get_close_matches(name, (*manual.JOBS, *manual.COMMANDS), 1)
        meant = f"; did you mean {near[0]}?" if near else "; see rayseg --help"
        print(f"rayseg: there is no {name}{meant}", file=sys.stderr)
        raise SystemExit(2)


def _job(name: str, arguments: list[str]) -> None:
    if _HELP & set(arguments):
        print(manual.of_job(name))
        return
    _see_jobs()
    sys.argv = [f"rayseg {name}", *arguments]
    try:
        module = importlib.import_module(f"jobs.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("jobs", f"jobs.{name}"):
            raise
        print(f"rayseg: the job {name} comes with a clone of the project: install it from there", file=sys.stderr)
        raise SystemExit(2) from None
    module.main()


def _see_jobs() -> None:
    """In a clone the jobs lie beside the platform; the wheel has them beside the package."""
    root = str(Path(__file__).parents[2])
    if root not in sys.path and Path(root, "jobs").is_dir():
        sys.path.append(root)


if __name__ == "__main__":
    main()
