"""Where an alias has been: each move is a tag of the registered model, so the UI shows them too, and none overwrites
another.

MLflow sets an alias whatever it was before. But of several who create a registered model of one name it lets one do so:
a model without versions is there while an alias is `moving`, and keeps others of this code off. Who sets aliases by
MLflow's UI or client does not ask it.
"""

import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from mlflow import MlflowClient, MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from rayseg.tracking import limits, registry, runs

logger = logging.getLogger(__name__)

STALE_S = 60.0  # to move an alias takes seconds: who takes longer has died
_LOOK_S = 0.2

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


@contextmanager
def moving(tracking_uri: str, name: str, alias: str) -> Iterator[Callable[[], None]]:
    """Within it no other process is; waits for that. Look where the alias is, decide, and `move` it here.

    Yields what raises RuntimeError when this process was paused for so long that another one went on: call it before.
    Where MLflow does not let this user create a registered model it says so, and keeps nobody off.
    """
    client, token = runs.client(tracking_uri), secrets.token_hex(8)
    lock = f"rayseg-moving-{hashlib.sha256(f'{name}@{alias}'.encode()).hexdigest()[:16]}"
    about = f"{alias} of {name} is being moved; this has no versions and is removed at once"
    seen, since = None, time.monotonic()
    while True:
        try:
            client.create_registered_model(lock, tags={"token": token}, description=about)
            break
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(PERMISSION_DENIED):
                logger.warning("MLflow lets this user create no registered model: two promotions are not kept apart")
                yield lambda: None
                return
            # MLflow looks the other one up to say that it is there, and says so where it was removed meanwhile.
            if error.error_code not in map(ErrorCode.Name, (RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST)):
                raise
        other = _token(client, lock)
        if other == token:  # the answer was lost, not the model
            break
        if other != seen:
            seen, since = other, time.monotonic()
        elif other is not None and time.monotonic() - since > STALE_S:
            _remove(client, lock)
        time.sleep(_LOOK_S)

    def check() -> None:
        if _token(client, lock) != token:
            raise RuntimeError(f"alias {alias}: another process went on while this one was paused; start it again")

    try:
        yield check
    finally:
        if _token(client, lock) == token:
            _remove(client, lock)


def _token(client: MlflowClient, lock: str) -> str | None:
    """Whose it is; None where it is not there."""
    try:
        token: str | None = client.get_registered_model(lock).tags.get("token")
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None
    return token


def _remove(client: MlflowClient, lock: str) -> None:
    with suppress(MlflowException):  # another one was faster, or it will be removed as stale
        client.delete_registered_model(lock)


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
