"""A courier: brings to MLflow what a run hands over, so that the run itself never waits for MLflow.

A server that accepts connections and never answers holds whoever calls it for as long as the client's limits let it:
some 20 minutes a call by MLflow's defaults (120 s, eight times).
"""

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

AGAIN_S = 60.0  # then what MLflow did not take is brought once more, if nothing new comes before
LEAVE_S = 30.0  # at the end so long is waited for what is on its way

NewsT = TypeVar("NewsT")


class Courier(Generic[NewsT]):
    """Calls `tell` with the newest of what is handed over, on a thread of its own, within a `with` block.

    News replace those before that are not on their way yet, so they say all that those said. `tell` returns whether
    MLflow has taken them; what it has not comes again with the next news, or after AGAIN_S seconds. At the end of the
    block there is one more try, and what MLflow has not taken LEAVE_S seconds later is left to others.
    """

    def __init__(self, tell: Callable[[NewsT], bool]) -> None:
        self._tell = tell
        self._changed = threading.Condition()
        self._news: list[NewsT] = []  # one, until MLflow has it, or none
        self._is_new = self._over = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._bring, daemon=True, name="rayseg-courier")

    def hand_over(self, news: NewsT) -> None:
        """Takes the news and returns at once; raises what `tell` has raised, which then is called no more."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._news, self._is_new = [news], True
            self._changed.notify()

    def __enter__(self) -> "Courier[NewsT]":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():
            logger.warning("MLflow does not answer: it lacks the last values of this process")
        if self._error is not None and error is None:
            raise self._error

    def _bring(self) -> None:
        over = False
        while not over:
            with self._changed:
                self._changed.wait_for(lambda: self._is_new or self._over, AGAIN_S if self._news else None)
                news, over, self._is_new = self._news, self._over, False
            try:
                taken = all(self._tell(one) for one in news)
            except Exception as error:  # it is the caller's, who is told when it comes again
                with self._changed:
                    self._error = error
                return
            with self._changed:
                if taken and self._news is news:
                    self._news = []
