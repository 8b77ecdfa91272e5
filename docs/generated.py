"""Reference pages from the code itself: keys of jobs, columns of tables, codes, figures, the HTTP API, the client.

All but the HTTP API is read from the sources without importing them, so that the build is quick. The meaning of a key
or a column is the comment beside it or right above it, or its line in the docstring of its class.
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

ROOT = Path(__file__).parents[1]
_ENTRY = re.compile(r"^(\w+): (.*(?:\n +.*)*)\n?", re.MULTILINE)
_YAML = {True: "true", False: "false", None: "null", "": '""'}
_WORDS = {"str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`", "Any": "any value"}


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
        above, number = [], node.lineno - 1  # type: ignore[attr-defined]
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
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            if isinstance(statement, ast.AnnAssign):
                targets = [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return self, statement.value  # type: ignore[attr-defined, union-attr]
            if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
                module = _module(statement.module or "")
                return module.node(name) if module else None
        return None

    def attribute(self, owner: str, name: str) -> "tuple[Module, ast.AST] | None":
        """`owner.name`, of a module that is imported as `owner`."""
        for statement in self.tree.body:
            if isinstance(statement, ast.ImportFrom) and any(alias.name == owner for alias in statement.names):
                module = _module(f"{statement.module}.{owner}")
                return module.node(name) if module else None
        return None


@cache
def _parsed(path: Path) -> tuple[ast.Module, dict[int, str]]:
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    texts = {line: re.sub(r"#\s*noqa.*", "", text).lstrip("# ").strip() for line, text in comments.items()}
    return ast.parse(source), {line: text for line, text in texts.items() if text}


def _module(name: str) -> Module | None:
    path = Path(*name.split("."))
    for base in (ROOT / "platform", ROOT):
        for file in (base / path.with_suffix(".py"), base / path / "__init__.py"):
            if file.is_file():
                return Module(file)
    return None


def generate(what: str) -> str:
    """The Markdown for a mark: `keys JOB`, `codes MODULE NAME`, `columns MODULE NAME`, `figures`, `http`, `client`."""
    kind, *names = what.split()
    kinds = {"keys": _keys, "codes": _codes, "columns": _columns, "figures": _figures, "http": _http, "client": _client}
    return kinds[kind](*names)


def _keys(job: str) -> str:
    """All keys of a job's section, a table for each group."""
    return "\n".join(["## Keys", "", *_table(*_configuration(job), "")])


@cache
def _configuration(job: str) -> tuple[Module, str]:
    """The job's module, and the name of the dataclass that it hands to `job.run`."""
    module = Module(ROOT / "jobs" / f"{job}.py")
    (call,) = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call) and len(node.args) == 3]
    assert isinstance(call.args[1], ast.Name)
    return module, call.args[1].id


@cache
def _jobs() -> dict[str, str]:
    """Jobs by the names of their dataclasses."""
    names = [path.stem for path in sorted((ROOT / "jobs").glob("*.py")) if path.stem != "__init__"]
    return {_configuration(name)[1]: name for name in names}


