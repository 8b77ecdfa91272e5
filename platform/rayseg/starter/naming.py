"""Groups of files whose paths are built alike: where folders vary, and which words stand around a name.

A group is what one pattern of a layout takes. Nobody says which folders are patients and which words are `_mask`, so
all sensible readings are made; `pairing` tries them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from rayseg.starter.files import File, Kind

_LEVELS = 4  # folders on the way that may vary; deeper ones are taken as they are
_MOST_GROUPS = 32  # a reading with more has taken names of patients for words
_AFTER = re.compile(r"[_\-. ](?=[A-Za-z])")  # a word after a name begins here: `_mask`, `-seg`
_CHANNEL = re.compile(r"_000\d$")  # nnU-Net's modalities of a case
_BEFORE = re.compile(r"[A-Za-z]+[_\-. ]?(?=.)")  # a word before a name: `mask_`, `img`
_MASK_WORDS = re.compile(
    r"(?<![a-z])(masks?|msk|seg(s|mentations?)?|labels?(Tr|Ts)?|lbl|gt|ground|truth|annotations?|annot|roi|lesions?|"
    r"targets?|contours?)(?![a-z])",
    re.IGNORECASE,
)
Words = Literal["all", "masks", "none"]  # which words behind names count: all that repeat, those of masks, none


@dataclass(frozen=True)
class Member:
    """A file of a group: `varying` are its folders at the levels that vary, `base` its name without words."""

    file: File
    varying: tuple[str, ...]
    base: str


@dataclass(frozen=True)
class Group:
    """Files that one pattern takes.

    levels: of each folder on the way its name, or None where it varies.
    head, tail: words before and behind the name.
    """

    levels: tuple[str | None, ...]
    head: str
    tail: str
    kind: Kind
    members: tuple[Member, ...] = field(repr=False, compare=False, hash=False)

    @property
    def varying(self) -> tuple[int, ...]:
        """The levels that vary."""
        return tuple(level for level, name in enumerate(self.levels) if name is None)

    @property
    def named(self) -> bool:
        """Whether its files have names of their own, beside the words."""
        return any(member.base for member in self.members)

    @property
    def says_mask(self) -> bool:
        """Whether its words speak of masks."""
        words = " ".join([*(name for name in self.levels if name), self.head, self.tail])
        return bool(_MASK_WORDS.search(words.replace("_", " ")))

    @property
    def suffix(self) -> str:
        """The ending in a pattern."""
        suffixes = {member.file.suffix for member in self.members}
        return suffixes.pop() if len(suffixes) == 1 else ".*"

    def key(self, member: Member, levels: Sequence[int], named: bool) -> tuple[str, ...]:
        """What a member pairs by: its folders at these varying levels, and its name."""
        of_level = dict(zip(self.varying, member.varying, strict=True))
        return (*(of_level[level] for level in levels), *([member.base] if named else []))

    def pattern(self, parts: Mapping[int, str], name: str) -> str:
        """The pattern of a layout: `parts` names the varying levels, `name` stands for the name."""
        folders = [
            literal if literal is not None else f"{{{parts[level]}}}" for level, literal in enumerate(self.levels)
        ]
        return "/".join([*folders, f"{self.head}{name if self.named else ''}{self.tail}{self.suffix}"])


def groups(files: Sequence[File]) -> Iterator[list[Group]]:
    """Readings of the files: each is all groups of one choice of varying folders and of words."""
    data = [file for file in files if file.kind in ("picture", "volume", "dicom")]
    names: dict[int, set[str]] = defaultdict(set)
    for file in data:
        for level, name in enumerate(file.folders):
            names[level].add(name)
    open_levels = [level for level in sorted(names) if len(names[level]) > 1]
    always = set(open_levels[_LEVELS:])
    seen: set[frozenset[tuple[object, ...]]] = set()
    for choice in product((False, True), repeat=len(open_levels[:_LEVELS])):
        varying = {level for level, varies in zip(open_levels, choice, strict=False) if varies} | always
        for tails, heads in product(("all", "masks", "none"), (False, True)):
            reading = _reading(data, varying, tails, heads)  # type: ignore[arg-type]
            mark = frozenset((one.levels, one.head, one.tail, one.kind) for one in reading)
            if reading and mark not in seen:
                seen.add(mark)
                yield reading


def _reading(files: Sequence[File], varying: set[int], tails: Words, heads: bool) -> list[Group]:
    """The groups of one choice; none where there are too many."""
    folders: dict[tuple[tuple[str | None, ...], Kind], list[File]] = defaultdict(list)
    for file in files:
        levels = tuple(None if level in varying else name for level, name in enumerate(file.folders))
        folders[levels, file.kind].append(file)
        if len(folders) > _MOST_GROUPS:
            return []
    grouped: dict[tuple[tuple[str | None, ...], str, str, Kind], list[Member]] = defaultdict(list)
    for (levels, kind), of_folders in folders.items():
        stems = [file.stem for file in of_folders]
        behind = _tails(stems, tails, whole=None in levels)
        before = _heads([stem.removesuffix(tail) for stem, tail in zip(stems, behind, strict=True)], heads)
        for file, tail, head in zip(of_folders, behind, before, strict=True):
            base = file.stem[len(head) : len(file.stem) - len(tail)]
            of_varying = tuple(name for name, level in zip(file.folders, levels, strict=True) if level is None)
            grouped[levels, head, tail, kind].append(Member(file, of_varying, base))
        if len(grouped) > _MOST_GROUPS:
            return []
    return [Group(*key, tuple(members)) for key, members in grouped.items() if _is_spellable(key)]


def _is_spellable(key: tuple[tuple[str | None, ...], str, str, Kind]) -> bool:
    """Whether a pattern can say it: braces and stars mean something there."""
    levels, head, tail, _ = key
    return not set("".join([*(name for name in levels if name), head, tail])) & set("{}*")


def _tails(stems: Sequence[str], words: Words, *, whole: bool) -> list[str]:
    """The words behind each name: of those that repeat the most frequent, and of equals the longest.

    A whole name is one where folders vary and it repeats: `ct` in `{patient}/ct.nii.gz`.
    """
    if words == "none":
        return [""] * len(stems)
    counts: Counter[str] = Counter()
    possible = [list(_ends(stem, whole)) for stem in stems]
    for ends in possible:
        counts.update(ends)
    if words == "masks":
        counts = Counter({end: count for end, count in counts.items() if _says_mask(end)})
    channels = words == "all" and all(_CHANNEL.search(stem) for stem in stems)
    least = 2 if len(stems) > 3 else 1
    chosen = []
    for stem, ends in zip(stems, possible, strict=True):
        known = [end for end in ends if counts[end] >= least]
        if channels:
            chosen.append(stem[-len("_0000") :])
        else:
            chosen.append(max(known, key=lambda end: (counts[end], len(end)), default=""))
    return chosen


def _says_mask(word: str) -> bool:
    return bool(_MASK_WORDS.search(word.replace("_", " ")))


def _ends(stem: str, whole: bool) -> Iterator[str]:
    """Ends of a name that are words, each begun by a letter."""
    for match in _AFTER.finditer(stem):
        end = stem[match.start() :]
        if match.start() and all(word[:1].isalpha() for word in re.split(r"[_\-. ]", end)[1:]):
            yield end
    if whole and stem[:1].isalpha() and all(word[:1].isalpha() for word in re.split(r"[_\-. ]", stem)):
        yield stem


def _heads(stems: Sequence[str], wanted: bool) -> list[str]:
    """The word before each name, where few such words stand before all of them."""
    matches = [_BEFORE.match(stem) if wanted else None for stem in stems]
    words = [match[0] if match else "" for match in matches]
    return words if len(set(words)) <= 4 else [""] * len(stems)
