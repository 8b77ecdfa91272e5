"""The VolumePredictor: a whole series in, a mask for each of its slices out, by windows of a grid in millimetres.

It walks along the normal of the slices. Of the network's grid it holds the slices that windows still touch; what is
finished goes back onto the source's slices, where it is decided. Bulk, online and local calls all run this one.
"""

import itertools
import statistics
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rayseg.ahead import mapped
from rayseg.data import walk
from rayseg.data.range import Known
from rayseg.data.volume import Grid, VolumePreprocess, geometry
from rayseg.dicom.reading import Slice, Source
from rayseg.inference.judgement import Judgement, Prediction
from rayseg.inference.networks import Mirror, check_classes, compile_all, known_of, may_find
from rayseg.models.engine import Compiled, Engine
from rayseg.records import Reason, Reject
from rayseg.tracking.bundle import Bundle, decide, load, read_example

_DEPTH, _ROWS, _COLUMNS = range(3)  # axes of a window (D, H, W, C)
_FLIPS: dict[str | None, tuple[tuple[int, ...], ...]] = {
    None: ((),),
    "columns": ((), (_COLUMNS,)),
    "both": ((), (_ROWS,), (_COLUMNS,), (_ROWS, _COLUMNS)),
    "all": tuple(some for count in range(4) for some in itertools.combinations((_DEPTH, _ROWS, _COLUMNS), count)),
}


@dataclass(frozen=True, eq=False)
class VolumePrediction:
    """A volume with its mask: uint8 label maps (slices, rows, columns), each on its slice's own grid."""

    slices: Sequence[Slice]
    mask: np.ndarray


