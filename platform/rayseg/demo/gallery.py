"""Pictures of a segmented archive: slices with the masks that stand in the DICOM SEG files."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayseg import snapshots, storage
from rayseg.data.preprocess import Preprocess
from rayseg.demo.report import Picture
from rayseg.dicom import pseudonyms, segmentation
from rayseg.dicom.reading import read_slice, slice_uid
from rayseg.inference.ledger import uris
from rayseg.records import Reject
from rayseg.tracking import figures


def pictures(
    manifest: str, ledger: Sequence[Mapping[str, Any]], preprocess: Preprocess, wanted: int = 12
) -> list[Picture]:
    """About `wanted` tiles, as many of each series, spread over its slices with something found.

    Args:
        manifest: URI of the archive's manifest.
        ledger: rows of `records.LEDGER`.
        preprocess: gives the grey values that the network saw.
        wanted: number of tiles; a series without anything found shows its middle slice.
    """
    table = snapshots.read_table(manifest, ("uri", "frame", "verdict", "series_key", "instance_key"))
    segmented = [row for row in ledger if row["verdict"] == "segmented"][:wanted]
    key = pseudonyms.from_environment().key
    made = []
    for row in segmented:
        masks = {}
        (seg,) = uris(row, "seg")
        for name, mask in segmentation.decode(storage.read(seg)).items():
            uid, hash_sign, frame = name.partition("#")
            masks[f"{key('instance', uid)}{hash_sign}{frame}"] = mask
        slices = [
            one | {"name": slice_uid(one["instance_key"], one["frame"])}
            for one in table.to_pylist()
            if one["verdict"] == "ok" and one["series_key"] == row["series_key"]
        ]
        slices = [one for one in slices if one["name"] in masks]
        for place in _places([bool(masks[one["name"]].any()) for one in slices], wanted // len(segmented)):
            found = read_slice(storage.read(slices[place]["uri"]), slices[place]["frame"])
            assert not isinstance(found, Reject), "was segmented, so it can be read"
            grey_HW = dataclasses.replace(preprocess, size=found.stored.shape).apply(found)[..., 0]
            png = figures.tile(grey_HW, masks[slices[place]["name"]])
            made.append(Picture(png, f"{row['series_key'][:8]} · {place + 1} of {len(slices)}"))
    return made


def _places(found: Sequence[bool], wanted: int) -> list[int]:
    """Which of a series' slices to show, in order."""
    positive = np.flatnonzero(found)
    if positive.size == 0:
        return [len(found) // 2]
    steps = (2 * np.arange(min(wanted, positive.size)) + 1) * positive.size // (2 * min(wanted, positive.size))
    return [int(place) for place in positive[steps]]
