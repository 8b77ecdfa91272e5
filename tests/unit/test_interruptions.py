"""What Ray Train's controller does is counted by its reason, once, and over all starts of a job."""

import itertools
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train import PreemptionError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.preemption import PreemptionInfo

from rayseg import storage
from rayseg.training.interruptions import Count, Interruptions, announced

INFO = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [1]})


def lost(preempted: bool) -> WorkerGroupError:
    """A worker's process is gone; what its peers say of it comes along."""
    gone = WorkerHealthCheckFailedError("gone", RayActorError(preempted=preempted))
    return WorkerGroupError("lost", {0: RuntimeError("the peer is gone"), 1: gone})


ERRORS = [
    (PreemptionError(INFO), True),
    (lost(preempted=True), True),
    (lost(preempted=False), False),
    (WorkerGroupError("a defect", {0: ZeroDivisionError()}), False),
]


@pytest.mark.parametrize(("error", "expected"), ERRORS)
def test_an_announced_loss_is_what_ray_spends_no_failure_on(error: TrainingFailedError, expected: bool) -> None:
    assert announced(error) is expected
    policy = DefaultFailurePolicy(FailureConfig(max_failures=9))
    policy.make_decision(error)
    assert (policy._preemption_failures, policy._worker_group_failures) == (int(expected), int(not expected))


def test_each_restart_is_counted_once_by_its_reason(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert Interruptions.of(folder) == Interruptions(0, 0, 0)
    waits = RestartingState(lost(preempted=False))
    states: list[TrainControllerState] = [
        InitializingState(),
        RunningState(),
        ResizingState(ResizeDecision(2, {"CPU": 1})),
        RunningState(),
        PreemptingState(INFO, 0.0),
        PreemptingState(INFO, 0.0),
        RestartingState(PreemptionError(INFO)),
        RunningState(),
        waits,
        waits,  # for nodes
        waits,
        ReschedulingState(lost(preempted=False)),
        RunningState(),
        RestartingState(lost(preempted=False)),
    ]
    count = Count(folder)
    for before, after in itertools.pairwise(states):
        count.after_controller_state_update(before, after)
    assert Interruptions.of(folder) == Interruptions(resizes=1, preemptions=1, failures=2)
    Count(folder).after_controller_state_update(RunningState(), ResizingState(ResizeDecision(1, {"CPU": 1})))
    assert Interruptions.of(folder) == Interruptions(resizes=2, preemptions=1, failures=2), "by the next driver"


def test_a_store_that_is_away_costs_the_count_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*arguments: object) -> None:
        raise OSError("away")

    monkeypatch.setattr(storage, "write_json", away)
    Count(str(tmp_path)).after_controller_state_update(RunningState(), RestartingState(lost(preempted=False)))
    assert Interruptions.of(str(tmp_path)) == Interruptions()
