"""The manifest that an earlier run left: its rows of unchanged objects are taken over instead of read again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayseg import config, storage
from rayseg.data.layouts import Layout
from rayseg.data.manifest import unjudged
from rayseg.data.spool import Spool, opened
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.records import MANIFEST, Reason

VERSION = 4  # of what a catalog makes of an object: another number makes older manifests' rows stale
METADATA = b"rayseg.catalog"  # of a manifest's file: `mark`
_SAME = ("uri", "bytes", "etag", "masks")  # an object is unchanged where these are
_TRY_AGAIN = {Reason.READ_FAILED, Reason.NOT_FOUND, Reason.INTERNAL}


def mark(layout: Layout, groups: Mapping[str, str], pseudonyms: Pseudonyms) -> str:
    """What a row depends on beside its object: the layout, its groups and, without telling it, the pseudonyms' key."""
    content = [VERSION, MANIFEST.names, config.plain(layout), config.digest(sorted(groups.items()))]
    return pseudonyms.key("catalog", json.dumps(content, sort_keys=True))


class Standing:
    """Rows of the manifest at `uri` by the object that they are of. 16 bytes a row are in memory, the rows on disk.

    Where there is none, or it is of another `mark`, it has no rows.
    """

    def __init__(self, uri: str, mark: str, path: Path) -> None:
        self._hashes, self._numbers = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._rows: Spool | None = None
        try:
            if (storage.read_footer(uri).metadata or {}).get(METADATA) != mark.encode():
                return
        except (FileNotFoundError, ValueError):
            return
        self._rows = opened(uri, path, MANIFEST)
        hashes = [
            0 if row["reason"] in _TRY_AGAIN else _hash(row)
            for batch in self._rows.batches((*_SAME, "reason"))
            for row in batch.to_pylist()
        ]
        self._numbers = np.argsort(np.array(hashes, np.uint64), kind="stable")
        self._hashes = np.array(hashes, np.uint64)[self._numbers]

    def rows(self, planned: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """The rows of each object as before its series was judged; none where the object is new or has changed."""
        if self._rows is None:
            return [[] for _ in planned]
        wanted = np.array([_hash(one) for one in planned], np.uint64)
        firsts = np.searchsorted(self._hashes, wanted)
        ends = np.searchsorted(self._hashes, wanted, side="right")
        numbers = [self._numbers[first:end] for first, end in zip(firsts, ends, strict=True)]
        rows = iter(self._rows.rows(np.concatenate(numbers)))
        found = [[next(rows) for _ in of_one] for of_one in numbers]
        return [
            [unjudged(row) for row in of_one if row["uri"] == one["uri"]]
            for one, of_one in zip(planned, found, strict=True)
        ]


def _hash(row: Mapping[str, Any]) -> int:
    """Eight bytes of an object's name and state, 0 for none."""
    values = repr([row[name] for name in _SAME])
    return int.from_bytes(hashlib.blake2b(values.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1
