"""Counts of pixels and the Dice from them."""

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
)
from tensorflow.python.framework import kernels, op_def_registry

from rayseg.models import metrics
from rayseg.models.metrics import (
    BINS,
    SIZE,
    confusion,
    confusion_by_class,
    counts,
    mean_of_defined,
    pooled_dice,
    scores,
)

OF_MASKS = {
    "dice_pooled": f1_score,
    "iou_pooled": jaccard_score,
    "precision_pooled": precision_score,
    "recall_pooled": recall_score,
    "f1_pooled": f1_score,
    "accuracy_pooled": accuracy_score,
}


def counted(mask: np.ndarray, probability: np.ndarray, weight: list[float], threshold: float = 0.5) -> list[int]:
    return ops.convert_to_numpy(
        confusion(mask, probability[..., np.newaxis], np.array(weight, np.float32), threshold)
    ).tolist()


def test_hand_counted_with_padding_and_the_threshold_itself() -> None:
    mask = np.array([[[1, 0, 1, 0]], [[1, 1, 1, 1]]], np.uint8)
    probability = np.array([[[0.5, 0.5, 0.49, 0.1]], [[0.9, 0.9, 0.9, 0.9]]], np.float32)
    assert counted(mask, probability, [1, 0]) == [1, 1, 1]
    assert counted(mask, probability, [1, 1]) == [5, 1, 1]
    assert counted(mask, probability, [1, 0], threshold=0.3) == [2, 1, 0]


def test_pooled_dice_of_summed_counts_is_the_f1_of_all_pixels() -> None:
    random = np.random.default_rng(5)
    mask = (random.random((6, 9, 7)) > 0.7).astype(np.uint8)
    probability = (0.6 * random.random((6, 9, 7)) + 0.3 * mask).astype(np.float32)
    halves = [counted(mask[part], probability[part], [1] * 3) for part in (slice(0, 3), slice(3, 6))]
    assert pooled_dice(*np.sum(halves, axis=0).tolist()) == pytest.approx(
        f1_score(mask.ravel(), probability.ravel() >= 0.5), abs=1e-12
    )


def test_dice_at_the_ends() -> None:
    assert pooled_dice(0, 0, 0) is None
    assert pooled_dice(3, 0, 0) == 1
    assert pooled_dice(0, 2, 0) == 0
    assert pooled_dice(0, 0, 2) == 0
    assert pooled_dice(1, 1, 2) == pytest.approx(2 / 5)


def test_each_class_is_counted_by_the_most_probable_one_without_padding() -> None:
    random = np.random.default_rng(6)
    mask = random.integers(0, 4, (5, 8, 9)).astype(np.uint8)
    probability = random.dirichlet(np.ones(4), (5, 8, 9)).astype(np.float32)
    probability[np.arange(4)[None, None, None] == mask[..., None]] += np.float32(0.2)
    weight = np.array([1, 1, 1, 1, 0], np.float32)
    counted = ops.convert_to_numpy(confusion_by_class(mask, probability, weight))
    assert counted.shape == (3, 3)
    found = probability.argmax(axis=-1)
    for index in (1, 2, 3):
        expected = f1_score(mask[:4].ravel() == index, found[:4].ravel() == index)
        assert pooled_dice(*counted[index - 1].tolist()) == pytest.approx(expected, abs=1e-12)


def test_a_class_without_a_value_is_left_out_of_the_mean() -> None:
    assert mean_of_defined([0.25, None, 0.75]) == 0.5
    assert mean_of_defined([None, None]) is None


def bins(probability: np.ndarray) -> np.ndarray:
    """The bin of a probability, in float64: 4096 of equal width of log odds from -16.64 to 16.64."""
    logit = np.log(probability.astype(float)) - np.log1p(-probability.astype(float))
    return np.clip(np.floor((logit + 16.64) / 33.28 * 4096), 0, 4095)


def network(truth: np.ndarray, spread: float, seed: int) -> np.ndarray:
    """What a network might give: float32, the certain ones mostly right, away from the borders of the bins."""
    random = np.random.default_rng(seed)
    logit = random.normal(np.where(truth, 1.0, -4.0), spread)
    centred = (np.floor((logit + 16.64) / 33.28 * 4096) + random.uniform(0.1, 0.9, truth.shape)) / 4096 * 33.28 - 16.64
    return (1 / (1 + np.exp(-np.clip(centred, -16, 8)))).astype(np.float32)


