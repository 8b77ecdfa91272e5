"""Precision: what `mixed_precision: auto` stands for, float32 or bfloat16, whichever makes the faster steps.

It is decided once, on the machines that train, before a run, a sweep or a cross-validation begins. The mark of its
unfinished job keeps the decision, and so do the run's parameters and configuration: a job that is started again, and a
run that reproduces another one, take it from there and measure nothing.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayseg import config as configuration
from rayseg import logs
from rayseg.grant import keep_to_grant
from rayseg.models.engine import has_bfloat16

# A worker without bfloat16 looks, says so and ends: it needs no TensorFlow.
if TYPE_CHECKING:
    from rayseg.data.prepared import PreparedSet
    from rayseg.training.settings import TrainConfig

logger = logging.getLogger(__name__)

AUTO, FLOAT32, BFLOAT16 = "auto", "float32", "mixed_bfloat16"
# It has 8 bits of precision, so it has to be worth it; and two measurements of one machine seldom disagree by as much.
_LEAST_GAIN = 1.15
_MOST_STEPS, _MOST_S = 10, 10.0  # of each; one step at least


@dataclasses.dataclass(frozen=True)
class Decision:
    """A Keras dtype policy, and why it."""

    policy: str
    reason: str


def decided(
    config: "TrainConfig", prepared: "PreparedSet", mark: Mapping[str, Any]
) -> tuple["TrainConfig", dict[str, Any]]:
    """The run with its precision, and what the mark of the unfinished job has to keep of it.

    Args:
        config: the run. Where it names a precision that is taken.
        prepared: its data.
        mark: what an earlier start of the job has kept; its decision stands.
    """
    if config.mixed_precision != AUTO:
        return config, {}
    kept = mark.get("precision")
    decision = Decision(**kept) if kept else _measured(config, prepared)
    logger.info("train: mixed_precision auto is %s: %s", decision.policy, decision.reason)
    with_it = configuration.plain(config) | {"mixed_precision": decision.policy}
    return configuration.build(type(config), with_it), {"precision": dataclasses.asdict(decision)}


def tags(decision: Mapping[str, Any]) -> dict[str, str]:
    """What a run's tags say of a decision as `decided` has it; nothing where the configuration named a precision."""
    return {"rayseg.mixed_precision": f"auto: {decision['precision']['reason']}"} if decision else {}


def choice(paces: Sequence[Mapping[str, float]]) -> Decision:
    """What to take by the seconds of a step on each worker; the slowest worker counts, as the others wait for it.

    Args:
        paces: seconds by policy of each worker; empty where it has no instructions for bfloat16.
    """
    if not all(paces):
        return Decision(FLOAT32, "not every worker has instructions for bfloat16")
    slowest = {policy: max(pace[policy] for pace in paces) for policy in (FLOAT32, BFLOAT16)}
    faster = slowest[FLOAT32] >= _LEAST_GAIN * slowest[BFLOAT16]
    measured = ", ".join(f"{policy} {seconds:.3g} s a step" for policy, seconds in slowest.items())
    return Decision(BFLOAT16 if faster else FLOAT32, measured)


def _measured(config: "TrainConfig", prepared: "PreparedSet") -> Decision:
    """By the paces of as many workers as the run has at least, all at once, where and with what they would train."""
    logger.info("train: tries some steps in %s and in %s (mixed_precision: auto)", FLOAT32, BFLOAT16)
    task = ray.remote(
        # A process that trains nothing else: TensorFlow keeps threads and memory of a GPU until it ends.
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        max_calls=1,
    )(logs.carried(_paces))
    group = placement_group([config.bundle] * config.least_workers, strategy="PACK")  # as Ray Train has it
    places = [PlacementGroupSchedulingStrategy(group, number) for number in range(config.least_workers)]
    job = configuration.plain(config), prepared, config.least_workers
    try:
        return choice(ray.get([task.options(scheduling_strategy=place).remote(*job) for place in places]))
    except ray.exceptions.RayError as error:  # such as a node that is lost: no reason not to train
        logger.warning("train: the steps of mixed_precision auto failed", exc_info=True)
        return Decision(FLOAT32, f"the measurement failed ({type(error).__name__})")
    finally:
        remove_placement_group(group)


def _paces(plain: Mapping[str, Any], prepared: "PreparedSet", workers: int) -> dict[str, float]:
    """Seconds of a step by policy, of a worker's share of a batch; empty without bfloat16, or without the GPU."""
    granted = keep_to_grant()
    if not granted and not has_bfloat16(on_gpu=False):
        return {}
    import tensorflow as tf

    from rayseg.data.windows import share
    from rayseg.models import numerics
    from rayseg.training.learner import Learner
    from rayseg.training.loop import set_up
    from rayseg.training.settings import TrainConfig

    config = configuration.build(TrainConfig, plain)
    set_up(config, 0, logging.WARNING)
    if granted and not (tf.config.list_physical_devices("GPU") and has_bfloat16(on_gpu=True)):
        return {}
    rows = share(config.batch_size, workers, config.accumulation)
    learners = {}
    for policy in (FLOAT32, BFLOAT16):
        alone = configuration.build(
            TrainConfig, {**plain, "mixed_precision": policy, "num_workers": 1, "batch_size": rows}
        )
        learners[policy] = Learner(alone, prepared, 0, 1, lambda: None)
    model = learners[FLOAT32].model
    numerics.settle(numerics.undetermined(model, config.jit_compile, granted))
    return paces(learners)


def paces(learners: Mapping[str, Any]) -> dict[str, float]:
    """The least seconds of a step of each learner: what else the machine does only adds to it."""
    for learner in learners.values():
        learner.timed_step()  # traced and warmed up
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    for _ in range(_MOST_STEPS):  # in turns, so that all meet the same moments
        for name, learner in learners.items():
            seconds[name].append(learner.timed_step())
        if sum(map(sum, seconds.values())) > _MOST_S * len(learners):
            break
    return {name: min(times) for name, times in seconds.items()}
