"""The HTTP API as the service's own OpenAPI description has it, in Markdown."""

from typing import Any

from serving import guard, jobs, routes
from serving.guard import Protection
from serving.metrics import Metrics
from serving.segment import Settings


def description() -> dict[str, Any]:
    """The OpenAPI description of the application, with the routes of jobs and figures; no model is asked."""
    absent: Any = None
    app = routes.create(absent, Settings(1))
    guard.around(app, Protection(max_body_bytes=1), Metrics(), absent, absent)
    assert jobs.router  # `around` adds its routes
    return app.openapi()


def markdown() -> str:
    """A section for each route: parameters, body, answers; then the fields of all bodies."""
    api = description()
    lines = []
    for path, operations in sorted(api["paths"].items()):
        for method, operation in operations.items():
            lines += _operation(method, path, operation)
    lines += ["## Bodies", ""]
    for name, schema in sorted(api["components"]["schemas"].items()):
        if "properties" in schema and not name.startswith(("HTTPValidation", "Validation")):
            lines += [f"### {name}", "", " ".join(schema.get("description", "").split()), ""]
            rows = [
                f"| `{field}` | {_kind(part)} | {_text(part.get('description', ''))} |"
                for field, part in schema["properties"].items()
            ]
            lines += ["| Field | Type | Meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _operation(method: str, path: str, operation: dict[str, Any]) -> list[str]:
    lines = [f"## {method.upper()} {path}", "", f"{operation.get('summary', '')}.", ""]
    parameters = [
        f"| `{one['name']}` | {one['in']} | {_kind(one['schema'])} | {_text(one.get('description', ''))} |"
        for one in operation.get("parameters", [])
    ]
    if parameters:
        lines += ["| Parameter | In | Type | Meaning |", "|---|---|---|---|", *parameters, ""]
    if body := operation.get("requestBody"):
        kinds = ", ".join(f"`{kind}`" for kind in body["content"])
        schema = next(iter(body["content"].values()))["schema"]
        named = f" The fields are those of {_kind(schema)}." if "$ref" in schema else ""
        lines += [f"Body: {_text(body.get('description', 'JSON'))}. Content types: {kinds}.{named}", ""]
    rows = []
    for status, answer in operation["responses"].items():
        kinds = [
            _kind(content["schema"]) if {"$ref", "anyOf"} & content.get("schema", {}).keys() else f"`{kind}`"
            for kind, content in answer.get("content", {}).items()
        ]
        rows.append(f"| {status} | {', '.join(kinds)} | {_text(answer.get('description', ''))} |")
    return [*lines, "| Status | Answer | Meaning |", "|---|---|---|", *rows, ""]


def _kind(schema: dict[str, Any]) -> str:
    if name := schema.get("$ref", "").rpartition("/")[2]:
        return f"[{name}](#{name.lower()})" if not name.startswith("HTTPValidation") else name
    if several := schema.get("anyOf"):
        return " or ".join(map(_kind, several))
    if values := schema.get("enum"):
        return ", ".join(f"`{value}`" for value in values)
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = str(schema.get("type", "any value"))
    return f"list of {_kind(schema['items'])}" if kind == "array" and "items" in schema else kind


def _text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
