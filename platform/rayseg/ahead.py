"""Calls in threads, a few ahead of who takes their results."""

import contextvars
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def mapped(
    pool: ThreadPoolExecutor, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], ahead: int
) -> Iterator[ResultT]:
    """Like `map`, in order, with at most `ahead` calls ahead of what has been taken; raises what a call raised."""
    running: deque[Future[ResultT]] = deque()
    for item in items:
        # With what log lines of this thread are about.
        running.append(pool.submit(contextvars.copy_context().run, function, item))
        if len(running) >= ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
