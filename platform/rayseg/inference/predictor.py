"""The Predictor: slices or bytes in, masks out. Bulk, online and MLflow all run this one.

`python -m rayseg.inference.predictor BUNDLE_DIR [REPEATS]` segments a bundle's recorded slices and prints what came out
as JSON: how a bundle is verified, and measured, in a clean process.
"""

import base64
import io
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from rayseg.ahead import mapped
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import Known
from rayseg.data.stacks import alone, along, usable
from rayseg.dicom.reading import Slice, Source, read_slice
from rayseg.inference import cells
from rayseg.inference.judgement import Judgement, Prediction
from rayseg.inference.networks import Mirror, check_classes, compile_all, known_of, may_find
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.models.engine import Compiled, Engine
from rayseg.records import Reason, Reject
from rayseg.tracking.bundle import Bundle, decide, describe, load, load_keras, mask_sha256, preprocess_of

FLIPS: dict[str | None, tuple[tuple[int, ...], ...]] = {
    None: ((),),
    "columns": ((), (1,)),
    "both": ((), (0,), (1,), (0, 1)),
}


class Predictor:
    """A model, or several whose probabilities are averaged, compiled for an engine.

    A slice's mask is byte-identical whatever else is in the call, whatever the call's size and however many threads
    there are (see `models.engine`), on one kind of processor and one version of the engine. Safe to call from several
    threads, of which `threads` compute at once.
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
        self.bundles = tuple(bundles)
        self.bundle = bundles[0]
        self.threshold = statistics.fmean(bundle.threshold for bundle in bundles)
        self.engine = compiled[0].description
        self._preprocesses = [_of_slices(bundle) for bundle in bundles]
        self._compiled = tuple(compiled)
        if mirror == "all":
            raise ValueError("mirror: all is for models of volumes; a slice has columns, and both")
        self._flips = FLIPS[mirror]
        self._several = len(bundles) > 1 or mirror is not None
        self._known = known
        self._ahead = threads + 1  # so that all are busy while a result is taken
        self._pool = ThreadPoolExecutor(threads, "slices")  # begins none before it is used
        check_classes(bundles)
        _check_alike(self._preprocesses)

    @classmethod
    def load(
        cls,
        *bundle_dirs: str | Path,
        engine: Engine = Engine(),  # noqa: B008, it is frozen
        threads: int = 1,
        mirror: Mirror | None = None,
        known: Known | None = None,
    ) -> "Predictor":
        """The Predictor of the bundles in `bundle_dirs`; `known` is of these together, as they were evaluated.

        Raises:
            ValueError: there is no sound bundle in one of them, or they are not of the same classes.
        """
        bundles = [load(folder) for folder in bundle_dirs]
        compiled = compile_all(bundle_dirs, bundles, engine, threads)
        return cls(bundles, compiled, mirror, threads, known)

    @property
    def neighbours(self) -> int:
        """How many slices the model looks at on each side of the one that it segments."""
        return self._preprocesses[0].neighbours

    @property
    def needs_series(self) -> bool:
        """Whether a slice alone, or an image file, cannot be segmented."""
        return self.neighbours > 0

    @property
    def color(self) -> bool:
        """Whether the network sees the colours of image files."""
        return self._preprocesses[0].color

    @property
    def known(self) -> Known:
        """What to judge by, see `networks.known_of`."""
        return known_of(self.bundle, self._several, self._known)

    def predict(self, slices: Sequence[Slice]) -> list[np.ndarray]:
        """One uint8 label map (rows, columns) a slice, on the slice's own grid.

        A model that looks at neighbours takes the slices for a whole series in order of position along the normal.
        """
        return [self._mask(stack) for stack in along(slices, self.neighbours)]

    def predict_stack(self, stack: Sequence[Slice | Reject | None]) -> Prediction | Reject:
        """The slice in the middle of 2 * `neighbours` + 1 with its mask, or why there is none; see `stacks.usable`."""
        judged = self.judge_stack(stack)
        return judged if isinstance(judged, Reject) else Prediction(judged.slice, judged.mask)

    def judge_stack(self, stack: Sequence[Slice | Reject | None], threshold: float | None = None) -> Judgement | Reject:
        """As `predict_stack`, and what the mask was decided by.

        `threshold` stands for the model's own, where it has one class.
        """
        slices = usable(stack)
        return slices if isinstance(slices, Reject) else self._judge(slices, threshold)

    def judge_stacks(self, stacks: Iterable[Sequence[Slice | Reject | None]]) -> Iterator[Judgement | Reject]:
        """`judge_stack` of each, in order; those of all that call this share `threads` threads.

        One that fails by a defect of ours comes as INTERNAL, with the type of the error.
        """

        def judged(stack: Sequence[Slice | Reject | None]) -> Judgement | Reject:
            try:
                return self.judge_stack(stack)
            except Exception as error:
                return Reject(Reason.INTERNAL, type(error).__name__)

        return mapped(self._pool, judged, stacks, self._ahead)

    def judge_series(self, slices: Iterable[Slice | Reject]) -> Iterator[tuple[int, Judgement | Reject]]:
        """Each slice of a whole series, given in order, with its number from 0: see `judge_stacks`."""
        return enumerate(self.judge_stacks(along(slices, self.neighbours)))

    def judge_alone(self, slice: Slice | Reject, threshold: float | None = None) -> Judgement | Reject:
        """As `judge_stack` for a slice that is no part of a series; NEEDS_NEIGHBOURS where the model looks at some."""
        if self.neighbours and not isinstance(slice, Reject):
            return Reject(
                Reason.NEEDS_NEIGHBOURS,
                f"the model looks at {self.neighbours} slices on each side too, and this is one alone: segment its "
                "series as a whole",
            )
        return self.judge_stack([slice], threshold)

    def segment(self, blobs: Sequence[bytes], frames: Sequence[int | None] | None = None) -> list[Prediction | Reject]:
        """For each object's bytes (DICOM, PNG, JPEG or TIFF) the slice with its mask, or why there is none.

        Each is a slice for itself: a model that looks at neighbours refuses it (NEEDS_NEIGHBOURS). `frames` says which
        frame of each object is meant, as `read_slice` does; by default they are single images.
        """
        sources = {id(blob): Source(blob, self.color) for blob in blobs}  # one of several frames once
        wanted = frames or [None] * len(blobs)
        judged = [self.judge_alone(sources[id(blob)].slice(frame)) for blob, frame in zip(blobs, wanted, strict=True)]
        return [one if isinstance(one, Reject) else Prediction(one.slice, one.mask) for one in judged]

    def segment_example(self) -> Prediction:
        """The bundle's example with the mask that was recorded when it was saved, where all is well: see `bundle`."""
        return self.segment_alone(self.bundle.example)

    def segment_alone(self, recorded: bytes) -> Prediction:
        """One of the bundle's slices, whose mask is of it without neighbours."""
        slice = read_slice(recorded)
        assert isinstance(slice, Slice), "a bundle is not saved with a slice that cannot be read"
        return Prediction(slice, self._mask(alone(slice, self.neighbours)))

    def _mask(self, stack: Sequence[Slice | None]) -> np.ndarray:
        return self._judge(stack).mask

    def _judge(self, stack: Sequence[Slice | None], threshold: float | None = None) -> Judgement:
        """By the mean over models and flips."""
        threshold = self.threshold if threshold is None else threshold
        images = {preprocess: preprocess.apply(*stack) for preprocess in self._preprocesses}
        inputs_NHWC = [self._flipped(images[preprocess]) for preprocess in self._preprocesses]
        screens = [compiled.screen for compiled in self._compiled if compiled.screen is not None]
        assert len(screens) in (0, len(self._compiled)), "one engine runs all models"
        screened = [screen(image) for screen, image in zip(screens, inputs_NHWC, strict=True)] if screens else []
        slice, image_HWC = stack[len(stack) // 2], images[self._preprocesses[0]]
        assert slice is not None
        classes = len(self.bundle.labels.names)
        if screened and not any(may_find(probabilities, threshold) for probabilities in screened):
            # Few want to know by how much nothing was found.
            nothing = np.zeros(slice.shape, np.uint8)
            count = len(self.bundles) if len(self.bundles) > 1 else len(self._flips)
            members = [nothing] * (count if self._several else 0)
            return Judgement(
                slice, nothing, image_HWC, lambda: self._average(screened, stack), lambda: members, classes
            )
        exact = [compiled.exact(image) for compiled, image in zip(self._compiled, inputs_NHWC, strict=True)]
        probabilities_KHW = self._average(exact, stack)
        mask = decide(probabilities_KHW, threshold)
        return Judgement(
            slice, mask, image_HWC, lambda: probabilities_KHW, lambda: self._members(exact, stack, threshold), classes
        )

    def _flipped(self, image_HWC: np.ndarray) -> np.ndarray:
        return np.stack([np.flip(image_HWC, axes) for axes in self._flips])

    def _average(self, of_models_NHWK: Sequence[np.ndarray], stack: Sequence[Slice | None]) -> np.ndarray:
        of_models = self._of_models(of_models_NHWK, stack)
        return of_models[0] if len(of_models) == 1 else np.mean(of_models, axis=0)

    def _of_models(self, of_models_NHWK: Sequence[np.ndarray], stack: Sequence[Slice | None]) -> list[np.ndarray]:
        return [
            bundle.restore(
                np.mean([np.flip(one, axes) for one, axes in zip(made_NHWK, self._flips, strict=True)], axis=0), stack
            )
            for bundle, made_NHWK in zip(self.bundles, of_models_NHWK, strict=True)
        ]

    def _members(
        self, of_models_NHWK: Sequence[np.ndarray], stack: Sequence[Slice | None], threshold: float
    ) -> list[np.ndarray]:
        """See `Judgement.members`; all by the one threshold that decides about the mean."""
        if not self._several:
            return []
        if len(self.bundles) > 1:
            apart = self._of_models(of_models_NHWK, stack)
        else:
            flipped = zip(of_models_NHWK[0], self._flips, strict=True)
            apart = [self.bundle.restore(np.flip(one, axes), stack) for one, axes in flipped]
        return [decide(one, threshold) for one in apart]


def _of_slices(bundle: Bundle) -> Preprocess:
    if not isinstance(bundle.preprocess, Preprocess):
        raise ValueError("ensemble: models of slices and models of volumes cannot be averaged")
    return bundle.preprocess


def _check_alike(preprocesses: Sequence[Preprocess]) -> None:
    for preprocess in preprocesses[1:]:
        if preprocess.neighbours != preprocesses[0].neighbours:
            raise ValueError("ensemble: models that look at equally many neighbours expected")
        if preprocess.color != preprocesses[0].color:
            raise ValueError("ensemble: models of either grey or colour images expected")


AnyPredictor = Predictor | VolumePredictor


def load_any(
    *bundle_dirs: str | Path,
    engine: Engine = Engine(),  # noqa: B008, it is frozen
    threads: int = 1,
    mirror: Mirror | None = None,
    known: Known | None = None,
) -> AnyPredictor:
    """What runs the models in `bundle_dirs`, of slices or of volumes as the first one says: see `Predictor.load`."""
    kind = Predictor if isinstance(preprocess_of(describe(Path(bundle_dirs[0]))), Preprocess) else VolumePredictor
    return kind.load(*bundle_dirs, engine=engine, threads=threads, mirror=mirror, known=known)


def mask_png(mask: np.ndarray) -> bytes:
    """A uint8 label map (rows, columns) as an 8-bit grey PNG with the same values."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


class _PyfuncModel:
    """What MLflow calls: one row in, one row out; a bad input gives a row with its reason."""

    def __init__(self, predictor: AnyPredictor) -> None:
        self._predictor = predictor

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Column `dicom` (`cells`) to `mask_png` (base64), `foreground_pixels`, and `reason`, `detail` of a reject."""
        objects = [cells.read(cell) for cell in model_input["dicom"]]
        results = iter(self._predictor.segment([blob for blob in objects if isinstance(blob, bytes)]))
        rows = [_row(blob if isinstance(blob, Reject) else next(results)) for blob in objects]
        return pd.DataFrame(rows, columns=["mask_png", "foreground_pixels", "reason", "detail"], dtype=object)


def _row(result: Prediction | Reject) -> tuple[str | None, int | None, str | None, str | None]:
    if isinstance(result, Reject):
        return None, None, result.reason.value, result.detail
    return base64.b64encode(mask_png(result.mask)).decode(), int(np.count_nonzero(result.mask)), None, None


def _load_pyfunc(data_path: str) -> _PyfuncModel:
    """The entry point that MLflow's pyfunc flavour asks of a loader module."""
    return _PyfuncModel(load_any(data_path))


def _main(bundle_dir: str, repeats: int = 0) -> None:
    """What `tracking.verification` runs: the masks of the bundle's slices and, with `repeats`, what one takes."""
    predictor = load_any(bundle_dir, engine=Engine("openvino", "float32"))
    mask = predictor.segment_example().mask
    golden = describe(Path(bundle_dir)).get("golden_masks_sha256", {})
    measured: dict[str, Any] = {
        "digest": predictor.bundle.digest,
        "example_mask_sha256": mask_sha256(mask),
        "golden_masks_sha256": {
            name: mask_sha256(predictor.segment_alone(Path(bundle_dir, name).read_bytes()).mask) for name in golden
        },
    }
    if repeats:
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            predictor.segment_example()
            seconds.append(time.perf_counter() - began)
        measured |= {"latency_s": statistics.median(seconds), "memory_mb": _greatest_memory_mb()}
    load_keras(bundle_dir)  # is what the digest was made of; last, as TensorFlow takes memory
    print(json.dumps(measured))


def _greatest_memory_mb() -> float | None:
    """The greatest resident memory of this process, 10^6 bytes; None on systems that do not tell.

    By Linux's `VmHWM`: `getrusage` would count what the process that started this one took.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return None if peak is None else int(peak[1]) * 1024 / 1e6


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
