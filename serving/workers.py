"""Threads that do work by priority, with a limit to what waits."""

import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from serving.messages import PRIORITIES, Priority

T = TypeVar("T")

# Of the places to wait: what is not urgent never takes the last ones.
_SHARE: dict[Priority, float] = {"urgent": 1.0, "normal": 0.75, "bulk": 0.5}


class BusyError(Exception):
    """There is no place to wait."""


@dataclass(order=True)
class _Item:
    rank: int
    number: int
    until: float = field(compare=False)  # of the monotonic clock
    work: Callable[[], Any] = field(compare=False)
    future: Future[Any] = field(compare=False)


class Workers:
    """`threads` threads; of what waits, the more urgent goes first, then what came first.

    Work whose future was cancelled, or whose time is over, is dropped when its turn comes.
    """

    def __init__(self, threads: int, most_waiting: int) -> None:
        self.done = 0
        self.dropped = 0
        self.running = 0
        self._most_waiting = most_waiting
        self._waiting: queue.PriorityQueue[_Item] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        for number in range(threads):
            threading.Thread(target=self._run, name=f"rayseg-worker-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How much work waits, what will be dropped included."""
        return self._waiting.qsize()

    def submit(self, work: Callable[[], T], priority: Priority, seconds: float) -> Future[T]:
        """What `work` gives or raises; TimeoutError where it has not begun after `seconds`. Raises BusyError."""
        future: Future[T] = Future()
        with self._lock:  # or two threads would take the last place
            if self._waiting.qsize() >= self._most_waiting * _SHARE[priority]:
                raise BusyError
            item = _Item(PRIORITIES.index(priority), next(self._numbers), time.monotonic() + seconds, work, future)
            self._waiting.put(item)
        return future

    def _run(self) -> None:
        while True:
            self._do(self._waiting.get())

    def _do(self, item: _Item) -> None:
        late = time.monotonic() > item.until
        if not item.future.set_running_or_notify_cancel() or late:
            with self._lock:
                self.dropped += 1
            if late and not item.future.cancelled():
                item.future.set_exception(TimeoutError())
            return
        with self._lock:
            self.running += 1
        result, problem = None, None
        try:
            result = item.work()
        except Exception as error:  # theirs to handle, who asked
            problem = error
        with self._lock:
            self.running -= 1
            self.done += 1
        if problem is None:
            item.future.set_result(result)
        else:
            item.future.set_exception(problem)
