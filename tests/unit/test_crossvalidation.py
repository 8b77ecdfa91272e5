"""What a cross-validation is told and tells; tests/ray runs one."""

import logging

import pytest

from rayseg import config
from rayseg.crossvalidation.crossvalidate import CrossValidate, CrossValidateConfig
from rayseg.crossvalidation.progress import Clock, Epochs
from rayseg.data.range import Range, widest


@pytest.mark.parametrize("values", [{"folds": 2}, {"folds": 5, "concurrent": 0}])
def test_what_cannot_be_is_refused_by_its_key(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"crossvalidate\.\w+: .*expected"):
        config.build(CrossValidate, values)


def test_a_run_to_reproduce_is_no_recipe_of_folds() -> None:
    train = {"reproduce": "0" * 32, "tracking_uri": "sqlite:///m.db"}
    with pytest.raises(ValueError, match=r"train\.reproduce"):
        config.build(CrossValidateConfig, {"prepare": {"manifest": "m", "output": "o"}, "train": train})


def test_the_clock_counts_epochs_of_this_start_and_whole_folds_that_stopped_early(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    epochs, clock = Epochs(), Clock(epochs=10, waiting=2, folds=3)  # fold 0 had ended before this start
    clock.look(epochs.done(), {0})
    for _ in range(4):
        epochs.note(1)
    now[0] += 40
    clock.look(epochs.done(), {0})
    assert "4 of 20 epochs of all folds, about 160 s left" in caplog.messages[-1]
    clock.look(epochs.done(), {0, 1})  # it stopped after 4
    clock.ended(1, 0.5, 4, 2)
    assert "fold 1: validation Dice 0.5000 in epoch 4; 2 of 3 folds trained, about 40 s left" in caplog.messages[-1]
    clock.look(epochs.done(), {0, 1, 2})
    clock.ended(2, None, 10, 3)
    assert caplog.messages[-1].endswith("fold 2: no score in epoch 10; 3 of 3 folds trained")


def test_the_widest_range_is_what_any_model_knows_but_for_certainty() -> None:
    one = Range(("CT",), (), (0.5, 0.7), (20.0, 30.0), None, 0.1, None, 3, 0.4)
    other = Range(("MR",), ("HEAD",), None, (25.0, 35.0), None, 0.2, 12.0, 2, 0.6)
    together = Range(("CT", "MR"), ("HEAD",), (0.5, 0.7), (20.0, 35.0), None, 0.2, 12.0, 3, None)
    assert widest([one, other]) == widest([other, one]) == together
