"""Init: looks at a folder of images and masks, and writes a recipe that runs, with comments that say why."""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayseg.starter.facts import Facts

_KINDS = {"picture": "pictures", "volume": "volumes", "dicom": "DICOM files", "table": "CSV files", "other": "others"}
_NAME = re.compile(r"[^a-z0-9]+")


def main(arguments: Sequence[str]) -> None:
    """Runs the command line; ends with code 2 where there is nothing to write a recipe for."""
    parser = argparse.ArgumentParser(prog="rayseg init", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="images and masks, or an archive without masks")
    parser.add_argument("--output", metavar="RECIPE.yaml", help="by default NAME.yaml")
    parser.add_argument("--name", help="of the runs and the model; by default the folder's")
    options = parser.parse_args(arguments)
    logging.getLogger("rayseg").setLevel(logging.ERROR)  # candidates that pair in part would warn of it
    try:
        for line in init(options.folder, options.output, options.name):
            print(line)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def init(folder: str, output: str | None = None, name: str | None = None) -> list[str]:
    """Writes the recipe; returns what was seen, what is doubted and what comes next, a line each.

    Raises:
        ValueError: no image in the folder, or there is such a recipe already.
    """
    called = _NAME.sub("-", (name or Path(folder).absolute().name).lower()).strip("-") or "rayseg"
    from rayseg.starter import facts, recipe  # late: --help needs none of what they import

    target = Path(output or f"{called}.yaml")
    if target.exists():
        raise ValueError(f"init: there is {target} already; name another file by --output")
    seen = facts.of_folder(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(recipe.text(seen, folder, called), encoding="utf-8")
    return [*_seen(seen), *(f"doubt: {one}" for one in _doubts(seen)), *_next(seen, target)]


def _seen(seen: "Facts") -> list[str]:
    kinds = ", ".join(f"{count} {_KINDS[kind]}" for kind, count in seen.kinds.most_common())
    lines = [f"seen: {kinds}" + (f"; {seen.modality} {seen.body_part}".rstrip() if seen.modality else "")]
    if seen.layout is None:
        return [*lines, f"seen: {seen.images} images and no labels that pair with them"]
    assert seen.classes is not None
    of_patients = "" if seen.patients is None else f" of {seen.patients} patients"
    if seen.told_by is not None and seen.told_by.source == "header":
        of_patients = f" of {seen.patients} patients in the headers that were read"
    lines += [f"seen: {seen.pairs} of {seen.images} images pair with {seen.masks} masks{of_patients}"]
    return [*lines, f"seen: classes {', '.join(seen.classes.names)}; images of {seen.median_px} pixels (median)"]


def _doubts(seen: "Facts") -> list[str]:
    if seen.layout is not None and seen.patients is None:
        told = (
            "NOTHING TELLS THE PATIENTS: all images would count as one, and none could be held out. Write groups.csv "
            "into the folder, with the header file,group and a line for each image; the recipe names it already"
        )
        return [told, *seen.doubts]
    return list(seen.doubts)


def _next(seen: "Facts", target: Path) -> list[str]:
    lines = [f"wrote {target}; next:"]
    if not Path("pseudonym.key").exists():
        lines += ["  (umask 077; openssl rand -hex 32 > pseudonym.key)"]
    if seen.layout is not None:
        return [*lines, f"  rayseg run {target}", f"  rayseg serve --config {target}"]
    return [
        *lines,
        f"  rayseg catalog --config {target}",
        f"  rayseg segment --config {target}    (once segment.model_uri names a model)",
    ]
