"""A watchdog: ends a worker that no longer makes progress, so that Ray Train replaces it.

Ray Train itself sees workers that have died. One that hangs, or waits for another one that hangs, looks alive.
"""

import faulthandler
import logging
import os
import signal
import threading
import time
from types import TracebackType

logger = logging.getLogger(__name__)

_LOOKS = 20  # within the limit


class Watchdog:
    """Kills this process when `beat` has not been called for `limit_s` seconds; watches within a `with` block."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rayseg-watchdog")

    def beat(self) -> None:
        """There is progress."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._limit_s / _LOOKS):
            if time.monotonic() - self._last > self._limit_s:
                logger.error("no step for %.0f s (train.hang_timeout_s): this worker ends itself", self._limit_s)
                faulthandler.dump_traceback(all_threads=True)
                # Not an exception: the thread that hangs may wait in TensorFlow and never see it.
                os.kill(os.getpid(), signal.SIGKILL)
