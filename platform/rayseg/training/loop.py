"""What one Ray Train worker does: its share of every global batch, in step with the others.

Keras's own `fit` does not run under MultiWorkerMirroredStrategy, so the step is written out: every rank takes the
gradient of its share of the loss (`losses.batch_share`), and the optimizer, built in the strategy's scope, sums the
gradients over the ranks before it applies them. All ranks so apply the same update to the same weights. A rank has one
replica (one GPU, or its CPUs): its batch goes to `strategy.run` as it is.
"""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import ray.train
import tensorflow as tf

from rayseg import config as configuration
from rayseg import storage
from rayseg.data.feed import batches, steps
from rayseg.data.prepared import PreparedSet, describe
from rayseg.models.losses import batch_share, bce_dice, ce_dice
from rayseg.models.metrics import confusion, confusion_by_class, mean_of_defined, pooled_dice
from rayseg.models.network import build_network
from rayseg.training.callbacks import Checkpoints, Progress, RunMetrics
from rayseg.training.schedule import learning_rate
from rayseg.training.settings import TrainConfig
from rayseg.training.state import State

logger = logging.getLogger(__name__)

ATTEMPTS_FILE = "attempts.json"


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Trains from the run's last checkpoint, if it has one, to its last epoch.

    Args:
        job: `config`, a plain `TrainConfig` with absolute URIs; `run_id` in MLflow; `folder`, URI of the run's folder.

    Returns:
        `attempts`, how often workers began on this run; `diverged`, the epoch whose loss is not finite, or None.
    """
    config = configuration.build(TrainConfig, job["config"])
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    _set_up(config, rank)
    attempts = _count_attempt(job["folder"]) if rank == 0 else 0
    prepared = describe(config.prepared)
    learner = _Learner(config, prepared, rank, ranks)
    checkpoint = ray.train.get_checkpoint()
    state = State()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = State.restore(Path(folder), learner.model)
        logger.info("rank %d goes on after epoch %d", rank, state.epoch)
    diverged = _run(config, learner, state, job["run_id"])
    return {"attempts": attempts, "diverged": diverged}


def _run(config: TrainConfig, learner: "_Learner", state: State, run_id: str) -> int | None:
    callbacks: list[keras.callbacks.Callback] = [Checkpoints(state, learner.rank)]
    metrics = RunMetrics(config.tracking_uri, run_id) if learner.rank == 0 else None
    if metrics is not None:
        callbacks = [Progress(config.epochs, learner.steps), metrics, *callbacks]
    called = keras.callbacks.CallbackList(callbacks, model=learner.model, epochs=config.epochs, steps=learner.steps)
    if state.untrained is None:
        state.untrained = learner.validate()
        if metrics is not None:
            metrics.log(0, state.untrained)
    called.on_train_begin()
    for epoch in range(state.epoch, config.epochs):  # counted from 0, as Keras's callbacks have it
        called.on_epoch_begin(epoch)
        logs = learner.train(epoch, called)
        if not math.isfinite(logs["train/loss"]):
            return epoch + 1
        learner.check_ranks()
        logs |= learner.validate()
        called.on_epoch_end(epoch, logs)
        if learner.any_rank(learner.model.stop_training):
            break
    called.on_train_end()
    return None


class _Learner:
    """The model of this rank, and its compiled steps; each of them is traced once."""

    def __init__(self, config: TrainConfig, prepared: PreparedSet, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.prepared, self._config = rank, ranks, prepared, config
        self.steps = steps(prepared.rows["train"], config.batch_size)
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        assert self.strategy.num_replicas_in_sync == ranks, "one replica a rank"
        self._names = prepared.labels.names
        self._loss = bce_dice if len(self._names) == 1 else ce_dice
        with self.strategy.scope():
            self.model = build_network(config.model, prepared.shape, len(self._names), config.mixed_precision)
            self.model.compile(optimizer=keras.optimizers.Adam(learning_rate(config, self.steps)))
            self.model.optimizer.build(self.model.trainable_variables)
        height, width, channels = prepared.shape
        per_rank = config.batch_size // ranks
        signature = [
            tf.TensorSpec((per_rank, height, width, channels), tf.uint8),
            tf.TensorSpec((per_rank, height, width), tf.uint8),
            tf.TensorSpec((per_rank,), tf.float32),
        ]
        self._train_step = self._compiled(self._learn, signature)
        self._val_step = self._compiled(self._judge, signature)
        self._sum = self._compiled(_sum_over_ranks, [tf.TensorSpec((None,), tf.float64)])

    def train(self, epoch: int, called: keras.callbacks.CallbackList) -> dict[str, Any]:
        """One epoch; returns its logs, the same on all ranks except for the times."""
        began = time.perf_counter()
        feed = self._feed("train", epoch)
        share, weight = 0.0, 0.0
        with contextlib.closing(feed):
            for step, batch in enumerate(feed):
                called.on_train_batch_begin(step)
                loss_sum, weight_sum = (float(value) for value in self._train_step(*batch))
                share, weight = share + loss_sum, weight + weight_sum
                called.on_train_batch_end(step, {"loss": loss_sum / weight_sum if weight_sum else 0.0})
        seconds = time.perf_counter() - began
        total, rows, waited_s, seconds = self._over_ranks([share, weight, feed.waited_s, seconds])
        return {
            "train/loss": total / rows,
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
            "stall_percent": 100 * waited_s / seconds,
            "rows_per_s": rows / (seconds / self.ranks),
        }

    def validate(self) -> dict[str, Any]:
        """Loss and pooled Dice over the whole validation split, from sums and counts over all ranks.

        Of several classes `val/dice_pooled` is the mean, and each has its own under `val/dice_pooled/NAME`.
        """
        totals = np.zeros(2 + 3 * len(self._names))
        with contextlib.closing(self._feed("val", 0, shuffle=False)) as feed:
            for batch in feed:
                loss_sum, weight_sum, counts = self._val_step(*batch)
                totals += [float(loss_sum), float(weight_sum), *counts.numpy()]
        loss, rows, *counted = self._over_ranks(totals.tolist())
        dice = [pooled_dice(*(int(count) for count in of_class)) for of_class in np.reshape(counted, (-1, 3))]
        values = {"val/loss": loss / rows, "val/dice_pooled": mean_of_defined(dice)}
        if len(dice) > 1:
            values |= {f"val/dice_pooled/{name}": value for name, value in zip(self._names, dice, strict=True)}
        return values

    def _feed(self, split: str, epoch: int, shuffle: bool = True) -> Any:
        return batches(
            self.prepared,
            split,
            global_batch=self._config.batch_size,
            rank=self.rank,
            world_size=self.ranks,
            seed=self._config.seed,
            epoch=epoch,
            shuffle=shuffle,
        )

    def _learn(self, image_NHWC: tf.Tensor, mask_NHW: tf.Tensor, weight_N: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            loss_N = self._loss(mask_NHW, self.model(image_NHWC, training=True))
            share = batch_share(loss_N, weight_N, self._config.batch_size)
        variables = self.model.trainable_variables
        self.model.optimizer.apply(tape.gradient(share, variables), variables)
        return tf.reduce_sum(loss_N * weight_N), tf.reduce_sum(weight_N)

    def _judge(self, image_NHWC: tf.Tensor, mask_NHW: tf.Tensor, weight_N: tf.Tensor) -> tuple[tf.Tensor, ...]:
        probability_NHWC = self.model(image_NHWC, training=False)
        loss_N = self._loss(mask_NHW, probability_NHWC)
        if len(self._names) == 1:
            counts = confusion(mask_NHW, probability_NHWC, weight_N, self._config.threshold)
        else:
            counts = tf.reshape(confusion_by_class(mask_NHW, probability_NHWC, weight_N), (-1,))
        return tf.reduce_sum(loss_N * weight_N), tf.reduce_sum(weight_N), counts

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank says so: the ranks must do the same."""
        return self._over_ranks([float(flag)])[0] > 0

    def check_ranks(self) -> None:
        """Raises RuntimeError where the ranks' weights are not bit-equal: what they would train is no one model."""
        sha256 = hashlib.sha256()
        for weight in self.model.get_weights():
            sha256.update(weight.tobytes())
        # 40 bits each: their sum over thousands of ranks is exact in float64.
        own = int.from_bytes(sha256.digest()[:5])
        if self._over_ranks([own]) != [own * self.ranks]:
            raise RuntimeError(f"training: the weights of rank {self.rank} are not those of the other ranks")

    def _over_ranks(self, values: list[float]) -> list[float]:
        """The values summed over the ranks; in float64, so counts stay exact."""
        return [float(value) for value in self._sum(np.asarray(values, np.float64))]

    def _compiled(self, function: Callable[..., Any], signature: list[tf.TensorSpec]) -> Callable[..., Any]:
        return tf.function(
            lambda *inputs: self.strategy.run(function, args=inputs), input_signature=signature, autograph=False
        )


def _sum_over_ranks(values: tf.Tensor) -> tf.Tensor:
    # A copy made by the replica: the strategy asks on which device a value lies, and a function's input does not say.
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(values))


def _set_up(config: TrainConfig, rank: int) -> None:
    """The process's logging, threads and seeds."""
    tf.get_logger().setLevel(logging.WARNING)
    # Ray shows what is logged here where the job runs: our words of rank 0, not each report of each rank.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("rayseg").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    threads = max(1, int(config.cpus_per_worker))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    keras.utils.set_random_seed(config.seed)


def _count_attempt(folder: str) -> int:
    uri = storage.join(folder, ATTEMPTS_FILE)
    attempts = 1 + (storage.read_json(uri)["attempts"] if storage.exists(uri) else 0)
    storage.write_json(uri, {"attempts": attempts})
    return attempts
