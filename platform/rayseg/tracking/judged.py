"""What several models together, or one with its mirror images, were like on validation.

No bundle can tell: theirs were saved when each model was alone. An evaluation on validation measures it and keeps it in
its run, under a tag by which whoever runs the same models in the same way finds it again.
"""

import json
from collections.abc import Sequence

from rayseg import config
from rayseg.data.range import Known
from rayseg.tracking import runs
from rayseg.tracking.version import ModelVersion

_TAG, _FILE = "rayseg.judges", "known.json"


def keep(tracking_uri: str, run_id: str, versions: Sequence[ModelVersion], mirror: str | None, known: Known) -> None:
    """Notes in a run of the first model's experiment what these are judged by."""
    runs.log_bytes(tracking_uri, run_id, _FILE, json.dumps(config.plain(known), indent=2).encode())
    runs.set_tags(tracking_uri, run_id, {_TAG: _name(versions, mirror)})


def find(tracking_uri: str, versions: Sequence[ModelVersion], mirror: str | None) -> Known | None:
    """What the latest such run says; None without one."""
    mlflow = runs.client(tracking_uri)
    experiment = mlflow.get_experiment(mlflow.get_run(versions[0].run_id).info.experiment_id).name
    for run_id in runs.tagged(tracking_uri, experiment, {_TAG: _name(versions, mirror)}):
        return config.build(Known, json.loads(runs.read_bytes(tracking_uri, run_id, _FILE)))
    return None


def _name(versions: Sequence[ModelVersion], mirror: str | None) -> str:
    return config.digest([[one.digest for one in versions], mirror])
