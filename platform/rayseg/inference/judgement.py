"""What a model says of a slice: its mask, and what that was decided by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rayseg.dicom.reading import Slice


@dataclass(frozen=True, eq=False)
class Prediction:
    """A slice with its mask: uint8 label map (rows, columns) on the slice's own grid."""

    slice: Slice
    mask: np.ndarray


@dataclass(frozen=True, eq=False)
class Judgement(Prediction):
    """With what the mask was decided by.

    image_HWC: uint8, what the (first) network saw of the slice; None where it saw a volume.
    """

    image_HWC: np.ndarray | None
    _probabilities_KHW: Callable[[], np.ndarray]
    _members: Callable[[], Sequence[np.ndarray]] = list
    classes: int = 1  # of the model

    @cached_property
    def probabilities_KHW(self) -> np.ndarray:
        """Float32 (channels, rows, columns) on the slice's own grid, of the one class, or of background and several."""
        return self._probabilities_KHW()

    @cached_property
    def members(self) -> Sequence[np.ndarray]:
        """The masks, as the mask, of each model of an ensemble, or of each mirror image of one model; else none."""
        return self._members()
