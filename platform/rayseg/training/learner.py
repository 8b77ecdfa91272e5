"""The model of one rank and its compiled steps, in step with the other ranks.

Keras's own `fit` does not run under MultiWorkerMirroredStrategy, so the step is written out: every rank takes the
gradient of its share of the loss (`losses.batch_share`), the gradients are summed over the ranks, and then each rank
makes the same update of the same weights, clipping, loss scaling and moving average included. A rank has one replica
(one GPU, or its CPUs): its batch goes to `strategy.run` as it is.
"""

import contextlib
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rayseg.data.batches import Batches
from rayseg.data.feed import batches
from rayseg.data.patches import count
from rayseg.data.prepared import PreparedSet
from rayseg.data.windows import share, steps
from rayseg.models.encoders import encoder_layers
from rayseg.models.histograms import BINS, best_threshold
from rayseg.models.inputs import input_dtype
from rayseg.models.losses import batch_share, loss_function
from rayseg.models.metrics import SIZE, counts, scores
from rayseg.training.optimizer import optimizer
from rayseg.training.settings import DEFAULT_THRESHOLD, TrainConfig
from rayseg.training.start import network
from rayseg.training.state import Part
from rayseg.training.statistics import estimate, normalisations

_NOTHING = Part()
_STATISTICS_BATCHES = 50  # that statistics of batch normalisation are estimated of, at most


