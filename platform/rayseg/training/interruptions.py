"""Why workers began anew: nodes came or went, an announced loss, or a failure. Counted where Ray Train decides it."""

import dataclasses
import logging
from dataclasses import dataclass

from ray.train import PreemptionError, TrainingFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState, TrainControllerState

from rayseg import storage

logger = logging.getLogger(__name__)

_FILE = "interruptions.json"


@dataclass(frozen=True)
class Interruptions:
    """How often workers began anew, by reason."""

    resizes: int = 0  # the run took more nodes, or fewer
    preemptions: int = 0  # a node was taken away that Ray had been told of
    failures: int = 0  # what `max_failures` counts

    @classmethod
    def of(cls, folder: str) -> "Interruptions":
        """Of the run in folder `folder`, over all starts of the job."""
        try:
            return cls(**storage.read_json(storage.join(folder, _FILE)))
        except FileNotFoundError:
            return cls()


class Count(ControllerCallback):
    """Counts in Ray Train's controller. Ray's public callbacks tell of errors only, and not which budget one took."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called whenever the controller's state changes, or stays as it is for another round."""
        if previous_state is current_state:  # waits for nodes
            return
        if isinstance(current_state, ResizingState):
            self._add("resizes")
        elif isinstance(current_state, RestartingState):
            self._add("preemptions" if announced(current_state.training_failed_error) else "failures")

    def _add(self, reason: str) -> None:
        try:
            before = Interruptions.of(self._folder)
            after = dataclasses.replace(before, **{reason: getattr(before, reason) + 1})
            storage.write_json(storage.join(self._folder, _FILE), dataclasses.asdict(after))
        except OSError as error:  # an error here would end the run
            logger.warning("the store does not take the count of %s (%s)", reason, type(error).__name__)


def announced(error: TrainingFailedError) -> bool:
    """Whether Ray Train counts it as a preemption, as its own failure policy does.

    That is one it has waited for, or the death of a worker on a node that was being drained.
    """
    causes = getattr(error, "worker_failures", {}).values()
    deaths = (getattr(cause, "health_check_failure", cause) for cause in causes)
    return isinstance(error, PreemptionError) or any(getattr(death, "preempted", False) for death in deaths)
