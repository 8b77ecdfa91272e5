"""A version in the model registry, as all that only uses it needs to know it: without MLflow, which takes seconds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelVersion:
    """A version in the registry. `uri` is `models:/NAME/VERSION`, `run_id` the run that trained it."""

    name: str
    version: str
    uri: str
    run_id: str
    digest: str
