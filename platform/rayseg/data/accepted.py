"""The accepted rows of a manifest in a file of their own, and which of them must be prepared together.

A manifest of millions is read a piece at a time: what stays in memory are some bytes a row. Tasks read their rows from
the file, so that a manifest which is replaced meanwhile changes nothing.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from rayseg import storage
from rayseg.data import manifest, voxels
from rayseg.data.stacks import PLACE

TAKEN = ("patient_key", "study_key", "series_key", "uri", "frame", "masks")  # columns of a manifest that a sample keeps
COLUMNS = tuple(dict.fromkeys([*TAKEN, *PLACE, *voxels.COLUMNS, "bytes", "etag"]))  # of the file
_SERIES = ("patient_key", "series_key", "kind", "frame")
_ROWS = 1024  # of a batch of the file
_ROWS_AT_ONCE = 4096  # of the manifest
_STREAM_BYTES = 2**16
_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads the numbers of patients over 64 bits


@dataclass
class Units:
    """Runs of accepted rows with objects in common: of a series, of a volume, or an image file alone.

    A unit is of one patient. Arrays have an item a unit, in the order of the manifest.
    """

    first: np.ndarray  # int64, its first row
    rows: np.ndarray  # int64
    patient: np.ndarray  # int32, in `patients`
    together: np.ndarray | None  # int32, equal where units share a mask; None where none do
    loose: np.ndarray  # bool: image files, which nothing puts into an order
    patients: list[str]
    labels: set[str | None]  # that the paths of masks have
    masks: int  # how many rows have any


@dataclass
class _Seen:
    """What has been seen of a manifest so far."""

    rows: int = 0
    masked: int = 0
    firsts: array = field(default_factory=lambda: array("q"))
    patients: array = field(default_factory=lambda: array("i"))
    loose: array = field(default_factory=lambda: array("b"))
    numbers: dict[str, int] = field(default_factory=dict)  # of patients
    labels: set[str | None] = field(default_factory=set)
    masks: array = field(default_factory=lambda: array("Q"))  # a hash of each mask of a unit, and the unit
    units: array = field(default_factory=lambda: array("i"))
    before: pa.Table | None = None  # the last row's `_keys`


def write(source: Path, path: Path) -> Units:
    """Writes the accepted rows of the manifest in the file `source` to the file `path`: COLUMNS, in its order.

    Raises:
        ValueError: it is no manifest of this version.
    """
    seen, columns = _Seen(), (*COLUMNS, "verdict")
    lacking = set(columns) - set(pq.read_schema(source).names)
    if lacking:
        raise ValueError(f"prepare.manifest: it lacks {', '.join(sorted(lacking))}; catalog again")
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))
    rows: list[pa.RecordBatch] = []
    with pa.OSFile(str(path), "wb") as sink:
        writer = None
        with pq.ParquetFile(source, buffer_size=_STREAM_BYTES) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                accepted = batch.filter(pc.equal(batch["verdict"], "ok")).select(COLUMNS)
                if writer is None:
                    writer = pa.ipc.new_file(sink, accepted.schema, options=options)
                if len(accepted):
                    _look(accepted, seen)
                    rows = _written([*rows, accepted], writer, _ROWS)
        if writer is None:
            writer = pa.ipc.new_file(sink, pa.schema([]))
        _written(rows, writer, 1)
        writer.close()
    firsts = np.frombuffer(seen.firsts, np.int64)
    return Units(
        first=firsts,
        rows=np.diff(firsts, append=seen.rows),
        patient=np.frombuffer(seen.patients, np.int32),
        together=_together(np.frombuffer(seen.masks, np.uint64), np.frombuffer(seen.units, np.int32), len(firsts)),
        loose=np.frombuffer(seen.loose, np.int8).astype(bool),
        patients=list(seen.numbers),
        labels=seen.labels,
        masks=seen.masked,
    )


def read(uri: str, ranges: np.ndarray) -> pa.Table:
    """Rows of a file of `write`, one range after the other.

    Args:
        uri: of the file.
        ranges: int64 (ranges, 2), first row and the one behind the last.
    """
    numbers = sorted({number for first, end in ranges for number in range(first // _ROWS, (end - 1) // _ROWS + 1)})
    batches = dict(zip(numbers, storage.read_batches(uri, numbers), strict=True))
    pieces = []
    for first, end in ranges.tolist():
        for number in range(first // _ROWS, (end - 1) // _ROWS + 1):
            start = max(first - number * _ROWS, 0)
            pieces.append(batches[number].slice(start, end - number * _ROWS - start))
    return pa.Table.from_batches(pieces).combine_chunks()


def series_firsts(path: Path) -> np.ndarray:
    """The first row of each series, or stack of one, in a local file of `write`, int64; an image file is alone."""
    begins, before = [], None
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            for values in zip(*(batch[name].to_pylist() for name in _SERIES), strict=True):
                *key, kind, frame = values
                begins.append(key != before or (kind == "image" and frame is None))
                before = key
    return np.flatnonzero(np.array(begins, bool))


def _written(rows: list[pa.RecordBatch], writer: pa.ipc.RecordBatchFileWriter, least: int) -> list[pa.RecordBatch]:
    """Writes batches of `_ROWS` rows while at least `least` are left, and gives the rest."""
    if not rows:
        return []
    table = pa.Table.from_batches(rows)
    while len(table) >= least:
        (batch,) = table.slice(0, _ROWS).combine_chunks().to_batches()
        writer.write_batch(batch)
        table = table.slice(_ROWS)
    return table.to_batches()


def _look(accepted: pa.RecordBatch, seen: _Seen) -> None:
    """Adds to what has been seen."""
    lengths = pc.list_value_length(accepted["masks"]).fill_null(0).to_numpy()
    masks = pc.list_flatten(accepted["masks"])
    uris = pc.struct_field(masks, "uri")
    seen.labels |= set(pc.unique(pc.struct_field(masks, "label")).to_pylist())
    seen.masked += int(np.count_nonzero(lengths))
    keys = _keys(accepted, uris, lengths)
    both = keys if seen.before is None else pa.concat_tables([seen.before, keys])
    begins = _begins(both)[-len(keys) :]
    patients = _numbers(keys["patient"], seen.numbers)
    starts = np.flatnonzero(begins)
    loose = pc.and_(pc.equal(accepted["kind"], "image"), pc.is_null(accepted["frame"])).fill_null(False)
    units = np.cumsum(begins, dtype=np.int64) + len(seen.firsts) - 1
    seen.firsts.frombytes((starts + seen.rows).tobytes())
    seen.patients.frombytes(patients[starts].astype(np.int32).tobytes())
    seen.loose.frombytes(np.asarray(loose)[starts].astype(np.int8).tobytes())
    if len(uris):
        of_masks = np.repeat(np.arange(len(keys)), lengths)
        hashes = _hashes(uris) ^ (patients[of_masks].astype(np.uint64) * _ODD)
        pairs = np.unique(np.stack([units[of_masks].astype(np.uint64), hashes]), axis=1)
        seen.units.frombytes(pairs[0].astype(np.int32).tobytes())
        seen.masks.frombytes(pairs[1].tobytes())
    seen.rows += len(keys)
    seen.before = keys.slice(len(keys) - 1)


def _keys(accepted: pa.RecordBatch, mask_uris: pa.Array, lengths: np.ndarray) -> pa.Table:
    """What rows of a unit have in common: the patient, and one of the object, the DICOM series and the first mask."""
    series = manifest.whole_series(accepted["series_key"])
    firsts = pa.array(np.cumsum(lengths) - lengths, mask=lengths == 0)
    return pa.table(
        {
            "patient": accepted["patient_key"],
            "uri": accepted["uri"],
            "series": pc.if_else(pc.equal(accepted["kind"], "dicom"), series, pa.scalar(None, pa.string())),
            "mask": mask_uris.take(firsts),
        }
    )


def _begins(keys: pa.Table) -> np.ndarray:
    """Whether each row begins a unit; the first one does."""

    def as_before(name: str) -> pa.Array:
        column = keys[name].combine_chunks()
        return pc.equal(column[1:], column[:-1]).fill_null(False)

    shared = pc.or_(as_before("uri"), pc.or_(as_before("series"), as_before("mask")))
    # A row without a patient is one all the same: the leak check refuses it.
    return np.concatenate([[True], ~np.asarray(pc.and_(as_before("patient"), shared))])


def _numbers(keys: pa.ChunkedArray, numbers: dict[str, int]) -> np.ndarray:
    """The number of each patient, in the order in which they come."""
    encoded = keys.combine_chunks().dictionary_encode(null_encoding="encode")
    known = np.array([numbers.setdefault(key, len(numbers)) for key in encoded.dictionary.to_pylist()])
    return known[np.asarray(encoded.indices)]


def _hashes(uris: pa.Array) -> np.ndarray:
    """Eight bytes of each."""
    encoded = uris.dictionary_encode()
    digests = (hashlib.blake2b(uri, digest_size=8).digest() for uri in _bytes(encoded.dictionary))
    return np.frombuffer(b"".join(digests), np.uint64)[np.asarray(encoded.indices)]


def _bytes(strings: pa.Array) -> Iterator[bytes]:
    yield from strings.cast(pa.binary()).to_pylist()


def _together(masks: np.ndarray, units: np.ndarray, count: int) -> np.ndarray | None:
    """See `Units`: equal numbers of units that share masks, directly or by way of others."""
    ordered = np.sort(masks)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(several):
        return None
    shared = np.isin(masks, several)
    nodes = count + np.searchsorted(several, masks[shared])
    size = count + len(several)
    edges = coo_matrix((np.ones(len(nodes), bool), (units[shared], nodes)), (size, size))
    _, components = connected_components(edges, directed=False)
    _, first, inverse = np.unique(components[:count], return_index=True, return_inverse=True)
    return first[inverse].astype(np.int32)
