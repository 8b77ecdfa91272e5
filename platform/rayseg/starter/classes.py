"""Classes: what the values, colours or names in masks are, from a look at some of them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rayseg.data.labels import BACKGROUND
from rayseg.starter.looks import Look

_COLOURS = {
    "#ff0000": "red", "#00ff00": "green", "#0000ff": "blue", "#ffff00": "yellow", "#00ffff": "cyan",
    "#ff00ff": "magenta", "#ffffff": "white", "#808080": "grey",
}  # fmt: skip
_LEAST = 1e-3  # of the foreground: fewer pixels are noise at edges
_MOST = 20  # classes; more values are no classes
_THRESHOLD = 127
_NOISE = 40


@dataclass(frozen=True)
class Classes:
    """The labels of a recipe.

    names: of the classes, in order.
    rule: `values`, `colors`, `sources` or None for one class.
    mapping: of the rule, value, colour or source to class.
    counts: pixels by class, where they were counted.
    foreground: share of the pixels that is no background; None where it was not counted.
    """

    names: tuple[str, ...]
    rule: str | None = None
    mapping: dict[int | str, str] = field(default_factory=dict)
    threshold: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    foreground: float | None = None
    doubts: tuple[str, ...] = ()


def find(looks: Sequence[Look], folders: Sequence[str] = ()) -> Classes:
    """The classes of some masks; `folders` look like classes, one binary mask each."""
    names = Counter(name for one in looks for name in set(one.names))
    if names:
        return _of_names(names)
    counts: Counter[int | str] = Counter()
    for one in looks:
        counts.update(one.counts)
    pixels = sum(one.pixels for one in looks)
    if any(one.colour for one in looks):
        return _of_colours(counts, pixels, lossy=any(one.lossy for one in looks))
    numbers = Counter({value: count for value, count in counts.items() if isinstance(value, int)})
    return _of_values(numbers, pixels, looks, folders)


def _of_names(found: Counter[str]) -> Classes:
    """Segments and regions of interest: each name a class, the frequent ones first."""
    mapping: dict[int | str, str] = {name: _name(name) for name, _ in found.most_common()}
    names = tuple(name for name in dict.fromkeys(mapping.values()) if name != BACKGROUND)
    return Classes(names, "sources", mapping) if names else Classes(("lesion",))


def _of_colours(counts: Counter[int | str], pixels: int, *, lossy: bool) -> Classes:
    colours = Counter({str(value): count for value, count in counts.items() if isinstance(value, str)})
    # Masks without foreground have the value 0 of no colour.
    colours.pop("#000000", None)
    least = max(1.0, _LEAST * colours.total())
    kept = [(colour, count) for colour, count in colours.most_common(_MOST) if count >= least]
    names: dict[int | str, str] = {
        colour: _COLOURS.get(colour, f"class_{number}") for number, (colour, _) in enumerate(kept, 1)
    }
    if len(kept) == 1:
        names = dict.fromkeys(names, "lesion")
    doubts = []
    if len(colours) > _MOST and not lossy:
        doubts.append(f"masks hold {len(colours)} colours and more; the frequent ones are classes, see labels.colors")
    return Classes(
        tuple(names.values()),
        "colors",
        names,
        counts={names[colour]: count for colour, count in kept},
        foreground=colours.total() / max(1, pixels),
        doubts=tuple(doubts),
    )


def _of_values(counts: Counter[int], pixels: int, looks: Sequence[Look], folders: Sequence[str]) -> Classes:
    positive = Counter({value: count for value, count in counts.items() if value > 0})
    foreground = positive.total() / max(1, pixels)
    sources: dict[int | str, str] = {folder: _name(folder) for folder in folders}
    many = len(positive) > _MOST or (any(one.lossy for one in looks) and len(positive) > 1)
    if many and all(one.peaked or one.distinct <= 1 or not _bright(one) for one in looks):
        bright = sum(count for value, count in positive.items() if value > _THRESHOLD)
        middle = sum(count for value, count in positive.items() if abs(value - 128) <= _NOISE)
        doubts = []
        if middle > bright:
            doubts.append("masks hold greys between black and white: are these classes? see labels.values")
        return _binary(sources, _THRESHOLD, bright, bright / max(1, pixels), tuple(doubts))
    if many:
        told = f"masks hold {len(positive)} different values and more: they look like images"
        return _binary(sources, 0, positive.total(), foreground, (told,))
    if len(positive) <= 1 or sources:
        doubts = ["all masks that were looked at are empty"] if not positive else []
        if sources and len(positive) > 1:
            doubts.append(f"masks hold {len(positive)} values, and folders look like classes: the folders count")
        return _binary(sources, 0, positive.total(), foreground, tuple(doubts))
    values: dict[int | str, str] = {value: f"class_{value}" for value in sorted(positive)}
    return Classes(
        tuple(values.values()),
        "values",
        values,
        counts={f"class_{value}": positive[value] for value in sorted(positive)},
        foreground=foreground,
    )


def _bright(one: Look) -> int:
    return sum(count for value, count in one.counts.items() if isinstance(value, int) and value > _NOISE)


def _binary(
    sources: dict[int | str, str], threshold: int, pixels: int, foreground: float, doubts: tuple[str, ...]
) -> Classes:
    if len(sources) > 1:
        names = tuple(dict.fromkeys(sources.values()))
        return Classes(names, "sources", sources, threshold, foreground=foreground, doubts=doubts)
    return Classes(("lesion",), None, {}, threshold, {"lesion": pixels}, foreground, doubts)


def _name(text: str) -> str:
    """A name that MLflow and SegmentLabel take."""
    cleaned = re.sub(r"[^\w.\- :]", "_", text, flags=re.ASCII).strip(" .")[:64]
    return BACKGROUND if cleaned.lower() == BACKGROUND else cleaned or "other"
