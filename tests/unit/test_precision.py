"""What `mixed_precision: auto` becomes, from the paces of workers."""

from typing import Any

import pytest

from rayseg.training import precision
from rayseg.training.precision import Decision, choice, decided
from rayseg.training.settings import TrainConfig

KEPT = {"precision": {"policy": "mixed_bfloat16", "reason": "measured"}}


def pace(float32: float, bfloat16: float) -> dict[str, float]:
    return {"float32": float32, "mixed_bfloat16": bfloat16}


@pytest.mark.parametrize(
    ("paces", "expected"),
    [
        ([pace(1.0, 0.5)], "mixed_bfloat16"),
        ([pace(0.38, 1.0)], "float32"),  # emulated
        ([pace(1.0, 0.95)], "float32"),  # not worth the digits, and within what measurements differ by
        ([pace(1.0, 0.5), {}], "float32"),  # a worker whose processor has no such instructions
        ([pace(1.0, 0.5), pace(1.0, 2.0)], "float32"),  # all wait for the second one: 1 s against 2
        ([pace(3.0, 0.5), pace(1.0, 2.0)], "mixed_bfloat16"),  # 3 s against 2
    ],
)
def test_the_faster_one_is_taken_as_the_slowest_worker_has_it(paces: list[dict[str, float]], expected: str) -> None:
    assert choice(paces).policy == expected


def test_the_reason_has_the_figures() -> None:
    assert choice([pace(0.4, 0.2), pace(0.5, 0.25)]).reason == "float32 0.5 s a step, mixed_bfloat16 0.25 s a step"


def test_a_step_counts_without_the_first_one_and_without_what_else_the_machine_did() -> None:
    class Scripted:
        def __init__(self, *seconds: float) -> None:
            self._seconds = iter((*seconds, *[9.0] * 20))

        def timed_step(self) -> float:
            return next(self._seconds)

    learners = {"float32": Scripted(0.1, 4.0, 3.0), "mixed_bfloat16": Scripted(0.2, 7.0, 5.0)}
    assert precision.paces(learners) == {"float32": 3.0, "mixed_bfloat16": 5.0}
    slow = {"float32": Scripted(60.0, 50.0, 1.0)}
    assert precision.paces(slow) == {"float32": 50.0}, "slow ones are tried once"


@pytest.mark.parametrize("named", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_what_is_named_is_taken_and_what_was_decided_stands(monkeypatch: pytest.MonkeyPatch, named: Any) -> None:
    def measured(*_: object) -> Decision:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(precision, "_measured", measured)
    config = TrainConfig(prepared="p", storage="s", tracking_uri="t", mixed_precision=named)
    assert decided(config, None, KEPT) == (config, {})  # type: ignore[arg-type]
    auto = TrainConfig(prepared="p", storage="s", tracking_uri="t", mixed_precision="auto")
    config, kept = decided(auto, None, KEPT)  # type: ignore[arg-type]
    assert (auto.mixed_precision, config.mixed_precision, kept) == ("auto", "mixed_bfloat16", KEPT)
    assert precision.tags(kept) == {"rayseg.mixed_precision": "auto: measured"}
    assert precision.tags({}) == {}
