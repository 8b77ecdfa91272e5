"""The learning rate as a function of the step: it depends on nothing else, so a resumed run goes on with the same."""

import keras

from rayseg.training.settings import TrainConfig

_LAST = 0.01  # of the configured rate, reached with the last step


def learning_rate(config: TrainConfig, steps: int) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """What Adam is given: `config.scaled_learning_rate` itself, or that with a warm-up and a cosine decay.

    `plateau` starts with the rate itself; Keras's ReduceLROnPlateau then lowers it.

    `cosine`: over `config.warmup_epochs` the rate rises linearly from a tenth to the configured rate, then falls along
    half a cosine to a hundredth of it (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts; Goyal et al.
    2017, arXiv:1706.02677, for the warm-up). Runs of one epoch have no warm-up.

    Args:
        config: the run.
        steps: of an epoch.
    """
    highest = config.scaled_learning_rate
    if config.schedule != "cosine":
        return highest
    warmup_steps = min(config.warmup_epochs, config.epochs - 1) * steps
    rise = {"warmup_target": highest, "warmup_steps": warmup_steps} if warmup_steps else {}
    return keras.optimizers.schedules.CosineDecay(
        highest / (10 if warmup_steps else 1),
        config.epochs * steps - warmup_steps,
        # Relative to where the decay starts: Keras multiplies the target of the warm-up with it.
        alpha=_LAST,
        **rise,
    )
