"""Threads that do work by priority, with a limit to what waits."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from serving.messages import PRIORITIES, Priority

T = TypeVar("T")

# Of the places to wait: what is not urgent never takes the last ones.
_SHARE: dict[Priority, float] = {"urgent": 1.0, "normal": 0.75, "bulk": 0.5}


# Every so manieth turn is of what has waited longest.
_OLDEST_EVERY = 4


class BusyError(Exception):
    """There is no place to wait."""


@dataclass(eq=False)
class _Item:
    rank: int
    number: int
    until: float  # of the monotonic clock
    work: Callable[[], Any]
    future: Future[Any]


class Workers:
    """`threads` threads; of what waits, the more urgent goes first, then what came first.

    Now and then what has waited longest is next, however little urgent it is: a long series is served beside single
    slices that never end. Work whose future is cancelled leaves its place at once; work whose time is over is dropped
    when its turn comes.
    """

    def __init__(self, threads: int, most_waiting: int) -> None:
        self.done = 0
        self.dropped = 0
        self.running = 0
        self._most_waiting = most_waiting
        self._waiting: list[_Item] = []  # in the order of arrival, and short
        self._numbers = itertools.count()
        self._turns = itertools.count(1)
        self._changed = threading.Condition()
        for number in range(threads):
            threading.Thread(target=self._run, name=f"rayseg-worker-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How much work waits."""
        return len(self._waiting)

    def submit(self, work: Callable[[], T], priority: Priority, seconds: float) -> Future[T]:
        """What `work` gives or raises; TimeoutError where it has not begun after `seconds`. Raises BusyError."""
        future: Future[T] = Future()
        with self._changed:  # or two threads would take the last place
            if len(self._waiting) >= self._most_waiting * _SHARE[priority]:
                raise BusyError
            item = _Item(PRIORITIES.index(priority), next(self._numbers), time.monotonic() + seconds, work, future)
            self._waiting.append(item)
            self._changed.notify()
        # By its number: a future that held its work would keep a body in memory until a collection of garbage.
        number = item.number
        future.add_done_callback(lambda _: self._leave(number))
        return future

    def _leave(self, number: int) -> None:
        """A future has its outcome: if it was cancelled, its work still waits."""
        with self._changed:
            for item in self._waiting:
                if item.number == number:
                    self._waiting.remove(item)
                    self.dropped += 1
                    return

    def _next(self) -> _Item:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            if next(self._turns) % _OLDEST_EVERY == 0:
                return self._waiting.pop(0)
            item = min(self._waiting, key=lambda item: (item.rank, item.number))
            self._waiting.remove(item)
            return item

    def _run(self) -> None:
        while True:
            self._do(self._next())

    def _do(self, item: _Item) -> None:
        late = time.monotonic() > item.until
        if not item.future.set_running_or_notify_cancel() or late:
            with self._changed:
                self.dropped += 1
            if late and not item.future.cancelled():
                item.future.set_exception(TimeoutError())
            return
        with self._changed:
            self.running += 1
        result, problem = None, None
        try:
            result = item.work()
        except Exception as error:  # theirs to handle, who asked
            problem = error
        with self._changed:
            self.running -= 1
            self.done += 1
        if problem is None:
            item.future.set_result(result)
        else:
            item.future.set_exception(problem)
