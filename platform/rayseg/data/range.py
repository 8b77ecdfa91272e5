"""What a model was trained on, in a few numbers: what makes an input, or a prediction, look foreign to it.

Of each slice `facts` are columns of the prepared set; `measure` sums them up over the training split without reading a
picture, and the trainer adds what the model says of validation. `inference.quality` judges series by the result.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayseg.data.conformal import VolumeErrors
from rayseg.data.prepared import PreparedSet
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice

COLUMNS = (
    "series_key",
    "modality",
    "body_part",
    "pixel_spacing_mm",
    "foreground_mm3",
    "intensity_mean",
    "intensity_sd",
    "foreground_pixels",
)
VOLUME_COLUMNS = ("modality", "body_part", "foreground_mm3", "foreground_voxels", "foreground_share")
_QUANTILES = (0.005, 0.995)  # a slice in a hundred may be odd, as a scan's first or last one
_LEAST_SHARE = 0.01  # of the slices, so that a few mislabelled ones do not widen what is known


@dataclass(frozen=True)
class Range:
    """What the training split looked like, as it was: margins are the judge's. None, or empty: not known."""

    modalities: tuple[str, ...] = ()  # Modality (PS3.3 C.7.3.1.1.1)
    body_parts: tuple[str, ...] = ()  # BodyPartExamined, upper case
    spacing_mm: tuple[float, float] | None = None  # least and greatest, between pixels as the network sees them
    intensity_mean: tuple[float, float] | None = None  # 0.5 and 99.5 % quantile over slices, see `facts`
    intensity_sd: tuple[float, float] | None = None
    foreground_share: float | None = None  # the greatest of a slice's area
    volume_ml: float | None = None  # the greatest of a series on its own grid, as inference measures it
    pieces: int | None = None  # the most that the model finds in a validation slice, see `pieces`
    entropy_bits: float | None = None  # the greatest mean of a validation patient, see `entropy_bits`
    pairwise_dice: float | None = None  # of several members: the least of a validation patient, see `data.agreement`


@dataclass(frozen=True)
class Known:
    """What a predictor's inputs, predictions and volumes are judged by."""

    range: Range | None = None
    volumes: VolumeErrors = VolumeErrors()  # noqa: RUF009, it is frozen


def of_several(first: Range | None, known: Known | None) -> Known:
    """What several models, or one with its mirror images, are judged by: what was measured of these together.

    Where that was not measured, the first model's bundle tells what it was trained on; what its own predictions were
    like on validation says nothing of averaged ones, whose volumes have no interval either.
    """
    if known is not None:
        return known
    return Known(first and replace(first, pieces=None, entropy_bits=None, pairwise_dice=None))


def facts(slice: Slice, image_HWC: np.ndarray, preprocess: Preprocess) -> dict[str, Any]:
    """Columns of `records.PREPARED` that tell one kind of slice from another.

    Mean and standard deviation are of the picture as the network sees it, padding included: a missing rescale or
    another window moves them, where what a fixed window makes of values depends on the values at all.

    Args:
        slice: as it was read.
        image_HWC: what `Preprocess.apply` makes of it, with or without its neighbours' channels.
        preprocess: that one.
    """
    header = slice.header
    geometry = slice.geometry if header is None else header.geometry
    spacing_mm = None if geometry is None else geometry.pixel_spacing_mm
    centre = np.ascontiguousarray(preprocess.centre(image_HWC))
    mean, deviation = cv2.meanStdDev(centre.reshape(len(centre), -1))
    return {
        "modality": (header.modality or None) if header else None,
        "body_part": (header.body_part or None) if header else None,
        "pixel_spacing_mm": spacing_mm
        and [mm / scale for mm, scale in zip(spacing_mm, preprocess.scale(*slice.shape), strict=True)],
        "intensity_mean": float(mean[0, 0]),
        "intensity_sd": float(deviation[0, 0]),
    }


def facts_of_volume(slice: Slice) -> dict[str, Any]:
    """The same of a slice that a network sees as part of a volume.

    The spacing is the slice's own, as the network's is always one, and what it saw of the intensities says nothing: of
    each volume they are made alike, and what CT has in HU is known.
    """
    header = slice.header
    geometry = slice.geometry if header is None else header.geometry
    spacing_mm = None if geometry is None else geometry.pixel_spacing_mm
    return {
        "modality": (header.modality or None) if header else None,
        "body_part": (header.body_part or None) if header else None,
        "pixel_spacing_mm": None if spacing_mm is None else list(spacing_mm),
        "intensity_mean": None,
        "intensity_sd": None,
    }


