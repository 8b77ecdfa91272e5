"""Labels: the classes of a data set, and which values, colours or sources of its masks mean which class."""

import re
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_erosion

from rayseg.dicom.image_files import eight_bits
from rayseg.records import Reason, Reject

BACKGROUND = "background"  # as a name in a mapping: what to leave out

# What MLflow takes as a part of a metric's name, and in 64 characters, as SegmentLabel is an LO (DICOM PS3.5, 6.2).
_NAME = re.compile(r"(?!\.+$)[\w.\- :]{1,64}")
_COLOR = re.compile(r"#[0-9a-f]{6}")
# Lossy compression moves values, and it and anti-aliasing blend edges. In each channel so much is noise; where a square
# of so many pixels is further from all that is named it is no edge, but something that no class is named for.
_NOISE = 64
_EDGE = 5


@dataclass(frozen=True)
class Labels:
    """The foreground classes, numbered 1, 2, ... in their order, and the rule that says which pixel is which.

    The first rule of these that is given holds:

    - `sources`: the `{label}` of a mask's path, or the SegmentLabel of a DICOM segmentation's segment, says the class;
    - `colors`: "#rrggbb" of a colour-coded mask, the nearest one counts; black is background unless named;
    - `values`: integers of a label map, or numbers of segments; several names without a rule are the values 1, 2, ...;
    - one name and no rule: every value above `threshold`, or channel of a colour, is that class, whatever its source;
      so is every segment and ROI, which have no values.

    Several values, colours or sources may mean one class; `background` as the name leaves one out. A mask that holds
    something without a class is rejected. Where classes overlap the later name wins. A `threshold` of 127 takes the
    noise of JPEG masks away.
    """

    names: tuple[str, ...] = ("lesion",)  # the foreground classes
    threshold: int = 0  # greater values are foreground, where `sources` or one name is the rule
    values: dict[int, str] | None = None  # the class of each stored number
    colors: dict[str, str] | None = None  # the class of each colour, such as "#ff0000"
    sources: dict[str, str] | None = None  # the class of each {label}, SegmentLabel or ROI name

    def __post_init__(self) -> None:
        if not self.names or not all(self.names) or len(set(self.names)) < len(self.names) or BACKGROUND in self.names:
            raise ValueError(
                f"labels.names: one or more different names of foreground expected, got {list(self.names)}"
            )
        for name in self.names:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"labels.names: letters, digits, spaces and any of _.:- expected, at most 64, got {name!r}"
                )
        if len(self.names) > 254:
            raise ValueError(f"labels.names: at most 254 names expected, got {len(self.names)}")
        if not 0 <= self.threshold <= 254:
            raise ValueError(f"labels.threshold: 0..254 expected, got {self.threshold}")
        rules = {key: getattr(self, key) for key in ("values", "colors", "sources") if getattr(self, key) is not None}
        if len(rules) > 1:
            raise ValueError(f"labels: one of {' and '.join(rules)} expected, not both")
        for key, rule in rules.items():
            for marker, name in rule.items():
                if name != BACKGROUND and name not in self.names:
                    raise ValueError(f"labels.{key}: {marker!r} means {name!r}, which labels.names lacks")
            unnamed = [name for name in self.names if name not in rule.values()]
            if unnamed:
                raise ValueError(f"labels.{key}: nothing means {', '.join(unnamed)}")
        for color in self.colors or {}:
            if not _COLOR.fullmatch(color):
                raise ValueError(f"labels.colors: a colour as '#ff0000' expected, got {color!r}")

    @property
    def by_value(self) -> bool:
        """Whether the integers of a mask say the class."""
        return self.colors is None and self.sources is None and (self.values is not None or len(self.names) > 1)

    def check_sources(self, found: set[str]) -> None:
        """Raises ValueError where `sources` is the rule and lacks one of these `{label}`s of masks' paths."""
        lacking = found - self.sources.keys() if self.sources is not None else set()
        if lacking:
            raise ValueError(f"labels.sources: lacks {', '.join(sorted(lacking))}, which paths of masks name")

    def apply(
        self, mask: np.ndarray, source: str | None = None, lossy: bool = False, has_shades: bool = True
    ) -> np.ndarray | Reject:
        """The class indices of one mask.

        Args:
            mask: integers (rows, columns), or uint8 or uint16 colours (rows, columns, 3); bool (rows, columns) of a
                segment or ROI, which is above any threshold.
            source: the `{label}` of its path, the segment's label or the ROI's name.
            lossy: whether compression may have moved its values.
            has_shades: whether its values are greys or colours of a picture; else `colors` says nothing of them.

        Returns:
            uint8 (rows, columns): 0 background, 1 the first of `names`, ...; MASK_VALUES where the mask holds what no
            class is named for.
        """
        if self.colors is not None:
            if not has_shades:
                return Reject(Reason.MASK_VALUES, "labels.colors: the mask has numbers, which are no colours")
            colors = eight_bits(mask) if mask.ndim == 3 else np.repeat(mask[..., np.newaxis], 3, axis=2)
            named = {tuple(bytes.fromhex(color[1:])): self._index(name) for color, name in self.colors.items()}
            return _nearest(colors, {(0, 0, 0): 0} | named, _NOISE, "colour")
        if self.by_value:
            if mask.ndim == 3:
                mask = mask[..., 0] if (mask == mask[..., :1]).all() else mask
            if mask.ndim == 3:
                return Reject(Reason.MASK_VALUES, "a colour-coded mask: labels.colors says which colour is what")
            values = self.values or dict(enumerate(self.names, start=1))
            named = {(value,): self._index(name) for value, name in values.items()}
            return _nearest(mask[..., np.newaxis], {(0,): 0} | named, _NOISE if lossy else 0, "value")
        index = 1
        if self.sources is not None:
            if source not in self.sources:
                return Reject(Reason.MASK_VALUES, "labels.sources lacks the mask's {label} or its segment's label")
            index = self._index(self.sources[source])
        strength = mask.max(axis=2) if mask.ndim == 3 else mask
        inside = strength if strength.dtype == bool else strength > self.threshold
        return inside.astype(np.uint8) * np.uint8(index)

    def _index(self, name: str) -> int:
        return 0 if name == BACKGROUND else self.names.index(name) + 1


