"""What a training job is given and what it gives: read by the driver and by its workers."""

from dataclasses import dataclass, field
from typing import Any, Literal

from rayseg.models.presets import NetworkConfig


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Two runs of equal configuration and data end with equal weights; `num_workers` changes them by rounding only.
    """

    prepared: str  # URI of a prepared set
    storage: str  # URI of a folder for checkpoints
    tracking_uri: str  # of MLflow: sqlite:///PATH or the URL of a server
    experiment: str = "rayseg"
    name: str = "train"
    registered_model: str = "rayseg"
    model: NetworkConfig = field(default_factory=NetworkConfig)
    batch_size: int = 8  # over all workers
    epochs: int = 10
    learning_rate: float = 1e-3  # the highest
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: int = 1  # of the cosine schedule
    seed: int = 1
    num_workers: int = 2
    cpus_per_worker: float = 1.0
    use_gpu: bool = False  # one for each worker
    max_failures: int = 3  # how often lost workers are replaced before the run fails
    threshold: float = 0.5  # one class: a pixel is foreground where its probability is at least this; more: unused
    mixed_precision: Literal["float32", "mixed_bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for key in ("batch_size", "epochs", "num_workers"):
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key}: a positive number expected, got {getattr(self, key)}")
        if self.batch_size % self.num_workers:
            raise ValueError(
                "train.batch_size: a multiple of train.num_workers expected (it is the batch over all workers), got "
                f"{self.batch_size} for {self.num_workers}"
            )
        for key in ("learning_rate", "cpus_per_worker"):
            if not getattr(self, key) > 0:
                raise ValueError(f"train.{key}: a positive number expected, got {getattr(self, key)}")
        for key in ("seed", "max_failures", "warmup_epochs"):
            if getattr(self, key) < 0:
                raise ValueError(f"train.{key}: 0 or more expected, got {getattr(self, key)}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"train.threshold: a number between 0 and 1 expected, got {self.threshold}")
        if not self.name or "/" in self.name:
            raise ValueError(f"train.name: a name without slashes expected, got {self.name!r}")


@dataclass(frozen=True)
class TrainResult:
    """The registered model, and how the training went. Dice values are pooled over the validation split.

    Of several classes they are the mean over these.

    restarts: how often workers began anew after a failure, over all starts of the job.
    history: a row an epoch: `epoch`, `train/loss`, `val/loss`, `val/dice_pooled` (None without any foreground), ...
    """

    run_id: str
    model_uri: str
    version: str
    epochs: int
    best_epoch: int  # the one whose weights are registered
    val_dice: float | None
    untrained_val_dice: float | None
    train_workers: int
    rows: int  # of the training split
    seconds: float
    restarts: int
    history: list[dict[str, Any]]
