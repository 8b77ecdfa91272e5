"""Samples: which accepted rows are taken, and how a task turns them into a shard of pixels."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data.labels import Labels, read_mask
from rayseg.data.manifest import read_failure
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice, read_slice, read_slices
from rayseg.records import PREPARED, REJECTS, Reason, Reject

# What is known before any object is read.
_SAMPLE = ("row_id", "patient_key", "series_key", "uri", "frame", "mask_uri", "split")
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
        samples, found, rejects = shard["samples"], {}, []
        for place, image, mask in _read(samples):
            made = make(image, mask, preprocess, labels)
            if isinstance(made, Reject):
                told = {name: samples[place][name] for name in ("uri", "frame", "patient_key", "series_key")}
                rejects.append({**told, "stage": "prepare", "reason": made.reason.value, "detail": made.detail})
            else:
                found[place] = samples[place] | made
        rows = [found[place] for place in sorted(found)]
        if rows:
            table = pa.Table.from_pylist(rows, schema=PREPARED)
            storage.write_table(storage.join(output, shard["path"]), table, row_group_rows)
        positive = sum(row["foreground_pixels"] > 0 for row in rows)
        written.append({"path": shard["path"], "rows": len(rows), "positive": positive, "rejects": rejects})
    return pa.Table.from_pylist(written, schema=WRITTEN)


def _read(
    samples: list[dict[str, Any]],
) -> Iterator[tuple[int, bytes | OSError | Slice | Reject, bytes | OSError | None]]:
    """Each sample's place, with its image and its mask's bytes (None: there is no mask), some read ahead.

    The image is the object's bytes or the slice of a frame. An object of which there are several frames is read once.
    """
    places: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(sample["uri"], []).append(place)
    masks = {uri: [samples[place]["mask_uri"] for place in of_uri] for uri, of_uri in places.items()}
    objects = storage.read_each(uri for image in places for uri in (image, *masks[image]) if uri is not None)
    for uri, of_uri in places.items():
        image = next(objects)
        frames = [samples[place]["frame"] for place in of_uri]
        slices: Iterable[bytes | OSError | Slice | Reject] = repeat(image, len(frames))
        if isinstance(image, bytes) and frames[0] is not None:
            slices = read_slices(image, frames)
        for place, slice, mask_uri in zip(of_uri, slices, masks[uri], strict=True):
            yield place, slice, None if mask_uri is None else next(objects)


def make(
    image: bytes | OSError | Slice | Reject, mask: bytes | OSError | None, preprocess: Preprocess, labels: Labels
) -> dict[str, Any] | Reject:
    """The columns foreground_pixels, image and mask of one sample, or why there are none; never raises."""
    try:
        if isinstance(image, OSError):
            return read_failure(image)
        if isinstance(mask, OSError):
            return read_failure(mask, "mask")
        slice = read_slice(image) if isinstance(image, bytes) else image
        if isinstance(slice, Reject):
            return slice
        if mask is not None and slice.header is not None and slice.header.frame is not None:
            return Reject(Reason.MASK_MISMATCH, "one mask for an object of several frames")
        values = np.zeros(slice.stored.shape, np.uint8) if mask is None else read_mask(mask)
        if isinstance(values, Reject):
            return values
        if values.shape != slice.stored.shape:
            return Reject(Reason.MASK_MISMATCH, f"mask {values.shape}, image {slice.stored.shape}")
        mask_HW = preprocess.apply_mask(labels.apply(values))
        return {
            "foreground_pixels": int(np.count_nonzero(mask_HW)),
            "image": preprocess.apply(slice).tobytes(),
            "mask": mask_HW.tobytes(),
        }
    except Exception as error:  # a defect of ours must cost this row only
        return Reject(Reason.INTERNAL, type(error).__name__)