@pytest.mark.parametrize("spread", [0.5, 3, 8])
def test_all_scores_of_one_class_are_those_of_scikit_learn_whatever_the_batches(spread: float) -> None:
    truth = np.random.default_rng(7).random((9, 40, 30)) < 0.1
    probability = network(truth, spread, 8)
    total = np.zeros(SIZE)
    for first, weight in ((0, [1, 1, 1, 1]), (4, [1, 1, 1, 1]), (8, [1, 0, 0, 0])):
        rows = np.minimum(np.arange(first, first + 4), 8)  # the padding repeats a row
        mask = truth[rows].astype(np.uint8) * 3  # any class is foreground
        total += counts(mask, probability[rows, ..., np.newaxis], np.array(weight, np.float32), 0.4).numpy()
    found = scores(total, ["lesion"])
    assert set(found) == {f"val/{name}" for name in (*OF_MASKS, "average_precision")}
    for name, function in OF_MASKS.items():
        expected = function(truth.ravel(), probability.ravel() >= np.float32(0.4))
        assert found[f"val/{name}"] == pytest.approx(expected, abs=1e-12)
    quantised = average_precision_score(truth.ravel(), bins(probability).ravel())
    assert found["val/average_precision"] == pytest.approx(quantised, abs=1e-9)
    exact = average_precision_score(truth.ravel(), probability.ravel())
    assert found["val/average_precision"] == pytest.approx(exact, abs=1e-3)


def test_scores_of_several_classes_are_those_of_scikit_learn_and_their_means() -> None:
    random = np.random.default_rng(9)
    mask = random.integers(0, 3, (4, 30, 20)).astype(np.uint8)
    probability = random.dirichlet(np.ones(4), (4, 30, 20)).astype(np.float32)
    probability[np.arange(4) == mask[..., None]] += np.float32(0.2)
    probability /= probability.sum(axis=-1, keepdims=True)
    total = counts(mask, probability, np.ones(4, np.float32), 0.5).numpy()
    found = scores(total, ["a", "b", "never"], split="test")
    chosen = probability.argmax(axis=-1)
    for index, name in ((1, "a"), (2, "b")):
        for metric, function in OF_MASKS.items():
            expected = function((mask == index).ravel(), (chosen == index).ravel())
            assert found[f"test/{metric}/{name}"] == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score((mask == index).ravel(), probability[..., index].ravel())
        assert found[f"test/average_precision/{name}"] == pytest.approx(expected, abs=1e-3)
    assert found["test/average_precision/never"] is None
    assert found["test/recall_pooled/never"] is None
    assert found["test/dice_pooled/never"] == 0
    for metric in (*OF_MASKS, "average_precision"):
        of_class = [found[f"test/{metric}/{name}"] for name in ("a", "b", "never")]
        assert found[f"test/{metric}"] == pytest.approx(np.mean([value for value in of_class if value is not None]))


def test_average_precision_counted_by_hand() -> None:
    # From the top: right, wrong, right and right at once with a wrong one: 1/3 * 1/1 + 2/3 * 3/5.
    mask = np.array([[[1, 0, 1, 1, 0]]], np.uint8)
    probability = np.array([[[0.9, 0.8, 0.3, 0.3, 0.3]]], np.float32)[..., np.newaxis]
    total = counts(mask, probability, np.ones(1, np.float32), 0.5).numpy()
    assert scores(total, ["lesion"])["val/average_precision"] == pytest.approx(1 / 3 + 2 / 3 * 3 / 5)


def test_certain_probabilities_are_counted_and_what_is_no_number_ends_nothing() -> None:
    mask = np.array([[[1, 1, 0, 0, 0]]], np.uint8)
    probability = np.array([[[1, 0, 1, 0, np.nan]]], np.float32)[..., np.newaxis]
    total = counts(mask, probability, np.ones(1, np.float32), 0.5).numpy()
    assert total[3:].sum() == 5
    assert total[[2 + BINS, 2 + 2 * BINS]].tolist() == [1, 1]  # the last bins
    assert total[3 + BINS] == 1
    found = scores(np.zeros(SIZE), ["lesion"])
    assert set(found.values()) == {None}
    nothing_there = counts(np.zeros((1, 2, 2), np.uint8), np.full((1, 2, 2, 1), 0.1, np.float32), np.ones(1), 0.5)
    found = scores(nothing_there.numpy(), ["lesion"])
    assert found["val/accuracy_pooled"] == 1
    assert found["val/dice_pooled"] is found["val/average_precision"] is None


