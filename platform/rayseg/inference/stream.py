"""Series through Ray Data: actors that segment whole series, several at once each, whose slices share batches.

Series whose masks are kept go through actors without a model first, so that no network is loaded where all are.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rayseg import logs
from rayseg.data.range import Known
from rayseg.inference.networks import Mirror
from rayseg.inference.plan import unpacked_series
from rayseg.inference.predictor import load_any
from rayseg.inference.remake import Model, remake_series
from rayseg.inference.series import Task, segment_series
from rayseg.models.engine import Engine, require_gpu
from rayseg.records import LEDGER, REJECTS
from rayseg.tracking.bundle import KERAS_FILE

# Takes seconds, and archives of few slices need none.
if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)

_SERIES_PER_THREAD = 16  # of a task, at most: the actor ends one before it begins the next
# Ray Data takes milliseconds and memory of the driver for each block before the first is worked on. Actors that are
# started again for the next dataset take seconds, of hours.
_SERIES_PER_DATASET = 16_000
# Series that end within this time come together, at most so many: a picture takes milliseconds, as a block of Ray does.
_TELL_S, _AT_ONCE = 0.2, 4
_TASKS_PER_ACTOR = 8  # at least, so that all end at about the same time
_NUMBER = pa.field("number", pa.int64())  # of the series in its dataset
_FOUND = pa.schema([_NUMBER, *LEDGER, pa.field("rejects", pa.list_(pa.struct(list(REJECTS))))])

# A bundle's files by name, uint8. It travels through Ray: actors need neither the registry nor its artifact store. What
# is bytes would be pickled, which takes seconds where a network is large; arrays are copied once.
_Files = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workers:
    """The actors of a run."""

    actors: int = 1
    cpus: int = 1  # of each: so many series, and slices of theirs in the network, at once
    gpus: float = 0.0  # of each; without any it runs on the CPU
    engine: Engine = field(default_factory=Engine)
    mirror: Mirror | None = None
    known: Known | None = None  # of several models or mirror images, what they are judged by
    here: bool = False  # there are no actors: this process does it, without Ray


# What an actor does with a series, a row of `plan.SCHEMA`: its ledger row, or None where kept masks are of no use.
_Work = Callable[[dict[str, Any]], dict[str, Any] | None]


def rows(
    todo: Sequence[bytes], kept: Sequence[bytes], task: Task, bundle_dirs: Sequence[Path], workers: Workers
) -> Iterator[list[dict[str, Any]]]:
    """Yields the series' ledger rows as they end, with their rejects beside in `rejects`; each series once.

    Args:
        todo: series for the network, each as `plan.Plan` has it.
        kept: series with kept masks, likewise; those whose masks turn out to be gone go through the network, too.
        task: what they have in common.
        bundle_dirs: of the model, or of several that are averaged.
        workers: what does it.
    """
    gone: list[bytes] = []
    if kept:
        several = len(bundle_dirs) > 1 or workers.mirror is not None
        model = Model.read(bundle_dirs[0], several, workers.known)
        for numbers, some in _streamed(kept, partial(_remaking, model, task), workers, 0.0):
            gone += [kept[number] for number, row in zip(numbers, some, strict=True) if row["verdict"] is None]
            yield [row for row in some if row["verdict"] is not None]
    if gone:
        logger.warning("segment: kept masks of %d series are of no use; the network runs again", len(gone))
    if todo or gone:
        yield from _segmented([*todo, *gone], task, bundle_dirs, workers)


def _segmented(
    todo: Sequence[bytes], task: Task, bundle_dirs: Sequence[Path], workers: Workers
) -> Iterator[list[dict[str, Any]]]:
    if not workers.gpus and workers.engine.name == "auto":
        workers = replace(workers, engine=replace(workers.engine, name="openvino"))
    if workers.here:
        for _, some in _streamed(todo, partial(_loaded, bundle_dirs, task, workers), workers, 0.0):
            yield some
        return
    import ray

    needless = {KERAS_FILE} if workers.engine.name == "openvino" else set()
    files = [{file.name: file for file in folder.iterdir() if file.name not in needless} for folder in bundle_dirs]
    bundles = ray.put([{name: np.fromfile(file, np.uint8) for name, file in some.items()} for some in files])
    for _, some in _streamed(todo, partial(_segmenting, bundles, task, workers), workers, workers.gpus):
        yield some


def _streamed(
    todo: Sequence[bytes], start: Callable[[], _Work], workers: Workers, gpus: float
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Yields numbers of series, and what `start`'s function gave of each, as they end."""
    if workers.here:
        numbered = pa.table({"number": range(len(todo)), "series": pa.array(todo, pa.binary())})
        for batch in _Segmenter(start, workers.cpus, logs.told())(numbered):
            ended = batch.to_pylist()
            yield [row.pop("number") for row in ended], ended
        return
    import ray.data

    share = len(todo) // (_TASKS_PER_ACTOR * workers.actors)
    per_task = min(max(share, workers.cpus), _SERIES_PER_THREAD * workers.cpus)
    for first in range(0, len(todo), _SERIES_PER_DATASET):
        left = dict(enumerate(todo[first : first + _SERIES_PER_DATASET], start=first))
        while left:
            before = len(left)
            some = [{"number": number, "series": cell} for number, cell in left.items()]
            dataset = ray.data.from_items(some, override_num_blocks=math.ceil(len(some) / per_task)).map_batches(
                _Segmenter,
                batch_size=None,
                batch_format="pyarrow",
                fn_constructor_args=(start, workers.cpus, logs.told()),
                compute=ray.data.ActorPoolStrategy(size=workers.actors),
                num_cpus=workers.cpus,
                num_gpus=gpus,
            )
            dataset.context.target_max_block_size = 1  # rows come when they are yielded, not at the end of their task
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                # Ray runs the task of a lost actor again, and numbers what it yields: rows come in the order in which
                # they end, so that one may come twice, and another one not.
                ended = [row for row in batch.to_pylist() if left.pop(row["number"], None) is not None]
                yield [row.pop("number") for row in ended], ended
            assert len(left) < before, "a pass over the rest ends some of it"


