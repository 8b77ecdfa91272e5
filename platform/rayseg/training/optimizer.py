"""The optimizer of a run: Adam, whose bias correction counts for each weight the steps since it began to learn."""

from collections.abc import Collection
from typing import Any

import keras
from keras import ops

from rayseg.training.schedule import learning_rate
from rayseg.training.settings import TrainConfig


def optimizer(config: TrainConfig, steps: int, encoder: Collection[str]) -> keras.optimizers.Optimizer:
    """Adam, with what the configuration adds to it.

    Args:
        config: the run.
        steps: of an epoch.
        encoder: paths of the variables that `config.freeze_epochs` leaves as they are at first.
    """
    ema = {} if config.ema_momentum is None else {"use_ema": True, "ema_momentum": config.ema_momentum}
    late = dict.fromkeys(encoder, config.freeze_epochs * steps)
    adam = Adam(late, learning_rate(config, steps), global_clipnorm=config.clip_norm, **ema)
    # Small gradients vanish in half precision; bfloat16 has the exponents of float32.
    return keras.optimizers.LossScaleOptimizer(adam) if config.mixed_precision == "mixed_float16" else adam


class Adam(keras.optimizers.Adam):
    """Kingma and Ba 2015 (arXiv:1412.6980), for weights that do not all begin to learn with the first step.

    The moments of a frozen weight are zero. Where it thaws after many steps, Keras's correction, which counts all of
    them, is next to 1, and the first steps are up to sqrt(1 / (1 - beta_2)) * (1 - beta_1) = 3 times the learning rate,
    those after it up to five times. Counted from the thaw they are as large as those of any weight.
    """

    def __init__(self, late: dict[str, int], *arguments: Any, **named: Any) -> None:
        """`late`: after how many steps weights begin to learn, by the paths of their variables."""
        super().__init__(*arguments, **named)
        self._late = late
        self._late_by_index: dict[int, int] = {}

    def build(self, var_list: list[keras.Variable]) -> None:
        """As Keras's; notes which of the weights are late."""
        super().build(var_list)
        steps = [self._late.get(variable.path, 0) for variable in var_list]
        self._late_by_index = {index: step for index, step in enumerate(steps) if step}

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Keras's step with the learning rate that makes its correction the one of the weight's own steps."""
        late = self._late_by_index.get(self._get_variable_index(variable))
        if late is not None:
            step = ops.cast(self.iterations + 1, "float32")
            own = ops.maximum(step - late, 1.0)
            learning_rate = learning_rate * self._correction(own) / self._correction(step)
        super().update_step(gradient, variable, learning_rate)

    def _correction(self, step: Any) -> Any:
        return ops.sqrt(1 - ops.power(self.beta_2, step)) / (1 - ops.power(self.beta_1, step))