class VolumePredictor:
    """A model of volumes, or several whose probabilities are averaged, compiled for an engine.

    A series' masks are byte-identical whatever else is at work, whatever the call and however many threads there are,
    on one kind of processor and one version of the engine. Safe to call from several threads: of the windows of all
    series `threads` are computed at once.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        compiled: Sequence[Compiled],
        mirror: Mirror | None = None,
        threads: int = 1,
        known: Known | None = None,
    ) -> None:
        assert bundles
        assert len(bundles) == len(compiled)
        check_classes(bundles)
        self.bundles = tuple(bundles)
        self.bundle = bundles[0]
        self.threshold = statistics.fmean(bundle.threshold for bundle in bundles)
        self.engine = compiled[0].description
        self._preprocesses = [_of_volumes(bundle) for bundle in bundles]
        self._compiled = tuple(compiled)
        self._flips = _FLIPS[mirror]
        self._several = len(bundles) > 1 or mirror is not None
        self._known = known
        self._ahead = threads + 1  # so that all are busy while a result is taken
        self.windows = 0  # that were computed so far
        self._counting = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, "windows")  # begins none before it is used

    @classmethod
    def load(
        cls,
        *bundle_dirs: str | Path,
        engine: Engine = Engine(),  # noqa: B008, it is frozen
        threads: int = 1,
        mirror: Mirror | None = None,
        known: Known | None = None,
    ) -> "VolumePredictor":
        """The VolumePredictor of the bundles in `bundle_dirs`; `known` is of these together, as they were evaluated.

        Raises:
            ValueError: there is no sound bundle of volumes in one of them, or they are not of the same classes.
        """
        bundles = [load(folder) for folder in bundle_dirs]
        return cls(bundles, compile_all(bundle_dirs, bundles, engine, threads), mirror, threads, known)

    @property
    def needs_series(self) -> bool:
        """Whether a slice alone, or an image file, cannot be segmented: always."""
        return True

    @property
    def color(self) -> bool:
        """Whether the network sees the colours of image files: never."""
        return False

    @property
    def known(self) -> Known:
        """What to judge by, see `networks.known_of`."""
        return known_of(self.bundle, self._several, self._known)

    def predict(self, slices: Sequence[Slice]) -> list[np.ndarray]:
        """One uint8 label map (rows, columns) a slice of a series, in the order given, on the slice's own grid.

        Raises:
            ValueError: the slices do not lie as one stack.
        """
        masks: dict[int, np.ndarray] = {}
        for number, judged in self.judge_series(slices):
            if isinstance(judged, Reject):
                raise ValueError(f"slices: {judged.reason}: {judged.detail}")
            masks[number] = judged.mask
        return [masks[number] for number in range(len(slices))]

    def judge_series(
        self, slices: Iterable[Slice | Reject], threshold: float | None = None
    ) -> Iterator[tuple[int, Judgement | Reject]]:
        """Each slice of a series with its number, as given from 0, and its mask, or why there is none.

        They come in the order of their positions along the normal, those without a mask before all others. A slice that
        cannot be used is left out, and its neighbours bridge the gap, as where volumes are measured. One that the store
        failed to give refuses the series: another try would see it, and a result must not depend on a bad day. What
        fails by a defect of ours comes as INTERNAL, with the type of the error.

        Args:
            slices: of a whole series, in any order; all are held until the last mask is out.
            threshold: stands for the model's own, where it has one class.
        """
        given = list(slices)
        left = dict(enumerate(given))
        try:
            for number, judged in self._judged(given, self.threshold if threshold is None else threshold):
                del left[number]
                yield number, judged
        except Exception as error:
            for number, one in left.items():
                yield number, one if isinstance(one, Reject) else Reject(Reason.INTERNAL, type(error).__name__)

    def judge_alone(self, slice: Slice | Reject, threshold: float | None = None) -> Reject:
        """NEEDS_NEIGHBOURS, as the model sees volumes, or what the slice itself is refused for."""
        del threshold
        if isinstance(slice, Reject):
            return slice
        return Reject(
            Reason.NEEDS_NEIGHBOURS, "the model sees volumes, and this is one slice: segment its series as a whole"
        )

    def segment(self, blobs: Sequence[bytes], frames: Sequence[int | None] | None = None) -> list[Prediction | Reject]:
        """For each object's bytes (DICOM) the slice with its mask, or why there is none.

        Those of one SeriesInstanceUID are one series, which is taken for whole, in any order. One alone is refused
        (NEEDS_NEIGHBOURS). `frames` says which frame of each object is meant, as `read_slice` does.
        """
        sources = {id(blob): Source(blob) for blob in blobs}
        wanted = frames or [None] * len(blobs)
        results: list[Prediction | Reject] = []
        series: dict[str, list[int]] = {}
        slices: dict[int, Slice] = {}
        for number, (blob, frame) in enumerate(zip(blobs, wanted, strict=True)):
            slice = sources[id(blob)].slice(frame)
            results.append(self.judge_alone(slice))
            if isinstance(slice, Slice) and slice.header is not None:
                slices[number] = slice
                series.setdefault(slice.header.series_instance_uid, []).append(number)
        for numbers in series.values():
            if len(numbers) == 1:
                continue
            for place, judged in self.judge_series([slices[number] for number in numbers]):
                one = judged if isinstance(judged, Reject) else Prediction(judged.slice, judged.mask)
                results[numbers[place]] = one
        return results

    def segment_example(self) -> VolumePrediction:
        """The bundle's example with the mask that was recorded when it was saved, where all is well: see `bundle`."""
        return self.segment_alone(self.bundle.example)

    def segment_alone(self, recorded: bytes) -> VolumePrediction:
        """One of the bundle's volumes."""
        slices = read_example(recorded)
        assert not isinstance(slices, Reject), "a bundle is not saved with a volume that cannot be read"
        return VolumePrediction(slices, np.stack(self.predict(slices)))

    def _judged(self, given: Sequence[Slice | Reject], threshold: float) -> Iterator[tuple[int, Judgement | Reject]]:
        usable = [(number, one) for number, one in enumerate(given) if isinstance(one, Slice)]
        places = [place for _, slice in usable if (place := geometry(slice)) is not None]
        refusal = _refusal(given)
        grids = [one.grid(places) for one in self._preprocesses] if usable and refusal is None else []
        refusal = refusal or next((grid for grid in grids if isinstance(grid, Reject)), None)
        for number, one in enumerate(given):
            if isinstance(one, Reject):
                yield number, one
            elif refusal is not None:
                yield number, refusal
        if refusal is not None or not usable:
            return
        laid = [grid for grid in grids if isinstance(grid, Grid)]
        in_order = [usable[place] for place in laid[0].order.tolist()]
        slices = [slice for _, slice in in_order]
        run = partial(mapped, self._pool, ahead=self._ahead)
        planes = [
            walk.planes(preprocess, grid, slices, partial(self._forward, compiled, threshold), run)
            for preprocess, grid, compiled in zip(self._preprocesses, laid, self._compiled, strict=True)
        ]
        judge = partial(self._judge, laid, threshold)
        judged = run(judge, zip(slices, zip(*planes, strict=True), strict=True))
        yield from zip((number for number, _ in in_order), judged, strict=True)

    def _forward(self, compiled: Compiled, threshold: float, patch_DHWC: np.ndarray) -> np.ndarray:
        """A window and its mirror images through the network: the mean, float32 (D, H, W, K)."""
        inputs_NDHWC = np.stack([np.flip(patch_DHWC, flip) for flip in self._flips])
        outputs_NDHWK = None if compiled.screen is None else compiled.screen(inputs_NDHWC)
        if outputs_NDHWK is None or may_find(outputs_NDHWK, threshold):
            outputs_NDHWK = compiled.exact(inputs_NDHWC)
        with self._counting:
            self.windows += 1
        turned = [np.flip(one, flip) for one, flip in zip(outputs_NDHWK, self._flips, strict=True)]
        return turned[0] if len(turned) == 1 else np.mean(turned, axis=0)

    def _judge(
        self, grids: Sequence[Grid], threshold: float, of_slice: tuple[Slice, tuple[np.ndarray, ...]]
    ) -> Judgement:
        """A slice by the mean over models, on its own grid."""
        slice, planes = of_slice
        of_models = [walk.restore(grid, plane_KHW) for grid, plane_KHW in zip(grids, planes, strict=True)]
        probabilities_KHW = of_models[0] if len(of_models) == 1 else np.mean(of_models, axis=0)
        members = [decide(one, threshold) for one in of_models] if len(of_models) > 1 else []
        mask, classes = decide(probabilities_KHW, threshold), len(self.bundle.labels.names)
        return Judgement(slice, mask, None, lambda: probabilities_KHW, lambda: members, classes)


def _of_volumes(bundle: Bundle) -> VolumePreprocess:
    if not isinstance(bundle.preprocess, VolumePreprocess):
        raise ValueError("ensemble: models of volumes and models of slices cannot be averaged")
    return bundle.preprocess


def _refusal(given: Sequence[Slice | Reject]) -> Reject | None:
    """Why none of a series' slices can be segmented, but for where they lie."""
    for one in given:
        if isinstance(one, Reject) and one.reason == Reason.READ_FAILED:
            return Reject(Reason.READ_FAILED, f"a slice of the series: {one.detail}")
        if isinstance(one, Slice) and geometry(one) is None:
            return Reject(Reason.NEEDS_NEIGHBOURS, "the model sees volumes, and an image file is none")
    return None
