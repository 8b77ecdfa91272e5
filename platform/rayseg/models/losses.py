"""Losses per sample, and how samples are weighed so that spreading them over workers changes nothing.

A loss is of (mask_NHW, probability_NHWC): class indices of any integer type, and what the network gives of any float
type, which is counted in float32. Of volumes both have a depth (NDHW, NDHWC), and voxels stand for pixels. It gives
float32 (N,), each sample by itself. The binary ones (`bce`, `dice`,
`bce_dice`, `focal`, `tversky`) take one channel, and every index but 0 is foreground; those of several classes (`ce`,
`ce_dice`) take a channel for the background and one a class, which sum to 1.

There is no batch Dice, whose sums run over all samples of a batch: it would depend on how a batch is dealt to workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from keras import backend, ops

_SMOOTHING = 1.0  # pixels


@dataclass(frozen=True)
class Loss:
    """Which loss is trained on, and its parameters; what a loss does not use has no effect."""

    # auto: bce_dice for one class, ce_dice for several
    name: Literal["auto", "bce", "dice", "bce_dice", "focal", "tversky", "ce", "ce_dice"] = "auto"
    alpha: float | None = None  # focal: weight of the foreground (0.25); tversky: weight of false positives (0.3)
    beta: float = 0.7  # tversky: weight of false negatives
    gamma: float = 2.0  # focal: the greater, the less easy pixels count

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"train.loss.alpha: a number from 0 to 1 expected, got {self.alpha}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"train.loss.beta: a number from 0 to 1 expected, got {self.beta}")
        if not 0 <= self.gamma <= 10:
            raise ValueError(f"train.loss.gamma: a number from 0 to 10 expected, got {self.gamma}")
        if self.name == "tversky" and self.alpha == self.beta == 0:
            raise ValueError(
                "train.loss.beta: alpha and beta of tversky must not both be 0: nothing would be a mistake"
            )


def loss_function(config: Loss, classes: int) -> Callable[[Any, Any], Any]:
    """The loss of (mask_NHW, probability_NHWC) that `config` asks for, see above.

    Raises:
        ValueError: a binary loss for several foreground `classes`, or the reverse.
    """
    binary: dict[str, Callable[[Any, Any], Any]] = {
        "bce": bce,
        "dice": dice,
        "bce_dice": bce_dice,
        "focal": partial(focal, alpha=0.25 if config.alpha is None else config.alpha, gamma=config.gamma),
        "tversky": partial(tversky, alpha=0.3 if config.alpha is None else config.alpha, beta=config.beta),
    }
    several: dict[str, Callable[[Any, Any], Any]] = {"ce": ce, "ce_dice": ce_dice}
    fitting = binary if classes == 1 else several
    name = ("bce_dice" if classes == 1 else "ce_dice") if config.name == "auto" else config.name
    if name not in fitting:
        raise ValueError(
            f"train.loss.name: one of auto, {', '.join(fitting)} expected for a set with {classes} foreground "
            f"class{'es' * (classes > 1)}, got {name}"
        )
    return fitting[name]


def bce(mask_NHW: Any, probability_NHWC: Any) -> Any:
    """Binary cross-entropy: the mean over the pixels of -t log p - (1 - t) log(1 - p), t being the truth, 0 or 1."""
    return _pixels_mean(ops.binary_crossentropy(*_binary(mask_NHW, probability_NHWC)))


def dice(mask_NHW: Any, probability_NHWC: Any) -> Any:
    """Soft Dice loss, 1 - (2 sum(t p) + 1) / (sum(t) + sum(p) + 1).

    That of Milletari et al. 2016 (arXiv:1606.04797) without its squares, smoothed by one pixel: 0 for nothing found
    where nothing is.
    """
    return tversky(mask_NHW, probability_NHWC, alpha=0.5, beta=0.5)


def bce_dice(mask_NHW: Any, probability_NHWC: Any) -> Any:
    """`bce` + `dice`, the usual sum of a pixel and an overlap term."""
    return bce(mask_NHW, probability_NHWC) + dice(mask_NHW, probability_NHWC)


def focal(mask_NHW: Any, probability_NHWC: Any, *, alpha: float, gamma: float) -> Any:
    """Focal loss, for little foreground: `bce` with less weight on pixels that are right already.

    The mean over the pixels of -alpha (1 - p)^gamma log p where there is foreground, -(1 - alpha) p^gamma log(1 - p)
    elsewhere (Lin et al. 2017, arXiv:1708.02002, who divide by the number of objects where this divides by that of
    pixels; their best are alpha 0.25 and gamma 2).
    """
    truth_NHW1, probability_NHW1 = _binary(mask_NHW, probability_NHWC)
    wrong_NHW1 = ops.abs(truth_NHW1 - probability_NHW1)
    # Away from 0, where the power's gradient has no limit for gamma below 1.
    easy_NHW1 = ops.power(ops.maximum(wrong_NHW1, backend.epsilon()), gamma)
    balance_NHW1 = truth_NHW1 * alpha + (1 - truth_NHW1) * (1 - alpha)
    return _pixels_mean(balance_NHW1 * easy_NHW1 * ops.binary_crossentropy(truth_NHW1, probability_NHW1))


def tversky(mask_NHW: Any, probability_NHWC: Any, *, alpha: float, beta: float) -> Any:
    """Tversky loss: `dice` with a weight for false positives and another for false negatives.

    1 - (2 TP + 1) / (2 TP + 2 alpha FP + 2 beta FN + 1) with TP = sum(t p), FP = sum((1 - t) p), FN = sum(t (1 - p))
    (Salehi et al. 2017, arXiv:1706.05721, best with 0.3 and 0.7), smoothed so that 0.5 and 0.5 are `dice`.
    """
    overlap_N1 = _overlap(*_binary(mask_NHW, probability_NHWC), alpha, beta)
    return 1 - overlap_N1[:, 0]


def ce(mask_NHW: Any, probability_NHWC: Any) -> Any:
    """Cross-entropy of several classes: the mean over the pixels of -log of the true class's probability."""
    index_NHW = ops.cast(mask_NHW, "int32")
    return _pixels_mean(ops.sparse_categorical_crossentropy(index_NHW, ops.cast(probability_NHWC, "float32")))


