"""Whether a replica gives the right masks: when its example is run, and what that says. Requests never run it."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from rayseg.records import Reason, Reject
from serving.messages import Health, ModelInfo
from serving.workers import BusyError, Workers

IDLE_S = 10.0  # between two runs of the example where no slice passes
BUSY_S = 60.0  # where slices pass: a wrong mask is no exception
EXAMPLE_S = 20.0  # for the example's turn, and its run


class Example(Protocol):
    """What is checked: see `swap.Loaded`."""

    @property
    def info(self) -> ModelInfo:
        """Of the version."""

    @property
    def example_sha256(self) -> str:
        """Of the mask that is expected."""

    def example(self) -> str:
        """Of the mask that is made now."""


class Checks:
    """The last check of the version in use; the next one is made where there is a reason for it.

    A slice that the model fails at (`Reason.INTERNAL`) is such a reason, if none passes beside it. What then decides is
    the example, which no client chose: slices that a client made to fail do not cost the replica its life.
    """

    def __init__(self, current: Callable[[], Example], workers: Workers) -> None:
        """Makes the first check, in this thread; raises what the example raises."""
        self._current, self._workers = current, workers
        self._passed = self._failed = 0  # slices since the last look
        self._done = 0  # of all work, and when that was seen to grow
        self._checked = self._grew = time.monotonic()
        example, started = current(), time.perf_counter()
        self.last = self._judge(example, example.example() == example.example_sha256, started)

    def count(self, answer: Any) -> None:
        """An answer of the model to one slice."""
        if not isinstance(answer, Reject):
            self._passed += 1
        elif answer.reason == Reason.INTERNAL:
            self._failed += 1

    async def look(self) -> Health:
        """The last check, after one that is due.

        Raises:
            TimeoutError: the example's turn did not come, and nothing else ended for as long: the threads hang.
            Exception: what the example raises.
        """
        passed, failed = self._passed, self._failed
        self._passed = self._failed = 0
        self._progress()
        wait_s = BUSY_S if passed else 0.0 if failed else IDLE_S
        if time.monotonic() - self._checked >= wait_s:
            await self._check()
        return self.last

    async def _check(self) -> None:
        example, started = self._current(), time.perf_counter()
        try:
            future = self._workers.submit(example.example, "urgent", EXAMPLE_S)
            digest = await asyncio.wait_for(asyncio.wrap_future(future), EXAMPLE_S)
        except (BusyError, TimeoutError):
            self._progress()
            if time.monotonic() - self._grew >= EXAMPLE_S:
                raise TimeoutError("the bundle's example is not run, and no slice ends") from None
            return  # too much to do is no illness
        except Exception:
            self.last = self._judge(example, False, started)
            raise
        self.last = self._judge(example, digest == example.example_sha256, started)

    def _progress(self) -> None:
        done = self._workers.done
        if done != self._done or not self._workers.running:
            self._done, self._grew = done, time.monotonic()

    def _judge(self, example: Example, matches: bool, started: float) -> Health:
        self._checked = time.monotonic()
        return Health(example.info, matches, time.perf_counter() - started, time.time())
