"""Samples: which accepted rows are taken, and how a task turns them into a shard of pixels."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.data.masks import truth
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import read_slice
from rayseg.records import PREPARED, REJECTS, Reason, Reject

_SAMPLE = ("row_id", "patient_key", "series_key", "uri", "masks", "split")  # known before any object is read
# A shard to write.
PLAN = pa.schema([("path", pa.string()), ("samples", pa.list_(pa.struct([PREPARED.field(name) for name in _SAMPLE])))])
# A shard as it came out; without rows it has no file.
WRITTEN = pa.schema(
    [
        ("path", pa.string()),
        ("rows", pa.int64()),
        ("positive", pa.int64()),
        ("rejects", pa.list_(pa.struct(list(REJECTS)))),
    ]
)


def limited(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """At most `limit` rows: equally many of each patient as far as it has them, spread over the patient's rows."""
    if limit is None or limit >= len(rows):
        return rows
    members: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row["patient_key"], []).append(index)
    left, kept = limit, []
    # The smallest patients first: what they cannot fill of an equal share goes to the others.
    for patients_left, indexes in zip(range(len(members), 0, -1), sorted(members.values(), key=len), strict=True):
        take = min(len(indexes), left // patients_left)
        left -= take
        kept += [indexes[(2 * k + 1) * len(indexes) // (2 * take)] for k in range(take)]
    return [rows[index] for index in sorted(kept)]


def write_shards(plan: pa.Table, output: str, preprocess: Preprocess, labels: Labels, row_group_rows: int) -> pa.Table:
    """A task: reads the samples of each planned shard, writes it where any is left, and tells what became of each.

    Args:
        plan: rows of `PLAN`.
        output: URI of the set.
        preprocess: makes the pixels.
        labels: makes the classes.
        row_group_rows: rows of a Parquet row group.

    Returns:
        Rows of `WRITTEN`, one a planned shard.
    """
    written = []
    for shard in plan.to_pylist():
        rows, rejects = [], []
        for sample, image, masks in _read(shard["samples"]):
            made = make(image, masks, preprocess, labels)
            if isinstance(made, Reject):
                told = {name: sample[name] for name in ("uri", "patient_key", "series_key")}
                rejects.append({**told, "stage": "prepare", "reason": made.reason.value, "detail": made.detail})
            else:
                rows.append(sample | made)
        if rows:
            table = pa.Table.from_pylist(rows, schema=PREPARED)
            storage.write_table(storage.join(output, shard["path"]), table, row_group_rows)
        positive = sum(row["foreground_pixels"] > 0 for row in rows)
        written.append({"path": shard["path"], "rows": len(rows), "positive": positive, "rejects": rejects})
    return pa.Table.from_pylist(written, schema=WRITTEN)


def _read(
    samples: list[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], bytes | OSError, list[tuple[bytes | OSError, str | None]]]]:
    """Each sample with its image's bytes and its masks' bytes and labels, some read ahead."""
    uris = (uri for sample in samples for uri in (sample["uri"], *(mask["uri"] for mask in sample["masks"])))
    objects = storage.read_each(uris)
    for sample in samples:
        yield sample, next(objects), [(next(objects), mask["label"]) for mask in sample["masks"]]


def make(
    image: bytes | OSError,
    masks: Sequence[tuple[bytes | OSError, str | None]],
    preprocess: Preprocess,
    labels: Labels,
) -> dict[str, Any] | Reject:
    """The columns foreground_pixels, image and mask of one sample, or why there are none; never raises."""
    try:
        if isinstance(image, OSError):
            return read_failure(image)
        readable = []
        for mask, label in masks:
            if isinstance(mask, OSError):
                return read_failure(mask, "mask")
            readable.append((mask, label))
        slice = read_slice(image, preprocess.color)
        if isinstance(slice, Reject):
            return slice
        classes = truth(readable, slice.shape, labels, slice.header)
        if isinstance(classes, Reject):
            return classes
        # Nearest neighbour picks pixels: classes before it or after are the same, a mean of classes would be none.
        mask_HW = preprocess.apply_mask(classes)
        return {
            "foreground_pixels": int(np.count_nonzero(mask_HW)),
            "image": preprocess.apply(slice).tobytes(),
            "mask": mask_HW.tobytes(),
        }
    except Exception as error:  # a defect of ours must cost this row only
        return Reject(Reason.INTERNAL, type(error).__name__)
