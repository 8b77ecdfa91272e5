"""A prepared set as its readers see it: what `_prepared.json` tells, and the rows of the shards.

A set is of slices, whose pixels stand in the rows of its shards, or of volumes: then each has a file of its own, see
`chunks`, and the rows of the one shard of a split tell what the volumes are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

from rayseg import config, lease, storage
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.data.volume import VolumePreprocess
from rayseg.records import PREPARED, PREPARED_VOLUMES

DESCRIPTION = "_prepared.json"
PATIENTS = "split.csv"  # which patient is where
READERS = "_readers"  # below the set: a lease of each job that `reading` is open in
VERSION = 7  # of the format and of what preparing does: another number makes older sets stale


@dataclass(frozen=True)
class PreparedSet:
    """A set written by `prepare.prepare`."""

    uri: str
    # Height, width, channels of the uint8 images; of volumes depth, height, width, channels of float16 patches. Masks
    # have the same without channels
    shape: tuple[int, ...]
    preprocess: Preprocess  # of slices; of volumes nothing uses it
    labels: Labels
    rows: dict[str, int]  # by split; of volumes as many as there are
    digest: str  # of everything that the set was made from
    shards: dict[str, tuple[str, ...]]  # by split: paths below `uri`
    shard_rows: dict[str, tuple[int, ...]]  # by split: of each shard
    row_group_rows: int  # of each row group but a shard's last, which has what is left
    limited: bool = False  # whether `prepare.limit` left rows out
    volume: VolumePreprocess | None = None  # of volumes; with what was measured of the training split
    volumes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by split: paths of their files below `uri`

    @property
    def model_preprocess(self) -> Preprocess | VolumePreprocess:
        """What a model that is trained on the set does with its input."""
        return self.preprocess if self.volume is None else self.volume

    @property
    def schema(self) -> pa.Schema:
        """Of the rows."""
        return PREPARED if self.volume is None else PREPARED_VOLUMES

    def files(self, split: str) -> list[str]:
        """The URIs of a split's Parquet shards, in order."""
        return [storage.join(self.uri, path) for path in self.shards[split]]

    def read_split(self) -> bytes:
        """Which patient is in which split: CSV with `patient_key`, `part`, `split`, `rows` and `positive` ones."""
        return storage.read(storage.join(self.uri, PATIENTS))

    def read_rows(self, split: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A split's rows in order, in the schema `schema`; `columns` spares reading the pixels."""
        tables = [storage.read_table(uri, columns) for uri in self.files(split)]
        wanted = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        return pa.concat_tables([table.select(wanted.names) for table in tables]) if tables else wanted.empty_table()


def describe(uri: str) -> PreparedSet:
    """Reads what the set at `uri` is; raises ValueError where there is none or it is of another version."""
    try:
        values = storage.read_json(storage.join(uri, DESCRIPTION))
    except FileNotFoundError:
        raise ValueError(f"prepared: there is no finished prepared set at {uri}; run the prepare job") from None
    if values.get("version") != VERSION:
        found = values.get("version")
        raise ValueError(f"prepared: the set at {uri} is of version {found}, not {VERSION}; prepare again")
    return PreparedSet(
        uri=storage.absolute(uri),
        shape=tuple(values["shape"]),
        preprocess=config.build(Preprocess, values["preprocess"]) if "preprocess" in values else Preprocess(),
        labels=config.build(Labels, values["labels"]),
        rows=values["rows"],
        digest=values["digest"],
        shards={split: tuple(paths) for split, paths in values["shards"].items()},
        shard_rows={split: tuple(rows) for split, rows in values["shard_rows"].items()},
        row_group_rows=values["row_group_rows"],
        limited=values.get("limit") is not None,
        volume=config.build(VolumePreprocess, values["volume"]) if "volume" in values else None,
        volumes={split: tuple(paths) for split, paths in values.get("volumes", {}).items()},
    )


@contextmanager
def reading(uri: str, job: str) -> Iterator[PreparedSet]:
    """The set at `uri`, whose shards stay while this is open, whatever is prepared there meanwhile.

    Raises:
        ValueError: as `describe`.
    """
    describe(uri)
    with lease.reader(storage.join(uri, READERS), job):
        # Prepare takes the description away before it looks for readers: one of the two sees the other.
        yield describe(uri)
