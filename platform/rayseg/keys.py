"""The keys of jobs, read from the sources of their dataclasses: name, type, default and meaning of each.

Nothing is imported for it, so that help comes at once. The meaning of a key is the comment beside it or right above it,
and its line in the docstring of its class.
"""

import ast
import inspect
import io
import re
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_PLATFORM = Path(__file__).parents[1]
_ROOTS = (_PLATFORM, _PLATFORM.parent)  # of a clone; of an installation the first has all
_WORDS = {"str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`", "Any": "any value"}
_ENTRY = re.compile(r"^(\w+): (.*(?:\n +.*)*)\n?", re.MULTILINE)
_YAML = {True: "true", False: "false", None: "null", "": '""'}
_DEFAULTS = {"dict": "`{}`", "_default_space": "rate and batch"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe; texts are Markdown.

    name: dotted, within its section.
    kind: which values it takes; a group has keys of its own.
    default: as a recipe spells it; empty for a group, `(needed)` where there is none.
    meaning: sentences.
    job: whose section this is, of a key that stands for one.
    """

    name: str
    kind: str
    default: str
    meaning: str
    group: "Group | None" = None
    job: str | None = None


@dataclass(frozen=True)
class Group:
    """The keys of a dataclass, and its text without the lines of single keys."""

    text: str
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Module:
    """A source file: its tree, its comments by line, and what each name that it imports is called elsewhere."""

    path: Path

    @property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return _parsed(self.path)[0]

    @property
    def comments(self) -> dict[int, str]:
        """Comments by line."""
        return _parsed(self.path)[1]

    def meaning(self, node: ast.AST) -> str:
        """The comments right above the node and those beside it."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        above: list[str] = []
        number = node.lineno - 1  # type: ignore[attr-defined]
        while number in self.comments and lines[number - 1].lstrip().startswith("#"):
            above.insert(0, self.comments[number])
            number -= 1
        beside = range(node.lineno, node.end_lineno + 1)  # type: ignore[attr-defined]
        texts = [
            text
            for line, text in self.comments.items()
            if line in beside and not lines[line - 1].lstrip().startswith("#")
        ]
        return " ".join(above + texts)

    def node(self, name: str) -> "tuple[Module, ast.AST] | None":
        """What the name stands for, in this module or in the one that it is imported from."""
        for statement in self.tree.body:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return self, statement
            targets: list[ast.expr] = statement.targets if isinstance(statement, ast.Assign) else []
            if isinstance(statement, ast.AnnAssign):
                targets = [statement.target]
            if name in map(ast.unparse, targets) and isinstance(statement, ast.Assign | ast.AnnAssign):
                return (self, statement.value) if statement.value else None
            if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
                module = find(statement.module or "")
                return module.node(name) if module else None
        return None

    def attribute(self, owner: str, name: str) -> "tuple[Module, ast.AST] | None":
        """`owner.name`, of a module that is imported as `owner`."""
        for statement in self.tree.body:
            if isinstance(statement, ast.ImportFrom) and any(alias.name == owner for alias in statement.names):
                module = find(f"{statement.module}.{owner}")
                return module.node(name) if module else None
        return None


@cache
def _parsed(path: Path) -> tuple[ast.Module, dict[int, str]]:
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    texts = {line: re.sub(r"#\s*noqa.*", "", text).lstrip("# ").strip() for line, text in comments.items()}
    return ast.parse(source), {line: text for line, text in texts.items() if text}


def find(name: str) -> Module | None:
    """The source of the module; None where it is not ours."""
    path = Path(*name.split("."))
    for base in _ROOTS:
        for file in (base / path.with_suffix(".py"), base / path / "__init__.py"):
            if file.is_file():
                return Module(file)
    return None


def of_job(job: str) -> Group:
    """The keys of the section of `python -m jobs.JOB`."""
    return _group_of(*_configuration(job), "")


def of_class(module: str, name: str) -> Group:
    """The keys of a dataclass."""
    home = find(module)
    assert home is not None, module
    return _group_of(home, name, "")


def summary(job: str) -> str:
    """What the job does: the docstring of its module."""
    module = find(f"jobs.{job}")
    assert module is not None, job
    return (ast.get_docstring(module.tree) or "").partition(": ")[2]


def class_name(job: str) -> str:
    """The name of the job's dataclass."""
    return _configuration(job)[1]


@cache
def _configuration(job: str) -> tuple[Module, str]:
    """The job's module, and the name of the dataclass that it hands to `job.run`."""
    module = find(f"jobs.{job}")
    assert module is not None, job
    (call,) = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call) and len(node.args) == 3]
    assert isinstance(call.args[1], ast.Name)
    return module, call.args[1].id


