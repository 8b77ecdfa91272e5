"""A sweep's space, its state through interruptions, and what it says it has found. No trial is run here."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayseg.config import build, load
from rayseg.models.presets import NetworkConfig
from rayseg.tracking.figures import trials as picture
from rayseg.training.findings import aligned, best, scaling, table
from rayseg.training.settings import TrainConfig
from rayseg.training.space import Space
from rayseg.training.sweep import Outcome, Sweep
from rayseg.training.tune import TuneConfig

TRAIN = TrainConfig(prepared="p", storage="s", tracking_uri="t", model=NetworkConfig(widths=(4, 8)), num_workers=2)
SPEC: dict[str, Any] = {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"choice": [8, 16]}}
POINT = {"learning_rate": 0.003, "batch_size": 16}
TRIALS, EPOCHS = 14, 3


@pytest.mark.parametrize(
    ("space", "points", "told"),
    [
        ({}, (), "tune.space: empty"),
        ({"learning_rat": {"uniform": [0, 1]}}, (), "tune.space.learning_rat: config key learning_rat: unknown"),
        ({"model.drop": {"uniform": [0, 1]}}, (), "tune.space.model.drop: config key model.drop: unknown"),
        ({"epochs": {"choice": [1, 2]}}, (), "tune.space.epochs: not to be tuned"),
        ({"learning_rate": {"normal": [0, 1]}}, (), "tune.space.learning_rate: one of loguniform, uniform"),
        ({"learning_rate": 0.1}, (), "tune.space.learning_rate: one of"),
        ({"learning_rate": {"loguniform": [0, 1]}}, (), "tune.space.learning_rate.loguniform: positive"),
        ({"learning_rate": {"uniform": [0.2, 0.1]}}, (), r"tune.space.learning_rate.uniform: \[low, high\]"),
        ({"accumulation": {"randint": [1.5, 3]}}, (), "tune.space.accumulation.randint: whole numbers"),
        ({"batch_size": {"choice": [8, 9]}}, (), "tune.space.batch_size: .*multiple of train.num_workers"),
        ({"mixed_precision": {"choice": ["float32", "auto"]}}, (), "tune.space.mixed_precision: float32, mixed_bf"),
        (SPEC, ({"learning_rate": 0.003},), "tune.points.0: a value of each key"),
        (SPEC, (POINT, POINT | {"batch_size": 32}), "tune.points.1.batch_size: a value within"),
    ],
)
def test_a_space_that_cannot_be_is_refused_by_its_key(space: Any, points: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Space(space, points, TRAIN)


def test_draws_are_functions_of_seed_and_number_and_lie_in_the_space() -> None:
    space = Space(SPEC | {"model.dropout": {"uniform": [0.0, 0.3]}, "accumulation": {"randint": [1, 3]}}, (), TRAIN)
    drawn = [space.draw(number, 1) for number in range(300)]
    assert drawn[7] == space.draw(7, 1) != space.draw(7, 2)
    rates = np.log10([values["learning_rate"] for values in drawn])
    assert (rates.min(), np.median(rates), rates.max()) == pytest.approx((-4, -3, -2), abs=0.15)
    assert {values["batch_size"] for values in drawn} == {8, 16}
    assert {values["accumulation"] for values in drawn} == {1, 2}
    changed = space.changed(drawn[0], name="other")
    assert (changed.model.dropout, changed.model.widths) == (drawn[0]["model.dropout"], (4, 8))
    assert (changed.name, changed.learning_rate) == ("other", drawn[0]["learning_rate"])


def test_the_section_names_the_key_that_is_wrong() -> None:
    train = {"prepared": "p", "storage": "s", "tracking_uri": "t"}
    for key, value in (("trials", 0), ("grace_epochs", 0), ("reduction_factor", 1)):
        with pytest.raises(ValueError, match=f"tune.{key}: "):
            build(TuneConfig, {"train": train, "tune": {key: value}})
    with pytest.raises(ValueError, match=r"^train\.num_workers: one number expected in a sweep, .* got \[1, 2\]"):
        build(TuneConfig, {"train": train | {"num_workers": [1, 2]}})


def test_the_shipped_recipe_is_a_sweep() -> None:
    recipe = Path(__file__).parents[2] / "configs" / "brain-tumor-mri-sweep.yaml"
    config = load(TuneConfig, None, recipe, ["tune.trials=9"])
    assert config.tune.trials == 9
    space = Space(config.tune.space, config.tune.points, config.train)
    assert space.draw(0, 1).keys() == {"learning_rate", "batch_size"}


def curve(values: dict[str, Any]) -> list[float]:
    """What a trial of these values scores, epoch by epoch: the nearer to 0.003 the better."""
    off = abs(np.log10(values["learning_rate"] / 0.003))
    return [round(float(0.9 - 0.3 * off - 0.1 / epoch), 6) for epoch in range(1, EPOCHS + 1)]


def sweep(folder: Path, search: str, abreast: int = 2, trials: int = TRIALS) -> Sweep:
    return Sweep(str(folder), Space(SPEC, (POINT,), TRAIN), search, 5, trials, [1], 3, abreast)


def drive(state: Sweep, abreast: int, ends: int | None = None) -> None:
    """Runs trials as Ray Tune does, the latest one first; after so many ends the driver is lost."""
    running: dict[int, int] = {}
    following, ended = 0, 0
    while ended != ends:
        while len(running) < abreast and following < state.trials and state.values(following) is not None:
            if not state.has_ended(following):
                state.begin(following)
                running[following] = 0
            following += 1
        if not running:
            return
        number = max(running)
        running[number] += 1
        values = state.values(number)
        assert values is not None
        stopped = number != 2 and state.hear(number, curve(values)[: running[number]])
        if number == 2:
            state.end(number, "MemoryError")
        elif stopped or running[number] == EPOCHS:
            state.end(number)
        else:
            continue
        del running[number]
        ended += 1


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_sweep_that_is_lost_again_and_again_has_the_trials_and_survivors_of_an_undisturbed_one(
    tmp_path: Path, search: str
) -> None:
    undisturbed = sweep(tmp_path / "undisturbed", search)
    drive(undisturbed, 2)
    while (state := sweep(tmp_path / "lost", search)).found < TRIALS:
        drive(state, 2, ends=3)
    expected, found = ([(one.number, one.values, one.status, one.val_dice) for one in state.outcomes()]
                       for state in (undisturbed, state))  # fmt: skip
    assert found == expected
    assert expected[0][1] == POINT
    kinds = [status for _, _, status, _ in expected]
    assert kinds[2] == "failed"
    assert 2 <= kinds.count("completed") < TRIALS - 2
    if search == "random":  # whatever there is room for
        alone = sweep(tmp_path / "alone", search, 1)
        drive(alone, 1)
        assert [(one.number, one.values, one.status, one.val_dice) for one in alone.outcomes()] == expected


def test_optuna_learns_from_the_trials_before(tmp_path: Path) -> None:
    state = sweep(tmp_path, "optuna", trials=30)
    assert state.values(1) is not None
    assert state.values(2) is None, "it waits for the first one of the two before it"
    drive(state, 2)
    later = [abs(np.log10(one.values["learning_rate"] / 0.003)) for one in state.outcomes()[15:]]
    assert np.median(later) < 0.25  # of draws at random over these two decades it is 0.52


def test_a_sweep_without_all_its_trials_has_no_outcome(tmp_path: Path) -> None:
    state = sweep(tmp_path, "random")
    drive(state, 2, ends=4)
    with pytest.raises(RuntimeError, match="10 of 14 trials have not ended"):
        state.outcomes()


def outcome(number: int, batch: int, rate: float, dice: float | None, status: str = "completed") -> Outcome:
    values = {"batch_size": batch, "learning_rate": rate}
    reason = "MemoryError" if dice is None else None
    return Outcome(number, values, status, 3, dice, 3 if dice else None, reason, 1.0)  # type: ignore[arg-type]


ROWS = [
    outcome(0, 8, 0.001, 0.7),
    outcome(1, 8, 0.01, 0.8, "stopped"),
    outcome(2, 16, 0.002, 0.72),
    outcome(3, 32, 0.004, 0.71),
    outcome(4, 32, 0.001, 0.5),
    outcome(5, 32, 0.1, None, "failed"),
]


def test_the_best_is_a_survivor() -> None:
    assert best(ROWS).number == 2
    assert best([ROWS[1], ROWS[5]]).number == 1
    with pytest.raises(ValueError, match="all 1 trials failed, the first one: MemoryError"):
        best([ROWS[5]])


def test_the_exponent_of_rates_that_grow_with_the_batch_is_one() -> None:
    found = scaling(ROWS)
    assert found is not None
    assert [row["learning_rate"] for row in found.best] == [0.001, 0.002, 0.004]
    assert found.exponent == pytest.approx(1)
    assert "batch^1.00, nearest to the linear rule" in found.sentence
    assert "3 batch sizes, 0 of these without a survivor" in found.sentence
    root = scaling([outcome(0, 8, 0.001, 0.7), outcome(1, 32, 0.002, 0.7)])
    assert root is not None
    assert root.exponent == pytest.approx(0.5)
    assert scaling(ROWS[:2]) is None, "one batch size"


def test_the_table_has_a_row_a_trial() -> None:
    rows = list(csv.DictReader(io.StringIO(table(ROWS))))
    assert [row["status"] for row in rows] == [one.status for one in ROWS]
    assert [float(row["learning_rate"]) for row in rows] == [one.values["learning_rate"] for one in ROWS]
    assert (rows[5]["val_dice"], rows[5]["reason"]) == ("", "MemoryError")
    lines = aligned(table(ROWS)).splitlines()
    assert len({line.index(one.status) for line, one in zip(lines[1:], ROWS, strict=True)}) == 1


@pytest.mark.parametrize("more", [{}, {"augment": None}])
def test_the_picture_shows_scores_by_colour(more: dict[str, Any]) -> None:
    rows = [{"values": one.values | more, "status": one.status, "val_dice": one.val_dice} for one in ROWS]
    drawn = np.asarray(Image.open(io.BytesIO(picture(rows))).convert("RGB"), np.int16)
    for end in ("#440154", "#fde725"):  # viridis' ends: of the worst and the best trial
        colour = np.array(list(bytes.fromhex(end[1:])))
        assert (np.abs(drawn[:, : int(0.8 * drawn.shape[1])] - colour).max(-1) < 30).any(), "left of the colour bar"
