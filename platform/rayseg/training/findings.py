"""What a sweep has found: its table, its best trial, and how the best learning rate goes with the batch size."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayseg.training.sweep import Outcome

_RATE, _BATCH = "learning_rate", "batch_size"


@dataclass(frozen=True)
class Scaling:
    """The learning rate of the best trial of each batch size, and the exponent p of rate ~ batch^p fitted to them.

    1 is the linear rule (Goyal et al. 2017, arXiv:1706.02677), 0.5 the square root rule (Krizhevsky 2014,
    arXiv:1404.5997), 0 is no scaling.
    """

    best: list[dict[str, float]]  # a row a batch size: batch_size, learning_rate, val_dice
    exponent: float
    sentence: str


def best(outcomes: Sequence[Outcome]) -> Outcome:
    """The highest validation Dice among the survivors; among those stopped, where no trial survived.

    Raises:
        ValueError: all trials failed.
    """
    scored = [outcome for outcome in outcomes if outcome.val_dice is not None]
    if not scored:
        raise ValueError(
            f"tune: all {len(outcomes)} trials failed, the first one: {outcomes[0].reason}; the same job started again "
            "is a new sweep"
        )
    return max(scored, key=_merit)


def table(outcomes: Sequence[Outcome]) -> str:
    """A CSV row a trial, in order of number."""
    text = io.StringIO()
    keys = sorted(outcomes[0].values)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *keys, "status", "epochs", "val_dice", "best_epoch", "seconds", "reason"])
    for found in outcomes:
        values = [found.values[key] if _plain(found.values[key]) else json.dumps(found.values[key]) for key in keys]
        row = [found.number, *values, found.status, found.epochs, found.val_dice, found.best_epoch]
        writer.writerow([*row, round(found.seconds, 1), found.reason])
    return text.getvalue()


def aligned(text: str) -> str:
    """A CSV text as columns that line up, without the last one's padding."""
    rows = [[_short(cell) for cell in row] for row in csv.reader(io.StringIO(text))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def scaling(outcomes: Sequence[Outcome]) -> Scaling | None:
    """None without trials of two batch sizes and of a learning rate that was tuned."""
    scored = [found for found in outcomes if found.val_dice is not None and {_RATE, _BATCH} <= found.values.keys()]
    batches = sorted({found.values[_BATCH] for found in scored})
    if len(batches) < 2:
        return None
    tops = [max((found for found in scored if found.values[_BATCH] == batch), key=_merit) for batch in batches]
    rates = [top.values[_RATE] for top in tops]
    exponent = float(np.polyfit(np.log(batches), np.log(rates), 1)[0])
    rules = {"no scaling": 0.0, "the square root rule": 0.5, "the linear rule": 1.0}
    nearest = min(rules, key=lambda name: abs(rules[name] - exponent))
    lost = sum(top.status != "completed" for top in tops)
    sentence = (
        f"best learning rate ~ batch^{exponent:.2f}, nearest to {nearest}, from one best trial a batch size "
        f"({len(scored)} trials, {len(batches)} batch sizes, {lost} of these without a survivor)"
    )
    rows = [
        {_BATCH: batch, _RATE: rate, "val_dice": float(top.val_dice or 0.0)}
        for batch, rate, top in zip(batches, rates, tops, strict=True)
    ]
    return Scaling(rows, exponent, sentence)


def _merit(found: Outcome) -> tuple[bool, float, int]:
    """Survivors first, as scores after different numbers of epochs are no match; of equals the lower number."""
    return found.status == "completed", found.val_dice or 0.0, -found.number


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _short(cell: str) -> str:
    try:
        return f"{float(cell):.4g}" if "." in cell or "e" in cell else cell
    except ValueError:
        return cell
