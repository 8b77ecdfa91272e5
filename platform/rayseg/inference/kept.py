"""Kept masks: what a model found in a series, compressed, so that its files can be made without the model.

A Parquet file a series, FOLDER/<first digits of the digest>/<series_key>.parquet below the output, a row a slice
(`records.KEPT`). It lies there before any file that is made of it. The ledger's row has its digest and SHA-256; a file
that is gone, or another one than that, counts as not kept. It holds no URI and nothing that identifies.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayseg import config, storage
from rayseg.data.agreement import Agreement
from rayseg.geometry.grid import Geometry
from rayseg.inference.outputs import Segmented
from rayseg.inference.packed import Packed
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.quality import Look
from rayseg.models.engine import Engine
from rayseg.records import KEPT, Reason, Reject

logger = logging.getLogger(__name__)

FOLDER = "masks"
VERSION = 1  # of what is kept and of how masks are made of the same model and settings; another number: made again
_DIGITS = 16  # of the digest, in the folder's name
_ABOUT = b"rayseg.masks"  # in the file's metadata
_GEOMETRY, _LOOK = ([field.name for field in fields(kind)] for kind in (Geometry, Look))
# What another try may see otherwise: masks of a series with such a slice are not kept.
_PASSING = {Reason.READ_FAILED, Reason.NOT_FOUND, Reason.INTERNAL}


@dataclass(frozen=True)
class Keep:
    """Where the masks of a run are kept."""

    output: str  # URI of the run's output
    digest: str  # of what decides about a mask beside the input, see `digest`

    def uri(self, series_key: str) -> str:
        """Of the file of a series."""
        return storage.join(self.output, FOLDER, self.digest[:_DIGITS], f"{series_key}.parquet")


@dataclass(frozen=True)
class Head:
    """The bytes of an object before its pixels: all that files take of it beside the masks."""

    length: int
    sha256: str

    @classmethod
    def of(cls, data: bytes, length: int) -> "Head":
        """Of an object's bytes, or of enough of them."""
        return cls(length, hashlib.sha256(data[:length]).hexdigest())


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a series; the slices of `series` are those with a mask, and nothing of their objects is there."""

    series: Segmented
    labels: tuple[str, ...]
    engine: str  # that made the masks, with its version and precision
    heads: Sequence[Head | None]  # of the objects that the slices of `series` are in; None of image files
    refused: Mapping[int, Reject]  # the other slices, by number


def digest(model_digest: str, engine: Engine, gpus: float, mirror: str | None, postprocess: Postprocess) -> str:
    """Of all that decides about a mask beside the input, and of nothing else.

    Args:
        model_digest: of the bundle, or of all bundles of an ensemble.
        engine: as configured; `auto` counts as what it comes to.
        gpus: of an actor.
        mirror: see `predictor.Mirror`.
        postprocess: of the series' masks.
    """
    name = engine.name if engine.name != "auto" else "tensorflow" if gpus else "openvino"
    device = "GPU" if gpus and name == "tensorflow" else "CPU"
    return config.digest([VERSION, model_digest, name, device, engine.precision, mirror, config.plain(postprocess)])


def write(
    keep: Keep | None,
    series: Segmented,
    labels: Sequence[str],
    engine: str,
    heads: Sequence[Head | None],
    refused: Mapping[int, Reject],
) -> dict[str, Any] | Reject | None:
    """Keeps the masks of a series, arguments as in `Kept`; None for `keep` keeps nothing.

    Returns:
        What the ledger's row says of it, `records.KEPT_FILE`; None where masks are not kept, as a slice could not be
        read that another try may read; WRITE_FAILED where the store did not take it.
    """
    if keep is None or any(reject.reason in _PASSING for reject in refused.values()):
        return None
    data = _encoded(series, labels, engine, heads, refused)
    try:
        storage.write(keep.uri(series.series_key), data)
    except OSError as error:
        return Reject(Reason.WRITE_FAILED, f"masks: {type(error).__name__}")
    return {"digest": keep.digest, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def read(uri: str, series_key: str, sha256: str) -> Kept | None:
    """What is kept of a series; None where it is gone, or is not what the ledger's row is about."""
    try:
        data = storage.read(uri)
    except OSError as error:
        logger.info("masks of series %s cannot be read: %s", series_key, type(error).__name__)
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        logger.warning("masks of series %s are not those of the ledger (sha256)", series_key)
        return None
    return decode(data, series_key)


def decode(data: bytes, series_key: str) -> Kept:
    """What a file holds; raises ValueError where it is none of ours."""
    try:
        table = pq.read_table(io.BytesIO(data))
        about = json.loads(table.schema.metadata[_ABOUT])
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise ValueError(
            f"kept masks: a Parquet file with {_ABOUT.decode()} expected ({type(error).__name__})"
        ) from None
    rows = table.to_pylist()
    there = [row for row in rows if row["reason"] is None]
    series = Segmented(
        series_key,
        about["kind"],
        [row["number"] for row in there],
        [row["frame"] for row in there],
        [Geometry(**_values(row, _GEOMETRY)) for row in there],
        Packed.of_cells((row["mask"], (row["rows"], row["columns"])) for row in there),
        [Look(**_values(row, _LOOK) | {"agreement": _agreement(row)}) for row in there],
    )
    heads = [None if row["head_bytes"] is None else Head(row["head_bytes"], row["head_sha256"]) for row in there]
    refused = {row["number"]: Reject(Reason(row["reason"]), row["detail"]) for row in rows if row["reason"] is not None}
    return Kept(series, tuple(about["labels"]), about["engine"], heads, refused)


def _encoded(
    series: Segmented,
    labels: Sequence[str],
    engine: str,
    heads: Sequence[Head | None],
    refused: Mapping[int, Reject],
) -> bytes:
    masks = series.masks if isinstance(series.masks, Packed) else Packed(series.masks)
    each = zip(series.numbers, series.frames, masks.cells, series.geometries, series.looks, heads, strict=True)
    rows: list[dict[str, Any]] = [
        {
            "number": number,
            "frame": frame,
            "mask": cell,
            **vars(geometry),
            **vars(look),
            "agreement": look.agreement and {name: value.tolist() for name, value in vars(look.agreement).items()},
            "head_bytes": head and head.length,
            "head_sha256": head and head.sha256,
        }
        for number, frame, (cell, _), geometry, look, head in each
    ]
    rows += [{"number": number, "reason": one.reason.value, "detail": one.detail} for number, one in refused.items()]
    about = json.dumps({"kind": series.kind, "labels": list(labels), "engine": engine})
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["number"]), schema=KEPT)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_ABOUT: about}), buffer, compression="zstd", write_statistics=False)
    return buffer.getvalue()


def _values(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names}


def _agreement(row: Mapping[str, Any]) -> Agreement | None:
    known = row["agreement"]
    return known and Agreement(*(np.array(known[name], np.int64) for name in ("sizes", "shared")))
