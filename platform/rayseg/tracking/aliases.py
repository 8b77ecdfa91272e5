"""Where an alias has been: each move is a tag of the registered model, so the UI shows them too, and none overwrites
another."""

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from rayseg.tracking import limits, registry, runs

_TAG = "rayseg.alias.{alias}.{at}"
_SERVED = "rayseg.served.{alias}"
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True)
class Move:
    """`alias` went from version `previous` (None: from nowhere) to `version` at the time `at` (UTC, ISO 8601)."""

    at: str
    action: Literal["promoted", "rolled back"]
    version: str
    previous: str | None


def move(
    tracking_uri: str, name: str, alias: str, version: str, action: Literal["promoted", "rolled back"]
) -> list[Move]:
    """Gives `alias` to a version and returns the alias' history, this move the last.

    A process that dies in between leaves the alias moved and this not told; see `earlier`.

    Raises:
        ValueError: the alias is too long.
    """
    limits.require("alias", alias, limits.ALIAS)
    before = registry.champion(tracking_uri, name, alias)
    registry.set_alias(tracking_uri, name, alias, version)
    made = Move(datetime.now(UTC).strftime(_TIME), action, version, None if before is None else before.version)
    tag = _TAG.format(alias=alias, at=made.at)
    runs.client(tracking_uri).set_registered_model_tag(name, tag, json.dumps(asdict(made)))
    return history(tracking_uri, name, alias)


def history(tracking_uri: str, name: str, alias: str) -> list[Move]:
    """The moves of `alias`, the oldest first."""
    tags = runs.client(tracking_uri).get_registered_model(name).tags
    pattern = re.compile(re.escape(_TAG.format(alias=alias, at="")) + r"\d{4}-\S+Z")
    return [Move(**json.loads(value)) for key, value in sorted(tags.items()) if pattern.fullmatch(key)]


def first(moves: list[Move]) -> str | None:
    """The version that bore the alias first, as far as is told; None where it was never moved."""
    return (moves[0].previous or moves[0].version) if moves else None


def earlier(moves: list[Move], now: str | None) -> str | None:
    """The version to roll back to: the one before `now`, which bears the alias; None where there was none.

    What was rolled back from does not count, so a second rollback goes one further. An alias that was moved by other
    means goes back to where it was last told to be.
    """
    stack: list[str] = []
    for one in moves:
        if one.action == "rolled back":
            while stack and stack[-1] != one.version:
                stack.pop()
            stack = stack or [one.version]
            continue
        if one.previous is not None and stack[-1:] != [one.previous]:
            stack.append(one.previous)
        stack.append(one.version)
    while stack and stack[-1] == now:
        stack.pop()
    return stack[-1] if stack else None


def note_served(tracking_uri: str, name: str, alias: str, version: str) -> None:
    """Says which version the service uses for `alias`: the last one that passed its checks, as a tag of the model."""
    runs.client(tracking_uri).set_registered_model_tag(name, _SERVED.format(alias=alias), version)


def served(tracking_uri: str, name: str, alias: str) -> str | None:
    """What was noted last; None where nothing was."""
    return runs.client(tracking_uri).get_registered_model(name).tags.get(_SERVED.format(alias=alias))
