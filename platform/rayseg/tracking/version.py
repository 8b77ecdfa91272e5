"""A version in the model registry, as all that only uses it needs to know it: without MLflow, which takes seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayseg import config


@dataclass(frozen=True)
class ModelVersion:
    """A version in the registry. `uri` is `models:/NAME/VERSION`, `run_id` the run that trained it."""

    name: str
    version: str
    uri: str
    run_id: str
    digest: str


def together(versions: Sequence[ModelVersion]) -> ModelVersion:
    """What one model, or an ensemble of several, is called; `run_id` is of the first one.

    An ensemble has the name of the first, the versions with plus signs between them (`1+2`, `1+other-v3` of another
    name), and a digest of all digests.
    """
    first, *others = versions
    if not others:
        return first
    told = [one.version if one.name == first.name else f"{one.name}-v{one.version}" for one in others]
    return ModelVersion(
        first.name,
        "+".join([first.version, *told]),
        " + ".join(one.uri for one in versions),
        first.run_id,
        config.digest([one.digest for one in versions]),
    )
