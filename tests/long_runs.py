"""Runs with all that a checkpoint must hold."""

from pathlib import Path

from rayseg.models.presets import NetworkConfig
from rayseg.training.settings import EarlyStopping, Plateau, TrainConfig

EPOCHS = 3


def config(prepared: str, folder: Path, **changes: object) -> TrainConfig:
    """A run with all that a checkpoint must hold: plateaus, a patience, a moving average."""
    values = {
        "prepared": prepared,
        "storage": str(folder / "runs"),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "model": NetworkConfig(widths=(4, 8)),
        "batch_size": 6,
        "epochs": EPOCHS,
        "learning_rate": 0.02,
        "schedule": "plateau",
        "plateau": Plateau(patience=1, min_delta=0.5),
        "early_stopping": EarlyStopping(patience=EPOCHS),
        "clip_norm": 1.0,
        "ema_momentum": 0.8,
        "tensorboard": True,
        "mixed_precision": "float32",
        "cpus_per_worker": 1.0,
    }
    return TrainConfig(**(values | changes))  # type: ignore[arg-type]
