"""A prepared set as its readers see it: what `_prepared.json` tells, and the rows of the shards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from rayseg import config, lease, storage
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.records import PREPARED

DESCRIPTION = "_prepared.json"
PATIENTS = "split.csv"  # which patient is where
READERS = "_readers"  # below the set: a lease of each job that `reading` is open in
VERSION = 7  # of the format and of what preparing does: another number makes older sets stale


@dataclass(frozen=True)
class PreparedSet:
    """A set written by `prepare.prepare`."""

    uri: str
    shape: tuple[int, int, int]  # height, width, channels of the uint8 images; masks are (height, width)
    preprocess: Preprocess
    labels: Labels
    rows: dict[str, int]  # by split
    digest: str  # of everything that the set was made from
    shards: dict[str, tuple[str, ...]]  # by split: paths below `uri`
    shard_rows: dict[str, tuple[int, ...]]  # by split: of each shard
    row_group_rows: int  # of each row group but a shard's last, which has what is left
    limited: bool = False  # whether `prepare.limit` left rows out

    def files(self, split: str) -> list[str]:
        """The URIs of a split's Parquet shards, in order."""
        return [storage.join(self.uri, path) for path in self.shards[split]]

    def read_split(self) -> bytes:
        """Which patient is in which split: CSV with `patient_key`, `part`, `split`, `rows` and `positive` ones."""
        return storage.read(storage.join(self.uri, PATIENTS))

    def read_rows(self, split: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A split's rows in order, in the schema `records.PREPARED`; `columns` spares reading the pixels."""
        tables = [storage.read_table(uri, columns) for uri in self.files(split)]
        wanted = PREPARED if columns is None else pa.schema([PREPARED.field(name) for name in columns])
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
        preprocess=config.build(Preprocess, values["preprocess"]),
        labels=config.build(Labels, values["labels"]),
        rows=values["rows"],
        digest=values["digest"],
        shards={split: tuple(paths) for split, paths in values["shards"].items()},
        shard_rows={split: tuple(rows) for split, rows in values["shard_rows"].items()},
        row_group_rows=values["row_group_rows"],
        limited=values.get("limit") is not None,
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
