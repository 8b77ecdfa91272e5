"""How far the folds are. The actor's process imports this and no more: TensorFlow would take most of a gigabyte."""

import logging
import time

logger = logging.getLogger(__name__)

_SPEAK_S = 30.0


class Epochs:
    """An actor that knows how many epochs each fold has behind it, of those since this start."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def note(self, fold: int) -> None:
        """One more."""
        self._done[fold] = self._done.get(fold, 0) + 1

    def done(self) -> dict[int, int]:
        """By fold."""
        return self._done


class Clock:
    """Says how far all folds are, and how long the rest would take at the pace of this start."""

    def __init__(self, epochs: int, waiting: int, folds: int) -> None:
        self._epochs, self._folds = epochs, folds
        self._total = epochs * waiting
        self._earlier: set[int] | None = None
        self._done = 0
        self._began = self._spoken = time.monotonic()

    def look(self, done: dict[int, int], ended: set[int]) -> None:
        """Takes notice of epochs by fold; a fold that stopped early has all of them behind it."""
        self._earlier = set(ended) if self._earlier is None else self._earlier
        whole = ended - self._earlier
        self._done = self._epochs * len(whole) + sum(epochs for fold, epochs in done.items() if fold not in whole)
        if time.monotonic() - self._spoken > _SPEAK_S:
            self._spoken = time.monotonic()
            logger.info("crossvalidate: %d of %d epochs of all folds%s", self._done, self._total, self._left())

    def ended(self, fold: int, val_dice: float | None, best_epoch: int, count: int) -> None:
        """Says what a fold's training gave."""
        scored = "no score" if val_dice is None else f"validation Dice {val_dice:.4f}"
        logger.info(
            "crossvalidate: fold %d: %s in epoch %d; %d of %d folds trained%s",
            fold, scored, best_epoch, count, self._folds, self._left(),
        )  # fmt: skip

    def _left(self) -> str:
        if not self._done or self._done >= self._total:
            return ""
        return f", about {(time.monotonic() - self._began) / self._done * (self._total - self._done):.0f} s left"
