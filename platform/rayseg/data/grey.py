"""A slice as a picture, with about the intensities that a model sees, and whether it sees colours."""

import dataclasses

import numpy as np

from rayseg.data.histogram import Histogram
from rayseg.data.intensity import Levels
from rayseg.data.preprocess import Preprocess
from rayseg.data.volume import VolumePreprocess
from rayseg.dicom.reading import Slice

_PERCENTILES = (0.5, 99.5)  # of a slice


def grey(preprocess: Preprocess | VolumePreprocess, slice: Slice) -> np.ndarray:
    """The slice on its own grid, uint8 (rows, columns).

    As the network's first channel where the model is of slices. Where it is of volumes, between the values that CT is
    clipped at; else between the percentiles 0.5 and 99.5 of the slice, as one alone does not tell those of its volume.
    """
    if isinstance(preprocess, Preprocess):
        alone_HWC = dataclasses.replace(preprocess, size=slice.shape, neighbours=0).apply(slice)
        return alone_HWC[..., 0]
    low, high = preprocess.intensity.low, preprocess.intensity.high
    if low is None or high is None:
        values = Histogram()
        values.add(slice)
        low, high = values.percentiles(_PERCENTILES)
    picture_HW = Levels(low, high, low, (high - low) or 1.0).apply(slice)
    return np.rint(picture_HW * 255).astype(np.uint8)


def sees_color(preprocess: Preprocess | VolumePreprocess) -> bool:
    """Whether the network sees the colours of image files."""
    return isinstance(preprocess, Preprocess) and preprocess.color
