import math

import pytest

from rayseg.training.schedule import learning_rate
from rayseg.training.settings import TrainConfig


def config(**changes: object) -> TrainConfig:
    values = {"prepared": "p", "storage": "s", "tracking_uri": "t", "learning_rate": 0.02, "epochs": 5} | changes
    return TrainConfig(**values)  # type: ignore[arg-type]


def test_the_rate_rises_over_the_warmup_and_falls_along_half_a_cosine() -> None:
    rate = learning_rate(config(warmup_epochs=1), steps=10)
    assert not isinstance(rate, float)
    assert float(rate(0)) == pytest.approx(0.002)
    assert float(rate(5)) == pytest.approx(0.011)
    assert float(rate(10)) == pytest.approx(0.02)
    for step in (10, 20, 30, 43, 50):
        cosine = (1 + math.cos(math.pi * (step - 10) / 40)) / 2
        assert float(rate(step)) == pytest.approx(0.02 * (0.99 * cosine + 0.01), rel=1e-5)
    assert float(rate(99)) == pytest.approx(0.0002)


def test_a_run_of_one_epoch_has_no_warmup() -> None:
    rate = learning_rate(config(epochs=1), steps=10)
    assert not isinstance(rate, float)
    assert float(rate(0)) == pytest.approx(0.02)
    assert float(rate(10)) == pytest.approx(0.0002)


def test_a_constant_rate_stays() -> None:
    assert learning_rate(config(schedule="constant"), steps=10) == 0.02
