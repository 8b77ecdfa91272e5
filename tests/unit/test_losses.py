"""The losses have hand-computed values, and splitting a batch over ranks does not change them."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from rayseg import config
from rayseg.models.losses import Loss, batch_share, bce_dice, ce_dice, loss_function

BINARY = ("bce", "dice", "bce_dice", "focal", "tversky")
SEVERAL = ("ce", "ce_dice")


def loss(mask: object, probability: object, function: Callable[[Any, Any], Any] = bce_dice) -> list[float]:
    """Of images given without the channel axis."""
    return ops.convert_to_numpy(
        function(np.array(mask, np.uint8), np.array(probability, np.float32)[..., np.newaxis])
    ).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The pixels are (1, 0.9), (0, 0.2), (0, 0.1), (1, 0.6): -(ln .9 + ln .8 + ln .9 + ln .6) / 4.
        ("bce", 0.2361725),
        # Both 0.9 + 0.6, sizes 2 and 1.8: 1 - (2 * 1.5 + 1) / (3.8 + 1).
        ("dice", 0.1666667),
        ("bce_dice", 0.2361725 + 0.1666667),
        # -(.25 * .1^2 ln .9 + .75 * .2^2 ln .8 + .75 * .1^2 ln .9 + .25 * .4^2 ln .6) / 4.
        ("focal", 0.0070452),
        # TP 1.5, FP 0.3, FN 0.5: 1 - (2 * 1.5 + 1) / (2 * 1.5 + 2 * .3 * .3 + 2 * .7 * .5 + 1).
        ("tversky", 0.1803279),
    ],
)
def test_hand_computed(name: Any, expected: float) -> None:
    function = loss_function(Loss(name), 1)
    [value] = loss([[[1, 0], [0, 1]]], [[[0.9, 0.2], [0.1, 0.6]]], function)
    assert value == pytest.approx(expected, abs=1e-6)


def test_parameters_reach_focal_and_tversky() -> None:
    random = np.random.default_rng(2)
    truth, found = random.integers(0, 2, (3, 4, 5)), random.random((3, 4, 5)).astype(np.float32)
    focal = loss(truth, found, loss_function(Loss("focal", alpha=0.6, gamma=0.5), 1))
    expected = keras.losses.binary_focal_crossentropy(
        truth.reshape(3, -1).astype(np.float32), found.reshape(3, -1), True, alpha=0.6, gamma=0.5
    )
    assert focal == pytest.approx(ops.convert_to_numpy(expected), rel=1e-5)
    # As for every pixel alike: half the cross-entropy.
    halved = loss(truth, found, loss_function(Loss("focal", alpha=0.5, gamma=0), 1))
    assert halved == pytest.approx(np.array(loss(truth, found, loss_function(Loss("bce"), 1))) / 2, rel=1e-5)
    even = loss(truth, found, loss_function(Loss("tversky", alpha=0.5, beta=0.5), 1))
    assert even == pytest.approx(loss(truth, found, loss_function(Loss("dice"), 1)), rel=1e-6)
    # Nothing but false positives: 2 of 4 pixels wrongly certain, then nothing but false negatives.
    weights = loss_function(Loss("tversky", alpha=0.2, beta=0.9), 1)
    assert loss([[[0, 0, 0, 0]]], [[[1, 1, 0, 0]]], weights) == pytest.approx([1 - 1 / (2 * 0.2 * 2 + 1)])
    assert loss([[[1, 1, 0, 0]]], [[[0, 0, 0, 0]]], weights) == pytest.approx([1 - 1 / (2 * 0.9 * 2 + 1)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [*BINARY, *SEVERAL])
def test_values_and_gradients_are_finite_where_the_network_is_certain(name: Any, dtype: str) -> None:
    mask = np.array([[[0, 1], [0, 1]], [[1, 1], [0, 0]]], np.uint8)
    certain = np.array([[[0, 1], [1, 0]], [[0, 1], [0, 1]]], np.float32)[..., np.newaxis]
    if name in SEVERAL:
        certain = np.concatenate([1 - certain, certain, 0 * certain], axis=-1)
    for gamma in (0.5, 2.0):
        function = loss_function(Loss(name, gamma=gamma), certain.shape[-1] - 1 or 1)
        probability = tf.cast(certain, dtype)
        with tf.GradientTape() as tape:
            tape.watch(probability)
            loss_N = function(mask, probability)
        assert loss_N.dtype == tf.float32
        assert np.isfinite(loss_N).all()
        assert np.isfinite(tf.cast(tape.gradient(loss_N, probability), tf.float32)).all()


@pytest.mark.parametrize(
    ("name", "form", "channels"), [("bce", "sigmoid", 1), ("focal", "sigmoid", 1), ("ce", "softmax", 3)]
)
def test_a_certain_mistake_still_has_a_gradient(name: Any, form: str, channels: int) -> None:
    # A logit of -200 is a probability of 0 in float32.
    bias = tf.Variable(np.array([-200, 200, 0][:channels], np.float32))
    model_output = keras.layers.Activation(form, dtype="float32")
    mask = np.full((1, 2, 2), 1 if channels == 1 else 2, np.uint8)

    @tf.function
    def gradient() -> tf.Tensor:
        with tf.GradientTape() as tape:
            probability = model_output(tf.zeros((1, 2, 2, channels)) + bias)
            loss_N = loss_function(Loss(name), channels - 1 or 1)(mask, probability)
        return tape.gradient(loss_N, bias)

    assert abs(gradient().numpy()).max() > 0.2


def test_the_loss_fits_the_number_of_classes() -> None:
    assert loss_function(Loss(), 1) is bce_dice
    assert loss_function(Loss(), 2) is ce_dice
    for name in BINARY:
        with pytest.raises(
            ValueError, match=rf"train\.loss\.name: one of auto, ce, ce_dice .* 3 .*classes, got {name}"
        ):
            loss_function(Loss(name), 3)
    for name in SEVERAL:
        with pytest.raises(
            ValueError, match=rf"train\.loss\.name: one of auto, bce, .* 1 foreground class, got {name}"
        ):
            loss_function(Loss(name), 1)
    assert config.build(Loss, {"name": "focal", "alpha": 0.5}) == Loss("focal", alpha=0.5)
    for values in ({"alpha": 2}, {"beta": -1}, {"gamma": -0.5}):
        with pytest.raises(ValueError, match=rf"train\.loss\.{next(iter(values))}: a number"):
            Loss(**values)
    with pytest.raises(ValueError, match=r"train\.loss\.beta"):
        Loss("tversky", alpha=0, beta=0)


def test_nothing_found_where_nothing_is_costs_nothing_and_a_perfect_mask_neither() -> None:
    assert loss([[[0, 0]], [[1, 0]]], [[[0, 0]], [[1, 0]]]) == pytest.approx([0, 0], abs=1e-5)


def test_half_certain_everywhere() -> None:
    # Cross-entropy ln 2; Dice of 2 of 4 pixels: 1 - (2 * 1 + 1) / (2 + 2 + 1) = 0.4.
    assert loss([[[1, 1], [0, 0]]], [[[0.5, 0.5], [0.5, 0.5]]]) == pytest.approx([math.log(2) + 0.4], abs=1e-6)


def test_any_class_index_but_0_is_foreground() -> None:
    probability = [[[0.7, 0.2]]]
    assert loss([[[2, 0]]], probability) == loss([[[1, 0]]], probability)


def test_it_stays_finite_where_the_network_is_certain_and_wrong() -> None:
    assert np.isfinite(loss([[[1, 0]]], [[[0, 1]]])).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shares_of_the_ranks_add_up_to_the_batch_without_its_padding(ranks: int) -> None:
    loss_N = np.array([1, 2, 3, 5, 7, 11, 13, 99], np.float32)
    weight_N = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    shares = [
        float(batch_share(of_rank, weights, global_batch=8))
        for of_rank, weights in zip(np.split(loss_N, ranks), np.split(weight_N, ranks), strict=True)
    ]
    assert sum(shares) == pytest.approx(42 / 8)


def test_several_classes_hand_computed() -> None:
    # Pixels of class 1 (0.1, 0.7, 0.2) and background (0.8, 0.1, 0.1). Cross-entropy -(ln .7 + ln .8) / 2 = 0.2899092.
    # Dice of class 1: 1 - (2 * 0.7 + 1) / (1 + 0.8 + 1) = 0.1428571; of class 2, which is nowhere: 1 - 1 / 1.3.
    probability = np.array([[[[0.1, 0.7, 0.2], [0.8, 0.1, 0.1]]]], np.float32)
    for name, expected in (("ce", 0.2899092), ("ce_dice", 0.2899092 + (0.1428571 + 0.2307692) / 2)):
        [value] = loss_function(Loss(name), 2)(np.array([[[1, 0]]], np.uint8), probability).numpy()
        assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", [*BINARY, *SEVERAL])
def test_a_sample_is_judged_by_itself(name: Any) -> None:
    random = np.random.default_rng(4)
    mask, probability = random.integers(0, 2, (3, 4, 4)), random.random((3, 4, 4, 1)).astype(np.float32)
    if name in SEVERAL:
        probability = random.dirichlet(np.ones(3), (3, 4, 4)).astype(np.float32)
    function = loss_function(Loss(name), probability.shape[-1] - 1 or 1)
    together = ops.convert_to_numpy(function(mask, probability))
    assert together.shape == (3,)
    for n in range(3):
        assert function(mask[n : n + 1], probability[n : n + 1]).numpy() == pytest.approx(together[n : n + 1], rel=1e-5)


def test_several_classes_perfect_or_absent_cost_nothing_and_samples_stand_alone() -> None:
    mask = np.array([[[1, 2, 0]], [[0, 0, 0]]], np.uint8)
    perfect = np.eye(3, dtype=np.float32)[mask]
    assert ops.convert_to_numpy(ce_dice(mask, perfect)).tolist() == pytest.approx([0, 0], abs=1e-5)
    random = np.random.default_rng(1).dirichlet(np.ones(3), (2, 1, 3)).astype(np.float32)
    together = ops.convert_to_numpy(ce_dice(mask, random))
    for sample in range(2):
        alone = ops.convert_to_numpy(ce_dice(mask[sample : sample + 1], random[sample : sample + 1]))
        assert alone[0] == pytest.approx(together[sample], abs=1e-6)
    assert np.isfinite(ops.convert_to_numpy(ce_dice(mask, np.roll(perfect, 1, axis=-1)))).all()


@pytest.mark.parametrize("name", [*BINARY, *SEVERAL])
def test_a_volume_is_an_image_of_as_many_pixels(name: Any) -> None:
    random = np.random.default_rng(6)
    channels = 3 if name in SEVERAL else 1
    mask = random.integers(0, channels, (2, 3, 4, 5)).astype(np.uint8)
    probability = random.dirichlet(np.ones(3), (2, 3, 4, 5)).astype(np.float32)[..., :channels]
    function = loss_function(Loss(name), max(1, channels - 1))
    of_volumes = function(mask, probability).numpy()
    assert of_volumes.shape == (2,)
    of_images = function(mask.reshape(2, 12, 5), probability.reshape(2, 12, 5, channels)).numpy()
    assert of_volumes == pytest.approx(of_images, rel=1e-6)