def _table(module: Module, name: str, prefix: str) -> list[str]:
    """What the dataclass says of itself, its keys, and the tables of the groups among these."""
    place = module.node(name)
    assert place is not None, name
    module, node = place
    assert isinstance(node, ast.ClassDef), name
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    known = {ast.unparse(field.target) for field in fields}
    entries = {key: " ".join(rest.split()) for key, rest in _ENTRY.findall(text) if key in known}
    text = _ENTRY.sub(lambda entry: "" if entry[1] in known else entry[0], text)
    rows, groups = [], []
    for field in fields:
        assert isinstance(field.target, ast.Name)
        key = f"{prefix}{field.target.id}"
        kind, default = _type(module, field.annotation), _default(module, field.value)
        meaning = [entries.get(field.target.id, ""), module.meaning(field)]
        group = _group(module, field.annotation)
        if group in _jobs():
            kind = "section"
            meaning.insert(0, f"As the job [{_jobs()[group]}]({_jobs()[group]}.md) has it.")
        elif group:
            groups.append((group, key))
            meaning.append(f"[Keys](#group-{key.replace('.', '')}).")
        rows.append(f"| `{key}` | {_cell(kind)} | {default} | {_cell(' '.join(filter(None, meaning)))} |")
    lines = [text.strip(), "", "| Key | Type | Default | Meaning |", "|---|---|---|---|", *rows, ""]
    for group, key in groups:
        lines += [f"### Group `{key}`", "", *_table(module, group, f"{key}.")]
    return lines


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
        return "`null`" if node.value is None else f"`{node.value}`"
    if isinstance(node, ast.Subscript):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        outer = ast.unparse(node.value)
        if outer == "Literal":
            return ", ".join(f"`{item.value}`" for item in items if isinstance(item, ast.Constant))
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
        return {"dict": "`{}`", "_default_space": "rate and batch"}.get(factory, "")
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


def _cell(text: str) -> str:
    return text.replace("|", "\\|").strip()


def _codes(module: str, name: str) -> str:
    """The values of an enumeration with their meanings."""
    home = _module(module)
    assert home is not None
    _, node = home.node(name) or (None, None)
    assert isinstance(node, ast.ClassDef)
    rows = [
        f"| `{statement.value.value}` | {_cell(home.meaning(statement))} |"
        for statement in node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
    ]
    return "\n".join(["| Code | Meaning |", "|---|---|", *rows])


def _columns(module: str, name: str) -> str:
    """The columns of an Arrow schema, or the parts of a list of structures."""
    home = _module(module)
    assert home is not None
    _, node = home.node(name) or (None, None)
    assert node is not None, name
    rows = []
    for part in ast.walk(node):
        arguments: list[ast.expr] = []
        if isinstance(part, ast.Tuple):
            arguments = part.elts
        elif isinstance(part, ast.Call) and ast.unparse(part.func) == "pa.field":
            arguments = part.args
        if len(arguments) == 2 and isinstance(arguments[0], ast.Constant):
            kind = re.sub(r"pa\.|\(\)", "", ast.unparse(arguments[1]))
            rows.append((part.lineno, f"| `{arguments[0].value}` | {kind} | {_cell(home.meaning(part))} |"))  # type: ignore[attr-defined]
    return "\n".join(["| Column | Type | Meaning |", "|---|---|---|", *(row for _, row in sorted(rows))])


def _figures() -> str:
    """What Prometheus gets of all stages, as `meters.METERS` declares it."""
    home = _module("rayseg.meters")
    assert home is not None
    _, node = home.node("METERS") or (None, None)
    assert isinstance(node, ast.Dict)
    rows = []
    for key, value in zip(node.keys, node.values, strict=True):
        assert isinstance(key, ast.Constant)
        assert isinstance(value, ast.Call)
        kind, text, labels = map(ast.literal_eval, value.args)
        rows.append(f"| `ray_{key.value}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text} |")
    return "\n".join(["| Figure | Kind | Labels | Meaning |", "|---|---|---|---|", *rows])


def _client() -> str:
    """The public methods of `rayseg.client.Client`."""
    home = _module("rayseg.client")
    assert home is not None
    _, node = home.node("Client") or (None, None)
    assert isinstance(node, ast.ClassDef)
    lines = []
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or not method.name.startswith("_")):
            name = "Client" if method.name == "__init__" else f"Client.{method.name}"
            arguments = ast.unparse(method.args).removeprefix("self, ").removeprefix("self")
            text = inspect.cleandoc(ast.get_docstring(method) or "")
            lines += [f"### {name}", "", f"```\n{name}({arguments})\n```", "", f"```text\n{text}\n```", ""]
    return "\n".join(lines)


def _http() -> str:
    """Routes, parameters and answers from the service's own OpenAPI description."""
    import openapi

    return openapi.markdown()