def _nearest(points: np.ndarray, named: dict[tuple[int, ...], int], noise: int, what: str) -> np.ndarray | Reject:
    """The index of the nearest named point of each pixel; `noise` is how far each channel may be from it.

    Args:
        points: integers (rows, columns, channels).
        named: points with their class indices.
        noise: 0 where values must be met exactly.
        what: is named, for the reject.
    """
    classes = np.zeros(points.shape[:2], np.uint8)
    open_HW = np.ones(points.shape[:2], bool)  # without a class yet
    for point, index in named.items():
        exact = points[..., 0] == point[0]
        for channel in range(1, len(point)):
            exact &= points[..., channel] == point[channel]
        classes[exact] = index
        open_HW &= ~exact
    if not open_HW.any():
        return classes
    rest, indices = points[open_HW].astype(np.int64), np.array(list(named.values()), np.uint8)
    # One named point after the other: all at once would take as many times the mask's memory.
    nearest, distance = np.zeros(len(rest), np.int64), np.full(len(rest), np.iinfo(np.int64).max)
    for number, point in enumerate(named):
        squared = ((rest - point) ** 2).sum(axis=1)
        closer = squared < distance
        nearest[closer], distance[closer] = number, squared[closer]
    classes[open_HW] = indices[nearest]
    strange_HW = np.zeros(open_HW.shape, bool)
    strange_HW[open_HW] = distance > noise**2 * points.shape[2]
    if noise:
        strange_HW = binary_erosion(strange_HW, np.ones((_EDGE, _EDGE), bool))
    if strange_HW.any():
        first = points[strange_HW][0]
        shown = "#" + bytes(first.astype(np.uint8)).hex() if len(first) == 3 else str(first[0])
        return Reject(Reason.MASK_VALUES, f"{what} {shown}, for which no class is named")
    return classes
