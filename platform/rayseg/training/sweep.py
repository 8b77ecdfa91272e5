"""The state of a sweep: what each trial draws, what it has scored, and what became of it.

A trial that has ended leaves a small file in the sweep's folder and is never run again. All else follows: draws are a
function of the seed and, with Optuna, of the outcomes of trials of lower numbers; verdicts are one of the scores; a
trial that was running goes on from its own checkpoint. So a sweep that was killed and started again has the same trials
and the same survivors as one that was not, and with random draws so has one with more or fewer trials at once. With
Optuna a trial draws knowing the outcomes of all but the `abreast - 1` trials before it, and waits for those; `abreast`
is therefore kept from a sweep's first start. What fails for lack of memory or of a machine is a function of nothing.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rayseg import meters, storage
from rayseg.training.halving import Progress, Verdict, verdicts
from rayseg.training.space import Space

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """What is kept of a trial that has ended: `dice` of validation after each epoch, `seconds` of its last go."""

    number: int
    values: dict[str, Any]
    dice: list[float]
    failure: str | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: epochs after the one that it was stopped at do not count.

    status: `completed` all epochs (or ended by its own early stopping), `stopped` by the halving, or `failed`.
    """

    number: int
    values: dict[str, Any]
    status: Literal["completed", "stopped", "failed"]
    epochs: int
    val_dice: float | None  # of the best epoch, None of a failed trial
    best_epoch: int | None
    reason: str | None
    seconds: float


class Sweep:
    """Trials by number, those that have ended in the folder `uri` among them."""

    def __init__(
        self,
        uri: str,
        space: Space,
        search: str,
        seed: int,
        trials: int,
        rungs: Sequence[int],
        factor: int,
        abreast: int,
    ) -> None:
        self._uri, self._space, self._seed, self._abreast = uri, space, seed, abreast
        self._rungs, self._factor = rungs, factor
        self._optuna = space.optuna(seed) if search == "optuna" else None
        self._told = 0  # trials whose outcomes Optuna knows
        self._values: list[dict[str, Any]] = []
        self._began: dict[int, float] = {}
        self._first = time.monotonic()
        self.trials = trials
        self._dice: list[list[float]] = [[] for _ in range(trials)]
        self._ended: dict[int, Ended] = {}
        for number in range(trials):
            try:
                self._keep(Ended(**storage.read_json(self._file(number))))
            except FileNotFoundError:
                continue
        self.found = len(self._ended)

    def values(self, number: int) -> dict[str, Any] | None:
        """What the trial draws, None while that waits for the outcome of another one."""
        while len(self._values) <= number:
            following = len(self._values)
            if self._optuna is None:
                self._values.append(self._space.draw(following, self._seed))
                continue
            while self._told <= following - self._abreast:
                if self._told not in self._ended:
                    return None
                # Those before it have ended, too, so what became of it is final.
                self._optuna.tell(self._told, self.outcome(self._told).val_dice)
                self._told += 1
            self._values.append(self._optuna.ask(following))
        return self._values[number]

    def begin(self, number: int) -> None:
        """The trial is about to run."""
        self._began[number] = time.monotonic()

    def has_ended(self, number: int) -> bool:
        """Whether the trial has ended for good."""
        return number in self._ended

    def hear(self, number: int, dice: Sequence[float | None]) -> bool:
        """Takes the trial's validation Dice of all epochs so far; whether it is to stop."""
        self._dice[number] = [value or 0.0 for value in dice]
        return self._verdicts()[number].stopped_after is not None

    def end(self, number: int, failure: str | None = None) -> None:
        """The trial has ended; its file is written."""
        values = self.values(number)
        assert values is not None, "drawn before it ran"
        seconds = time.monotonic() - self._began[number]
        ended = Ended(number, values, self._dice[number], failure, seconds)
        self._keep(ended)
        storage.write_json(self._file(number), asdict(ended))
        outcome = self.outcome(number)
        meters.add("rayseg_trials_total", status=outcome.status)
        self._tell(outcome)

    def outcome(self, number: int) -> Outcome:
        """What became of a trial that has ended, by the verdict so far."""
        ended, verdict = self._ended[number], self._verdicts()[number]
        stopped = verdict.stopped_after is not None
        dice = ended.dice[: verdict.stopped_after]
        failed = not stopped and (ended.failure is not None or not dice)
        best = max(range(len(dice)), key=dice.__getitem__, default=0)
        return Outcome(
            number=number,
            values=ended.values,
            status="failed" if failed else "stopped" if stopped else "completed",
            epochs=len(dice),
            val_dice=None if failed else dice[best],
            best_epoch=None if failed else best + 1,
            reason=ended.failure if failed else None,
            seconds=ended.seconds,
        )

    def outcomes(self) -> list[Outcome]:
        """All of them; raises RuntimeError where trials have not ended."""
        missing = self.trials - len(self._ended)
        if missing:
            raise RuntimeError(f"tune: {missing} of {self.trials} trials have not ended; start the same job again")
        return [self.outcome(number) for number in range(self.trials)]

    def _verdicts(self) -> list[Verdict]:
        so_far = [Progress(tuple(dice), number in self._ended) for number, dice in enumerate(self._dice)]
        return verdicts(so_far, self._rungs, self._factor)

    def _keep(self, ended: Ended) -> None:
        self._dice[ended.number] = list(ended.dice)
        self._ended[ended.number] = ended

    def _file(self, number: int) -> str:
        return storage.join(self._uri, f"{number:05d}.json")

    def _tell(self, outcome: Outcome) -> None:
        score = (
            outcome.reason if outcome.val_dice is None else f"Dice {outcome.val_dice:.4f} in epoch {outcome.best_epoch}"
        )
        done, left = len(self._ended), self.trials - len(self._ended)
        left_s = (time.monotonic() - self._first) / (done - self.found) * left
        logger.info(
            "trial %d (%s): %s after %d epochs, %s; %d of %d trials done, about %.0f s left",
            outcome.number, told(outcome.values), outcome.status, outcome.epochs, score, done, self.trials, left_s,
        )  # fmt: skip


def told(values: dict[str, Any]) -> str:
    """Values as a person reads them: `batch_size 16, learning_rate 0.00123`."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in sorted(values.items())
    )
