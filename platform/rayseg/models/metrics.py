"""Metrics as counts, to be added up over batches and workers and divided once.

Validation adds up the `counts` of its batches, in float64, where they stay exact, and over its workers; `scores`
divides the sums. All of it is pooled: the pixels of all samples count together. Values per case come from
`evaluation.scores`, which knows the cases.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from rayseg.models.histograms import BINS, GREATEST, LEAST, LOGIT, average_precision

SIZE = 3 + 2 * BINS  # counts of a class
_EXACT = 2**24  # float32 has all whole numbers up to this one


def counts(mask_NHW: Any, probability_NHWC: Any, weight_N: Any, threshold: float) -> Any:
    """Everything that `scores` needs of a batch, for each foreground class, counted where the network runs.

    All of it is in floats: TensorFlow's GPU kernels for int32, but for the scatter, take their numbers to the host.
    The floats are whole numbers, and exact. Zeros and ones are added up in float32, at most 2**24 of them at a time:
    in whatever order, every sum on the way is a whole number of at most 2**24, which float32 has. From there on it is
    float64, which has all up to 2**53. The places of the scatter are below 2 x BINS x classes, and of up to 255 classes
    below 2**24, too.

    Args:
        mask_NHW: class indices, 0 is background; of one class, everything else is foreground. Of volumes (N, D, H, W),
            with a probability of (N, D, H, W, C): voxels count as pixels do.
        probability_NHWC: of one class one channel; of several the background's too.
        weight_N: 0 for padding, which is not counted.
        threshold: one class: at least this probability counts as found. Of several the most probable class does.

    Returns:
        float64 (classes x SIZE,): of each class pixels found, wrongly found and missed, then the pixels that are not of
        it by bins of its probability, then those that are.
    """
    channels = probability_NHWC.shape[-1]
    mask_NHW = ops.cast(mask_NHW, "float32")
    if channels == 1:
        confusion_K3 = ops.expand_dims(confusion(mask_NHW, probability_NHWC, weight_N, threshold), 0)
        truth_NHWK, probability_NHWK = ops.expand_dims(mask_NHW > 0, -1), probability_NHWC
    else:
        confusion_K3 = confusion_by_class(mask_NHW, probability_NHWC, weight_N)
        classes = np.arange(1, channels, dtype=np.float32)
        truth_NHWK, probability_NHWK = ops.expand_dims(mask_NHW, -1) == classes, probability_NHWC[..., 1:]
    histograms_KB = _histograms(truth_NHWK, probability_NHWK, weight_N)
    return ops.reshape(ops.concatenate([confusion_K3, histograms_KB], axis=1), (-1,))


def scores(totals: np.ndarray, names: Sequence[str], split: str = "val") -> dict[str, float | None]:
    """The metrics of added-up `counts`, under the names `SPLIT/dice_pooled` and so on.

    Dice, IoU, precision, recall and accuracy (the fraction of pixels that are right about the class or its absence) are
    of the masks; of pixels F1 is the same as Dice. Average precision is of the probabilities, in bins: the sum over the
    bins, from the top, of the gain in recall times the precision there, which scikit-learn's `average_precision_score`
    gives for the bins' numbers as scores.

    Args:
        totals: (classes x SIZE,).
        names: of the foreground classes.
        split: begins the names of the metrics.

    Returns:
        None where a metric is undefined: nothing to find, nothing found, or both. Of several classes the mean over
        those that have a value (of average precision this is mAP), and each class's own under `SPLIT/METRIC/NAME`.
    """
    of_class = [_scores(numbers) for numbers in np.reshape(totals, (len(names), SIZE))]
    values = {f"{split}/{metric}": mean_of_defined(found[metric] for found in of_class) for metric in of_class[0]}
    if len(names) > 1:
        for name, found in zip(names, of_class, strict=True):
            values |= {f"{split}/{metric}/{name}": value for metric, value in found.items()}
    return values


def confusion(mask_NHW: Any, probability_NHWC: Any, weight_N: Any, threshold: float) -> Any:
    """Pixels found (true positives), wrongly found and missed, over all samples whose weight is not 0.

    Args:
        mask_NHW: class indices, not 0 is foreground.
        probability_NHWC: one channel; at least `threshold` counts as found.
        weight_N: 0 for padding.
        threshold: between 0 and 1.

    Returns:
        float64 (3,), exact as `counts` says.
    """
    return _counts(mask_NHW > 0, probability_NHWC[..., 0] >= threshold, weight_N)


def confusion_by_class(mask_NHW: Any, probability_NHWC: Any, weight_N: Any) -> Any:
    """`confusion` of each foreground class; a pixel is of the class that is most probable there.

    Args:
        mask_NHW: class indices, 0 is background.
        probability_NHWC: of background and classes.
        weight_N: 0 for padding.

    Returns:
        float64 (classes, 3).
    """
    index_NHW = ops.cast(mask_NHW, "float32")
    # Keras's argmax looks at signs as int32, which TensorFlow does on the host. The first of equal ones counts.
    greatest_NHW = ops.max(probability_NHWC, axis=-1)
    confusions = []
    for index in range(1, probability_NHWC.shape[-1]):
        before_NHW = ops.max(probability_NHWC[..., :index], axis=-1)
        found_NHW = ops.logical_and(probability_NHWC[..., index] == greatest_NHW, before_NHW < greatest_NHW)
        confusions.append(_counts(index_NHW == index, found_NHW, weight_N))
    return ops.stack(confusions)


def _counts(truth_NHW: Any, found_NHW: Any, weight_N: Any) -> Any:
    valid_N11 = _over_places(weight_N, truth_NHW) > 0

    def count(pixels_NHW: Any) -> Any:
        ones = ops.reshape(ops.cast(ops.logical_and(pixels_NHW, valid_N11), "float32"), (-1,))
        return sum(ops.cast(ops.sum(ones[piece]), "float64") for piece in _pieces(ones))

    return ops.stack(
        [
            count(ops.logical_and(found_NHW, truth_NHW)),
            count(ops.logical_and(found_NHW, ops.logical_not(truth_NHW))),
            count(ops.logical_and(ops.logical_not(found_NHW), truth_NHW)),
        ]
    )


def _histograms(truth_NHWK: Any, probability_NHWK: Any, weight_N: Any) -> Any:
    """As `histograms.histograms`, on the device, of each class and both in one: float64 (classes, 2 x BINS)."""
    probability_NHWK = ops.clip(ops.cast(probability_NHWK, "float32"), LEAST, GREATEST)
    logit_NHWK = ops.log(probability_NHWK) - ops.log1p(-probability_NHWK)
    bin_NHWK = ops.floor((logit_NHWK + LOGIT) * (BINS / (2 * LOGIT)))
    # Clipped, not trusted: what is not a number has no bin, and must not end the run here.
    bin_NHWK = ops.where(bin_NHWK >= 1, ops.minimum(bin_NHWK, BINS - 1), 0.0)
    classes = probability_NHWK.shape[-1]
    first_K = 2 * BINS * np.arange(classes, dtype=np.float32)
    index_NHWK = bin_NHWK + BINS * ops.cast(truth_NHWK, "float32") + first_K
    valid_NHWK = ops.broadcast_to(_over_places(ops.cast(weight_N > 0, "float32"), index_NHWK), index_NHWK.shape)
    valid, index = (ops.reshape(values, (-1,)) for values in (valid_NHWK, index_NHWK))
    sums = [
        ops.segment_sum(valid[piece], ops.cast(index[piece], "int32"), 2 * BINS * classes) for piece in _pieces(index)
    ]
    return ops.reshape(sum(ops.cast(one, "float64") for one in sums), (classes, 2 * BINS))


def _over_places(weight_N: Any, values: Any) -> Any:
    """The weights with as many axes as `values`, each of 1 but for the first."""
    return ops.reshape(weight_N, (-1, *(1 for _ in values.shape[1:])))


def _pieces(flat: Any) -> Iterator[slice]:
    """Of a batch, as a rank has it, one."""
    return (slice(first, first + _EXACT) for first in range(0, flat.shape[0], _EXACT))


def _scores(numbers: np.ndarray) -> dict[str, float | None]:
    """The metrics of one class, by name."""
    found, wrong, missed = (int(number) for number in numbers[:3])
    negative_B, positive_B = numbers[3 : 3 + BINS], numbers[3 + BINS :]
    dice = pooled_dice(found, wrong, missed)
    return {
        "dice_pooled": dice,
        "iou_pooled": _ratio(found, found + wrong + missed),
        "precision_pooled": _ratio(found, found + wrong),
        "recall_pooled": _ratio(found, found + missed),
        "f1_pooled": dice,
        "accuracy_pooled": _ratio(numbers[3:].sum() - wrong - missed, numbers[3:].sum()),
        "average_precision": float(average_precision(negative_B, positive_B)) if positive_B.any() else None,
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def mean_of_defined(values: Iterable[float | None]) -> float | None:
    """The mean over the classes that have a value; None where none has."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def pooled_dice(found: int, wrong: int, missed: int) -> float | None:
    """Dice of all pixels together, 2 TP / (2 TP + FP + FN); None where there is no foreground, true or found."""
    total = 2 * found + wrong + missed
    return 2 * found / total if total else None