class Learner:
    """Trains and validates by epochs; each of its steps is traced once, the training step again after a freeze.

    beat: called after each step, so that a watchdog knows that there is progress.
    """

    def __init__(
        self, config: TrainConfig, prepared: PreparedSet, rank: int, ranks: int, beat: Callable[[], None]
    ) -> None:
        self.rank, self.ranks, self.prepared, self._config, self._beat = rank, ranks, prepared, config, beat
        of_volumes = prepared.volume is not None
        rows = count(prepared, "train", config.patches) if of_volumes else prepared.rows["train"]
        self.steps = steps(rows, config.batch_size)
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        assert self.strategy.num_replicas_in_sync == ranks, "one replica a rank"
        self._names = prepared.labels.names
        self._loss = loss_function(config.loss, len(self._names))
        with self.strategy.scope():
            self.model = network(config, prepared)
            encoder = [one.path for layer in encoder_layers(self.model) for one in layer.trainable_variables]
            self.model.compile(optimizer=optimizer(config, self.steps, encoder))
            self._variables = list(self.model.trainable_variables)
            self.model.optimizer.build(self._variables)
        per_rank = share(config.batch_size, ranks, config.accumulation)
        # Of volumes each has a depth, too, also where names say NHW.
        self._signature = [
            tf.TensorSpec((per_rank, *prepared.shape), input_dtype(prepared.shape)),
            tf.TensorSpec((per_rank, *prepared.shape[:-1]), tf.uint8),
            tf.TensorSpec((per_rank,), tf.float32),
        ]
        self._train_step = self._compiled_update()
        self._val_step = self._compiled(self._judge, self._signature)
        self._forward = self._compiled(lambda image_NHWC: self.model(image_NHWC, training=True), self._signature[:1])
        self._sum = self._compiled(_sum_over_ranks, [tf.TensorSpec((None,), tf.float64)])

    def freeze(self, layers: list[keras.Layer], frozen: bool) -> None:
        """Leaves the layers as they are in training, or lets them learn again."""
        if any(layer.trainable == frozen for layer in layers):
            for layer in layers:
                layer.trainable = not frozen
            self._train_step = self._compiled_update()

    def train(
        self,
        epoch: int,
        called: keras.callbacks.CallbackList,
        done: Part = _NOTHING,
        look: Callable[[int, Callable[[], Part]], None] = lambda step, summed: None,
    ) -> dict[str, Any]:
        """One epoch, or what is left of it; returns its logs, the same on all ranks.

        Args:
            epoch: counted from 0.
            called: Keras's callbacks.
            done: what was done of it before.
            look: called after each step with the number of steps done, and what sums up what they came to, which all
                ranks must call together.
        """
        began = time.perf_counter()
        totals: Any = tf.zeros((2,), tf.float64)
        with contextlib.closing(self._feed("train", epoch, first=done.step)) as feed:

            def summed(step: int) -> Part:
                means = [value / self.ranks for value in (feed.waited_s, time.perf_counter() - began)]
                loss, rows, waited_s, seconds = self._over_ranks([*(float(value) for value in totals), *means])
                return Part(step, done.loss + loss, done.rows + rows, done.waited_s + waited_s, done.seconds + seconds)

            for step, batch in enumerate(feed, done.step):
                called.on_train_batch_begin(step)
                # Not fetched here: a GPU goes on with the next step meanwhile.
                totals += tf.cast(self._train_step(*batch), tf.float64)
                called.on_train_batch_end(step)
                self._beat()
                look(step + 1, functools.partial(summed, step + 1))
            whole = summed(self.steps)
        return {
            "train/loss": float(np.float32(whole.loss / whole.rows)),  # what interrupted sums round to, too
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
            "stall_percent": 100 * whole.waited_s / whole.seconds,
            "rows_per_s": whole.rows / whole.seconds,
            "workers": self.ranks,
        }

    def timed_step(self) -> float:
        """Seconds of a training step on noise, from which the weights learn: for a model that is then thrown away."""
        of_images, of_masks, of_weights = (spec.shape.as_list() for spec in self._signature)
        random = np.random.default_rng(1)
        if self._signature[0].dtype == tf.uint8:
            image_NHWC, least = random.integers(0, 256, of_images, np.uint8), 200.0
        else:
            image_NHWC, least = random.standard_normal(of_images, np.float32).astype(np.float16), 0.8
        mask_NHW = (image_NHWC[..., 0] > least).astype(np.uint8)
        assert list(mask_NHW.shape) == of_masks
        began = time.perf_counter()
        self._train_step(image_NHWC, mask_NHW, np.ones(of_weights, np.float32)).numpy()
        return time.perf_counter() - began

    def validate(self) -> dict[str, Any]:
        """`val/loss` and the scores of `metrics.scores` over the whole validation split, summed over all ranks.

        Of one class without a given threshold they are those at `val/threshold`, the one of the best Dice, which the
        model would be registered with: what is best, of epochs and of trials, is judged by it.
        """
        totals: Any = tf.zeros((2 + SIZE * len(self._names),), tf.float64)
        with contextlib.closing(self._feed("val", 0, shuffle=False)) as feed:
            for batch in feed:
                totals += self._val_step(*batch)  # not fetched here either
                self._beat()
        loss, rows, *counted = self._over_ranks(totals.numpy().tolist())
        summed = np.asarray(counted)
        threshold: dict[str, float | None] = {}
        if len(self._names) == 1 and self._config.threshold is None:
            best = best_threshold(*summed[SIZE - 2 * BINS :].reshape(2, BINS))
            threshold = {"val/threshold": None if best is None else best.threshold}
            if best is not None:
                summed[: SIZE - 2 * BINS] = best.found, best.wrong, best.missed
        return {"val/loss": loss / rows, **scores(summed, self._names), **threshold}

    @contextlib.contextmanager
    def averaged(self, epoch: int) -> Iterator[None]:
        """Within it the model has the moving averages of its weights, where the run keeps such.

        Statistics of batch normalisation are then of these weights, over batches of the epoch: see `statistics`.
        """
        if self._config.ema_momentum is None:
            yield
            return
        before = [variable.numpy() for variable in self.model.non_trainable_variables]
        self._swap_averages()
        try:
            if normalisations(self.model):
                estimate(self.model, self._images(epoch), self._forward, self._mean_over_ranks)
            yield
        finally:
            self._swap_averages()
            for variable, value in zip(self.model.non_trainable_variables, before, strict=True):
                variable.assign(value)

    def _images(self, epoch: int) -> Iterator[tf.Tensor]:
        """Some whole batches of the training split, augmented as in training."""
        with contextlib.closing(self._feed("train", epoch)) as feed:
            for image_NHWC, _, weight_N in itertools.islice(feed, _STATISTICS_BATCHES):
                if not self.any_rank(not np.all(weight_N)) or self.steps == 1:
                    yield image_NHWC
                self._beat()

    def _mean_over_ranks(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(self._over_ranks(values.tolist())) / self.ranks

    def _swap_averages(self) -> None:
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        for variable, average in zip(self._variables, optimizer._model_variables_moving_average, strict=True):
            kept = variable.numpy()
            variable.assign(average.numpy())
            average.assign(kept)

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

    def _feed(self, split: str, epoch: int, shuffle: bool = True, first: int = 0) -> Batches:
        return batches(
            self.prepared,
            split,
            global_batch=self._config.batch_size,
            rank=self.rank,
            world_size=self.ranks,
            seed=self._config.seed,
            epoch=epoch,
            shuffle=shuffle,
            augment=self._config.augment if split == "train" else None,
            patches=self._config.patches if split == "train" else None,
            first=first,
            parts=self._config.accumulation,
            threads=self._config.feed_threads_per_worker,
        )

    def _compiled_update(self) -> Callable[..., Any]:
        """The training step: the sums of the loss and of the weights of the rank's share."""
        of_part = tf.function(self._of_part, jit_compile=True) if self._config.jit_compile else self._of_part
        parts = self._config.accumulation

        def summed(*share: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            pieces = zip(*(tf.split(values, parts) for values in share), strict=True)
            gradients, totals = of_part(*next(pieces))
            for piece in pieces:
                more, sums = of_part(*piece)
                gradients, totals = [one + other for one, other in zip(gradients, more, strict=True)], totals + sums
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, gradients), totals

        optimizer = self.model.optimizer
        # Outside of the replica, where nothing is summed again. The loss scaling's `apply` insists on the replica; what
        # it calls there does not.
        apply = getattr(optimizer, "_common_apply", optimizer.apply)

        def update(*share: tf.Tensor) -> tf.Tensor:
            gradients, totals = self.strategy.run(summed, args=share)
            apply(gradients, self._variables)
            return totals

        return tf.function(update, input_signature=self._signature, autograph=False)

    def _of_part(
        self, image_NHWC: tf.Tensor, mask_NHW: tf.Tensor, weight_N: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Gradients of the part's share of the loss, zero for frozen weights; sums of the loss and of the weights."""
        optimizer = self.model.optimizer
        with tf.GradientTape() as tape:
            loss_N = self._supervised(mask_NHW, self.model(image_NHWC, training=True))
            share = optimizer.scale_loss(batch_share(loss_N, weight_N, self._config.batch_size))
        # Zeros for the others: Adam's moments stay zero with them, and so do its steps.
        learning = [variable.value for variable in self._variables if variable.trainable]
        found = iter(tape.gradient(share, learning, unconnected_gradients=tf.UnconnectedGradients.ZERO))
        gradients = [next(found) if variable.trainable else tf.zeros_like(variable) for variable in self._variables]
        return gradients, tf.stack([tf.reduce_sum(loss_N * weight_N), tf.reduce_sum(weight_N)])

    def _supervised(self, mask_NHW: tf.Tensor, outputs: Any) -> tf.Tensor:
        """The loss; under deep supervision each further output counts half as much as the one before.

        As nnU-Net weighs them (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), to a sum of 1.
        """
        if not isinstance(outputs, list):
            return self._loss(mask_NHW, outputs)
        weights = [2.0**-index for index in range(len(outputs))]
        losses = [weight * self._loss(mask_NHW, output) for weight, output in zip(weights, outputs, strict=True)]
        return tf.add_n(losses) / sum(weights)

    def _judge(self, image_NHWC: tf.Tensor, mask_NHW: tf.Tensor, weight_N: tf.Tensor) -> tf.Tensor:
        """Sums of the loss and of the weights, then `metrics.counts`: float64, to be added up on the device."""
        outputs = self.model(image_NHWC, training=False)
        probability_NHWC = outputs[0] if isinstance(outputs, list) else outputs
        loss_N = self._loss(mask_NHW, probability_NHWC)
        sums = tf.stack([tf.reduce_sum(loss_N * weight_N), tf.reduce_sum(weight_N)])
        counted = counts(mask_NHW, probability_NHWC, weight_N, self._config.threshold or DEFAULT_THRESHOLD)
        return tf.concat([tf.cast(sums, tf.float64), counted], axis=0)

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
