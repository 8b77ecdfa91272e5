"""What networks take: images or volumes, told apart by their axes."""

from collections.abc import Sequence
from typing import Literal

VOLUME_AXES = 4  # of one sample: depth, height, width, channels


def input_dtype(shape: Sequence[int | None]) -> Literal["uint8", "float16"]:
    """The type of a network's input.

    uint8 of images (height, width, channels), whose intensities are 0 to 255; float16 of volumes (depth, height, width,
    channels), whose intensities are as `Intensity` makes them, about 0.
    """
    return "float16" if len(shape) == VOLUME_AXES else "uint8"
