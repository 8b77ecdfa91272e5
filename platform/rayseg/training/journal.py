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
    MLflow does not take now, because its server is down, is logged after a later epoch.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._tracking_uri, self._run_id = tracking_uri, run_id
        self._logged: int | None = None  # the last epoch that MLflow has; None: not asked yet

    def publish(self, untrained: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> bool:
        """Logs what MLflow lacks of these; whether it has all of it now."""
        try:
            if self._logged is None:
                self._logged = runs.last_step(self._tracking_uri, self._run_id, _SIGN)
            if self._logged is None:
                self._log(0, untrained)
                self._logged = 0
            for row in history[self._logged :]:
                self._log(row["epoch"], {name: value for name, value in row.items() if name != "epoch"})
                self._logged = row["epoch"]
        except runs.UnreachableError as error:
            logger.warning("MLflow cannot be reached (%s): values are logged later", error)
            return False
        return True

    def tell(self, values: Mapping[str, float]) -> None:
        """Logs values of the run that stand as they are at its end, unless MLflow does not answer."""
        try:
            runs.log_metrics(self._tracking_uri, self._run_id, values)
        except runs.UnreachableError as error:
            logger.warning("MLflow cannot be reached (%s): %s are not logged", error, ", ".join(values))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        defined = {name: value for name, value in values.items() if value is not None}
        runs.log_metrics(self._tracking_uri, self._run_id, defined, step=step)