def ce_dice(mask_NHW: Any, probability_NHWC: Any) -> Any:
    """`ce` + the mean over the foreground classes of their `dice`, as nnU-Net adds them.

    (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, whose Dice leaves the background out too.) A class that is
    neither there nor found costs nothing.
    """
    truth_NHWC = ops.one_hot(ops.cast(mask_NHW, "int32"), probability_NHWC.shape[-1], dtype="float32")[..., 1:]
    overlap_NC = _overlap(truth_NHWC, ops.cast(probability_NHWC, "float32")[..., 1:], 0.5, 0.5)
    return ce(mask_NHW, probability_NHWC) + ops.mean(1 - overlap_NC, axis=1)


def batch_share(loss_N: Any, weight_N: Any, global_batch: int) -> Any:
    """What a rank's samples add to the loss of the global batch: sum(weight x loss) / global batch size.

    Summed over the ranks, as Keras's optimizers sum gradients under a distribution strategy, it is the same loss
    however the samples are dealt to the ranks: the divisor is no rank's own number of samples. (Keras's own `fit`
    gets there by a mean over each rank's batch divided by the number of ranks.) Samples of weight 0, the padding of
    an epoch's last batch, add nothing; that batch counts for as much as it has samples.
    """
    return ops.sum(loss_N * weight_N) / global_batch


def _binary(mask_NHW: Any, probability_NHWC: Any) -> tuple[Any, Any]:
    """Truth and probability, float32 (N, H, W, 1).

    The network's output is passed on as it is, not sliced: from a sigmoid's own output Keras finds the logits, whose
    cross-entropy has a gradient even where the probability is rounded to 0 or 1.
    """
    return ops.expand_dims(ops.cast(mask_NHW > 0, "float32"), -1), ops.cast(probability_NHWC, "float32")


def _overlap(truth_NHWC: Any, found_NHWC: Any, alpha: float, beta: float) -> Any:
    """The Tversky index of each sample and channel, smoothed, float32 (N, C)."""
    both_NC = _places_sum(truth_NHWC * found_NHWC)
    truth_NC, found_NC = _places_sum(truth_NHWC), _places_sum(found_NHWC)
    # 2 TP + 2 alpha FP + 2 beta FN, without differences of nearly equal sums.
    sizes_NC = 2 * alpha * found_NC + 2 * beta * truth_NC + 2 * (1 - alpha - beta) * both_NC
    return (2 * both_NC + _SMOOTHING) / (sizes_NC + _SMOOTHING)


def _places_sum(value_NHWC: Any) -> Any:
    """The sum over all pixels or voxels, float32 (N, C)."""
    return ops.sum(value_NHWC, axis=tuple(range(1, len(value_NHWC.shape) - 1)))


def _pixels_mean(value_NHW: Any) -> Any:
    """The mean of each sample, float32 (N,); a channel axis may follow."""
    return ops.mean(value_NHW, axis=tuple(range(1, len(value_NHW.shape))))
