"""What a replica says of the versions that it holds."""

from datetime import UTC, datetime

from pydantic import BaseModel, Field

from serving.messages import Held, State


class VersionAnswer(BaseModel):
    """A version in memory."""

    version: str
    roles: tuple[str, ...] = Field(description="current, previous, shadow; none where only a client asked for it")
    state: str = Field(description="serving: requests that name no model get it; held: ready")
    since: datetime = Field(description="loaded and checked")
    digest: str
    run_id: str
    labels: tuple[str, ...]
    threshold: float
    engine: str


class FailureAnswer(BaseModel):
    """The last version that was not taken."""

    version: str
    detail: str
    at: datetime


class AgreementAnswer(BaseModel):
    """Of the shadow's masks with those that were answered."""

    version: str
    slices: int
    identical_share: float
    dice: float | None = Field(description="pooled; null where nothing was found")


class ModelsAnswer(BaseModel):
    """The JSON answer of `GET /v1/models`: of one replica, where there are several."""

    name: str
    replica: str
    models: list[VersionAnswer] = Field(description="the one in use first")
    swaps: int = Field(description="since the replica began")
    failed_swaps: int
    last_failure: FailureAnswer | None
    waiting: int = Field(description="slices in the queue")
    running: int = Field(description="slices in the model")
    dropped: int = Field(description="slices whose client was gone, or whose time was over")
    shadow: AgreementAnswer | None


def models_answer(state: State) -> ModelsAnswer:
    """All of it."""
    failure = agreement = None
    if state.failure is not None:
        failure = FailureAnswer(version=state.failure.version, detail=state.failure.detail, at=_time(state.failure.at))
    if state.agreement is not None:
        agreement = AgreementAnswer(
            version=state.agreement.version,
            slices=state.agreement.slices,
            identical_share=state.agreement.identical / state.agreement.slices,
            dice=state.agreement.dice,
        )
    return ModelsAnswer(
        name=state.held[0].model.name,
        replica=state.replica,
        models=[_version(held) for held in state.held],
        swaps=state.swaps,
        failed_swaps=state.failures,
        last_failure=failure,
        waiting=state.waiting,
        running=state.running,
        dropped=state.dropped,
        shadow=agreement,
    )


def version_answer(state: State, which: str) -> VersionAnswer | None:
    """The version of this number, role or alias; None where it is not held."""
    for held in state.held:
        if which in (held.model.version, *held.roles, *held.aliases):
            return _version(held)
    return None


def _version(held: Held) -> VersionAnswer:
    model = held.model
    return VersionAnswer(
        version=model.version,
        roles=held.roles,
        state="serving" if "current" in held.roles else "held",
        since=_time(held.since),
        digest=model.digest,
        run_id=model.run_id,
        labels=model.labels,
        threshold=model.threshold,
        engine=model.engine,
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
