"""Samples: which accepted rows are taken, and how a task turns them into a shard of pixels."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data.duplicates import fingerprint
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.data.masks import truth
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import facts
from rayseg.data.spool import unpacked
from rayseg.data.stacks import usable
from rayseg.dicom.reading import Slice, read_slices, slice_uid
from rayseg.records import PREPARED, REJECTS, MissingMask, Reason, Reject

TAKEN = ("patient_key", "study_key", "series_key", "uri", "frame", "masks")  # columns of a manifest that a sample keeps
# A shard to write; its samples (TAKEN, `neighbours`, `voxel_mm3`, `split`) are packed: the plan is all in Ray's store.
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


def row_id(uri: str, frame: int | None) -> str:
    """The name of the sample made of an object, or of a frame of it."""
    return hashlib.sha256(slice_uid(uri, frame).encode()).hexdigest()


def _unpacked(cell: bytes) -> list[dict[str, Any]]:
    absent: dict[str, Any] = {"neighbours": [], "voxel_mm3": None}
    return [{"row_id": row_id(row["uri"], row["frame"]), **absent, **row} for row in unpacked(cell).to_pylist()]


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


def write_shards(
    plan: pa.Table,
    output: str,
    preprocess: Preprocess,
    labels: Labels,
    row_group_rows: int,
    missing_mask: MissingMask = "reject",
) -> pa.Table:
    """A task: reads the samples of each planned shard, writes it where any is left, and tells what became of each.

    A shard that an earlier run wrote is kept: its name is of all that it is made from. Only where that run could not
    read an object from the store it is made again.

    Args:
        plan: rows of `PLAN`.
        output: URI of the set.
        preprocess: makes the pixels.
        labels: makes the classes.
        row_group_rows: rows of a Parquet row group.
        missing_mask: of the manifest's layout.

    Returns:
        Rows of `WRITTEN`, one a planned shard.
    """
    written: list[dict[str, Any]] = []
    for shard in plan.to_pylist():
        standing = _standing(storage.join(output, shard["path"]))
        if standing is not None:
            written.append({"path": shard["path"], **standing})
            continue
        samples = _unpacked(shard["samples"])
        found: dict[int, dict[str, Any]] = {}
        rejects = []
        for place, stack, masks in _read(samples, preprocess.color):
            sample = samples[place]
            made = make(
                stack, masks, preprocess, labels, sample["frame"], sample["voxel_mm3"], missing_mask=missing_mask
            )
            if isinstance(made, Reject):
                told = {name: samples[place][name] for name in ("uri", "frame", "patient_key", "series_key")}
                rejects.append({**told, "stage": "prepare", "reason": made.reason.value, "detail": made.detail})
            else:
                found[place] = samples[place] | made
        rows = [found[place] for place in sorted(found)]
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
    positive = set()
    preprocess = dataclasses.replace(preprocess, neighbours=0)
    for cell in plan["samples"].to_pylist():
        samples = [sample for sample in _unpacked(cell) if sample["masks"]]
        for place, stack, masks in _read(samples, preprocess.color):
            # What has no mask has no foreground either way.
            made = make(stack, masks, preprocess, labels, samples[place]["frame"])
            if not isinstance(made, Reject) and made["foreground_pixels"]:
                positive.add(samples[place]["patient_key"])
    return pa.table({"patient_key": pa.array(sorted(positive), pa.string())})


def _read(
    samples: list[dict[str, Any]],
    color: bool,
) -> Iterator[tuple[int, list[Slice | Reject | None], list[tuple[bytes | OSError, str | None]]]]:
    """Each sample's place, with its slice among its neighbours, and its masks' bytes and labels, some read ahead.

    An object of which there are several frames is read and parsed once, and so is a mask or a neighbour that the
    object before needed too. Every slice is decoded for each stack that it is in.
    """
    stacks = [_stack(sample) for sample in samples]
    places: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(sample["uri"], []).append(place)
    needed = {uri: _objects(uri, of_uri, samples, stacks) for uri, of_uri in places.items()}
    before: list[dict[str, None]] = [{}, *needed.values()]
    fresh = {uri: [one for one in needed[uri] if one not in last] for uri, last in zip(places, before, strict=False)}
    objects = storage.read_each(one for uri in places for one in fresh[uri])
    held: dict[str, bytes | OSError] = {}
    for uri, of_uri in places.items():
        held = {one: data for one, data in held.items() if one in needed[uri]}
        held |= {one: next(objects) for one in fresh[uri]}
        asked: dict[str, list[int | None]] = {}  # frames of each object, in the order in which the stacks have them
        for at, frame in (slice for place in of_uri for slice in stacks[place] if slice is not None):
            asked.setdefault(at, []).append(frame)
        opened = {at: _slices(held[at], frames, color) for at, frames in asked.items()}
        for place in of_uri:
            stack = [None if slice is None else next(opened[slice[0]]) for slice in stacks[place]]
            yield place, stack, [(held[mask["uri"]], mask["label"]) for mask in samples[place]["masks"]]


def _stack(sample: dict[str, Any]) -> list[tuple[str, int | None] | None]:
    """URI and frame of the sample's slice in the middle of its neighbours'."""
    stack = [None if one is None else (one["uri"], one["frame"]) for one in sample["neighbours"]]
    stack.insert(len(stack) // 2, (sample["uri"], sample["frame"]))
    return stack


def _objects(
    uri: str,
    places: list[int],
    samples: list[dict[str, Any]],
    stacks: list[list[tuple[str, int | None] | None]],
) -> dict[str, None]:
    """What must be read for the samples of an object, the object first."""
    neighbours = [slice[0] for place in places for slice in stacks[place] if slice is not None]
    return dict.fromkeys([uri, *neighbours, *(mask["uri"] for place in places for mask in samples[place]["masks"])])


def _slices(data: bytes | OSError, frames: list[int | None], color: bool) -> Iterator[Slice | Reject]:
    if isinstance(data, OSError):
        return repeat(read_failure(data), len(frames))
    return read_slices(data, frames, color)


def make(
    stack: Sequence[Slice | Reject | None],
    masks: Sequence[tuple[bytes | OSError, str | None]],
    preprocess: Preprocess,
    labels: Labels,
    frame: int | None = None,
    voxel_mm3: float | None = None,
    missing_mask: MissingMask = "reject",
) -> dict[str, Any] | Reject:
    """The columns of one sample that its pixels and header give, or why there are none; never raises.

    `voxel_mm3` is the volume that a pixel of the slice stands for in its series, where that is known.
    """
    try:
        slices = usable(stack)
        if isinstance(slices, Reject):
            return slices
        readable = []
        for mask, label in masks:
            if isinstance(mask, OSError):
                return read_failure(mask, "mask")
            readable.append((mask, label))
        slice = slices[len(slices) // 2]
        assert slice is not None
        classes = truth(readable, slice.shape, labels, slice.header, frame, slice.geometry, missing_mask)
        if isinstance(classes, Reject):
            return classes
        mask_HW = preprocess.apply_mask(classes)
        image_HWC = preprocess.apply(*slices)
        return {
            **facts(slice, image_HWC, preprocess),
            "foreground_pixels": int(np.count_nonzero(mask_HW)),
            "foreground_mm3": None if voxel_mm3 is None else int(np.count_nonzero(classes)) * voxel_mm3,
            "fingerprint": fingerprint(preprocess.centre(image_HWC)),
            "image": image_HWC.tobytes(),
            "mask": mask_HW.tobytes(),
        }
    except Exception as error:  # a defect of ours must cost this row only
        return Reject(Reason.INTERNAL, type(error).__name__)
