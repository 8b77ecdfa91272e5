"""Batches of an epoch, made ahead by threads: what training iterates over, of slices and of volumes alike."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np

_PREFETCH = 4  # batches that are made ahead, beside those that threads are at


class Batch(NamedTuple):
    """A rank's part of a global batch."""

    image: np.ndarray  # uint8 (N, H, W, C), or of volumes float16 (N, D, H, W, C)
    mask: np.ndarray  # uint8 (N, H, W), or of volumes (N, D, H, W)
    # float32 (N,): 1, or 0 for padding, which only the last batch of an epoch has, and ranks with a smaller share
    weight: np.ndarray


class Batches(Iterator[Batch]):
    """The batches of an epoch, made ahead by threads, each by one of them.

    waited_s: seconds that the consumer has waited for batches so far.
    """

    def __init__(self, begin: Callable[[ThreadPoolExecutor], Iterator[Future[Batch]]], threads: int) -> None:
        """`begin` gives the batches in order; each is given to the threads when it is asked for."""
        self.waited_s = 0.0
        # OpenCV's own threads would take the training's cores for pictures too small for them.
        self._pool = ThreadPoolExecutor(threads, "rayseg-feed", initializer=cv2.setNumThreads, initargs=(1,))
        self._begun = begin(self._pool)
        self._ahead: deque[Future[Batch]] = deque()
        self._most = _PREFETCH + threads
        self._top_up()

    def __next__(self) -> Batch:
        if not self._ahead:
            self.close()
            raise StopIteration
        began = time.perf_counter()
        try:
            batch = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self.waited_s += time.perf_counter() - began
        self._top_up()
        return batch

    def close(self) -> None:
        """Ends the threads; for who does not want the rest of the epoch."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)

    def _top_up(self) -> None:
        while len(self._ahead) < self._most and (batch := next(self._begun, None)) is not None:
            self._ahead.append(batch)
