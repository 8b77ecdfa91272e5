"""The two kinds of prepared sets: of slices, and of volumes; what prepare does differently for them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayseg import config, storage
from rayseg.data import accepted, samples, volume_samples
from rayseg.data.accepted import Units
from rayseg.data.histogram import Histogram
from rayseg.data.manifest import whole_series
from rayseg.data.samples import Making
from rayseg.data.shards import Task, limited
from rayseg.data.split import SPLITS
from rayseg.data.volume_samples import VolumeMaking
from rayseg.records import Reason

Mapped = Callable[..., Iterator[tuple[int, Any]]]  # `work.mapped`, with where the tasks run
_ROWS_AT_ONCE = 2**16


@dataclass(frozen=True, eq=False)
class OfSlices:
    """A row is a slice; shards hold the pixels of many."""

    making: Making
    units: Units
    foreground = "foreground_pixels"  # column

    def taken(self, limit: int | None) -> np.ndarray | None:
        """The accepted rows that a limit leaves, int64; None for all."""
        return limited(np.repeat(self.units.patient, self.units.rows), limit)

    def count(self, tasks: Sequence[Task]) -> int:
        """Rows that some tasks make, rejected ones among them."""
        return sum(task.rows for task in tasks)

    def looking(self, rows_uri: str) -> Callable[[Task], dict[str, list[int]]]:
        """What a task does to find the patients of its rows that have foreground, with the pixels of each class."""
        return partial(samples.foreground, rows_uri=rows_uri, making=self.making)

    def measured(self, tasks: Sequence[Task], rows_uri: str, mapped: Mapped) -> "OfSlices":
        """As it is: nothing of the training split is needed."""
        return self

    def writing(self, rows_uri: str, output: str) -> Callable[[Task], list[dict[str, Any]]]:
        """What a task does to write its shards; it carries none of the units."""
        return partial(samples.write_shards, rows_uri=rows_uri, output=output, making=self.making)

    def description(self, output: str, written: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Of the set, what is of this kind."""
        preprocess = self.making.preprocess
        shards = _by_split(written)
        return {
            "preprocess": config.plain(preprocess),
            "shape": [*preprocess.size, preprocess.channels],
            "shards": {split: [shard["path"] for shard in shards[split]] for split in SPLITS},
            "shard_rows": {split: [shard["rows"] for shard in shards[split]] for split in SPLITS},
        }


@dataclass(frozen=True, eq=False)
class OfVolumes:
    """A row is a volume, which has a file of its own; a shard a split tells of them."""

    making: VolumeMaking
    units: Units
    firsts: np.ndarray  # int64, of each series the first accepted row
    foreground = "foreground_voxels"  # column

    def taken(self, limit: int | None) -> np.ndarray | None:
        """The accepted rows of the series that a limit leaves, int64; None for all."""
        unit = np.searchsorted(self.units.first, self.firsts, side="right") - 1
        series = limited(self.units.patient[unit], limit)
        if series is None:
            return None
        ends = np.append(self.firsts[1:], self.units.rows.sum())
        return np.concatenate([np.arange(self.firsts[one], ends[one]) for one in series.tolist()])

    def count(self, tasks: Sequence[Task]) -> int:
        """Series that some tasks make, rejected ones among them."""
        count = 0
        for task in tasks:
            for first, end in task.ranges.tolist():
                begins = self.firsts[np.searchsorted(self.firsts, first) : np.searchsorted(self.firsts, end)]
                count += len(begins) if task.taken is None else int(np.isin(begins, task.taken).sum())
        return count

    def looking(self, rows_uri: str) -> Callable[[Task], dict[str, list[int]]]:
        """What a task does to find the patients of its series that have foreground, with the pixels of each class."""
        return partial(volume_samples.class_pixels, rows_uri=rows_uri, making=self.making)

    def measured(self, tasks: Sequence[Task], rows_uri: str, mapped: Mapped) -> "OfVolumes":
        """With the values within the foreground of the training split, where the intensities are made by these."""
        intensity = self.making.volume.intensity
        if intensity.kind != "ct" or intensity.is_measured:
            return self
        training = [task for task in tasks if task.split == "train"]
        parts: dict[int, Histogram] = dict(
            mapped(partial(volume_samples.foreground, rows_uri=rows_uri, making=self.making), training)
        )
        values = Histogram()
        for number in sorted(parts):  # sums depend on their order
            values.merge(parts[number])
        volume = dataclasses.replace(self.making.volume, intensity=intensity.of_foreground(values))
        return dataclasses.replace(self, making=dataclasses.replace(self.making, volume=volume))

    def writing(self, rows_uri: str, output: str) -> Callable[[Task], list[dict[str, Any]]]:
        """What a task does to write its volumes; it carries none of the units."""
        return partial(volume_samples.write_volumes, rows_uri=rows_uri, output=output, making=self.making)

    def description(self, output: str, written: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Of the set, what is of this kind; writes the shards."""
        shards: dict[str, list[str]] = {}
        volumes = _by_split(written)
        for split in SPLITS:
            paths = [one["path"] for one in volumes[split]]
            shards[split] = [f"split={split}/part-00000-{config.digest(paths)[:16]}.parquet"] if paths else []
            if paths:
                rows = pa.concat_tables([one["table"] for one in volumes[split]])
                storage.write_table(storage.join(output, shards[split][0]), rows)
        return {
            "volume": config.plain(self.making.volume),
            "shape": [*self.making.volume.patch, 1],
            "shards": shards,
            "shard_rows": {split: [len(volumes[split])] if volumes[split] else [] for split in SPLITS},
            "volumes": {split: [one["path"] for one in volumes[split]] for split in SPLITS},
        }


def of_volumes(manifest: Path, rows: Path, units: Units, making: VolumeMaking) -> OfVolumes:
    """The kind, by the manifest and its accepted rows in local files."""
    return OfVolumes(dataclasses.replace(making, unmasked=_unmasked(manifest)), units, accepted.series_firsts(rows))


def _unmasked(manifest: Path) -> frozenset[str]:
    """The series of which slices were rejected as they have no mask: volumes with holes."""
    keys: set[str] = set()
    columns = ["series_key", "reason", "localizer"]
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            no_mask = pc.and_kleene(
                pc.equal(batch["reason"], Reason.NO_MASK.value), pc.invert(pc.fill_null(batch["localizer"], False))
            )
            keys |= set(pc.unique(whole_series(batch.filter(no_mask)["series_key"].drop_null())).to_pylist())
    return frozenset(keys)


def _by_split(written: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """What tasks tell of that has rows, by split."""
    return {
        split: [one for one in written if one["rows"] and one["path"].startswith(f"split={split}/")] for split in SPLITS
    }
