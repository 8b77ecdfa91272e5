"""Several networks as one: their mean, over mirror images too, as a Keras model that any engine runs.

`inference.predictor` averages models of other sizes and preprocessing when it runs; this is for models of one training
set, such as those of the folds, which can then be registered, promoted and served as one.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops

from rayseg.models.inputs import input_dtype
from rayseg.models.network import portable


def mean(models: Sequence[keras.Model], flips: Sequence[tuple[int, ...]] = ((),)) -> keras.Model:
    """The mean of the models' probabilities, uint8 (N, H, W, C) to float32 (N, H, W, K).

    Of volumes float16 (N, D, H, W, C) to float32 (N, D, H, W, K).

    Args:
        models: all of one input and output shape.
        flips: axes of an image (0 rows, 1 columns) or a volume (0 depth, 1 rows, 2 columns) along which it is mirrored,
            and what is found is mirrored back; () is the image as it is. All of them count alike.

    Raises:
        ValueError: models of several shapes.
    """
    first = models[0]
    if any((one.input_shape, one.output_shape) != (first.input_shape, first.output_shape) for one in models):
        raise ValueError("ensemble: models of one input and output size expected")
    shape = first.input_shape[1:]
    images = keras.Input(shape, dtype=input_dtype(shape), name="image")
    probabilities = []
    for number, model in enumerate(models):
        alone = portable(model)
        member = keras.Model(alone.input, alone.output, name=f"member_{number}")
        probabilities += [_flipped(member(_flipped(images, axes)), axes) for axes in flips]
    probability = (
        layers.Average(dtype="float32", name="mean")(probabilities) if len(probabilities) > 1 else probabilities[0]
    )
    return keras.Model(images, probability, name="ensemble")


def _flipped(values_NHWC: Any, axes: tuple[int, ...]) -> Any:
    for axis in axes:  # one after the other: OpenVINO reads no reversal of several axes at once
        values_NHWC = ops.flip(values_NHWC, axis + 1)
    return values_NHWC
