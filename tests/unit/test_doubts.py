"""A run that ended well and is of no use says so."""

from typing import Any

import pytest

from rayseg.training import doubts


def told(dice: list[float | None], untrained: float | None = 0.1, batch_size: int = 8, rows: int = 80) -> str:
    history: list[dict[str, Any]] = [{"val/dice_pooled": one} for one in dice]
    best = max(history, key=lambda row: row["val/dice_pooled"] or 0)
    return " ".join(doubts.of_run(batch_size, rows, best, {"val/dice_pooled": untrained}, history))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dice": [0.2, 0.7]}, ""),
        ({"dice": [None], "untrained": None}, ""),
        ({"dice": [0.7], "batch_size": 80}, ""),
        ({"dice": [0.7], "batch_size": 512}, "train.batch_size is 512 and the training split has 80 rows"),
        ({"dice": [0.05, 0.1]}, "no better on validation than it was untrained (Dice 0.100, untrained 0.100)"),
        ({"dice": [0.0, 0.0], "untrained": None}, "no foreground of validation was ever found"),
    ],
)
def test_what_is_doubted(values: dict[str, Any], words: str) -> None:
    said = told(**values)
    assert words in said
    assert bool(said) == bool(words)