@cache
def _jobs() -> dict[str, str]:
    """Jobs by the names of their dataclasses."""
    home = find("jobs")
    assert home is not None
    return {_configuration(path.stem)[1]: path.stem for path in sorted(home.path.parent.glob("[a-z]*.py"))}


def _group_of(module: Module, name: str, prefix: str) -> Group:
    place = module.node(name)
    assert place is not None, name
    module, node = place
    assert isinstance(node, ast.ClassDef), name
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    known = {ast.unparse(field.target) for field in fields}
    entries = {key: " ".join(rest.split()) for key, rest in _ENTRY.findall(text) if key in known}
    text = _ENTRY.sub(lambda entry: "" if entry[1] in known else entry[0], text)
    keys = []
    for field in fields:
        name = ast.unparse(field.target)
        kind, default = _type(module, field.annotation), _default(module, field.value)
        meaning = " ".join(filter(None, (entries.get(name, ""), module.meaning(field))))
        inner, group, job = _group(module, field.annotation), None, None
        if inner in _jobs():
            kind, job = "section", _jobs()[inner]
        elif inner:
            group = _group_of(module, inner, f"{prefix}{name}.")
        keys.append(Key(f"{prefix}{name}", kind, default, meaning, group, job))
    return Group(text.strip(), tuple(keys))


def _group(module: Module, annotation: ast.expr) -> str | None:
    """The dataclass that the annotation names, if it is one of keys."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            place = module.node(node.id)
            if place and isinstance(place[1], ast.ClassDef) and node.id not in ("Window",):
                return node.id
    return None


def _type(module: Module, node: ast.expr) -> str:
    if isinstance(node, ast.BinOp):
        return f"{_type(module, node.left)} or {_type(module, node.right)}"
    if isinstance(node, ast.Constant):
        return "`null`" if node.value is None else f"`{node.value!s}`"
    if isinstance(node, ast.Subscript):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        outer = ast.unparse(node.value)
        if outer == "Literal":
            return ", ".join(f"`{item.value!s}`" for item in items if isinstance(item, ast.Constant))
        if outer == "dict":
            return f"mapping of {_type(module, items[0])} to {_type(module, items[1])}"
        kinds = [_type(module, item) for item in items if ast.unparse(item) != "..."]
        return f"list of {kinds[0]}" if len(items) != len(kinds) else f"[{', '.join(kinds)}]"
    name = ast.unparse(node)
    if name in _WORDS:
        return _WORDS[name]
    place = module.node(name)
    if place and isinstance(place[1], ast.expr):
        return _type(place[0], place[1])
    return "`{center, width}`" if name == "Window" else "group"


def _default(module: Module, node: ast.expr | None) -> str:
    if node is None:
        return "(needed)"
    if isinstance(node, ast.Call):
        factory = ast.unparse(node.keywords[0].value) if node.keywords else ""
        return _DEFAULTS.get(factory, "")
    return f"`{_value(module, node)}`"


def _value(module: Module, node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        place = module.attribute(node.value.id, node.attr)
        assert place is not None, ast.unparse(node)
        return _value(place[0], place[1])  # type: ignore[arg-type]
    if isinstance(node, ast.BinOp):
        left, right = _value(module, node.left), _value(module, node.right)
        return left * right if isinstance(node.op, ast.Mult) else left**right
    value = ast.literal_eval(node)
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return _YAML[value] if value is None or value == "" or isinstance(value, bool) else value
