"""Metrics as counts, to be added up over batches and workers and divided once."""

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
    valid_N11 = ops.reshape(weight_N, (-1, 1, 1)) > 0
    truth_NHW = mask_NHW > 0
    found_NHW = probability_NHWC[..., 0] >= threshold

    def count(pixels_NHW: Any) -> Any:
        return ops.sum(ops.cast(ops.logical_and(pixels_NHW, valid_N11), "int32"))

    return ops.stack(
        [
            count(ops.logical_and(found_NHW, truth_NHW)),
            count(ops.logical_and(found_NHW, ops.logical_not(truth_NHW))),
            count(ops.logical_and(ops.logical_not(found_NHW), truth_NHW)),
        ]
    )


def pooled_dice(found: int, wrong: int, missed: int) -> float | None:
    """Dice of all pixels together, 2 TP / (2 TP + FP + FN); None where there is no foreground, true or found."""
    total = 2 * found + wrong + missed
    return 2 * found / total if total else None
