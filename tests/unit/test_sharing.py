"""Batches that threads share."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rayseg.models.sharing import Shared


def test_each_thread_gets_its_own_from_full_batches() -> None:
    sizes = []

    def double(images_NHWC: np.ndarray) -> np.ndarray:
        sizes.append(len(images_NHWC))
        return images_NHWC * 2.0

    shared = Shared(double, 4)
    images = [np.full((3, 2, 2, 1), number, np.uint8) for number in range(20)]
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(shared, images))
    assert [one.tolist() for one in made] == [(image * 2.0).tolist() for image in images]
    assert set(sizes) == {4}
    assert 15 <= len(sizes) <= 60


def test_a_failure_is_everybodys_who_asked() -> None:
    shared = Shared(lambda _: 1 / 0, 2)
    with pytest.raises(ZeroDivisionError):
        shared(np.zeros((1, 1, 1, 1), np.uint8))
    with pytest.raises(ZeroDivisionError):
        shared(np.zeros((1, 1, 1, 1), np.uint8))


def test_what_the_function_holds_is_freed_with_the_last_user() -> None:
    """A service that goes from model to model would fill a GPU otherwise."""
    before = set(threading.enumerate())
    shared = Shared(lambda images_NHWC: images_NHWC, 2)
    shared(np.zeros((3, 1, 1, 1), np.uint8))
    (thread,) = set(threading.enumerate()) - before
    del shared
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
