"""Samples: which accepted rows are taken, and how a task turns them into a shard of pixels."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.data.masks import truth
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice, read_slice, read_slices
from rayseg.records import PREPARED, REJECTS, Reason, Reject

# What is known before any object is read.
_SAMPLE = ("row_id", "patient_key", "series_key", "uri", "frame", "masks", "split")
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
        for place, image, masks in _read(samples, preprocess.color):
            made = make(image, masks, preprocess, labels, samples[place]["frame"])
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
    color: bool,
) -> Iterator[tuple[int, bytes | OSError | Slice | Reject, list[tuple[bytes | OSError, str | None]]]]:
    """Each sample's place, with its image, and its masks' bytes and labels, some read ahead.

    The image is the object's bytes or the slice of a frame. An object of which there are several frames is read once,
    and so is a mask that the next image has too.
    """
    places: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(sample["uri"], []).append(place)
    masks = {
        uri: dict.fromkeys(mask["uri"] for place in of_uri for mask in samples[place]["masks"])
        for uri, of_uri in places.items()
    }
    before: list[dict[str, None]] = [{}, *masks.values()]
    fresh = {uri: [mask for mask in masks[uri] if mask not in last] for uri, last in zip(places, before, strict=False)}
    objects = storage.read_each(uri for image in places for uri in (image, *fresh[image]))
    held: dict[str, bytes | OSError] = {}
    for uri, of_uri in places.items():
        image = next(objects)
        held = {mask: data for mask, data in held.items() if mask in masks[uri]}
        held |= {mask: next(objects) for mask in fresh[uri]}
        frames = [samples[place]["frame"] for place in of_uri]
        slices: Iterable[bytes | OSError | Slice | Reject] = repeat(image, len(frames))
        if isinstance(image, bytes) and frames[0] is not None:
            slices = read_slices(image, frames, color)
        for place, slice in zip(of_uri, slices, strict=True):
            yield place, slice, [(held[mask["uri"]], mask["label"]) for mask in samples[place]["masks"]]


def make(
    image: bytes | OSError | Slice | Reject,
    masks: Sequence[tuple[bytes | OSError, str | None]],
    preprocess: Preprocess,
    labels: Labels,
    frame: int | None = None,
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
        slice = read_slice(image, color=preprocess.color) if isinstance(image, bytes) else image
        if isinstance(slice, Reject):
            return slice
        classes = truth(readable, slice.shape, labels, slice.header, frame)
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
