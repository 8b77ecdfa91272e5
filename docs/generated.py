"""Reference pages from the code itself: keys of jobs, columns of tables, codes, figures, the HTTP API, the client.

All but the HTTP API is read from the sources without importing them, so that the build is quick. The meaning of a key
or a column is the comment beside it or right above it, or its line in the docstring of its class.
"""

import ast
import inspect
import re

from rayseg import keys
from rayseg.keys import Group


def generate(what: str) -> str:
    """The Markdown for a mark.

    `keys JOB`, `group MODULE NAME`, `codes MODULE NAME`, `columns MODULE NAME`, `figures`, `http`, `client`.
    """
    kind, *names = what.split()
    kinds = {
        "keys": _keys,
        "group": _group,
        "codes": _codes,
        "columns": _columns,
        "figures": _figures,
        "http": _http,
        "client": _client,
    }
    return kinds[kind](*names)


def _keys(job: str) -> str:
    """All keys of a job's section, a table for each group."""
    return "\n".join(["## Keys", "", *_tables(keys.of_job(job))])


def _group(module: str, name: str) -> str:
    """The keys of a dataclass."""
    return "\n".join(_tables(keys.of_class(module, name)))


def _tables(group: Group) -> list[str]:
    lines = [group.text, "", "| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for key in group.keys:
        meaning = key.meaning
        if key.job:
            meaning = f"As the job [{key.job}]({key.job}.md) has it. {meaning}"
        elif key.group:
            meaning = f"{meaning} [Keys](#group-{key.name.replace('.', '')})."
        lines.append(f"| `{key.name}` | {_cell(key.kind)} | {key.default} | {_cell(meaning)} |")
    lines.append("")
    for key in group.keys:
        if key.group:
            lines += [f"### Group `{key.name}`", "", *_tables(key.group)]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").strip()


def _codes(module: str, name: str) -> str:
    """The values of an enumeration with their meanings."""
    home = keys.find(module)
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
    home = keys.find(module)
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
    home = keys.find("rayseg.meters")
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
    home = keys.find("rayseg.client")
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
