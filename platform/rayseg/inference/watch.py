"""What a series' time goes into."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

# Waiting for bytes, decoding, waiting for its slices in the network (with their scaling, and behind those of the
# actor's other series), making files, writing them.
STEPS = ("read", "decode", "forward", "encode", "write")

T = TypeVar("T")


class Watch:
    """How long each of `STEPS` takes, in seconds of the clock; steps within others count for themselves."""

    def __init__(self) -> None:
        self.began = self._since = time.monotonic()
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self._step: str | None = None

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Counts the block's time, but for the steps within it, to the step `name`."""
        outer = self._turn(name)
        try:
            yield
        finally:
            self._turn(outer)

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time to get each counts to the step `name`."""
        iterator = iter(items)
        while True:
            with self.step(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _turn(self, name: str | None) -> str | None:
        now = time.monotonic()
        if self._step is not None:
            self.seconds[self._step] += now - self._since
        outer, self._step, self._since = self._step, name, now
        return outer
