"""What changed between two segmentations of one series. Knows no Ray.

Volumes are by Cavalieri's principle from the positions that the segmentations themselves hold (`geometry.volume`);
lesions are connected components matched by overlap, as `evaluation.lesions` scores them, the baseline in place of the
truth: one that has no voxel of the challenger has vanished, and one without a voxel of the baseline has appeared.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import ndimage

from rayseg import storage
from rayseg.data.manifest import read_failure
from rayseg.dicom import segmentation
from rayseg.dicom.segmentation import Decoded
from rayseg.evaluation.lesions import lesions
from rayseg.evaluation.sides import MASKS
from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.geometry.volume import volume_ml
from rayseg.inference import kept
from rayseg.inference.kept import Kept
from rayseg.records import Reason, Reject
from rayseg.retry import CredentialsError

# A row for each series, `class` empty, and one for each class of it that both sides know.
DIFF = pa.schema(
    [
        ("series_key", pa.string()),  # pseudonym of the series
        ("patient_key", pa.string()),  # pseudonym of the patient
        ("class", pa.string()),  # name of the class; empty for all classes together
        ("verdict", pa.string()),  # "identical", "changed" (slices of one side only are a change) or "not_compared"
        ("reason", pa.string()),  # why not compared
        ("detail", pa.string()),  # more about the reason
        ("slices", pa.int32()),  # that both sides have a mask of
        ("one_sided_slices", pa.int32()),  # that one side alone has, and that are not compared
        ("baseline_pixels", pa.int64()),  # foreground of the baseline
        ("challenger_pixels", pa.int64()),  # foreground of the challenger
        ("changed_pixels", pa.int64()),  # of all classes: of another class, too
        ("dice", pa.float64()),  # of all classes: of foreground of any; null where both are empty
        ("baseline_ml", pa.float64()),  # null where positions give no volume
        ("challenger_ml", pa.float64()),  # the same of the challenger
        ("change_ml", pa.float64()),  # challenger minus baseline
        ("changed_ml", pa.float64()),  # of changed_pixels: what was added and what was taken away, together
        ("baseline_lesions", pa.int32()),  # lesions of the baseline
        ("challenger_lesions", pa.int32()),  # lesions of the challenger
        ("appeared", pa.int32()),  # lesions of the challenger
        ("vanished", pa.int32()),  # lesions of the baseline
    ]
)
# The slice with most changed pixels. Its UID, or its place, finds the source and goes no further.
_SHOWN = pa.struct(
    [
        ("slice_uid", pa.string()),  # null where kept masks were compared
        ("place", pa.int32()),  # among the slices of its series that the manifest accepts, from 0; null where not known
        ("position_mm", pa.list_(pa.float64())),  # 3
        ("number", pa.int32()),  # from 1, along the normal
        ("slices", pa.int32()),
        ("rows", pa.int32()),
        ("columns", pa.int32()),
        ("baseline", pa.binary()),  # uint8 label map (rows, columns), zlib; numbers mean the same on both sides
        ("challenger", pa.binary()),
    ]
)
CHANGES = pa.schema([("rows", pa.list_(pa.struct(list(DIFF)))), ("shown", _SHOWN)])
_NOTHING = {  # of a series in which neither side found anything, nor wrote a file that says how many slices it has
    "slices": None,
    "one_sided_slices": None,
    **dict.fromkeys(("baseline_pixels", "challenger_pixels", "changed_pixels"), 0),
    **dict.fromkeys(("baseline_ml", "challenger_ml", "change_ml", "changed_ml"), 0.0),
    **dict.fromkeys(("baseline_lesions", "challenger_lesions", "appeared", "vanished"), 0),
}


@dataclass(frozen=True, eq=False)
class _Stacks:
    """Both label maps of the slices in order, cut to the box with foreground of either, numbered alike."""

    baseline: np.ndarray  # uint8 (slices, rows, columns)
    challenger: np.ndarray
    geometries: Sequence[Geometry]

    def measured(self, number: int | None) -> dict[str, Any]:
        """The columns of `DIFF` from `baseline_pixels` on, of a class or of all."""
        a, b = (stack > 0 if number is None else stack == number for stack in (self.baseline, self.challenger))
        other = self.baseline != self.challenger if number is None else a ^ b
        pixels = {"baseline": _by_slice(a), "challenger": _by_slice(b), "changed": _by_slice(other)}
        both = int(np.count_nonzero(a & b))
        whole = sum(pixels["baseline"]) + sum(pixels["challenger"])
        volumes_ml = {name: volume_ml(counts, self.geometries) for name, counts in pixels.items()}
        before_ml, after_ml = volumes_ml["baseline"], volumes_ml["challenger"]
        found = lesions(b, a)
        return {
            **{f"{name}_pixels": sum(counts) for name, counts in pixels.items()},
            **{f"{name}_ml": volume for name, volume in volumes_ml.items()},
            "dice": 2 * both / whole if whole else None,
            "change_ml": None if before_ml is None or after_ml is None else after_ml - before_ml,
            "baseline_lesions": found.true,
            "challenger_lesions": found.predicted,
            "appeared": found.false,
            "vanished": found.true - found.found,
        }


def compare_series(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `CHANGES` of a pair of `sides.pair`; raises CredentialsError alone."""
    base = {"series_key": pair["series_key"], "patient_key": pair["patient_key"]}
    try:
        sides, files = [], (pair["baseline"], pair["challenger"])
        for side, file in zip(("baseline", "challenger"), files, strict=True):
            read = None if file is None else _read(file, side, pair["series_key"])
            if isinstance(read, Reject):
                return _refused(base, read)
            sides.append(read)
        changes = _compared(base, *sides)
        shown = changes["shown"]
        if shown is not None and any(file is not None and file["profile"] == MASKS for file in files):
            changes["shown"] = {**shown, "slice_uid": None, "place": int(shown["slice_uid"])}
        return changes
    except CredentialsError:
        raise
    except Exception as error:  # a defect of ours must cost this series only
        return _refused(base, Reject(Reason.INTERNAL, type(error).__name__))


