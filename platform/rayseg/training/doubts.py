"""Doubts about a run that has ended well: what no one would want, told aloud."""

from collections.abc import Mapping, Sequence
from typing import Any

_DICE = "val/dice_pooled"


def of_run(
    batch_size: int,
    rows: int,
    best: Mapping[str, Any],
    untrained: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Sentences, each with what to do.

    Args:
        batch_size: rows of a batch.
        rows: of the training split.
        best: validation of the epoch whose weights are registered.
        untrained: validation before the first step.
        history: of all epochs.
    """
    doubts = []
    if batch_size > rows:
        doubts.append(
            f"train.batch_size is {batch_size} and the training split has {rows} rows: an epoch is one step; lower it"
        )
    dice, before = best.get(_DICE), untrained.get(_DICE)
    if dice is not None and before is not None and dice <= before:
        doubts.append(
            f"the model is no better on validation than it was untrained (Dice {dice:.3f}, untrained {before:.3f}): "
            "look at pairs of images and masks, train longer, or change train.learning_rate"
        )
    scores = [row[_DICE] for row in history if row.get(_DICE) is not None]
    if scores and max(scores) == 0:
        doubts.append("no foreground of validation was ever found: look at masks and labels, or take another loss")
    return doubts