def pieces(mask: np.ndarray) -> int:
    """How many connected pieces (8 neighbours) the foreground of a label map has, whatever its classes."""
    if not mask.any():
        return 0
    return int(cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=8)[0]) - 1


def entropy_bits(probabilities_KHW: np.ndarray, mask: np.ndarray) -> tuple[float, int]:
    """The entropy of the probabilities (Shannon, bits) summed over the foreground of a label map, and its pixels.

    Args:
        probabilities_KHW: of the one class, or of the background and several.
        mask: uint8 (rows, columns), what was decided by them.
    """
    found = probabilities_KHW.reshape(len(probabilities_KHW), -1)[:, np.flatnonzero(mask)].astype(np.float64)
    if len(found) == 1:
        found = np.concatenate([found, 1 - found])
    return float(-(found * np.log2(np.maximum(found, 1e-12))).sum()), found.shape[1]


def measure(prepared: PreparedSet) -> Range:
    """Of the training split of a set, but for what only a model can tell."""
    if prepared.volume is not None:
        return _of_volumes(prepared)
    rows = prepared.read_rows("train", COLUMNS)
    height, width, _ = prepared.shape
    spacing_mm = pc.list_flatten(rows["pixel_spacing_mm"]).to_numpy()
    most = pc.max(rows["foreground_pixels"]).as_py()
    return Range(
        modalities=_common(rows["modality"]),
        body_parts=_common(rows["body_part"]),
        spacing_mm=(float(spacing_mm.min()), float(spacing_mm.max())) if len(spacing_mm) else None,
        intensity_mean=_spread(rows["intensity_mean"]),
        intensity_sd=_spread(rows["intensity_sd"]),
        foreground_share=most / (height * width) if most else None,
        # With a limit series are not whole.
        volume_ml=None if prepared.limited else _greatest_volume_ml(rows),
    )


def _of_volumes(prepared: PreparedSet) -> Range:
    """Spacing and intensities are left out: a network sees volumes of one spacing, made alike."""
    rows = prepared.read_rows("train", VOLUME_COLUMNS)
    share = pc.max(rows["foreground_share"]).as_py()
    volumes_mm3 = rows.filter(pc.greater(rows["foreground_voxels"], 0))["foreground_mm3"]
    return Range(
        modalities=_common(rows["modality"]),
        body_parts=_common(rows["body_part"]),
        foreground_share=share or None,
        volume_ml=pc.max(volumes_mm3).as_py() / 1000 if len(volumes_mm3) and not volumes_mm3.null_count else None,
    )


def widest(ranges: Sequence[Range]) -> Range:
    """What any of several models was trained on, for the mean of them.

    `entropy_bits` is not known: a mean of probabilities is less certain than each of them.
    """

    def ends(name: str) -> tuple[float, float] | None:
        known = [pair for one in ranges if (pair := getattr(one, name)) is not None]
        return (min(low for low, _ in known), max(high for _, high in known)) if known else None

    def most(name: str) -> Any:
        return max((value for one in ranges if (value := getattr(one, name)) is not None), default=None)

    return Range(
        modalities=tuple(sorted({value for one in ranges for value in one.modalities})),
        body_parts=tuple(sorted({value for one in ranges for value in one.body_parts})),
        spacing_mm=ends("spacing_mm"),
        intensity_mean=ends("intensity_mean"),
        intensity_sd=ends("intensity_sd"),
        foreground_share=most("foreground_share"),
        volume_ml=most("volume_ml"),
        pieces=most("pieces"),
    )


def _common(values: pa.ChunkedArray) -> tuple[str, ...]:
    counts = Counter(values.drop_null().to_pylist())
    return tuple(sorted(value for value, count in counts.items() if count >= _LEAST_SHARE * counts.total()))


def _spread(values: pa.ChunkedArray) -> tuple[float, float] | None:
    known = values.drop_null().to_numpy()
    if not len(known):
        return None
    low, high = np.quantile(known, _QUANTILES)
    return float(low), float(high)


def _greatest_volume_ml(rows: pa.Table) -> float | None:
    """None where the series of a slice with foreground does not say how large that is."""
    rows = rows.filter(pc.or_kleene(pc.greater(rows["foreground_pixels"], 0), pc.greater(rows["foreground_mm3"], 0)))
    if not len(rows) or rows["foreground_mm3"].null_count or rows["series_key"].null_count:
        return None
    series = np.asarray(rows["series_key"].combine_chunks().dictionary_encode().indices)
    return float(np.bincount(series, rows["foreground_mm3"].to_numpy() / 1000).max())
