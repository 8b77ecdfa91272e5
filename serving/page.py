"""The page at `/` and its files: our own, and NiiVue out of the Python package that carries it."""

import logging
from functools import cache
from importlib import metadata
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

logger = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
# Nothing may be loaded from elsewhere, and no other site may frame it. NiiVue has its font as a picture of the form
# `data:`, and sets the size and the cursor of its canvas by the style's properties, which the policy allows anyhow.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
# NiiVue on PyPI is a Jupyter widget: one module, whose only export is the widget. In this very version, which
# requirements-viewer.lock pins by its hash, the class that draws is called `t2`.
_PACKAGE, _VERSION, _BUNDLE = "ipyniivue", "2.4.4", "ipyniivue/static/widget.js"
_EXPORT, _EXPORT_VIEWER = b"export{Ih as default};", b"export{t2 as Niivue};"


def add(app: FastAPI) -> None:
    """The page's routes; without NiiVue's package the page shows slices, and says what is missing for 3D."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers=HEADERS)

    @app.get("/web/niivue.js", include_in_schema=False)
    def viewer() -> Response:
        try:
            return Response(niivue(), media_type="text/javascript", headers={"Cache-Control": "private, max-age=86400"})
        except LookupError as error:
            return PlainTextResponse(str(error), 404)

    app.mount("/web", StaticFiles(directory=WEB), name="web")


@cache
def niivue() -> bytes:
    """NiiVue as a module that exports `Niivue`.

    Raises:
        LookupError: its package is not there, or is another one than the lock's.
    """
    try:
        package = metadata.distribution(_PACKAGE)
        module = Path(str(package.locate_file(_BUNDLE))).read_bytes()
    except (metadata.PackageNotFoundError, OSError):
        raise LookupError(f"{_PACKAGE} is not installed: make setup") from None
    if package.version != _VERSION or module.count(_EXPORT) != 1:
        raise LookupError(f"{_PACKAGE} {package.version} is installed, {_VERSION} is needed: make setup")
    return module.replace(_EXPORT, _EXPORT_VIEWER)
