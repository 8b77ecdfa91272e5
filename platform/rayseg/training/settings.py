"""What a training job is given and what it gives: read by the driver and by its workers."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from rayseg.data.augment import Augment
from rayseg.data.patches import Patches
from rayseg.models.losses import Loss
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import limits

DEFAULT_THRESHOLD = 0.5  # of the scores on validation while no other is known
_GPU_FEED_THREADS = 4  # at least


@dataclass(frozen=True)
class EarlyStopping:
    """Ends the run when `monitor` has not risen by `min_delta` for `patience` epochs (Keras's own callback)."""

    patience: int = 10  # epochs without a rise
    min_delta: float = 0.0  # a smaller rise is none
    monitor: str = "val/dice_pooled"  # the score that is watched
    mode: Literal["max", "min"] = "max"  # whether the score should rise or fall

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"train.early_stopping.patience: a positive number expected, got {self.patience}")


@dataclass(frozen=True)
class Plateau:
    """The schedule `plateau`: where `monitor` has not risen for `patience` epochs the rate is multiplied by `factor`.

    Keras's own ReduceLROnPlateau does it.
    """

    patience: int = 5  # epochs without a rise
    factor: float = 0.5  # the rate is multiplied by it
    min_delta: float = 1e-4  # a smaller rise is none
    cooldown: int = 0  # epochs after a reduction that do not count
    least: float = 0.0  # lowest learning rate
    monitor: str = "val/dice_pooled"  # the score that is watched
    mode: Literal["max", "min"] = "max"  # whether the score should rise or fall

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise ValueError(f"train.plateau.factor: a number between 0 and 1 expected, got {self.factor}")
        if self.patience < 1:
            raise ValueError(f"train.plateau.patience: a positive number expected, got {self.patience}")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Two runs of equal configuration and data end with equal weights; `num_workers` and `accumulation` change them by
    rounding only. What `mixed_precision: auto` chooses depends on the machine; from then on it is part of the run.
    """

    prepared: str = ""  # URI of a prepared set
    storage: str = ""  # URI of a folder for checkpoints
    tracking_uri: str = ""  # URI of MLflow: sqlite:///PATH or the URL of a server; by default MLFLOW_TRACKING_URI
    experiment: str = "rayseg"  # experiment of the run in MLflow
    name: str = "train"  # name of the run in MLflow
    registered_model: str = "rayseg"  # name of the model that is registered
    reproduce: str | None = None  # id of a run in MLflow to repeat; only the three places above are taken from here

    model: NetworkConfig = field(default_factory=NetworkConfig)
    init_from: str | None = None  # a registered model to start from: models:/NAME/VERSION or models:/NAME@ALIAS
    freeze_epochs: int = 0  # the first epochs, in which a pretrained encoder is left as it is

    loss: Loss = field(default_factory=Loss)
    augment: Augment | None = None  # null is off; {} is light; of slices
    patches: Patches = field(default_factory=Patches)  # what training sees of volumes
    batch_size: int = 8  # rows of a batch, over all workers
    accumulation: int = 1  # parts in which each worker's share of a batch is computed, one after the other
    epochs: int = 10  # passes over the training split
    learning_rate: float = 1e-3  # the highest rate, for a batch of `base_batch_size` where that is given
    base_batch_size: int | None = None  # batch size that `learning_rate` is for; the rate is scaled to `batch_size`
    scaling_rule: Literal["linear", "sqrt"] = "linear"  # how the rate is scaled
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"  # how the rate changes over the epochs
    warmup_epochs: int = 1  # epochs in which the rate of the cosine schedule rises
    plateau: Plateau = field(default_factory=Plateau)
    early_stopping: EarlyStopping | None = None
    clip_norm: float | None = None  # greatest norm of all gradients of a batch together
    ema_momentum: float | None = None  # validates and registers a moving average of the weights, such as 0.99
    # One class: a pixel is foreground where its probability is at least this. Null takes the threshold of the best
    # pooled Dice on validation, in the best epoch. Several classes do not use it.
    threshold: float | None = None
    # Arithmetic. auto is float32 or mixed_bfloat16, what is faster where the run trains. It is measured once and kept.
    mixed_precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    jit_compile: bool = False  # XLA for forward and backward pass
    tensorboard: bool = False  # keeps TensorBoard's event files with the run
    seed: int = 1  # another seed is another start, order and augmentation

    # Threads of each worker that read and augment. By default one, as a forward pass on the CPU is far slower. With a
    # GPU there are as many as `cpus_per_worker`, and 4 at least.
    feed_threads: int | None = None
    # A number of workers, or [least, most]: as many as the cluster has room for, more or fewer as nodes come and go.
    num_workers: int | tuple[int, int] = 2
    cpus_per_worker: float = 1.0  # CPUs of a worker
    gpus_per_worker: float = 0.0  # 1, or a fraction of a GPU that other runs share
    # What else each worker takes of its node, such as {train: 1}: any resource that nodes were started with.
    resources: dict[str, float] = field(default_factory=dict)
    max_failures: int = 3  # how often lost workers are replaced before the run fails; announced losses do not count
    hang_timeout_s: float = 600.0  # a worker that takes longer for a step counts as hung, and is replaced

    def __post_init__(self) -> None:
        # Now, not after all epochs: a database refuses what is longer.
        limits.require("train.experiment", self.experiment, limits.EXPERIMENT)
        limits.require("train.registered_model", self.registered_model, limits.MODEL)
        if not self.registered_model.strip(" .") or set(self.registered_model) & set("/:@'"):
            raise ValueError(
                f"train.registered_model: a name without any of / : @ ' expected, got {self.registered_model!r}"
            )
        for key in ("batch_size", "epochs", "accumulation"):
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key}: a positive number expected, got {getattr(self, key)}")
        if not 1 <= self.least_workers <= self.most_workers:
            raise ValueError(
                "train.num_workers: a positive number, or two of them as [least, most] expected, got "
                f"{self.workers_told}"
            )
        if self.base_batch_size is not None and self.base_batch_size < 1:
            raise ValueError(f"train.base_batch_size: a positive number expected, got {self.base_batch_size}")
        if not self.elastic and not self.shares_evenly(self.most_workers):
            raise ValueError(
                "train.batch_size: a multiple of train.num_workers times train.accumulation expected (it is the batch "
                f"over all workers), got {self.batch_size} for {self.num_workers} times {self.accumulation}"
            )
        if self.batch_size < self.most_workers * self.accumulation:
            raise ValueError(
                "train.batch_size: at least the most of train.num_workers times train.accumulation expected (it is the "
                f"batch over all workers), got {self.batch_size} for {self.most_workers} times {self.accumulation}"
            )
        for key in ("learning_rate", "cpus_per_worker", "hang_timeout_s", "clip_norm"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"train.{key}: a positive number expected, got {getattr(self, key)}")
        for key in ("seed", "max_failures", "warmup_epochs", "freeze_epochs"):
            if getattr(self, key) < 0:
                raise ValueError(f"train.{key}: 0 or more expected, got {getattr(self, key)}")
        if not 0 <= self.gpus_per_worker <= 1:
            raise ValueError(f"train.gpus_per_worker: 0 to 1 expected, got {self.gpus_per_worker}")
        if 0 < self.gpus_per_worker < 1 < self.most_workers:
            # What adds up gradients between GPUs (NCCL) takes one process a GPU.
            raise ValueError("train.gpus_per_worker: workers of one run take a whole GPU each; set 1, or num_workers=1")
        if {"CPU", "GPU"} & self.resources.keys():
            raise ValueError("train.resources: cpus_per_worker and gpus_per_worker are keys of their own")
        if self.feed_threads is not None and self.feed_threads < 1:
            raise ValueError(f"train.feed_threads: a positive number expected, got {self.feed_threads}")
        for key in ("threshold", "ema_momentum"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < 1:
                raise ValueError(f"train.{key}: a number between 0 and 1 expected, got {getattr(self, key)}")
        if not self.name or "/" in self.name:
            raise ValueError(f"train.name: a name without slashes expected, got {self.name!r}")
        if not self.tracking_uri:
            object.__setattr__(self, "tracking_uri", os.environ.get("MLFLOW_TRACKING_URI", ""))
        for key in ("tracking_uri",) if self.reproduce else ("prepared", "storage", "tracking_uri"):
            if not getattr(self, key):
                raise ValueError(f"train.{key}: missing; give it in the recipe or by --set {key}=...")

    def check_among_others(self, of: str) -> None:
        """Raises ValueError for what a run of several at once, as `of` says, cannot have."""
        if self.reproduce:
            raise ValueError(f"train.reproduce: not for {of}; give the section's other keys")
        if self.elastic:
            raise ValueError(
                f"train.num_workers: one number expected in {of}, as the first runs would take the nodes of the "
                f"others; got {self.workers_told}"
            )

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return not isinstance(self.num_workers, int)

    @property
    def least_workers(self) -> int:
        """Without so many the run waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The run never has more."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def workers_told(self) -> str:
        """`num_workers` as a recipe has it."""
        return f"[{self.least_workers}, {self.most_workers}]" if self.elastic else str(self.num_workers)

    def shares_evenly(self, workers: int) -> bool:
        """Whether so many workers have equal shares of a batch, without padding."""
        return self.batch_size % (workers * self.accumulation) == 0

    @property
    def bundle(self) -> dict[str, float]:
        """What each worker asks the cluster for."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus, **self.resources}

    @property
    def feed_threads_per_worker(self) -> int:
        """`feed_threads`, or what stands for it by default."""
        if self.feed_threads is not None:
            return self.feed_threads
        return max(_GPU_FEED_THREADS, int(self.cpus_per_worker)) if self.gpus_per_worker else 1

    @property
    def scaled_learning_rate(self) -> float:
        """The learning rate for `batch_size`.

        `linear` multiplies it by batch_size / base_batch_size (Goyal et al. 2017, arXiv:1706.02677, found for SGD),
        `sqrt` by the root of that (Krizhevsky 2014, arXiv:1404.5997; Malladi et al. 2022, arXiv:2205.10287, for Adam).
        """
        if self.base_batch_size is None:
            return self.learning_rate
        ratio = self.batch_size / self.base_batch_size
        return self.learning_rate * (ratio if self.scaling_rule == "linear" else ratio**0.5)


@dataclass(frozen=True)
class Trial:
    """A training run as one of a sweep.

    In MLflow it is a child of the sweep's run, it can be gone on with until the sweep has ended, and only the winner is
    registered: in a second go on the run, which finds it trained.
    """

    parent_run_id: str
    number: int
    register: bool = False

    @property
    def tags(self) -> dict[str, str]:
        """What its run is found by."""
        return {"mlflow.parentRunId": self.parent_run_id, "rayseg.trial": str(self.number)}


@dataclass(frozen=True)
class TrainResult:
    """The registered model, and how the training went. Dice values are pooled over the validation split.

    Of several classes they are the mean over these.

    train_workers: of the last epoch.
    restarts: how often workers began anew, for whatever reason, over all starts of the job.
    resizes, preemptions, failures: how often that was as nodes came or went, as one was lost that had been announced
        (a spot node), and as workers died or hung; only these are counted by `max_failures`.
    history: a row an epoch: `epoch`, `workers` (at its end), `train/loss`, `val/loss`, `val/dice_pooled` (None without
        any foreground), ...
    reproduced: of a run that repeats another one, whether every value of every epoch is equal to that one's.
    """

    run_id: str
    model_uri: str  # empty, as the version, of a trial that is not registered
    version: str
    epochs: int
    best_epoch: int  # the one whose weights are registered
    val_dice: float | None
    untrained_val_dice: float | None
    train_workers: int
    rows: int  # of the training split
    seconds: float
    restarts: int
    resizes: int
    preemptions: int
    failures: int
    history: list[dict[str, Any]]
    reproduced: bool | None = None
