"""Metrics as counts, to be added up over batches and workers and divided once."""

from collections.abc import Iterable
from typing import Any

from keras import ops


def confusion(mask_NHW: Any, probability_NHWC: Any, weight_N: Any, threshold: float) -> Any:
    """Pixels found (true positives), wrongly found and missed, over all samples whose weight is not 0.

    Args:
        mask_NHW: class indices, not 0 is foreground.
        probability_NHWC: one channel; at least `threshold` counts as found.
        weight_N: 0 for padding.
        threshold: between 0 and 1.

    Returns:
        int32 (3,): exact for batches below 2**31 pixels.
    """
    return _counts(mask_NHW > 0, probability_NHWC[..., 0] >= threshold, weight_N)


def confusion_by_class(mask_NHW: Any, probability_NHWC: Any, weight_N: Any) -> Any:
    """`confusion` of each foreground class; a pixel is of the class that is most probable there.

    Args:
        mask_NHW: class indices, 0 is background.
        probability_NHWC: of background and classes.
        weight_N: 0 for padding.

    Returns:
        int32 (classes, 3).
    """
    found_NHW = ops.argmax(probability_NHWC, axis=-1)
    index_NHW = ops.cast(mask_NHW, found_NHW.dtype)
    classes = range(1, probability_NHWC.shape[-1])
    return ops.stack([_counts(index_NHW == index, found_NHW == index, weight_N) for index in classes])


def _counts(truth_NHW: Any, found_NHW: Any, weight_N: Any) -> Any:
    valid_N11 = ops.reshape(weight_N, (-1, 1, 1)) > 0

    def count(pixels_NHW: Any) -> Any:
        return ops.sum(ops.cast(ops.logical_and(pixels_NHW, valid_N11), "int32"))

    return ops.stack(
        [
            count(ops.logical_and(found_NHW, truth_NHW)),
            count(ops.logical_and(found_NHW, ops.logical_not(truth_NHW))),
            count(ops.logical_and(ops.logical_not(found_NHW), truth_NHW)),
        ]
    )


def mean_of_defined(values: Iterable[float | None]) -> float | None:
    """The mean over the classes that have a value; None where none has."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def pooled_dice(found: int, wrong: int, missed: int) -> float | None:
    """Dice of all pixels together, 2 TP / (2 TP + FP + FN); None where there is no foreground, true or found."""
    total = 2 * found + wrong + missed
    return 2 * found / total if total else None
