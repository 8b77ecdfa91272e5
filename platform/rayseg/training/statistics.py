"""Statistics of batch normalisation for weights that no batch was normalised with: moving averages of weights."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np


def estimate(
    model: keras.Model,
    images: Iterable[Any],
    forward: Callable[[Any], Any],
    mean_over_ranks: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Replaces the moving mean and variance of each normalisation that learns by the mean over some batches.

    What torch's `update_bn` does. All other variables of the model, seeds of dropout included, stay as they are.

    Args:
        model: its weights are those that the statistics are for.
        images: batches of the training split, as a training step takes them.
        forward: runs the model on one of them as in training.
        mean_over_ranks: of float64 values of this rank, the mean over all ranks.
    """
    layers = normalisations(model)
    statistics = [value for layer in layers for value in (layer.moving_mean, layer.moving_variance)]
    momenta = [layer.momentum for layer in layers for _ in range(2)]
    before = [variable.numpy() for variable in model.non_trainable_variables]
    sums = [np.zeros(value.shape) for value in statistics]
    batches = 0
    for image in images:
        for value in statistics:
            value.assign(np.zeros(value.shape, np.float32))
        forward(image)
        # A moving average that begins with zero has the batch's own value times one minus the momentum.
        for total, value, momentum in zip(sums, statistics, momenta, strict=True):
            total += value.numpy() / (1 - momentum)
        batches += 1
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        variable.assign(value)
    if batches:
        means = mean_over_ranks(np.concatenate([total.ravel() for total in sums]) / batches)
        ends = np.cumsum([total.size for total in sums])[:-1]
        for value, mean in zip(statistics, np.split(means, ends), strict=True):
            value.assign(mean.reshape(value.shape).astype(np.float32))


def normalisations(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The model's batch normalisations but for frozen ones, which use the statistics that they came with."""
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
