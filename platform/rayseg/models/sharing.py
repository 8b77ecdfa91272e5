"""Sharing: images of several threads run through a network in one batch."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np


class Shared:
    """A function of batches of exactly `batch` images, as a function of any number of them, for many threads.

    What threads ask for at the same time shares batches; nothing waits for more to come. A batch that is not full is
    filled up with zeros. The function runs in one thread, which ends when nobody has this object any more: what it
    holds, a network on a GPU, is free then.
    """

    def __init__(self, forward: Callable[[np.ndarray], np.ndarray], batch: int) -> None:
        self._waiting: _Queue = queue.SimpleQueue()
        # The thread has no reference to this object, or it would live for ever.
        arguments = self._waiting, forward, batch
        threading.Thread(target=_run, args=arguments, name="rayseg-forward", daemon=True).start()
        weakref.finalize(self, self._waiting.put, None)

    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        """What the function makes of each image, float32 (N, ...); raises what it raises."""
        futures: list[Future[np.ndarray]] = [Future() for _ in images_NHWC]
        for image_HWC, future in zip(images_NHWC, futures, strict=True):
            self._waiting.put((image_HWC, future))
        return np.stack([future.result() for future in futures])


_Queue = queue.SimpleQueue[tuple[np.ndarray, Future[np.ndarray]] | None]


def _run(waiting: _Queue, forward: Callable[[np.ndarray], np.ndarray], batch: int) -> None:
    while True:
        taken = _taken(waiting, batch)
        if not taken:
            return
        first, _ = taken[0]
        images_NHWC = np.zeros((batch, *first.shape), first.dtype)
        for place, (image_HWC, _) in enumerate(taken):
            images_NHWC[place] = image_HWC
        try:
            made = forward(images_NHWC)
        except Exception as error:  # theirs to handle, who asked
            for _, future in taken:
                future.set_exception(error)
            continue
        for (_, future), one in zip(taken, made, strict=False):
            future.set_result(one)


def _taken(waiting: _Queue, batch: int) -> list[tuple[np.ndarray, Future[np.ndarray]]]:
    """What waits, up to a batch, one at least; nothing at the end."""
    item = waiting.get()
    taken = []
    while item is not None:
        taken.append(item)
        if len(taken) == batch:
            break
        try:
            item = waiting.get_nowait()
        except queue.Empty:
            break
    return taken
