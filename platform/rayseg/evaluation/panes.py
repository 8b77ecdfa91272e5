"""A slice in three panes: what the baseline found, what the challenger found, and where they differ."""

import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from tqdm import tqdm

from rayseg import snapshots, storage
from rayseg.dicom.reading import Slice, read_slice
from rayseg.evaluation.difference import Picture
from rayseg.records import Reject

# Okabe and Ito's, which are told apart by the colour-blind; they also differ in lightness.
BASELINE, CHALLENGER, BOTH, OTHER_CLASS = (86, 180, 233), (213, 94, 0), (240, 228, 66), (204, 121, 167)
_GROUND, _INK = (14, 17, 22), (232, 236, 241)
_PANE, _GAP, _HEAD, _FOOT = 320, 8, 30, 30  # pixels
_LEAST_PART = 0.5  # of the slice's longer side: so much of it is always shown, for orientation
_AROUND = 1.4  # times what was found, where that is more
_TINT = 0.55
_LINE = 2  # pixels, of an outline
_NEAREST = 3  # rows of the manifest that are tried for a slice's source
_MANIFEST_COLUMNS = ("uri", "frame", "verdict", "kind", "series_key", "instance_key", "image_position_mm")


def pictures(shown: Sequence[Mapping[str, Any]], manifest: str, runs: tuple[str, str]) -> list[Picture]:
    """One of each series, with its source slice; on black, and saying so, where that cannot be read.

    Args:
        shown: of each series the row of all its classes and what `shown` has beside it, see `changes.CHANGES`.
        manifest: URI of the archive's manifest.
        runs: names of both.
    """
    if not shown:
        return []
    wanted = pa.array([one["series_key"] for one in shown])
    sources: dict[str, list[dict[str, Any]]] = {}
    with snapshots.reading(manifest, "diff") as file:
        for group in storage.read_row_groups(file, _MANIFEST_COLUMNS):
            here = pc.or_(pc.is_in(group["series_key"], wanted), pc.is_in(group["instance_key"], wanted))
            for row in group.filter(here).to_pylist():
                if row["verdict"] == "ok":
                    alone = row["kind"] == "image" and row["frame"] is None
                    sources.setdefault(row["instance_key" if alone else "series_key"], []).append(row)
    names = [f"{side}: {run}" for side, run in zip(("baseline", "challenger"), runs, strict=True)]
    made = []
    for one in tqdm(shown, desc="pictures", disable=None):
        source = _source(one, sources.get(one["series_key"], []))
        before, after = (
            np.frombuffer(zlib.decompress(one[side]), np.uint8).reshape(one["rows"], one["columns"])
            for side in ("baseline", "challenger")
        )
        readable = source is not None and source.shape == before.shape
        picture = png(source.stored if source and readable else None, before, after, names)
        made.append(Picture(_caption(one, readable), picture))
    return made


