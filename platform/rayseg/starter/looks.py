"""Looks: what one file shows, read by the readers that the jobs use."""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from rayseg import storage
from rayseg.dicom import contours, image_files, segment_index, segments, volumes
from rayseg.dicom.parsing import parse, silence_libraries
from rayseg.dicom.reading import MAX_PIXELS, Header, read_headers
from rayseg.dicom.stored import Stored
from rayseg.records import Reject
from rayseg.starter.files import File

_FEW = 16  # different values of a mask without loss; a label volume may have more
_FEW_OF_VOLUME = 64
_NOISE = 40  # how far JPEG moves a value
_PEAKS = (0, 128, 255)  # where the values of a mask lie that was saved as JPEG
_MOSTLY = 0.9  # of what is no background
_KEPT = 64  # values that are counted one by one


@dataclass(frozen=True)
class Look:
    """What a file shows.

    shape: rows and columns of a slice.
    counts: pixels by stored value, or by colour as "#rrggbb"; of an image the most frequent ones.
    distinct: how many different values there are.
    peaked: whether what is no background lies near a few values, as a mask does that lost its exact ones.
    names: SegmentLabels or ROINames.
    header: of a DICOM object with pixels.
    """

    shape: tuple[int, int]
    slices: int = 1
    counts: Counter[int | str] = field(default_factory=Counter)
    distinct: int = 0
    colour: bool = False
    lossy: bool = False
    peaked: bool = False
    negative: bool = False
    volume: bool = False
    names: tuple[str, ...] = ()
    holds: Literal["pixels", "segments", "contours"] = "pixels"
    header: Header | None = field(default=None, repr=False)

    @property
    def is_mask(self) -> bool | None:
        """Whether it looks like a mask; None where that cannot be said, as of one value everywhere."""
        if self.holds != "pixels":
            return True
        if self.distinct <= 1 or (self.lossy and not self._foreground):
            return None
        if self.volume:
            return self.distinct <= _FEW_OF_VOLUME and not self.negative
        return self.distinct <= _FEW or self.peaked

    @property
    def pixels(self) -> int:
        """Of all slices."""
        return self.shape[0] * self.shape[1] * self.slices

    @property
    def _foreground(self) -> int:
        return sum(count for value, count in self.counts.items() if value not in (0, "#000000"))


@lru_cache(maxsize=4096)
def look(file: File) -> Look | None:
    """What the file shows; None where it cannot be read."""
    try:
        data = storage.read(file.uri)
        if file.kind == "picture":
            return _picture(data)
        return _volume(data) if file.kind == "volume" else _dicom(data)
    except Exception:  # whatever is wrong with it: catalog will say it
        return None


def _picture(data: bytes) -> Look | None:
    decoded = image_files.decode_mask(data, MAX_PIXELS, by_value=True)
    if isinstance(decoded, Reject):  # fractions, as an image may have them
        image = image_files.decode(data, MAX_PIXELS, color=True)
        return None if isinstance(image, Reject) else _pixels(image)
    return _pixels(decoded[0], lossy=decoded[1])


def _pixels(values: np.ndarray, lossy: bool = False, header: Header | None = None) -> Look:
    shape = (values.shape[0], values.shape[1])
    colour = values.ndim == 3 and not all(np.array_equal(values[..., 0], values[..., other]) for other in (1, 2))
    if colour:
        eight = image_files.eight_bits(values) if values.dtype == np.uint16 else values
        snapped = _snapped(eight) if lossy else eight
        packed = (snapped.astype(np.int64) * (1 << 16, 1 << 8, 1)).sum(axis=2)
        numbers, counts = np.unique(packed, return_counts=True)
        counted: Counter[int | str] = Counter(
            {f"#{number:06x}": int(count) for number, count in zip(numbers, counts, strict=True)}
        )
        peaked = _is_peaked(eight)
    else:
        grey = values[..., 0] if values.ndim == 3 else values
        numbers, counts = _values(grey)
        counted = Counter({int(number): int(count) for number, count in zip(numbers, counts, strict=True)})
        peaked = grey.dtype == np.uint8 and _is_peaked(grey[..., np.newaxis])
    return Look(
        shape,
        counts=Counter(dict(counted.most_common(_KEPT))),
        distinct=len(numbers),
        colour=colour,
        lossy=lossy,
        peaked=peaked,
        negative=bool(values.min() < 0),
        header=header,
    )


def _values(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values, ascending, and how many pixels have each."""
    if grey.dtype != np.uint8:
        return np.unique(grey, return_counts=True)
    counts = np.bincount(grey.ravel(), minlength=256)
    numbers = np.flatnonzero(counts)
    return numbers, counts[numbers]


def _is_peaked(values_HWC: np.ndarray) -> bool:
    """Whether nearly all foreground has each of its channels near one of the peaks."""
    values = values_HWC.astype(np.int16)
    foreground = (values > _NOISE).any(axis=2)
    if not foreground.any():
        return False
    near = np.min([np.abs(values - peak) for peak in _PEAKS], axis=0)[foreground] <= _NOISE
    bright = values[foreground].max(axis=1) >= _PEAKS[1] - _NOISE
    return float((near.all(axis=1) & bright).mean()) >= _MOSTLY


def _snapped(values_HWC: np.ndarray) -> np.ndarray:
    """Channels at the nearest peak."""
    distances = np.stack([np.abs(values_HWC.astype(np.int16) - peak) for peak in _PEAKS])
    return np.array(_PEAKS, np.uint8)[distances.argmin(axis=0)]


def _volume(data: bytes) -> Look | None:
    volume = volumes.read_header(data)
    if isinstance(volume, Reject):
        return None
    columns, rows, slices = volume.shape
    labels = volumes.labels(data)
    if isinstance(labels, Reject):  # fractions or several volumes: an image
        return Look((rows, columns), slices, distinct=_FEW_OF_VOLUME + 1, volume=True)
    numbers, counts = np.unique(labels, return_counts=True)
    counted: Counter[int | str] = Counter(
        {int(number): int(count) for number, count in zip(numbers, counts, strict=True)}
    )
    return Look(
        (rows, columns),
        slices,
        Counter(dict(counted.most_common(_KEPT))),
        len(numbers),
        negative=bool(labels.min() < 0),
        volume=True,
    )


def _dicom(data: bytes) -> Look | None:
    silence_libraries()
    parsed = parse(data)
    if isinstance(parsed, Reject):
        return None
    sop_class = str(parsed.dataset.get("SOPClassUID", ""))
    if sop_class == contours.SOP_CLASS:
        structures = contours.read(parsed.data)
        names = () if isinstance(structures, Reject) else tuple(structures.names.values())
        return Look((0, 0), names=names, holds="contours")
    if sop_class in segments.SOP_CLASSES:
        segmentation = segment_index.read(parsed.data)
        names = () if isinstance(segmentation, Reject) else tuple(segmentation.labels.values())
        return Look((0, 0), names=names, holds="segments")
    headers = read_headers(data)
    if isinstance(headers, Reject):
        return None
    header = headers[0]
    values = Stored(parsed).values(None if len(headers) == 1 else 0)
    if isinstance(values, Reject):
        return None
    return _pixels(values, header=header)
