"""Successive halving against Ray's own scheduler, and whatever order trials come in."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from rayseg.training.halving import Progress, rungs, verdicts


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[list[list[float]], int, int, int]:
    """Scores of trials, of which some end early; grace epochs, factor, epochs."""
    grace, factor, epochs = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(3, 10))
    score = st.integers(0, 20).map(lambda value: value / 20)  # so that some are equal
    scores = draw(st.lists(st.lists(score, min_size=epochs, max_size=epochs), min_size=1, max_size=9))
    return [one[: draw(st.sampled_from([epochs, epochs, 2]))] for one in scores], grace, factor, epochs


@settings(deadline=None)
@given(sweeps())
def test_verdicts_are_those_of_rays_scheduler_with_one_trial_after_the_other(case) -> None:
    scores, grace, factor, epochs = case
    ray = AsyncHyperBandScheduler(
        time_attr="epoch", metric="dice", mode="max", max_t=epochs, grace_period=grace, reduction_factor=factor
    )
    expected = []
    for number, dice in enumerate(scores):
        trial = SimpleNamespace(trial_id=str(number))
        ray.on_trial_add(None, trial)
        results = ({"epoch": epoch, "dice": value} for epoch, value in enumerate(dice, 1) if epoch < epochs)
        stops = (r["epoch"] for r in results if ray.on_trial_result(None, trial, r) == TrialScheduler.STOP)
        expected.append(next(stops, None))
    found = verdicts([Progress(tuple(dice), ended=True) for dice in scores], rungs(grace, factor, epochs), factor)
    assert [verdict.stopped_after for verdict in found] == expected
    assert all(verdict.final for verdict in found)


@settings(deadline=None)
@given(sweeps(), st.integers(0, 2**32), st.integers(1, 4))
def test_in_whatever_order_trials_come_the_survivors_are_the_same(case, seed: int, abreast: int) -> None:
    scores, grace, factor, epochs = case
    places = rungs(grace, factor, epochs)
    expected = verdicts([Progress(tuple(dice), ended=True) for dice in scores], places, factor)
    order, known, ended = random.Random(seed), [0] * len(scores), [False] * len(scores)
    running, waiting = [], list(range(len(scores)))
    while running or waiting:
        while waiting and len(running) < abreast:
            running.append(waiting.pop(0))
        number = order.choice(running)
        known[number] += 1
        so_far = [Progress(tuple(d[:k]), e) for d, k, e in zip(scores, known, ended, strict=True)]
        for found, end in zip(verdicts(so_far, places, factor), expected, strict=True):
            assert not found.final or found.stopped_after is None or found == end, "a verdict does not change"
        stopped = verdicts(so_far, places, factor)[number].stopped_after is not None
        if stopped or known[number] == len(scores[number]):
            running.remove(number)
            ended[number] = True
    so_far = [Progress(tuple(d[:k]), e) for d, k, e in zip(scores, known, ended, strict=True)]
    assert verdicts(so_far, places, factor) == expected


def test_a_verdict_waits_for_trials_of_lower_numbers() -> None:
    later = Progress((0.1, 0.2), ended=True)
    [_, waits] = verdicts([Progress((), ended=False), later], [1], 3)
    assert (waits.stopped_after, waits.final) == (None, False)
    [_, stopped] = verdicts([Progress((0.3,), ended=False), later], [1], 3)
    assert (stopped.stopped_after, stopped.final) == (1, True)
    [_, alone] = verdicts([Progress((), ended=True), later], [1], 3)  # the lower one failed
    assert (alone.stopped_after, alone.final) == (None, True)


@pytest.mark.parametrize(
    ("grace", "factor", "epochs", "expected"),
    [(1, 3, 9, [1, 3]), (3, 3, 10, [3, 9]), (6, 3, 6, []), (2, 2, 9, [2, 4, 8])],
)
def test_rungs(grace: int, factor: int, epochs: int, expected: list[int]) -> None:
    assert rungs(grace, factor, epochs) == expected
