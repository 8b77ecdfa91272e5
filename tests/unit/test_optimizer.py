"""Adam for weights that begin to learn late, against the paper's formulas."""

import keras
import numpy as np
import pytest

from rayseg.training.optimizer import Adam

RATE, LATE = 0.01, 500


def steps_of(optimizer: keras.optimizers.Optimizer, gradients: np.ndarray, done: int) -> np.ndarray:
    """How a weight that no step has moved yet goes on, step by step, when so many are done."""
    optimizer.build(weights := [keras.Variable([0.0], name="weight")])
    optimizer.iterations.assign(done)
    values = []
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor([gradient], "float32")], weights)
        values.append(float(weights[0].numpy()[0]))
    return np.diff(values, prepend=0)


def by_hand(gradients: np.ndarray) -> np.ndarray:
    """Kingma and Ba 2015, algorithm 1, in Keras's form of epsilon."""
    first, second, steps = 0.0, 0.0, []
    for number, gradient in enumerate(gradients, start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        size = RATE * np.sqrt(1 - 0.999**number) / (1 - 0.9**number)
        steps.append(-size * first / (np.sqrt(second) + 1e-7))
    return np.array(steps)


def test_thawed_weights_go_as_far_as_any_others() -> None:
    gradients = np.random.default_rng(0).normal(1, 1, 12)
    steps = steps_of(Adam({"weight": LATE}, RATE), gradients, LATE)
    np.testing.assert_allclose(steps, by_hand(gradients), rtol=1e-3, atol=1e-6)
    assert abs(steps[0]) == pytest.approx(RATE, rel=1e-3)
    np.testing.assert_allclose(steps_of(Adam({}, RATE), gradients, 0), by_hand(gradients), rtol=1e-3, atol=1e-6)
    assert np.abs(steps_of(keras.optimizers.Adam(RATE), gradients, LATE)).max() > 2.5 * RATE, "else it says little"


def test_a_schedule_goes_on_by_the_steps_of_the_run() -> None:
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([LATE + 2], [RATE, RATE / 10])
    steps = steps_of(Adam({"weight": LATE}, schedule), np.ones(6), LATE)
    np.testing.assert_allclose(steps, [-RATE] * 3 + [-RATE / 10] * 3, rtol=1e-3)