def test_counts_compile_with_fixed_shapes() -> None:
    mask = np.random.default_rng(1).integers(0, 3, (2, 8, 8)).astype(np.uint8)
    probability = np.random.default_rng(2).dirichlet(np.ones(3), (2, 8, 8)).astype(np.float32)
    compiled = tf.function(lambda *inputs: counts(*inputs, 0.5), jit_compile=True)
    weight = np.ones(2, np.float32)
    assert np.array_equal(compiled(mask, probability, weight), counts(mask, probability, weight, 0.5))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_volume_counts_as_an_image_of_as_many_pixels(channels: int) -> None:
    random = np.random.default_rng(4)
    mask = random.integers(0, 3, (3, 4, 5, 6)).astype(np.uint8)
    probability = random.dirichlet(np.ones(3), (3, 4, 5, 6)).astype(np.float32)[..., :channels]
    weight = np.array([1, 0, 1], np.float32)
    of_volumes = counts(mask, probability, weight, 0.4).numpy()
    of_images = counts(mask.reshape(3, 20, 6), probability.reshape(3, 20, 6, channels), weight, 0.4).numpy()
    np.testing.assert_array_equal(of_volumes, of_images)
    assert of_volumes[3:SIZE].sum() == 2 * 4 * 5 * 6, "the padding does not count"


def integers(mask: np.ndarray, probability: np.ndarray, weight: np.ndarray, threshold: float) -> np.ndarray:
    """What `counts` gives, in numpy's int64."""
    channels = probability.shape[-1]
    valid = np.broadcast_to(weight[:, None, None] > 0, mask.shape)
    made = []
    for index in range(1, max(channels, 2)):
        truth = mask == index if channels > 1 else mask > 0
        of_class = probability[..., index if channels > 1 else 0]
        taken = probability.argmax(axis=-1) == index if channels > 1 else of_class >= np.float32(threshold)
        made += [np.count_nonzero(part & valid) for part in (taken & truth, taken & ~truth, ~taken & truth)]
        for side in (~truth, truth):
            made += np.bincount(bins(of_class[side & valid]).astype(int), minlength=BINS).tolist()
    return np.array(made, np.int64)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 9),
    channels=st.sampled_from([1, 2, 4]),
    at_once=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_counts_are_the_integers_of_numpy_whatever_is_added_up_at_once(
    rows: int, size: int, channels: int, at_once: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    mask = random.integers(0, channels + 1, (rows, size, size)).astype(np.uint8)
    probability = np.stack([network(mask == index, 3, seed + index) for index in range(channels)], axis=-1)
    weight = random.integers(0, 2, rows).astype(np.float32)
    with patch.object(metrics, "_EXACT", at_once):
        made = counts(mask, probability, weight, 0.4).numpy()
    np.testing.assert_array_equal(made, integers(mask, probability, weight, 0.4))


def test_counts_are_exact_beyond_the_whole_numbers_of_float32() -> None:
    side = 4097
    mask = np.ones((1, side, side), np.uint8)
    mask[0, 0, :3] = 0
    probability = np.full((1, side, side, 1), 0.9, np.float32)
    probability[0, 0, :5] = 0.1
    made = counts(mask, probability, np.ones(1, np.float32), 0.5).numpy()
    assert made[:3].tolist() == [side**2 - 5, 0, 2]
    assert side**2 - 5 > 2**24
    assert made[3:].sum() == side**2
    assert made[3:].max() == side**2 - 5, "one bin has nearly all"
    # Batch after batch, as validation does it: 2**33 pixels and some.
    assert (tf.constant(made) * 512 + made).numpy()[0] == 513 * (side**2 - 5)


def on_the_host(graph: tf.Graph) -> Iterator[str]:
    """Nodes whose results a GPU leaves in the memory of the host, by what TensorFlow has registered for any device."""
    for node in graph.as_graph_def().node:
        if node.op == "Const":  # known before the first batch
            continue
        results = {argument.name for argument in op_def_registry.get(node.op).output_arg}
        for kernel in kernels.get_registered_kernels_for_op(node.op).kernel:
            fits = all(node.attr[one.name].type in one.allowed_values.list.type for one in kernel.constraint)
            if kernel.device_type == "DEFAULT" and fits and results & set(kernel.host_memory_arg):
                yield f"{node.op} {node.name}"


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_of_a_batch_is_counted_on_the_host(channels: int) -> None:
    signature = [
        tf.TensorSpec((2, 8, 8), tf.uint8),
        tf.TensorSpec((2, 8, 8, channels), tf.float32),
        tf.TensorSpec((2,), tf.float32),
    ]
    graph = tf.function(lambda *inputs: counts(*inputs, 0.5), autograph=False).get_concrete_function(*signature).graph
    assert {"UnsortedSegmentSum", "Sum"} <= {node.op for node in graph.as_graph_def().node}
    assert list(on_the_host(graph)) == []
    numbers = tf.function(lambda x: x + x, autograph=False).get_concrete_function(tf.TensorSpec((8,), tf.int32))
    assert "AddV2 add" in on_the_host(numbers.graph), "else this would say nothing"