def _source(one: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> Slice | None:
    """The slice that a picture is of, by its place, or one of those that the manifest has nearest to the masks."""

    def distance_mm(row: dict[str, Any]) -> float:
        if row["image_position_mm"] is None or one["position_mm"] is None:
            return np.inf
        return float(np.linalg.norm(np.subtract(row["image_position_mm"], one["position_mm"])))

    by_place = one["place"] is not None
    near = rows[one["place"] : one["place"] + 1] if by_place else sorted(rows, key=distance_mm)[:_NEAREST]
    for row in near:
        try:
            found = read_slice(storage.read(row["uri"]), row["frame"])
        except OSError:
            continue
        if isinstance(found, Reject):
            continue
        if by_place or (found.header and found.header.slice_uid == one["slice_uid"]):
            return found
    return None


def _caption(one: Mapping[str, Any], readable: bool) -> str:
    parts = [f"Series {one['series_key'][:12]}, slice {one['number']} of {one['slices']}"]
    if one["changed_ml"] is not None:
        volumes = f"{one['baseline_ml']:.4g} mL, then {one['challenger_ml']:.4g} mL"
        parts.append(f"{volumes}; {one['changed_ml']:.4g} mL added or taken away")
    parts.append(f"Dice {one['dice']:.3f}")
    parts += [f"{one[name]} lesions {name}" for name in ("appeared", "vanished") if one[name]]
    if not readable:
        parts.append("the slice itself cannot be read")
    return " \u00b7 ".join(parts)


def png(stored_HW: np.ndarray | None, before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> bytes:
    """The part of a slice around what was found in it.

    Args:
        stored_HW: values, shown from the 1st to the 99th percentile of the part; None where they cannot be read.
        before: uint8 label map (rows, columns) of the baseline.
        after: of the challenger.
        names: of both runs, to stand over their panes.
    """
    box = _part((before > 0) | (after > 0))
    a, b = before[box], after[box]
    grey = np.zeros(a.shape, np.uint8) if stored_HW is None else _grey(stored_HW[box])
    scale = _PANE / max(a.shape)
    height, width = (max(1, round(side * scale)) for side in a.shape)
    ground_HWC = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC).convert("RGB"))
    a, b = (_enlarged(mask, (width, height)) for mask in (a, b))

    left, right = (_outlined(ground_HWC, mask, colour) for mask, colour in ((a, BASELINE), (b, CHALLENGER)))
    parts = {
        "only baseline": ((a > 0) & (b == 0), BASELINE),
        "only challenger": ((a == 0) & (b > 0), CHALLENGER),
        "both": ((a > 0) & (a == b), BOTH),
        "of another class": ((a > 0) & (b > 0) & (a != b), OTHER_CLASS),
    }
    middle = ground_HWC.astype(float)
    for where, colour in parts.values():
        middle[where] = (1 - _TINT) * middle[where] + _TINT * np.array(colour)

    page = Image.new("RGB", (3 * _PANE + 2 * _GAP, _HEAD + _PANE + _FOOT), _GROUND)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    panes = (left, right, middle.astype(np.uint8))
    for number, (pane_HWC, name) in enumerate(zip(panes, (*names, "difference"), strict=True)):
        corner = number * (_PANE + _GAP)
        draw.text((corner + 6, 6), _fitted(name, font, _PANE - 12), fill=_INK, font=font)
        page.paste(Image.fromarray(pane_HWC), (corner + (_PANE - width) // 2, _HEAD + (_PANE - height) // 2))
    across = 6
    for name, (where, colour) in parts.items():
        if not where.any() and name == "of another class":
            continue
        draw.rectangle((across, _HEAD + _PANE + 9, across + 13, _HEAD + _PANE + 22), fill=colour)
        draw.text((across + 20, _HEAD + _PANE + 6), name, fill=_INK, font=font)
        across += 20 + int(font.getlength(name)) + 26
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _part(inside: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a square around what is inside, as far as the slice reaches."""
    (found,) = ndimage.find_objects(inside.astype(np.uint8))
    longer = max(along.stop - along.start for along in found)
    side = max(round(longer * _AROUND), round(_LEAST_PART * max(inside.shape)))
    ends = []
    for along, size in zip(found, inside.shape, strict=True):
        start = min(max((along.start + along.stop - side) // 2, 0), max(size - side, 0))
        ends.append(slice(start, min(start + side, size)))
    return ends[0], ends[1]


def _grey(stored_HW: np.ndarray) -> np.ndarray:
    low, high = np.percentile(stored_HW, (1, 99))
    scaled = (stored_HW.astype(np.float64) - low) / max(high - low, 1e-9)
    return (scaled.clip(0, 1) * 255).astype(np.uint8)


def _enlarged(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _outlined(ground_HWC: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """With the border of each class, inside of it, so that neighbours keep theirs."""
    made = ground_HWC.copy()
    for number in np.unique(mask[mask > 0]):
        inside = mask == number
        made[inside & ~ndimage.binary_erosion(inside, iterations=_LINE)] = colour
    return made


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or its beginning, that is at most so many pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}\u2026") > width:
        text = text[:-1]
    return f"{text}\u2026"
