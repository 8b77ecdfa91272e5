"""What goes on beside a measurement: a value that is looked at again and again."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_POLL_S = 0.1


@contextmanager
def greatest(look: Callable[[], float]) -> Iterator[list[float]]:
    """The greatest value, in a list of one, that `look` gives while the block runs; minus infinity before any."""
    seen, over = [-math.inf], threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            seen[0] = max(seen[0], look())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
