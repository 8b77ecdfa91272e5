"""Samples: how a task turns accepted rows into shards of pixels."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import config, storage
from rayseg.data import accepted, voxels
from rayseg.data.accepted import TAKEN
from rayseg.data.duplicates import fingerprint
from rayseg.data.labels import Labels
from rayseg.data.manifest import read_failure
from rayseg.data.masks import Mask, truth
from rayseg.data.objects import Place, read_stacks
from rayseg.data.prepared import VERSION
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import facts
from rayseg.data.shards import Task
from rayseg.data.stacks import beside, usable
from rayseg.dicom.reading import Slice, slice_uid
from rayseg.records import PREPARED, MissingMask, Reason, Reject

_METADATA = b"rayseg.shard"  # of a shard's file: what became of its samples


@dataclass(frozen=True)
class Making:
    """What samples are made with. `missing_mask` is of the manifest's layout."""

    preprocess: Preprocess
    labels: Labels
    row_group_rows: int  # of the shards' Parquet row groups
    missing_mask: MissingMask = "reject"


def row_id(uri: str, frame: int | None) -> str:
    """The name of the sample made of an object, or of a frame of it."""
    return hashlib.sha256(slice_uid(uri, frame).encode()).hexdigest()


def samples(rows: pa.Table, numbers: np.ndarray, neighbours: int) -> list[dict[str, Any]]:
    """What is known of some rows before anything is read: TAKEN, `neighbours`, `voxel_mm3`.

    And size and ETag of the slices' and neighbours' objects (those of masks stand in `masks`): others make another
    shard.

    Args:
        rows: accepted ones, `accepted.COLUMNS`, those of a series together and all of them: those that are not
            prepared are neighbours all the same, and count for `voxel_mm3`.
        numbers: int64, which are prepared.
        neighbours: on each side.
    """
    around, sizes, etags = beside(rows, numbers.tolist(), neighbours)
    measured = rows.select([*TAKEN, "bytes", "etag"]).append_column("voxel_mm3", voxels.of_rows(rows))
    taken = measured.take(pa.array(numbers)).append_column("neighbours", around)
    return taken.append_column("neighbour_bytes", sizes).append_column("neighbour_etags", etags).to_pylist()


