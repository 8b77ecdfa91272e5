"""The documentation site: `make docs` builds it, without a network and with warnings as errors."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform"), str(ROOT / "docs")]

import generated  # noqa: E402

project = "rayseg"
author = "the rayseg developers"
copyright = "the rayseg developers, Apache-2.0"
extensions = ["myst_parser"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "rayseg"
html_copy_source = False
html_show_sphinx = False

_MARK = re.compile(r"^<!-- generated: (.+?) -->$", re.MULTILINE)


def _fill(_: Sphinx, __: str, source: list[str]) -> None:
    """Puts what the code itself says in the place of `<!-- generated: KIND NAME -->`."""
    source[0] = _MARK.sub(lambda mark: generated.generate(mark[1]), source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _fill)
