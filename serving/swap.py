"""The versions of a model that a replica holds, and how it goes from one to the next without a missed request.

A version is loaded beside the one in use and checked; then one assignment makes it the one in use. Who began on a
version has a reference to it and ends on it. A version that fails its check is never used: the one in use stays, and
the registry remembers which it is, so a replica that is started then takes that one, too.
"""

import logging
import math
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rayseg.inference.predictor import Predictor, load_any
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.models.engine import Engine
from rayseg.records import Reject
from rayseg.tracking import aliases, registry
from rayseg.tracking.bundle import describe, example_file, mask_sha256
from rayseg.tracking.registry import ModelVersion
from serving.messages import Failure, Held, ModelInfo

logger = logging.getLogger(__name__)

_EXACT = Engine("openvino", "float32")  # what bundles record masks by
# Of the pixels that are foreground by either engine.
_MOST_DIFFERENT = 0.01
# Until a version is tried again that could not be loaded, as a full disk passes: doubled each time.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 600.0
_ASKED_FOR = 2  # versions kept that are neither in use nor the shadow, but were named by a client


class UnsoundError(Exception):
    """A version that must not be used."""


@dataclass(frozen=True)
class _Unsound:
    """Why a version is not used, and until when it is not tried again (of the monotonic clock)."""

    detail: str
    until: float = math.inf
    pause_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Loaded:
    """A version, ready to run."""

    info: ModelInfo
    predictor: Predictor | VolumePredictor
    example_sha256: str  # of the example's mask, by the engine that serves
    since: float

    def example(self) -> str:
        """The SHA-256 of the example's mask, made now."""
        return mask_sha256(self.predictor.segment_example().mask)


def check(bundle_dir: Path, serving: Predictor | VolumePredictor, exact: Predictor | VolumePredictor) -> str:
    """Runs the bundle's recorded slices, and returns the SHA-256 of the example's mask by `serving`.

    Raises:
        UnsoundError: `exact` does not give what was recorded, or `serving` something else.
    """
    description = describe(bundle_dir)
    example = example_file(description)
    recorded: Mapping[str, str] = {example: description["example_mask_sha256"]} | description.get(
        "golden_masks_sha256", {}
    )
    digest = ""
    for name, sha256 in recorded.items():
        blob = (bundle_dir / name).read_bytes()
        expected, mask = exact.segment_alone(blob).mask, serving.segment_alone(blob).mask
        if mask_sha256(expected) != sha256:
            raise UnsoundError(f"{name} does not give the recorded mask")
        either = np.count_nonzero(expected | mask)
        different = np.count_nonzero(expected != mask)
        if different > _MOST_DIFFERENT * either:
            raise UnsoundError(f"{name}: {different} of {either} pixels differ by {serving.engine} and {exact.engine}")
        if name == example:
            digest = mask_sha256(mask)
    return digest


