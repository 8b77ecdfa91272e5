"""Losses per sample, and how samples are weighed so that spreading them over workers changes nothing."""

from typing import Any

from keras import ops

_SMOOTHING = 1.0  # pixels


def bce_dice(mask_NHW: Any, probability_NHWC: Any) -> Any:
    """Binary cross-entropy plus soft Dice loss of each sample, the usual sum of a pixel and an overlap term.

    Of sample n with pixels t (0 or 1) and probabilities p: mean(-t log p - (1 - t) log(1 - p))
    + 1 - (2 sum(t p) + 1) / (sum(t) + sum(p) + 1). The overlap term is that of Milletari et al. 2016
    (arXiv:1606.04797) without its squares, smoothed by one pixel: 0 for nothing found where nothing is. It is taken
    of each sample by itself, so it does not depend on what else is in the batch.

    Args:
        mask_NHW: class indices, not 0 is foreground.
        probability_NHWC: float32, one channel.

    Returns:
        float32 (N,).
    """
    truth_NHW = ops.cast(mask_NHW > 0, "float32")
    probability_NHW = probability_NHWC[..., 0]
    cross_entropy_N = ops.mean(ops.binary_crossentropy(truth_NHW, probability_NHW), axis=(1, 2))
    both_N = ops.sum(truth_NHW * probability_NHW, axis=(1, 2))
    sizes_N = ops.sum(truth_NHW, axis=(1, 2)) + ops.sum(probability_NHW, axis=(1, 2))
    return cross_entropy_N + 1 - (2 * both_N + _SMOOTHING) / (sizes_N + _SMOOTHING)


def ce_dice(mask_NHW: Any, probability_NHWC: Any) -> Any:
    """Cross-entropy plus soft Dice loss of each sample for several classes, as nnU-Net adds them.

    Of sample n: the mean over its pixels of -log of the true class's probability, + the mean over the foreground
    classes of 1 - (2 sum(t p) + 1) / (sum(t) + sum(p) + 1), t being 1 where the class is true and p its probability
    (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, whose Dice leaves the background out too), smoothed as in
    `bce_dice`: a class that is neither there nor found costs nothing.

    Args:
        mask_NHW: class indices, 0 is background.
        probability_NHWC: float32, of background and classes, which sum to 1.

    Returns:
        float32 (N,).
    """
    channels = probability_NHWC.shape[-1]
    index_NHW = ops.cast(mask_NHW, "int32")
    cross_entropy_N = ops.mean(ops.sparse_categorical_crossentropy(index_NHW, probability_NHWC), axis=(1, 2))
    truth_NHWC = ops.one_hot(index_NHW, channels, dtype="float32")[..., 1:]
    found_NHWC = probability_NHWC[..., 1:]
    both_NC = ops.sum(truth_NHWC * found_NHWC, axis=(1, 2))
    sizes_NC = ops.sum(truth_NHWC, axis=(1, 2)) + ops.sum(found_NHWC, axis=(1, 2))
    return cross_entropy_N + ops.mean(1 - (2 * both_NC + _SMOOTHING) / (sizes_NC + _SMOOTHING), axis=1)


def batch_share(loss_N: Any, weight_N: Any, global_batch: int) -> Any:
    """What a rank's samples add to the loss of the global batch: sum(weight x loss) / global batch size.

    Summed over the ranks, as Keras's optimizers sum gradients under a distribution strategy, it is the same loss
    however the samples are dealt to the ranks: the divisor is no rank's own number of samples. (Keras's own `fit`
    gets there by a mean over each rank's batch divided by the number of ranks.) Samples of weight 0, the padding of
    an epoch's last batch, add nothing; that batch counts for as much as it has samples.
    """
    return ops.sum(loss_N * weight_N) / global_batch
