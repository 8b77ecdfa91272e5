"""Who asked for what, and what became of it: one JSON line a request, without an identity in it."""

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any

from starlette.types import Scope

from rayseg.dicom import pseudonyms

_STATE = "rayseg.sent"


def about(scope: Scope, uids: Iterable[str]) -> None:
    """Notes the series, or of a lone instance that, which a request is about; UIDs go to the log as pseudonyms only."""
    scope.setdefault("state", {})[_STATE] = sorted(set(uids))


class Audit:
    """Appends lines to a file, which may be rotated by moving it away."""

    def __init__(self, path: str) -> None:
        """Raises ValueError where the file cannot be opened."""
        # A logger's lines are whole whatever threads write; this one is in nobody's tree.
        self._logger = logging.Logger("rayseg.audit", logging.INFO)
        try:
            self._logger.addHandler(WatchedFileHandler(path, encoding="ascii"))
        except OSError as error:
            raise ValueError(f"serve.audit: {path} cannot be written ({type(error).__name__})") from None
        try:
            self._pseudonyms: pseudonyms.Pseudonyms | None = pseudonyms.from_environment()
        except ValueError:
            self._pseudonyms = None

    def write(self, scope: Scope, **figures: Any) -> None:
        """One request: `figures` and the pseudonyms of what it was about, where a key is configured."""
        uids = scope.get("state", {}).get(_STATE, ())
        sent = [self._pseudonyms.key("series", uid) for uid in uids] if self._pseudonyms else []
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **figures, "sent": sent}
        self._logger.info("%s", json.dumps(line))
