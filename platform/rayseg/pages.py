"""HTML pages from the templates that lie beside the modules which fill them."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

import jinja2


def render(package: str, template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The template of a package, filled; what it is given is text and never markup.

    Args:
        package: whose folder has it, and what it includes; `page.html`, that pages extend, and `style.css`, their look,
            lie beside this module.
        template: name of the file.
        filters: by the names that it uses, beside `data_uri` of PNG bytes.
        values: by the names that it uses; one that it uses and lacks raises `jinja2.UndefinedError`.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, "."), jinja2.PackageLoader("rayseg", ".")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": _data_uri, **filters}
    return environment.get_template(template).render(**values)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
