"""Log lines: which run, stage and series they are of, as JSON where that is asked for, and without what may identify.

Ray's own variable says how: with RAY_LOGGING_CONFIG_ENCODING=JSON in the environment of a job Ray makes each line of
its driver and of its workers a JSON object, with the ids of job, task, actor, worker and node; what this module knows
is in it under `rayseg`: {"run": ..., "stage": ..., "series": pseudonym}. Without it lines are for people.
"""

import contextlib
import functools
import json
import logging
import os
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

ENCODING = "RAY_LOGGING_CONFIG_ENCODING"
_OURS = ("rayseg.", "serving.", "jobs.", "__main__")

_process: dict[str, str] = {}  # of all threads
_within: ContextVar[Mapping[str, str]] = ContextVar("rayseg_logs", default={})  # noqa: B039 (nobody changes it)


def begin(stage: str) -> None:
    """A driver begins: its lines, and those of the workers that `adopt` what it tells, have a run of their own."""
    _process.update(run=secrets.token_hex(4), stage=stage)


def told() -> dict[str, str]:
    """What the lines of this process have: a driver hands it to its workers."""
    return dict(_process)


def adopt(driver: Mapping[str, str]) -> None:
    """The lines of this process, a worker, have what those of its driver have."""
    _process.update(driver)


def carried(task: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
    """The task for a worker, whose lines then have what those of this process have."""
    driver = told()

    @functools.wraps(task)
    def call(*arguments: ParamsT.args, **named: ParamsT.kwargs) -> ResultT:
        adopt(driver)
        return task(*arguments, **named)

    return call


@contextlib.contextmanager
def about(**of: str) -> Iterator[None]:
    """The lines within are also of this: a `series`, by its pseudonym."""
    token = _within.set({**_within.get(), **of})
    try:
        yield
    finally:
        _within.reset(token)


def set_up() -> None:
    """The lines of a driver, on standard error."""
    for library in ("httpx", "botocore", "alembic"):  # a line a request, a credential, a change of a database
        logging.getLogger(library).setLevel(logging.WARNING)
    if os.environ.get(ENCODING) != "JSON":
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
        return
    # From when a job connects Ray's own handler of the root logger writes these lines. Another one there would write
    # each twice, so ours is what Python falls back on where there is none.
    logging.getLogger().setLevel(logging.INFO)
    fallback = logging.StreamHandler()
    fallback.setFormatter(_Json())
    logging.lastResort = fallback


def without_texts(error: BaseException) -> str:
    """The traceback of an error with the texts of our own errors alone: others' may quote a file, or its name.

    An error of a task, which Ray gives as text within text, is shortened in the same way.
    """
    kept = []
    for line in "".join(traceback.format_exception(error)).splitlines():
        frame = re.match(r'\s+(File ".*|\^+|~+)$', line) or line.startswith(("Traceback ", "During ", "The above "))
        if frame:
            kept.append(line)
        elif named := re.match(r"\s*(?:ray::\S+|[\w.]*(?:Error|Exception|Exit|Interrupt)\b(?:\([\w.]+\))?)", line):
            kept.append(named[0])
    if _is_ours(error):
        kept[-1] = f"{type(error).__name__}: {error}"
    return "\n".join(kept)


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    named = getattr(error, "filename", None) is not None  # as the text of the system's own errors
    return not named and trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_OURS)


class _Json(logging.Formatter):
    """The keys are those of Ray's lines."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
            "filename": record.filename,
            "lineno": record.lineno,
            "process": record.process,
        }
        if record.exc_info:
            line["exc_text"] = self.formatException(record.exc_info)
        return json.dumps(line | ({"rayseg": record.rayseg} if hasattr(record, "rayseg") else {}))


_make_record = logging.getLogRecordFactory()


def _record(*arguments: Any, **named: Any) -> logging.LogRecord:
    record = _make_record(*arguments, **named)
    if of := _process | dict(_within.get()):
        # One name: `extra` of a library may have any other, and then logging raises.
        record.rayseg = of
    return record


logging.setLogRecordFactory(_record)
