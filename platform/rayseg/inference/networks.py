"""The networks of one model or of several, compiled for an engine, and what two ways of running them have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rayseg.data.range import Known, of_several
from rayseg.models.engine import Compiled, Engine, compile_openvino, compile_tensorflow, has_gpu
from rayseg.tracking.bundle import Bundle, load_keras

# Test-time augmentation: the mean over a slice, or a window of a volume, and its mirror image, or its four; `all` are
# the eight of a volume, those along the normal too.
Mirror = Literal["columns", "both", "all"]

# How far bfloat16 may be off where nothing is found, of a probability: about as far as it was anywhere in trials.
_DOUBT = 0.1


def compile_all(
    bundle_dirs: Sequence[str | Path], bundles: Sequence[Bundle], engine: Engine, threads: int
) -> list[Compiled]:
    """The networks of the bundles that were loaded from these folders.

    Raises:
        ValueError: a Keras model cannot be read, or is not the bundle's.
    """
    if engine.name == "tensorflow" or (engine.name == "auto" and has_gpu()):
        return [compile_tensorflow(load_keras(folder), engine.precision, threads) for folder in bundle_dirs]
    return [compile_openvino(bundle.network, engine.precision, threads) for bundle in bundles]


def check_classes(bundles: Sequence[Bundle]) -> None:
    """Raises ValueError where the models of an ensemble are not of the same classes."""
    first = bundles[0].labels.names
    for bundle in bundles[1:]:
        if bundle.labels.names != first:
            raise ValueError(
                f"ensemble: models of the same classes expected, got {list(first)} and {list(bundle.labels.names)}"
            )


def known_of(bundle: Bundle, several: bool, known: Known | None) -> Known:
    """What to judge by: what the bundle knows, of several models or mirror images what was measured of these."""
    return of_several(bundle.range, known) if several else Known(bundle.range, bundle.volumes)


def may_find(probabilities: np.ndarray, threshold: float) -> bool:
    """Whether anything could be found in what bfloat16 gave: probabilities (..., K), see `bundle.Bundle`.

    Averages over models and mirror images, and what lies between pixels, are never above the greatest of these.
    """
    if probabilities.shape[-1] == 1:
        return bool(probabilities.max() >= threshold - _DOUBT)
    lead = probabilities[..., 1:].max(axis=-1) - probabilities[..., 0]
    return bool(lead.max() >= -2 * _DOUBT)
