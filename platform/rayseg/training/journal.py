"""The journal: brings what a run's checkpoints say into its MLflow run, each epoch once."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rayseg.tracking import runs

logger = logging.getLogger(__name__)

_SIGN = "val/loss"  # every epoch has it, and the untrained model


class Journal:
    """Logs epochs, under the number of epochs done as step; 0 is the untrained model.

    Only what a checkpoint holds is logged: an epoch that is lost with a killed worker is made, and logged, again. What
    MLflow does not take now, because its server is down or silent, is logged by a later call. So is `so_far`: values of
    the run from before this process.
    """

    def __init__(self, tracking_uri: str, run_id: str, so_far: Mapping[str, float] | None = None) -> None:
        self._tracking_uri, self._run_id = tracking_uri, run_id
        self._so_far = {name: value for name, value in (so_far or {}).items() if value}
        self._logged: int | None = None  # the last epoch that MLflow has; None: it is to be asked

    def publish(self, untrained: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> bool:
        """Logs what MLflow lacks of these; whether it has all of it now."""
        try:
            if self._so_far:
                runs.log_metrics(self._tracking_uri, self._run_id, self._so_far)
                self._so_far = {}
            if self._logged is None:
                self._logged = runs.last_step(self._tracking_uri, self._run_id, _SIGN)
            if self._logged is None:
                self._log(0, untrained)
                self._logged = 0
            for row in history[self._logged :]:
                self._log(row["epoch"], {name: value for name, value in row.items() if name != "epoch"})
                self._logged = row["epoch"]
        except runs.UnreachableError as error:
            self._logged = None  # whoever does not answer may have taken it all the same
            logger.warning("MLflow cannot be reached (%s): values are logged later", error)
            return False
        return True

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        defined = {name: value for name, value in values.items() if value is not None}
        # Last, as many values go in several requests: an epoch that has its sign has all of them.
        defined[_SIGN] = defined.pop(_SIGN)
        runs.log_metrics(self._tracking_uri, self._run_id, defined, step=step)