class _Segmenter:
    """An actor: series in, ledger rows out; what it makes lies on the store before a row comes back.

    Its threads are its own: Ray's, of an actor with several calls at once, now and then crash it as it ends (SIGSEGV in
    `tstate_delete_common`).
    """

    def __init__(self, start: Callable[[], _Work], threads: int, told: Mapping[str, str]) -> None:
        logs.adopt(told)
        self._threads = ThreadPoolExecutor(threads, "series")
        self._work = start()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        numbered = zip(batch["number"].to_pylist(), batch["series"].to_pylist(), strict=True)
        under_way = [self._threads.submit(self._segment, *one) for one in numbered]
        rows: list[dict[str, Any]] = []
        told = time.monotonic()
        try:
            for ended in as_completed(under_way):
                rows.append(ended.result())
                if len(rows) == _AT_ONCE or time.monotonic() - told > _TELL_S:
                    yield pa.Table.from_pylist(rows, schema=_FOUND)
                    rows, told = [], time.monotonic()
            if rows:
                yield pa.Table.from_pylist(rows, schema=_FOUND)
        finally:
            for one in under_way:
                one.cancel()

    def _segment(self, number: int, cell: bytes) -> dict[str, Any]:
        series = unpacked_series(cell)
        with logs.about(series=series["series_key"]):
            row = self._work(series)
            if row is not None and row["verdict"] == "rejected":
                logger.warning("series %s is rejected: %s", series["series_key"], row["reason"])
            return {"number": number, **(row or {})}


def _segmenting(bundles: "ray.ObjectRef[list[_Files]]", task: Task, workers: Workers) -> _Work:
    """In the actor: loads the model."""
    import ray

    from rayseg.grant import keep_to_grant

    if keep_to_grant():
        require_gpu(workers.engine, "segment.gpus_per_actor")
    with tempfile.TemporaryDirectory() as folder:
        places = []
        for number, files in enumerate(ray.get(bundles)):
            places.append(Path(folder, str(number)))
            places[-1].mkdir()
            for name, content in files.items():
                content.tofile(places[-1] / name)
        return _loaded(places, task, workers)


def _loaded(bundle_dirs: Sequence[Path], task: Task, workers: Workers) -> _Work:
    """Loads the model."""
    predictor = load_any(
        *bundle_dirs, engine=workers.engine, threads=workers.cpus, mirror=workers.mirror, known=workers.known
    )

    def work(series: dict[str, Any]) -> dict[str, Any]:
        series.pop("masks")
        return segment_series(predictor, task, **series)

    return work


def _remaking(model: Model, task: Task) -> _Work:
    """In the actor: there is nothing to load."""
    return lambda series: remake_series(model, task, **series)
