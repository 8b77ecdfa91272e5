"""The pages under docs/ and the README: their prose, their commands and their YAML."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = [page for page in PAGES if page.parent.name in ("start", "how-to")]

_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@cache
def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for their module
    spec.loader.exec_module(module)
    return module


def generated(what: str) -> str:
    """What the site has in the place of a mark."""
    return _module("generated").generate(what)


def routes() -> dict[str, Any]:
    """The paths of the service's OpenAPI description."""
    return _module("openapi").description()["paths"]


def prose(page: Path) -> str:
    """The page without code, comments and the targets of links."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"^(?: {4,}|\t).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(page: Path) -> Iterator[str]:
    """Sentences of the prose; a row of a table, an item of a list and a heading are their own."""
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.) ?)", prose(page)):
        for cell in block.split("|"):
            yield from (part.strip() for part in re.split(r"(?<=[.!?])\s+", cell) if part.strip())


def words(text: str) -> int:
    """Words, as a reader counts them: what has a letter or a digit."""
    return sum(any(character.isalnum() for character in word) for word in text.split())


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for _, name, text in _FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


@dataclass(frozen=True)
class Command:
    """A line of a shell, with the variables that stand before it."""

    page: Path
    line: str
    words: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        """The values of `--set`."""
        return [self.words[at + 1] for at, word in enumerate(self.words) if word == "--set"]

    def option(self, name: str) -> str | None:
        return self.words[self.words.index(name) + 1] if name in self.words else None


def commands(page: Path) -> list[Command]:
    """Commands of indented blocks, and those of each side of `;`, `&&` and `|`."""
    lines = re.findall(r"^(?: {4}| {7,})(?! )(\S.*)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    found = []
    for line in lines:
        part: list[str] = []
        lexer = shlex.shlex(re.sub(r"\$\([^()]*\)", "VALUE", line), posix=True, punctuation_chars="();&|<>")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word and set(word) <= set("();&|"):
                found += _command(page, line, part)
                part = []
            else:
                part.append(word)
    return found


def _command(page: Path, line: str, part: list[str]) -> list[Command]:
    while part and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", part[0]):
        part = part[1:]
    return [Command(page, line, tuple(part))] if part else []


def recipes(page: Path) -> dict[str, dict[str, Any]]:
    """The recipes that a page tells to save, by the name in their first line."""
    named = {}
    for block in blocks(page, "yaml"):
        if name := re.match(r"# (\S+\.yaml)\n", block):
            named[name[1]] = yaml.safe_load(block)
    return named