class Versions:
    """What a replica holds: `current`, `previous`, `shadow`, and a few that clients named. Safe to use from threads."""

    def __init__(
        self,
        *,
        tracking_uri: str,
        model_uri: str,
        engine: Engine,
        threads: int,
        shadow: str | None = None,
        fallback: str | None = None,
    ) -> None:
        """Loads the version that `model_uri` names now.

        Args:
            tracking_uri: of MLflow.
            model_uri: models:/NAME@ALIAS, which is followed, or models:/NAME/VERSION.
            engine: that runs all of them.
            threads: that call it.
            shadow: an alias, which is followed, too.
            fallback: version to use where that one is unsound and the registry does not say which was in use.

        Raises:
            UnsoundError: no version can be used.
        """
        self.swaps = self.failures = 0
        self.failure: Failure | None = None
        self._current: Loaded | None = None
        self.previous: Loaded | None = None
        self.shadow: Loaded | None = None
        self._tracking_uri, self._model_uri = tracking_uri, model_uri
        self._engine, self._threads = engine, threads
        self.alias = model_uri.partition("@")[2] or None
        self._shadow_alias = shadow
        self._asked_for: OrderedDict[str, Loaded] = OrderedDict()
        self._unsound: dict[str, _Unsound] = {}
        self._loading = threading.Lock()  # one at a time: a load takes memory and a core
        self._told = ""
        self.name = model_uri.removeprefix("models:/").partition("@")[0].partition("/")[0]
        self._current = self._first(fallback)
        self._remember()
        self._follow_shadow()

    @property
    def current(self) -> Loaded:
        """The version in use."""
        assert self._current is not None
        return self._current

    def get(self, wanted: str | None, load: bool = True) -> Loaded | None:
        """The version that a number or an alias names; None where there is none to be used.

        With `load` one that is not held is loaded, which takes a while.
        """
        if wanted is None or wanted == self.alias:
            return self.current
        if wanted == self._shadow_alias and self.shadow is not None:
            return self.shadow
        held = self._held(wanted)
        if held is not None or not load:
            return held
        uri = f"models:/{self.name}/{wanted}" if wanted.isdigit() else f"models:/{self.name}@{wanted}"
        try:
            version = registry.resolve(self._tracking_uri, uri)
            loaded = self._load(version)
        except (UnsoundError, ValueError) as error:
            logger.info("no version for what a client named (%s)", type(error).__name__)
            return None
        with self._loading:
            self._asked_for[loaded.info.version] = loaded
            while len(self._asked_for) > _ASKED_FOR:
                self._asked_for.popitem(last=False)
        return loaded

    def poll(self) -> None:
        """Looks at the registry once, and goes to the version that the alias names now if that is sound."""
        if self.alias is not None:
            self._follow()
        self._follow_shadow()

    def watch(self, every_s: float) -> Callable[[], None]:
        """Polls in a thread until the function that is returned is called."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(every_s):
                try:
                    self.poll()
                except Exception as error:  # the registry may be away: the version in use stays
                    self._tell(f"registry: {type(error).__name__}")

        threading.Thread(target=run, name="rayseg-versions", daemon=True).start()
        return ended.set

    def held(self) -> tuple[Held, ...]:
        """All versions in memory, the one in use first."""
        places = [
            ("current", self.alias, self.current),
            ("previous", None, self.previous),
            ("shadow", self._shadow_alias, self.shadow),
            *(("", None, loaded) for loaded in list(self._asked_for.values())),
        ]
        of_version: dict[str, tuple[Loaded, list[str], list[str]]] = {}
        for role, alias, loaded in places:
            if loaded is not None:
                _, roles, names = of_version.setdefault(loaded.info.version, (loaded, [], []))
                roles += [role] if role else []
                names += [alias] if alias else []
        return tuple(
            Held(loaded.info, tuple(roles), tuple(names), loaded.since) for loaded, roles, names in of_version.values()
        )

    def _first(self, fallback: str | None) -> Loaded:
        version = registry.resolve(self._tracking_uri, self._model_uri)
        try:
            return self._load(version)
        except UnsoundError as error:
            self._refuse(version, str(error))
        served = None if self.alias is None else aliases.served(self._tracking_uri, self.name, self.alias)
        for number in (served, fallback):
            if number is not None and not self._is_unsound(number):
                uri = f"models:/{self.name}/{number}"
                return self._load(registry.resolve(self._tracking_uri, uri))
        raise UnsoundError(f"{version.uri}: {self._unsound[version.version].detail}")

    def _follow(self) -> None:
        version = registry.resolve(self._tracking_uri, self._model_uri)
        if version.version == self.current.info.version or self._is_unsound(version.version):
            return
        try:
            loaded = self._held(version.version) or self._load(version)
        except UnsoundError as error:
            self._refuse(version, str(error))
            return
        self.previous, self._current = self.current, loaded
        self.swaps += 1
        logger.info("%s version %s is in use, after %s", self.name, version.version, self.previous.info.version)
        self._remember()

    def _follow_shadow(self) -> None:
        if self._shadow_alias is None:
            return
        try:
            version = registry.resolve(self._tracking_uri, f"models:/{self.name}@{self._shadow_alias}")
        except ValueError:  # nobody bears the alias
            self.shadow = None
            return
        if self._is_unsound(version.version) or (self.shadow and self.shadow.info.version == version.version):
            return
        try:
            self.shadow = self._held(version.version) or self._load(version)
        except UnsoundError as error:
            self._refuse(version, str(error))

    def _is_unsound(self, number: str) -> bool:
        unsound = self._unsound.get(number)
        return unsound is not None and time.monotonic() < unsound.until

    def _held(self, number: str) -> Loaded | None:
        for loaded in (self._current, self.previous, self.shadow):
            if loaded is not None and loaded.info.version == number:
                return loaded
        return self._asked_for.get(number)

    def _load(self, version: ModelVersion) -> Loaded:
        """Raises UnsoundError, and what the registry raises where it is away."""
        if self._is_unsound(version.version):
            raise UnsoundError(self._unsound[version.version].detail)
        with self._loading, tempfile.TemporaryDirectory() as folder:
            held = self._held(version.version)
            if held is not None:
                return held  # meanwhile
            bundle_dir, _ = registry.fetch(self._tracking_uri, version.uri, folder)
            try:
                predictor = load_any(bundle_dir, engine=self._engine, threads=self._threads)
                exact = load_any(bundle_dir, engine=_EXACT)
                example_sha256 = check(bundle_dir, predictor, exact)
            except UnsoundError as error:
                self._unsound[version.version] = _Unsound(str(error))
                raise
            except Exception as error:  # a damaged bundle raises anything, and so does a machine without memory
                logger.warning("%s: %s", version.uri, error)
                detail = f"it cannot be loaded ({type(error).__name__})"
                before = self._unsound.get(version.version, _Unsound("", pause_s=_FIRST_PAUSE_S / 2))
                pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S)
                self._unsound[version.version] = _Unsound(detail, time.monotonic() + pause_s, pause_s)
                raise UnsoundError(detail) from error
            self._unsound.pop(version.version, None)
        bundle = predictor.bundle
        info = ModelInfo(
            name=version.name,
            version=version.version,
            alias=None,
            digest=bundle.digest,
            run_id=version.run_id,
            labels=bundle.labels.names,
            preprocess=bundle.preprocess,
            threshold=bundle.threshold,
            engine=predictor.engine,
            settings=self._engine,
            range=bundle.range,
            volumes=bundle.volumes,
        )
        logger.info("%s version %s is ready", version.name, version.version)
        return Loaded(info, predictor, example_sha256, time.time())

    def _refuse(self, version: ModelVersion, detail: str) -> None:
        if self.failure is None or self.failure.version != version.version:
            self.failures += 1
        self.failure = Failure(version.version, detail, time.time())
        logger.error("%s version %s is not taken: %s", version.name, version.version, detail)

    def _remember(self) -> None:
        if self.alias is None:
            return
        try:
            aliases.note_served(self._tracking_uri, self.name, self.alias, self.current.info.version)
        except Exception as error:  # it may be read only for us
            self._tell(f"registry: which version is in use could not be noted ({type(error).__name__})")

    def _tell(self, problem: str) -> None:
        """Once, not at every poll."""
        if problem != self._told:
            logger.warning("%s", problem)
        self._told = problem


@dataclass
class Shadowing:
    """Counts how a challenger's masks agree with those that were answered."""

    version: str = ""
    slices: int = 0
    identical: int = 0
    both: int = 0  # pixels of equal class, background left out
    sizes: int = 0  # pixels with a class, of one and of the other

    def add(self, version: str, answered: np.ndarray, other: np.ndarray | Reject) -> None:
        """A slice; another version begins anew."""
        if version != self.version:
            self.version, self.slices, self.identical, self.both, self.sizes = version, 0, 0, 0, 0
        self.slices += 1
        if isinstance(other, Reject):
            self.sizes += int(np.count_nonzero(answered))
            return
        self.identical += int(np.array_equal(answered, other))
        self.both += int(np.count_nonzero((answered == other) & (answered > 0)))
        self.sizes += int(np.count_nonzero(answered) + np.count_nonzero(other))
