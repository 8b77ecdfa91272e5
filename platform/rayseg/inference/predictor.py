"""The Predictor: slices or bytes in, masks out. Bulk, online and MLflow all run this one.

`python -m rayseg.inference.predictor BUNDLE_DIR` segments a bundle's example and prints what came out as JSON: how a
bundle is verified in a clean process.
"""

import base64
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from rayseg.data.stacks import alone, along, usable
from rayseg.dicom.reading import Slice, read_slice
from rayseg.records import Reason, Reject
from rayseg.tracking.bundle import Bundle, load, mask_sha256


@dataclass(frozen=True, eq=False)
class Prediction:
    """A slice with its mask: uint8 label map (rows, columns) on the slice's own grid."""

    slice: Slice
    mask: np.ndarray


class Predictor:
    """A loaded and warmed-up model.

    A slice's mask is byte-identical whatever else is in the call, whatever the call's size and however many threads
    TensorFlow has (see `Bundle.compile`), on one kind of processor and one build of TensorFlow. Safe to call from
    several threads. How many threads TensorFlow uses is the process's own affair: see `limit_threads`.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._probabilities = bundle.compile()

    @classmethod
    def load(cls, bundle_dir: str | Path) -> "Predictor":
        """The Predictor of the bundle in `bundle_dir`; raises ValueError where there is no sound bundle."""
        return cls(load(bundle_dir))

    @property
    def neighbours(self) -> int:
        """How many slices the model looks at on each side of the one that it segments."""
        return self.bundle.preprocess.neighbours

    def predict(self, slices: Sequence[Slice]) -> list[np.ndarray]:
        """One uint8 label map (rows, columns) a slice, on the slice's own grid.

        A model that looks at neighbours takes the slices for a whole series in order of position along the normal.
        """
        return [self._mask(stack) for stack in along(slices, self.neighbours)]

    def predict_stack(self, stack: Sequence[Slice | Reject | None]) -> Prediction | Reject:
        """The slice in the middle of 2 * `neighbours` + 1 with its mask, or why there is none; see `stacks.usable`."""
        made = self.judge_stack(stack)
        return made if isinstance(made, Reject) else made[0]

    def judge_stack(self, stack: Sequence[Slice | Reject | None]) -> tuple[Prediction, np.ndarray] | Reject:
        """As `predict_stack`, and the probabilities that the mask was decided by.

        They are float32 (channels, rows, columns) on the slice's own grid: of the one class, or of background and
        classes.
        """
        slices = usable(stack)
        if isinstance(slices, Reject):
            return slices
        centre = slices[len(slices) // 2]
        assert centre is not None
        probabilities_KHW = self._probabilities(slices)
        return Prediction(centre, self.bundle.decide(probabilities_KHW)), probabilities_KHW

    def segment(self, blobs: Sequence[bytes], frames: Sequence[int | None] | None = None) -> list[Prediction | Reject]:
        """For each object's bytes (DICOM, PNG, JPEG or TIFF) the slice with its mask, or why there is none.

        Each is a slice for itself: a model that looks at neighbours refuses it (NEEDS_NEIGHBOURS). `frames` says which
        frame of each object is meant, as `read_slice` does; by default they are single images.
        """
        color = self.bundle.preprocess.color
        wanted = frames or [None] * len(blobs)
        slices = [read_slice(blob, frame, color) for blob, frame in zip(blobs, wanted, strict=True)]
        return [self._single(slice) for slice in slices]

    def segment_example(self) -> Prediction:
        """The bundle's example with the mask that was recorded when it was saved, where all is well: see `bundle`."""
        slice = read_slice(self.bundle.example)
        assert isinstance(slice, Slice), "a bundle is not saved with an example that cannot be read"
        return Prediction(slice, self._mask(alone(slice, self.neighbours)))

    def _mask(self, stack: Sequence[Slice | None]) -> np.ndarray:
        return self.bundle.decide(self._probabilities(stack))

    def _single(self, slice: Slice | Reject) -> Prediction | Reject:
        if self.neighbours and not isinstance(slice, Reject):
            return Reject(
                Reason.NEEDS_NEIGHBOURS,
                f"the model looks at {self.neighbours} slices on each side too, and this is one alone: segment its "
                "series as a bulk job",
            )
        return self.predict_stack([slice])


def limit_threads(threads: int) -> None:
    """Bounds TensorFlow's threads of this process, as actors must: by default it takes every core of the machine.

    Raises:
        RuntimeError: TensorFlow already runs with other settings; call this before the first model is loaded.
    """
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def mask_png(mask: np.ndarray) -> bytes:
    """A uint8 label map (rows, columns) as an 8-bit grey PNG with the same values."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


class _PyfuncModel:
    """What MLflow calls: one row in, one row out; a bad input gives a row with its reason."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Column `dicom` (bytes) to `mask_png` (base64), `foreground_pixels`, and `reason`, `detail` of a reject."""
        rows = [_row(result) for result in self._predictor.segment([bytes(blob) for blob in model_input["dicom"]])]
        return pd.DataFrame(rows, columns=["mask_png", "foreground_pixels", "reason", "detail"], dtype=object)


def _row(result: Prediction | Reject) -> tuple[str | None, int | None, str | None, str | None]:
    if isinstance(result, Reject):
        return None, None, result.reason.value, result.detail
    return base64.b64encode(mask_png(result.mask)).decode(), int(np.count_nonzero(result.mask)), None, None


def _load_pyfunc(data_path: str) -> _PyfuncModel:
    """The entry point that MLflow's pyfunc flavour asks of a loader module."""
    return _PyfuncModel(Predictor.load(data_path))


def _main(bundle_dir: str) -> None:
    predictor = Predictor.load(bundle_dir)
    mask = predictor.segment_example().mask
    found = {"digest": predictor.bundle.digest, "example_mask_sha256": mask_sha256(mask)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
