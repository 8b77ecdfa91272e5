"""What the ingress and the model deployment say to each other; neither needs what the other one imports."""

import time
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np

from rayseg.data.conformal import VolumeErrors
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import Range
from rayseg.data.volume import VolumePreprocess
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.inference.quality import Look
from rayseg.models.engine import Engine
from rayseg.records import Reject

Priority = Literal["urgent", "normal", "bulk"]
_LARGE_BYTES = 2**20

PRIORITIES: tuple[Priority, ...] = get_args(Priority)


@dataclass(frozen=True)
class ModelInfo:
    """What answers say about the model that made them."""

    name: str
    version: str
    alias: str | None  # the one that was asked for, where the model was asked for by alias
    digest: str
    run_id: str
    labels: tuple[str, ...]  # foreground classes; value `i + 1` of a mask is `labels[i]`
    preprocess: Preprocess | VolumePreprocess
    threshold: float
    engine: str = ""  # that runs it, with its version and precision
    settings: Engine = field(default_factory=Engine)  # as it was configured: part of what names a mask
    range: Range | None = None  # what it was trained on, to judge inputs by
    volumes: VolumeErrors = VolumeErrors()  # noqa: RUF009, it is frozen


@dataclass(frozen=True)
class Ask:
    """How a slice, or a group of them, is to be segmented."""

    model: str | None = None  # version or alias; None: the version in use
    threshold: float | None = None  # in the place of the model's own, where it has one class
    priority: Priority = "urgent"
    # Who asked has given up then, by the monotonic clock of this process. What travels is what is left: clocks of two
    # machines may differ by more than a deadline.
    until: float = field(default_factory=lambda: time.monotonic() + 60)

    @property
    def seconds(self) -> float:
        """What is left."""
        return self.until - time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        return Ask._arrived, (self.model, self.threshold, self.priority, self.seconds)

    @staticmethod
    def _arrived(model: str | None, threshold: float | None, priority: Priority, seconds: float) -> "Ask":
        return Ask(model, threshold, priority, time.monotonic() + seconds)


@dataclass(frozen=True)
class Refusal:
    """Why the service, not the input, is the reason that there is no mask."""

    reason: Literal["busy", "deadline", "unknown_model", "unavailable", "invalid_parameter"]
    detail: str


@dataclass(frozen=True)
class Segmented:
    """A slice's mask: uint8 class indices (rows, columns) on the source grid."""

    mask: np.ndarray
    look: Look
    geometry: Geometry | None  # None for an image file
    model: ModelInfo
    batch_size: int  # slices at work at the same time
    forward_ms: float  # decoding included
    series: tuple[str, ...] = field(default=(), repr=False)  # SeriesInstanceUID, where it has one: never to be logged

    def __getstate__(self) -> dict[str, Any]:
        """With a large mask compressed: what the straight way to the ingress refuses would be computed once more."""
        state = dict(self.__dict__)
        if self.mask.nbytes > _LARGE_BYTES:
            state["mask"] = self.mask.shape, zlib.compress(self.mask.tobytes(), level=1)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        mask = state["mask"]
        if not isinstance(mask, np.ndarray):
            shape, packed = mask
            state = state | {"mask": np.frombuffer(zlib.decompress(packed), np.uint8).reshape(shape)}
        self.__dict__.update(state)


@dataclass(frozen=True)
class Masked:
    """A slice of a series: its mask, and what `quality` keeps of it."""

    mask: np.ndarray
    look: Look


@dataclass(frozen=True)
class Stacked:
    """The masks of some slices of a series, or why one has none."""

    masks: list[Masked | Reject]
    model: ModelInfo
    forward_ms: float  # of all of them


@dataclass(frozen=True)
class Health:
    """Outcome of the last run of the bundle's example: `matches` says whether its mask is the recorded one."""

    model: ModelInfo
    matches: bool
    seconds: float  # that it took, queue included
    at: float  # seconds since the epoch


@dataclass(frozen=True)
class Held:
    """A version that a replica has in memory."""

    model: ModelInfo
    roles: tuple[str, ...]  # "current", "previous", "shadow"; none where only a client asked for it
    aliases: tuple[str, ...]  # by which it is followed
    since: float  # seconds since the epoch: loaded and checked


@dataclass(frozen=True)
class Failure:
    """A version that was not taken."""

    version: str
    detail: str
    at: float  # seconds since the epoch


@dataclass(frozen=True)
class Agreement:
    """Of the shadow's masks with those that were answered."""

    version: str
    slices: int
    identical: int
    dice: float | None  # pooled over all pixels of all slices; None where nobody found anything


@dataclass(frozen=True)
class State:
    """What a replica holds and does."""

    replica: str
    held: tuple[Held, ...]  # the version in use is the first
    failure: Failure | None  # the last one
    swaps: int
    failures: int
    waiting: int  # slices
    running: int
    dropped: int  # slices that nobody waited for any more
    agreement: Agreement | None


class Segmenter(Protocol):
    """The model as the routes see it."""

    async def segment(self, body: bytes, ask: Ask) -> Segmented | Reject | Refusal:
        """One object's bytes to its mask or the reason there is none."""

    async def segment_stacks(self, slices: list[Slice | None], ask: Ask) -> Stacked | Refusal:
        """The masks of all slices but the first and last few, which are only there as the others' neighbours."""

    async def segment_series(self, slices: list[Slice | Reject], ask: Ask) -> Stacked | Refusal:
        """The masks of a whole series by a model of volumes, in the order of the slices."""

    async def describe(self, model: str | None = None) -> ModelInfo | Refusal:
        """The version in use, or the one that a version number or alias names."""

    async def state(self) -> State:
        """What one of the replicas holds."""

    async def health(self) -> Health:
        """Outcome of the last check of a replica; nothing is run for it."""
