"""Adam for weights that begin to learn late, against the paper's formulas."""

import keras
import numpy as np
import pytest

from rayseg.training.optimizer import Adam

RATE, LATE = 0.01, 500


def steps_of(optimizer: keras.optimizers.Optimizer, gradients: np.ndarray, late: np.ndarray) -> np.ndarray:
    """How each of two weights moves, step by step; the second one's gradient is zero as long as it is frozen."""
    optimizer.build(weights := [keras.Variable([0.0], name=name) for name in ("early", "late")])
    values = []
    for both in np.stack([gradients, late], axis=1):
        optimizer.apply([keras.ops.convert_to_tensor([value], "float32") for value in both], weights)
        values.append([float(weight.numpy()[0]) for weight in weights])
    return np.diff(values, axis=0, prepend=0)


def by_hand(gradients: np.ndarray) -> np.ndarray:
    """Kingma and Ba 2015, algorithm 1, in Keras's form of epsilon."""
    first, second, steps = 0.0, 0.0, []
    for number, gradient in enumerate(gradients, start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        size = RATE * np.sqrt(1 - 0.999**number) / (1 - 0.9**number)
        steps.append(-size * first / (np.sqrt(second) + 1e-7))
    return np.array(steps)


def test_thawed_weights_go_as_far_as_any_others() -> None:
    gradients = np.random.default_rng(0).normal(1, 1, LATE + 40)
    late = np.where(np.arange(len(gradients)) < LATE, 0, gradients)
    steps = steps_of(Adam({"late": LATE}, RATE), gradients, late)
    np.testing.assert_allclose(steps[:, 0], by_hand(gradients), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(steps[LATE:, 1], by_hand(gradients[LATE:]), rtol=1e-3, atol=1e-6)
    assert not steps[:LATE, 1].any()
    assert abs(steps[LATE, 1]) == pytest.approx(RATE, rel=1e-3)
    keras_steps = steps_of(keras.optimizers.Adam(RATE), gradients, late)
    assert np.abs(keras_steps[LATE : LATE + 10, 1]).max() > 2.5 * RATE, "else this would say little"


def test_a_schedule_goes_on_by_the_steps_of_the_run() -> None:
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([LATE + 2], [RATE, RATE / 10])
    steps = steps_of(Adam({"late": LATE}, schedule), np.ones(LATE + 6), np.arange(LATE + 6) >= LATE)
    np.testing.assert_allclose(steps[LATE:, 1], [-RATE] * 3 + [-RATE / 10] * 3, rtol=1e-3)