def _refused(base: Mapping[str, Any], reject: Reject) -> dict[str, Any]:
    told = {"class": "", "verdict": "not_compared", "reason": reject.reason.value, "detail": reject.detail}
    return {"rows": [{**base, **told}], "shown": None}


def _read(file: Mapping[str, Any], side: str, series_key: str) -> Decoded | Reject:
    """The file of a ledger's row, if it is still the one that the row is about."""
    try:
        data = storage.read(file["uri"])
    except OSError as error:
        return read_failure(error, f"the {side}'s file")
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        what = f"the {side}'s file is not what its ledger says (sha256)"
        return Reject(Reason.CORRUPT, f"{what}; has another run replaced it?")
    try:
        return _of_kept(kept.decode(data, series_key)) if file["profile"] == MASKS else segmentation.read(data)
    except ValueError as error:
        return Reject(Reason.CORRUPT, f"the {side}'s file: {error}")


def _of_kept(masks: Kept) -> Decoded:
    """Kept masks as a segmentation says them; slices are named by their numbers."""
    names = [f"{number:09d}" for number in masks.series.numbers]
    arrays = (mask.copy() for mask in masks.series.masks)  # they are renumbered in place
    labels = dict(enumerate(masks.labels, start=1))
    return Decoded(
        dict(zip(names, arrays, strict=True)), dict(zip(names, masks.series.geometries, strict=True)), labels
    )


def _compared(base: Mapping[str, Any], baseline: Decoded | None, challenger: Decoded | None) -> dict[str, Any]:
    """Of two segmentations; None is one without foreground that was not written."""
    there = [side for side in (baseline, challenger) if side is not None]
    if not there:
        return {"rows": [{**base, "class": "", "verdict": "identical", **_NOTHING}], "shown": None}
    names = list(dict.fromkeys(name for side in there for name in side.labels.values()))
    places = there[0].geometries
    shared = set.intersection(*(set(side.masks) for side in there))
    one_sided = len(set.union(*(set(side.masks) for side in there)) - shared)
    uids = _ordered(sorted(shared), places)
    sizes = {side.masks[uid].shape for side in there for uid in uids}
    if len(sizes) != 1:
        what = "sizes differ" if uids else "they have no slice in common"
        return _refused(base, Reject(Reason.CORRUPT, f"the two files cannot be compared: {what}"))
    (size,) = sizes
    slices = [(_numbered(baseline, names, uid, size), _numbered(challenger, names, uid, size)) for uid in uids]
    stacks = _Stacks(*_stacked(slices), [places[uid] for uid in uids])
    told = {**base, "slices": len(uids), "one_sided_slices": one_sided}
    common = [name for name in names if all(name in side.labels.values() for side in there)]
    rows = []
    for name in ("", *common):
        measured = stacks.measured(names.index(name) + 1 if name else None)
        verdict = "changed" if measured["changed_pixels"] or one_sided else "identical"
        rows.append({**told, "class": name, "verdict": verdict, **measured})
    if not rows[0]["changed_pixels"]:
        return {"rows": rows, "shown": None}
    most = int(np.argmax([np.count_nonzero(before != after) for before, after in slices]))
    before, after = (zlib.compress(mask.tobytes(), 1) for mask in slices[most])
    return {
        "rows": rows,
        "shown": {
            "slice_uid": uids[most],
            "position_mm": places[uids[most]].image_position_mm,
            "number": most + 1,
            "slices": len(uids),
            "rows": size[0],
            "columns": size[1],
            "baseline": before,
            "challenger": after,
        },
    }


def _numbered(side: Decoded | None, names: Sequence[str], uid: str, size: tuple[int, int]) -> np.ndarray:
    """A slice's label map, uint8, with 1 for the first of `names`; once a slice, as it is renumbered in place."""
    if side is None:
        return np.zeros(size, np.uint8)
    table = np.zeros(256, np.uint8)
    for number, name in side.labels.items():
        table[number] = names.index(name) + 1
    mask = side.masks[uid]
    mask[:] = table[mask]
    return mask


def _stacked(slices: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Both stacks, cut to the rows and columns with foreground of either: that is little of a long series."""
    anywhere = np.zeros(slices[0][0].shape, bool)
    for before, after in slices:
        anywhere |= (before | after) > 0
    box = next(iter(ndimage.find_objects(anywhere.astype(np.uint8))), (slice(1), slice(1)))
    before, after = (np.stack([masks[side][box] for masks in slices]) for side in (0, 1))
    return before, after


def _by_slice(inside_SHW: np.ndarray) -> list[int]:
    counts: list[int] = np.count_nonzero(inside_SHW, axis=(1, 2)).tolist()
    return counts


def _ordered(uids: Sequence[str], places: Mapping[str, Geometry]) -> list[str]:
    """Along the normal of their planes, where all have a place."""
    positions_mm = [places[uid].image_position_mm for uid in uids]
    orientation = places[uids[0]].image_orientation if uids else None
    known = [position for position in positions_mm if position is not None]
    if orientation is None or len(known) < len(uids):
        return list(uids)
    return [uids[index] for index in planes.in_order(known, orientation)[0]]
