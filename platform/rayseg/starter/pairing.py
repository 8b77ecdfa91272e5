"""Pairing: of all readings of a folder the one by which most images have a mask, tried with the planner of layouts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rayseg.data.layouts import Layout, Planned, plan
from rayseg.starter.files import File, spread
from rayseg.starter.looks import look
from rayseg.starter.naming import Group, groups

_LOOKED = 5  # files of a group, to tell masks from images
_TRIED = 8  # candidates that the planner tries
_HALF = 0.5  # of the pairs that any candidate has: one that looks right may have so few

Names = Callable[[Group], dict[int, str]]  # how the levels that vary are called in patterns
NAME, SEVERAL = "{slice}", "{object}"


@dataclass(frozen=True)
class Candidate:
    """Images and masks that may belong together; without masks there are none in the folder."""

    images: Group
    masks: Group | None
    pairs: int = 0
    trust: int = 0  # 3: masks look like masks and images do not; 0: neither looks nor names speak for it
    many: bool = False  # whether one mask is of all images with its folders
    planned: tuple[Planned[File], ...] = field(default=(), repr=False)


def best(files: Sequence[File]) -> Candidate | None:
    """The candidate that pairs most; without any pair the largest group of images, None where there is no image."""
    readings = list(groups(files))
    candidates: dict[tuple[Group, Group], Candidate] = {}
    for reading in readings:
        for masks in reading:
            for images in reading:
                if images is masks or (images, masks) in candidates:
                    continue
                candidate = _candidate(images, masks)
                if candidate is not None:
                    candidates[images, masks] = candidate
    ranked = sorted(candidates.values(), key=_rank, reverse=True)
    tried = [tried for one in _trusted(ranked)[:_TRIED] if (tried := _tried(one, files)) is not None]
    if tried:
        return max(tried, key=_rank)
    alone = [group for reading in readings for group in reading if looks_like_masks(group) is not True]
    # As few words and varying folders as possible; of equals the most files.
    largest = max(alone, key=lambda one: (len(one.members), -len(one.varying), -len(one.head + one.tail)), default=None)
    return None if largest is None else Candidate(largest, None)


def looks_like_masks(group: Group) -> bool | None:
    """Whether most of its files look like masks; None where they do not tell."""
    seen = Counter(one.is_mask for member in spread(group.members, _LOOKED) if (one := look(member.file)) is not None)
    if not seen[True] and not seen[False]:
        return None
    return seen[True] > seen[False]


def holds_places(group: Group) -> bool:
    """Whether its files say themselves which images they are of: segmentations, contours, volumes."""
    first = look(group.members[0].file)
    return group.kind == "volume" or (first is not None and first.holds != "pixels")


def layout_of(candidate: Candidate, parts: dict[int, str], name: str = NAME) -> Layout:
    """The layout; `parts` names the levels that vary, `name` stands for what image and mask have in common."""
    images = candidate.images.pattern(parts, name)
    if candidate.masks is None:
        return Layout(images)
    of_mask = SEVERAL if candidate.many else name
    return Layout(images, candidate.masks.pattern(parts, of_mask))


def _candidate(images: Group, masks: Group) -> Candidate | None:
    """What pairs by equal folders and names, and how much of it; None for nothing."""
    trust = _trust(images, masks)
    if not trust:
        return None
    levels = [level for level in masks.varying if level in images.varying]
    ways = [False, True] if holds_places(masks) and images.kind == "dicom" else [False]
    for many in ways:
        named = images.named and masks.named and not many
        if not named and not levels:
            continue
        by_key = Counter(masks.key(member, levels, named) for member in masks.members)
        pairs = sum(images.key(member, levels, named) in by_key for member in images.members)
        if pairs:
            return Candidate(images, masks, pairs, trust, many)
    return None


def _trust(images: Group, masks: Group) -> int:
    """How much speaks for it: 0 for nothing, 3 where masks look like masks and images do not."""
    of_masks, of_images = looks_like_masks(masks), looks_like_masks(images)
    if any(one.holds != "pixels" for group in (images,) if (one := look(group.members[0].file)) is not None):
        return 0
    if of_masks and not of_images:
        return 3
    by_name = masks.says_mask and not images.says_mask
    if by_name:
        return 2 if of_masks is not False else 1
    return 0


def _rank(one: Candidate) -> tuple[float, ...]:
    assert one.masks is not None
    return (
        one.pairs,
        one.trust,
        not one.many,
        one.many or one.images.named == one.masks.named,
        one.masks.says_mask and not one.images.says_mask,
        one.pairs - len(one.images.members),
        one.pairs - len(one.masks.members),
        one.images.levels == one.masks.levels,
        -len(one.images.varying),
        -len(one.images.head + one.images.tail) - len(one.masks.head + one.masks.tail),
    )


def _trusted(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Those that are trusted most, unless they pair far less than others do."""
    most = max((one.pairs for one in ranked), default=0)
    enough = [one for one in ranked if one.pairs >= _HALF * most]
    trust = max((one.trust for one in enough), default=0)
    return [one for one in enough if one.trust == trust]


def _tried(candidate: Candidate, files: Sequence[File]) -> Candidate | None:
    """The candidate with what the planner makes of it; None where it refuses."""
    parts = {level: f"level_{'abcdefghij'[level]}" for level in range(10)}
    try:
        layout = layout_of(candidate, parts)
        planned = tuple(plan(layout, [(file.path, file) for file in files], {}))
    except ValueError:
        return None
    pairs = sum(bool(image.masks) for image in planned)
    return Candidate(candidate.images, candidate.masks, pairs, candidate.trust, candidate.many, planned)
