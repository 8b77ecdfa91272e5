"""The queue in front of the model: order, limits, what is dropped."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from serving.workers import BusyError, Workers


@pytest.fixture
def held() -> Iterator[tuple[Callable[[int], Workers], threading.Event]]:
    """Makes workers of one thread, which is at work until the event."""
    go = threading.Event()

    def make(most_waiting: int) -> Workers:
        workers, begun = Workers(1, most_waiting), threading.Event()
        workers.submit(lambda: (begun.set(), go.wait(60)), "urgent", 60)
        assert begun.wait(60)
        return workers

    yield make, go
    go.set()


def test_the_urgent_go_first_and_equals_in_the_order_of_arrival(held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.workers._OLDEST_EVERY", 1000)
    make, go = held
    workers, order = make(99), []
    wanted = [("bulk", 1), ("normal", 2), ("urgent", 3), ("bulk", 4), ("urgent", 5), ("normal", 6)]
    futures = [workers.submit(lambda number=number: order.append(number), priority, 60) for priority, number in wanted]
    assert workers.waiting == 6
    go.set()
    for future in futures:
        future.result(60)
    assert order == [3, 5, 2, 6, 1, 4]
    assert (workers.waiting, workers.done, workers.dropped) == (0, 7, 0)


def test_places_to_wait_end_and_the_last_ones_are_for_the_urgent(held) -> None:
    make, _ = held
    workers, taken = make(8), []
    for priority, places in (("bulk", 4), ("normal", 6), ("urgent", 8)):
        while True:
            try:
                taken.append(workers.submit(lambda: None, priority, 60))
            except BusyError:
                break
        assert len(taken) == places


def test_what_nobody_waits_for_is_not_done(held) -> None:
    make, go = held
    workers, done = make(9), []
    late = workers.submit(lambda: done.append("late"), "normal", 0.0)
    gone = workers.submit(lambda: done.append("gone"), "normal", 60)
    awaited = workers.submit(lambda: done.append("awaited"), "normal", 60)
    assert gone.cancel()
    go.set()
    awaited.result(60)
    with pytest.raises(TimeoutError):
        late.result(60)
    assert done == ["awaited"]
    assert workers.dropped == 2


def test_a_failure_is_the_askers_and_the_thread_goes_on() -> None:
    workers = Workers(1, 9)
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 // 0, "urgent", 60).result(60)
    assert workers.submit(lambda: 7, "bulk", 60).result(60) == 7


def test_what_is_cancelled_leaves_its_place_at_once(held) -> None:
    make, _ = held
    workers = make(4)
    taken = [workers.submit(lambda: None, "urgent", 60) for _ in range(4)]
    with pytest.raises(BusyError):
        workers.submit(lambda: None, "urgent", 60)
    for future in taken[1:3]:
        assert future.cancel()
    assert (workers.waiting, workers.dropped) == (2, 2)
    for _ in range(2):
        workers.submit(lambda: None, "urgent", 60)
    with pytest.raises(BusyError):
        workers.submit(lambda: None, "urgent", 60)


def test_what_was_cancelled_is_not_held_in_memory(held) -> None:
    make, _ = held
    workers = make(4)

    class Body:
        def __call__(self) -> None: ...

    body = Body()
    kept = weakref.ref(body)
    gc.disable()
    try:
        future = workers.submit(body, "urgent", 60)
        del body
        assert future.cancel()
        assert kept() is None
    finally:
        gc.enable()


def test_a_long_series_is_served_beside_single_slices_that_never_end(held) -> None:
    """Three clients ask for the next slice as soon as they have the one before; a series has all its slices waiting."""
    make, go = held
    workers, order, ended = make(99), [], threading.Event()

    def single() -> None:
        order.append("single")
        if not ended.is_set():
            workers.submit(single, "urgent", 60)

    for _ in range(3):
        workers.submit(single, "urgent", 60)
    series = [workers.submit(lambda: order.append("series"), "normal", 60) for _ in range(20)]
    go.set()
    for future in series:
        future.result(60)
    ended.set()
    workers.submit(lambda: None, "bulk", 60).result(60)
    until_last = order[: len(order) - order[::-1].index("series")]
    singles = until_last.count("single")
    assert 2 * 20 <= singles <= 4 * 20, "single slices have most of the turns, and the series its share"
