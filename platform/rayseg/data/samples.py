"""Samples: which accepted rows are taken, and how a task turns them into a shard of pixels."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data.duplicates import fingerprint
from rayseg.data.labels import Labels, read_mask
from rayseg.data.manifest import read_failure
from rayseg.data.preprocess import Preprocess
from rayseg.data.spool import unpacked
from rayseg.dicom.reading import read_slice
from rayseg.records import PREPARED, REJECTS, Reason, Reject

TAKEN = ("patient_key", "study_key", "series_key", "uri", "mask_uri")  # columns of a manifest that a sample keeps
# A shard to write; its samples (TAKEN and `split`) are packed: all of the plan is in Ray's store.
PLAN = pa.schema([("path", pa.string()), ("samples", pa.binary())])
# A shard as it came out; without rows it has no file.
WRITTEN = pa.schema(
    [
        ("path", pa.string()),
        ("rows", pa.int64()),
        ("positive", pa.int64()),
        ("rejects", pa.list_(pa.struct(list(REJECTS)))),
    ]
)


_METADATA = b"rayseg.shard"  # of a shard's file: its row of WRITTEN


def row_id(uri: str) -> str:
    """The name of the sample made of an object."""
    return hashlib.sha256(uri.encode()).hexdigest()


def _unpacked(cell: bytes) -> list[dict[str, Any]]:
    return [{"row_id": row_id(row["uri"]), **row} for row in unpacked(cell).to_pylist()]


def limited(patient_keys: Sequence[str], limit: int | None) -> Sequence[int]:
    """Which rows make at most `limit`: equally many of each patient as far as it has them, spread over its rows."""
    if limit is None or limit >= len(patient_keys):
        return range(len(patient_keys))
    members: dict[str, list[int]] = {}
    for index, key in enumerate(patient_keys):
        members.setdefault(key, []).append(index)
    left, kept = limit, []
    # The smallest patients first: what they cannot fill of an equal share goes to the others.
    for patients_left, indexes in zip(range(len(members), 0, -1), sorted(members.values(), key=len), strict=True):
        take = min(len(indexes), left // patients_left)
        left -= take
        kept += [indexes[(2 * k + 1) * len(indexes) // (2 * take)] for k in range(take)]
    return sorted(kept)


def write_shards(plan: pa.Table, output: str, preprocess: Preprocess, labels: Labels, row_group_rows: int) -> pa.Table:
    """A task: reads the samples of each planned shard, writes it where any is left, and tells what became of each.

    A shard that an earlier run wrote is kept: its name is of all that it is made from. Only where that run could not
    read an object from the store it is made again.

    Args:
        plan: rows of `PLAN`.
        output: URI of the set.
        preprocess: makes the pixels.
        labels: makes the classes.
        row_group_rows: rows of a Parquet row group.

    Returns:
        Rows of `WRITTEN`, one a planned shard.
    """
    written: list[dict[str, Any]] = []
    for shard in plan.to_pylist():
        standing = _standing(storage.join(output, shard["path"]))
        if standing is not None:
            written.append({"path": shard["path"], **standing})
            continue
        rows, rejects = [], []
        for sample, image, mask in _read(_unpacked(shard["samples"])):
            made = make(image, mask, preprocess, labels)
            if isinstance(made, Reject):
                told = {name: sample[name] for name in ("uri", "patient_key", "series_key")}
                rejects.append({**told, "stage": "prepare", "reason": made.reason.value, "detail": made.detail})
            else:
                rows.append(sample | made)
        positive = sum(row["foreground_pixels"] > 0 for row in rows)
        told_of_all = {"rows": len(rows), "positive": positive, "rejects": rejects}
        if rows:
            metadata = {_METADATA: json.dumps(told_of_all, sort_keys=True)}
            table = pa.Table.from_pylist(rows, schema=PREPARED.with_metadata(metadata))
            storage.write_table(storage.join(output, shard["path"]), table, row_group_rows)
        written.append({"path": shard["path"], **told_of_all})
    return pa.Table.from_pylist(written, schema=WRITTEN)


def _standing(uri: str) -> dict[str, Any] | None:
    """What a whole shard at `uri` says became of its samples; None where there is none or another try may do better."""
    try:
        told: dict[str, Any] = json.loads((storage.read_footer(uri).metadata or {})[_METADATA])
    except (OSError, ValueError, KeyError):
        return None
    return None if any(reject["reason"] == Reason.READ_FAILED for reject in told["rejects"]) else told


def positive_patients(plan: pa.Table, preprocess: Preprocess, labels: Labels) -> pa.Table:
    """A task: the patients (column `patient_key`) of the planned samples that have foreground once prepared."""
    found = set()
    for cell in plan["samples"].to_pylist():
        for sample, image, mask in _read([sample for sample in _unpacked(cell) if sample["mask_uri"] is not None]):
            made = make(image, mask, preprocess, labels)
            if not isinstance(made, Reject) and made["foreground_pixels"]:
                found.add(sample["patient_key"])
    return pa.table({"patient_key": pa.array(sorted(found), pa.string())})


def _read(samples: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes | OSError, bytes | OSError | None]]:
    """Each sample with its image's and its mask's bytes (None: there is no mask), some read ahead."""
    uris = (uri for sample in samples for uri in (sample["uri"], sample["mask_uri"]) if uri is not None)
    objects = storage.read_each(uris)
    for sample in samples:
        yield sample, next(objects), None if sample["mask_uri"] is None else next(objects)


def make(
    image: bytes | OSError, mask: bytes | OSError | None, preprocess: Preprocess, labels: Labels
) -> dict[str, Any] | Reject:
    """The columns foreground_pixels, fingerprint, image and mask of one sample, or why there are none; never raises."""
    try:
        if isinstance(image, OSError):
            return read_failure(image)
        if isinstance(mask, OSError):
            return read_failure(mask, "mask")
        slice = read_slice(image)
        if isinstance(slice, Reject):
            return slice
        values = np.zeros(slice.stored.shape, np.uint8) if mask is None else read_mask(mask)
        if isinstance(values, Reject):
            return values
        if values.shape != slice.stored.shape:
            return Reject(Reason.MASK_MISMATCH, f"mask {values.shape}, image {slice.stored.shape}")
        mask_HW = preprocess.apply_mask(labels.apply(values))
        image_HWC = preprocess.apply(slice)
        return {
            "foreground_pixels": int(np.count_nonzero(mask_HW)),
            "fingerprint": fingerprint(image_HWC),
            "image": image_HWC.tobytes(),
            "mask": mask_HW.tobytes(),
        }
    except Exception as error:  # a defect of ours must cost this row only
        return Reject(Reason.INTERNAL, type(error).__name__)