def write_shards(task: Task, rows_uri: str, output: str, making: Making) -> list[dict[str, Any]]:
    """A task: reads its samples, writes each shard where any are left, and tells what became of each.

    A shard that an earlier run wrote is kept: its name is of all that it is made from. Only where that run could not
    read an object from the store it is made again.

    Args:
        task: which shards.
        rows_uri: of the file of accepted rows.
        output: URI of the set.
        making: makes the samples.

    Returns:
        Of each shard in order `path`, `rows`, `positive` and `rejects` (`records.REJECTS`); without rows it has no
        file.
    """
    every = samples(accepted.read(rows_uri, task.ranges), task.numbers(), making.preprocess.neighbours)
    ends = [number * len(every) // task.shards for number in range(task.shards + 1)]
    shards = [every[first:end] for first, end in pairwise(ends)]
    paths = [_path(task, number, shard, making) for number, shard in enumerate(shards)]
    written = [_standing(storage.join(output, path)) for path in paths]
    missing = [shard for shard, one in zip(shards, written, strict=True) if one is None]
    made = _made([sample for shard in missing for sample in shard], making)
    for number, shard in enumerate(shards):
        if written[number] is None:
            outcomes = [(sample, next(made)) for sample in shard]
            written[number] = _write(storage.join(output, paths[number]), task.split, outcomes, making.row_group_rows)
    return [{"path": path, **told} for path, told in zip(paths, written, strict=True) if told is not None]


def _path(task: Task, number: int, shard: list[dict[str, Any]], making: Making) -> str:
    """Below the set; the digest is of all that the shard is made from."""
    made_with = [VERSION, making.row_group_rows, making.missing_mask, config.plain(making.preprocess)]
    digest = config.digest([made_with, config.plain(making.labels), task.split, shard])[:16]
    return f"split={task.split}/part-{task.part + number:05d}-{digest}.parquet"


def _write(
    uri: str, split: str, outcomes: Sequence[tuple[dict[str, Any], dict[str, Any] | Reject]], row_group_rows: int
) -> dict[str, Any]:
    """Writes a shard and tells what became of its samples."""
    rows, rejects = [], []
    for sample, made in outcomes:
        if isinstance(made, Reject):
            told = {name: sample[name] for name in ("uri", "frame", "patient_key", "series_key")}
            rejects.append({**told, "stage": "prepare", "reason": made.reason.value, "detail": made.detail})
        else:
            rows.append({**sample, **made, "row_id": row_id(sample["uri"], sample["frame"]), "split": split})
    if split == "train":  # a row group, which training reads at once, should not have neighbouring slices only
        rows.sort(key=lambda row: row["row_id"])
    told_of_all = {"rows": len(rows), "positive": sum(row["foreground_pixels"] > 0 for row in rows), "rejects": rejects}
    if rows:
        metadata = {_METADATA: json.dumps(told_of_all, sort_keys=True)}
        table = pa.Table.from_pylist(rows, schema=PREPARED.with_metadata(metadata))
        storage.write_table(uri, table, row_group_rows)
    return told_of_all


def _standing(uri: str) -> dict[str, Any] | None:
    """What a whole shard at `uri` says became of its samples; None where there is none or another try may do better."""
    try:
        told: dict[str, Any] = json.loads((storage.read_footer(uri).metadata or {})[_METADATA])
    except (OSError, ValueError, KeyError):
        return None
    return None if any(reject["reason"] == Reason.READ_FAILED for reject in told["rejects"]) else told


def foreground(task: Task, rows_uri: str, making: Making) -> dict[str, list[int]]:
    """A task: the patients of its rows that have foreground once prepared, each with the pixels of each class."""
    making = dataclasses.replace(making, preprocess=dataclasses.replace(making.preprocess, neighbours=0))
    every = samples(accepted.read(rows_uri, task.ranges), task.numbers(), 0)
    masked = [sample for sample in every if sample["masks"]]  # what has no mask has no foreground either way
    classes = len(making.labels.names)
    pixels: dict[str, np.ndarray] = {}
    for sample, made in zip(masked, _made(masked, making), strict=True):
        if not isinstance(made, Reject) and made["foreground_pixels"]:
            counts = np.bincount(np.frombuffer(made["mask"], np.uint8), minlength=classes + 1)[1:]
            pixels[sample["patient_key"]] = pixels.get(sample["patient_key"], 0) + counts
    return {patient: counts.tolist() for patient, counts in sorted(pixels.items())}


def _made(samples: Sequence[dict[str, Any]], making: Making) -> Iterator[dict[str, Any] | Reject]:
    """What `make` makes of each; all objects that they need are read and parsed once."""
    stacks = [_stack(sample) for sample in samples]
    masks = [[mask["uri"] for mask in sample["masks"]] for sample in samples]
    for sample, (stack, of_sample) in zip(samples, read_stacks(stacks, masks, making.preprocess.color), strict=True):
        labelled = [(mask, told["label"]) for mask, told in zip(of_sample, sample["masks"], strict=True)]
        yield make(
            stack,
            labelled,
            making.preprocess,
            making.labels,
            sample["frame"],
            sample["voxel_mm3"],
            making.missing_mask,
        )


def _stack(sample: dict[str, Any]) -> list[Place | None]:
    """The sample's slice in the middle of its neighbours'."""
    stack = [None if one is None else (one["uri"], one["frame"]) for one in sample["neighbours"]]
    stack.insert(len(stack) // 2, (sample["uri"], sample["frame"]))
    return stack


def make(
    stack: Sequence[Slice | Reject | None],
    masks: Sequence[tuple[Mask | bytes | OSError, str | None]],
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
