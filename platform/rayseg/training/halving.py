"""Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) whose verdicts do not depend on who comes first.

At certain epochs, the rungs, a trial is compared with those that were there before it, and goes on only where it is
among the best 1/factor. Ray's AsyncHyperBandScheduler takes "before" by the clock. Here it is by number: trial 5 is
compared with trials 0 to 4, as if they had run one after the other. A verdict waits for those, the trial does not: it
trains on, and what it did after the epoch that it is stopped at does not count. So the verdicts are a function of the
scores, whatever runs at once, is killed or is started again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Progress:
    """A trial so far: its score after each epoch from the first one on, and whether it has ended for good."""

    scores: tuple[float, ...] = ()
    ended: bool = False


@dataclass(frozen=True)
class Verdict:
    """`stopped_after` so many epochs, or None. Where it is not `final` it waits for a trial of a lower number."""

    stopped_after: int | None
    final: bool


def rungs(grace_epochs: int, factor: int, epochs: int) -> list[int]:
    """Epochs after which trials are compared: `grace_epochs` and that times each power of `factor`, below `epochs`."""
    found = []
    rung = grace_epochs
    while rung < epochs:
        found.append(rung)
        rung *= factor
    return found


def verdicts(trials: Sequence[Progress], rungs_: Sequence[int], factor: int) -> list[Verdict]:
    """A verdict a trial, in order of number.

    A trial whose score at a rung is below the (1 - 1/factor) percentile of those of lower numbers, interpolated
    linearly, is stopped there; those that failed or ended before the rung do not count.

    Args:
        trials: in order of number, those that have not begun too.
        rungs_: see `rungs`.
        factor: of the rungs.
    """
    seen: dict[int, list[float]] = {rung: [] for rung in rungs_}
    waiting = float("inf")  # from this rung on a trial of a lower number may still come
    found = []
    for trial in trials:
        stopped_after, final = None, True
        for rung in rungs_:
            short = len(trial.scores) < rung
            if short and trial.ended:
                break
            if short or rung >= waiting:
                final, waiting = False, min(waiting, rung)
                break
            score = trial.scores[rung - 1]
            if seen[rung] and score < np.percentile(seen[rung], 100 * (1 - 1 / factor)):
                stopped_after = rung
            seen[rung].append(score)
            if stopped_after is not None:
                break
        found.append(Verdict(stopped_after, final))
    return found
