"""What training knows for the model card."""

from rayseg import __version__
from rayseg import config as configuration
from rayseg.data.prepared import PreparedSet
from rayseg.tracking.card import Card
from rayseg.training.settings import TrainConfig
from rayseg.training.state import State


def card(config: TrainConfig, prepared: PreparedSet, state: State, run_id: str) -> Card:
    """About the model that the run gave: use, data, training, scores on validation."""
    best_epoch, best = state.best()
    return Card(
        name=f"{config.registered_model} {__version__}",
        run_id=run_id,
        labels=prepared.labels.names,
        shape=prepared.shape,
        threshold=state.threshold(config),
        threshold_chosen=config.threshold is None,
        digest=prepared.digest[:16],
        rows=prepared.rows,
        preprocess=configuration.plain(prepared.model_preprocess),
        label_settings=configuration.plain(prepared.labels),
        model=configuration.plain(config.model.resolved()),
        epochs=state.epoch,
        best_epoch=best_epoch,
        batch_size=config.batch_size,
        rate=config.scaled_learning_rate,
        schedule=config.schedule,
        precision=config.mixed_precision,
        seed=config.seed,
        validation={name: value for name, value in best.items() if name.startswith("val/") and value is not None},
    )
