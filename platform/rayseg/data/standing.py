"""What an earlier run left: its rows of unchanged objects are taken over instead of read again.

That is the manifest at its end, and before it the parts that `Parts` writes from time to time.
"""

import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import config, snapshots, storage
from rayseg.data.layouts import Layout
from rayseg.data.manifest import unjudged
from rayseg.data.spool import Spool, fill
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.records import MANIFEST, Reason

VERSION = 4  # of what a catalog makes of an object: another number makes older manifests' rows stale
METADATA = b"rayseg.catalog"  # of a manifest's file: `mark`
PARTS = ".parts"  # behind the manifest's URI: the folder of its parts
_SAME = ("uri", "bytes", "etag", "masks")  # an object is unchanged where these are
_FIRST_S, _LAST_S = 1.0, 60.0
_MOST_ROWS = 50_000
_TRY_AGAIN = {Reason.READ_FAILED, Reason.NOT_FOUND, Reason.INTERNAL}


def mark(layout: Layout, groups: Mapping[str, str], pseudonyms: Pseudonyms) -> str:
    """What a row depends on beside its object: the layout, its groups and, without telling it, the pseudonyms' key."""
    content = [VERSION, MANIFEST.names, config.plain(layout), config.digest(sorted(groups.items()))]
    return pseudonyms.key("catalog", json.dumps(content, sort_keys=True))


class Parts:
    """The rows that a catalog has read so far, below the manifest's URI and `PARTS`: what is left of it when it dies.

    A part is written after `_FIRST_S`, later each tenth of the time so far and at least each `_LAST_S` or `_MOST_ROWS`
    rows: so much is read again at most. Each is whole: no object's rows stand in two of them.
    """

    def __init__(self, manifest: str, mark: str) -> None:
        self.folder = f"{manifest}{PARTS}"
        self._schema = MANIFEST.with_metadata({METADATA: mark})
        self._waiting: list[pa.Table] = []
        self._began = self._written = time.monotonic()

    def uris(self) -> list[str]:
        """Of those that are there, of any mark."""
        with contextlib.suppress(FileNotFoundError):
            return [info.uri for info in storage.list_files(self.folder, (".parquet",))]
        return []

    def add(self, rows: pa.Table) -> None:
        """Rows of whole objects, as before their series are judged."""
        self._waiting.append(rows)
        now = time.monotonic()
        pause_s = min(_LAST_S, max(_FIRST_S, (now - self._began) / 10))
        if now - self._written < pause_s and sum(map(len, self._waiting)) < _MOST_ROWS:
            return
        table = pa.concat_tables(self._waiting).select(self._schema.names).cast(self._schema)
        storage.write_table(storage.join(self.folder, f"part-{secrets.token_hex(8)}.parquet"), table)
        self._waiting, self._written = [], time.monotonic()

    def keep(self, manifest: Path) -> None:
        """A whole manifest, as a part."""
        storage.write_file(storage.join(self.folder, "part-whole.parquet"), manifest)

    def remove(self) -> None:
        """All of them: the manifest is whole."""
        storage.delete_tree(self.folder)


class Standing:
    """Rows of the manifest at `uri`, and of `parts`, by the object that they are of.

    16 bytes a row are in memory, the rows on disk. Files that are not there or are of another `mark` have no rows.
    """

    def __init__(self, uri: str, mark: str, path: Path, parts: Sequence[str] = ()) -> None:
        self._rows = Spool(path, MANIFEST)
        ends = []
        for place in (uri, *parts):
            with contextlib.suppress(FileNotFoundError, ValueError):  # none, or none of ours
                file = snapshots.current(place) if place == uri else place
                if (storage.read_footer(file).metadata or {}).get(METADATA) == mark.encode():
                    fill(self._rows, file)
                    ends.append(len(self._rows))
        hashes = [
            0 if row["reason"] in _TRY_AGAIN else _hash(row)
            for batch in self._rows.batches((*_SAME, "reason"))
            for row in batch.to_pylist()
        ]
        self._ends = np.array(ends, np.int64)
        self._numbers = np.argsort(np.array(hashes, np.uint64), kind="stable")
        self._hashes = np.array(hashes, np.uint64)[self._numbers]

    def rows(self, planned: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """The rows of each object as before its series was judged; none where the object is new or has changed."""
        wanted = np.array([_hash(one) for one in planned], np.uint64)
        firsts = np.searchsorted(self._hashes, wanted)
        ends = np.searchsorted(self._hashes, wanted, side="right")
        numbers = [self._of_one_file(self._numbers[first:end]) for first, end in zip(firsts, ends, strict=True)]
        rows = iter(self._rows.rows(np.concatenate(numbers)))
        found = [[next(rows) for _ in of_one] for of_one in numbers]
        return [
            [unjudged(row) for row in of_one if row["uri"] == one["uri"]]
            for one, of_one in zip(planned, found, strict=True)
        ]

    def _of_one_file(self, numbers: np.ndarray) -> np.ndarray:
        """Those in the first file that has any: a part that outlived its manifest has the same rows once more."""
        files = np.searchsorted(self._ends, numbers, side="right")
        return numbers[files == files.min(initial=len(self._ends))]


def _hash(row: Mapping[str, Any]) -> int:
    """Eight bytes of an object's name and state, 0 for none."""
    values = repr([row[name] for name in _SAME])
    return int.from_bytes(hashlib.blake2b(values.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1
