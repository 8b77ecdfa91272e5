"""Layouts: where the images of a data set lie, and how masks, classes and patients pair with them.

A layout is declared by patterns of paths below the source, in which `{part}` names a piece without slash (`{part:3}`
one of three characters, `{part**}` one with slashes), `*` stands for anything without slash and `**` for anything. An
image and a mask belong together where the parts that both patterns name are equal. Two parts mean more: `{patient}` is
the patient, and `{label}` in a mask's path says what its foreground is (see `labels.Labels.sources`). What matches a
mask's pattern is a mask, whatever else it matches. A pattern without parts is a folder: what lies in it pairs by equal
paths, whatever the suffix.
"""

import csv
import io
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar

from rayseg.records import MissingMask

logger = logging.getLogger(__name__)

FileT = TypeVar("FileT")

_SHOWN = 3
_TOKEN = re.compile(r"\{([a-z_]+)(\*\*|:[1-9]\d?)?\}|(\*\*)|(\*)")
_BRACES = "a part is lower-case letters in braces, as {slice}, {id:3} or {path**}"
# An image file does not say where it lies: it has masks of its own, and is the mask of one image.
_FLAT = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Layout:
    """Where things lie below a source; one pattern or several of each kind."""

    images: str | tuple[str, ...] = ""  # pattern of the paths of images
    masks: str | tuple[str, ...] | None = None  # pattern of the paths of masks; null for an archive without masks
    groups: str | None = None  # CSV below the source with the columns file,group: the patient of each image
    missing_mask: MissingMask = "reject"  # an image without a mask is rejected, or has no foreground
    volume: int | None = None  # which volume to take of files of several (4-D), from 0; null rejects such files

    def __post_init__(self) -> None:
        if self.volume is not None and self.volume < 0:
            raise ValueError(f"layout.volume: a number from 0 on expected, got {self.volume}")
        for key, patterns in (("images", self.image_patterns), ("masks", self.mask_patterns)):
            for pattern in patterns:
                try:
                    _compiled(pattern)
                except ValueError as error:
                    raise ValueError(f"layout.{key}: {error}") from None
        for mask in self.mask_patterns:
            if not any(_shared(image, mask) for image in self.image_patterns):
                raise ValueError(f"layout.masks: {mask!r} names no part that a pattern of layout.images names too")

    @property
    def image_patterns(self) -> tuple[str, ...]:
        """The patterns of images."""
        return (self.images,) if isinstance(self.images, str) else self.images

    @property
    def mask_patterns(self) -> tuple[str, ...]:
        """The patterns of masks; none where there are no masks."""
        return (self.masks,) if isinstance(self.masks, str) else self.masks or ()

    def folders(self) -> list[str]:
        """The folders below the source to list: all that the patterns can match lies in them, none within another."""
        found = sorted({_compiled(pattern).folder for pattern in (*self.image_patterns, *self.mask_patterns)})
        return [name for name in found if not any(name != other and _is_below(name, other) for other in found)]


@dataclass(frozen=True)
class Mask(Generic[FileT]):
    """A mask of an image."""

    file: FileT  # what the listing gave with the path
    path: str  # below the source
    label: str | None  # the `{label}` of the path; None where the pattern names none


@dataclass(frozen=True)
class Planned(Generic[FileT]):
    """An image as the layout has it."""

    file: FileT  # what the listing gave with the path
    path: str  # below the source
    name: str  # below the images' folder, where the layout has one
    group: str | None  # the patient by the CSV or by the path; None where neither names one
    masks: tuple[Mask[FileT], ...]


def plan(
    layout: Layout,
    objects: Iterable[tuple[str, FileT]],
    groups: Mapping[str, str],
    without_image: list[str] | None = None,
) -> Iterator[Planned[FileT]]:
    """The images among the objects, with what belongs to each, in their order; without masks, as the objects come.

    What is left over is logged at the end: as a warning where images and masks do not pair, else as information.

    Args:
        layout: the patterns.
        objects: paths below the source, each with whatever the caller wants back.
        groups: the CSV of groups.
        without_image: gets the paths of the masks that no image pairs with, before the plan ends.

    Raises:
        ValueError: no image or no pair at all, two masks for one image by one pattern, or one mask for several where
            it or these are image files; with counts and examples.
    """
    told = _Told()
    masks: _Masks[FileT] = _Masks(layout)
    held: list[tuple[str, FileT]] = []
    for path, file in objects:
        if path == layout.groups:
            continue
        if layout.mask_patterns:
            if not masks.add(path, file):
                held.append((path, file))
        else:
            yield from _image(layout, path, file, groups, masks, told)
    for path, file in held:
        yield from _image(layout, path, file, groups, masks, told)
    if without_image is not None:
        without_image += masks.lonely()
    _tell(layout, masks, told)


def read_groups(data: bytes) -> Mapping[str, str]:
    """The CSV of groups: path of an image, as `plan` takes it, to group; raises ValueError where malformed."""
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"layout.groups: not a CSV file in UTF-8 ({type(error).__name__})") from None
    groups: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        file, group = row.get("file"), row.get("group")
        if not file or not group:
            raise ValueError(f"layout.groups: line {number} lacks a value for file or group; header: file,group")
        if groups.setdefault(file, group) != group:
            raise ValueError(f"layout.groups: line {number} puts a file into a second group")
    if not groups:
        raise ValueError("layout.groups: the CSV has no rows; header: file,group")
    return groups


@dataclass(frozen=True)
class _Pattern:
    expression: re.Pattern[str]
    folder: str  # everything that matches lies in it
    parts: frozenset[str]


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> _Pattern:
    """Raises ValueError for braces that make no part."""
    pattern = pattern.strip("/")
    if not _TOKEN.search(pattern):
        if "{" in pattern or "}" in pattern:
            raise ValueError(
                f"{pattern!r}: a part is lower-case letters in braces, as {{slice}}, {{id:3}} or {{path**}}"
            )
        start = re.escape(pattern) + "/" if pattern else ""
        suffix = r"(?:\.(?:nii|seg))?(?:\.[^./]*)?"  # .nii.gz and .seg.nrrd are one
        return _Pattern(re.compile(rf"{start}(?P<path>.+?){suffix}"), pattern, frozenset({"path"}))
    expression, end, parts = "", 0, set()
    for token in _TOKEN.finditer(pattern):
        expression += _literal(pattern, end, token.start())
        name, size, deep, _ = token.groups()
        if name is None:
            expression += ".*" if deep else "[^/]*"
        elif name in parts:
            expression += f"(?P={name})"
        else:
            parts.add(name)
            one = {None: "[^/]+", "**": ".+"}.get(size) or f"[^/]{{{size[1:]}}}"
            expression += f"(?P<{name}>{one})"
        end = token.end()
    expression += _literal(pattern, end, len(pattern))
    first = _TOKEN.search(pattern)
    assert first is not None
    return _Pattern(re.compile(expression), pattern[: first.start()].rpartition("/")[0], frozenset(parts))


def _literal(pattern: str, start: int, end: int) -> str:
    text = pattern[start:end]
    if "{" in text or "}" in text:
        raise ValueError(f"{pattern!r}: {_BRACES}")
    return re.escape(text)


def _shared(image: str, mask: str) -> tuple[str, ...]:
    """The parts by which an image and a mask pair."""
    return tuple(sorted(_compiled(image).parts & _compiled(mask).parts))


def _is_below(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(folder + "/")


class _Masks(Generic[FileT]):
    """The masks of a listing, found by the parts that they share with an image."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.paths: list[str] = []
        self._uses: Counter[tuple[int, str]] = Counter()  # by the pattern of the images
        self._used: set[str] = set()
        self._by_parts: dict[tuple[int, int], dict[tuple[str, ...], list[Mask[FileT]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self._claims: dict[tuple[int, tuple[str, ...]], str] = {}

    def add(self, path: str, file: FileT) -> bool:
        """Whether the object is a mask."""
        for number, pattern in enumerate(self._layout.mask_patterns):
            match = _compiled(pattern).expression.fullmatch(path)
            if match is None:
                continue
            parts = match.groupdict()
            other = self._claims.setdefault((number, tuple(parts.values())), path)
            if other != path:
                shown = " and ".join(shape(self._layout, one) for one in (other, path))
                raise ValueError(f"layout.masks: two masks for one image, as {shown}; keep one kind of file")
            mask = Mask(file, path, parts.get("label"))
            self.paths.append(path)
            for image_number, image in enumerate(self._layout.image_patterns):
                key = tuple(parts[name] for name in _shared(image, pattern))
                if key:
                    self._by_parts[image_number, number][key].append(mask)
            return True
        return False

    def of(self, image_number: int, path: str, parts: Mapping[str, str]) -> tuple[Mask[FileT], ...]:
        """The masks of the image at a path, those of the first pattern first."""
        found: list[Mask[FileT]] = []
        for number, pattern in enumerate(self._layout.mask_patterns):
            shared = _shared(self._layout.image_patterns[image_number], pattern)
            of_pattern = self._by_parts[image_number, number].get(tuple(parts[name] for name in shared), [])
            for mask in of_pattern:
                self._used.add(mask.path)
                self._uses[image_number, mask.path] += 1
                flat = any(one.lower().endswith(_FLAT) for one in (path, mask.path))
                if flat and self._uses[image_number, mask.path] > 1:
                    shown = shape(self._layout, mask.path)
                    raise ValueError(f"layout.masks: {shown} would be the mask of several images; name more parts")
            found += of_pattern
        return tuple(found)

    def lonely(self) -> list[str]:
        """The masks that no image has."""
        return [path for path in self.paths if path not in self._used]


@dataclass
class _Told:
    """What a plan has seen; of the paths that are told about, the first few and the count."""

    images: int = 0
    paired: int = 0
    bare: list[str] = field(default_factory=list)
    bare_count: int = 0
    ignored: list[str] = field(default_factory=list)
    ignored_count: int = 0


def _image(
    layout: Layout, path: str, file: FileT, groups: Mapping[str, str], masks: _Masks[FileT], told: _Told
) -> Iterator[Planned[FileT]]:
    """The object where it is an image, nothing where it is none."""
    for number, pattern in enumerate(layout.image_patterns):
        compiled = _compiled(pattern)
        match = compiled.expression.fullmatch(path)
        if match is None:
            continue
        parts = match.groupdict()
        found = masks.of(number, path, parts)
        told.images += 1
        told.paired += bool(found)
        if not found:
            told.bare_count += 1
            told.bare += [path] if len(told.bare) < _SHOWN else []
        below = path[len(compiled.folder) + 1 :] if compiled.folder else path
        group = parts.get("patient") if layout.groups is None else groups.get(below) or groups.get(path)
        yield Planned(file, path, below if len(layout.image_patterns) == 1 else path, group, found)
        return
    told.ignored_count += 1
    told.ignored += [path] if len(told.ignored) < _SHOWN else []


def _tell(layout: Layout, masks: _Masks[Any], told: _Told) -> None:
    ignored = _examples(layout, "objects that are neither", told.ignored_count, told.ignored)
    if not told.images:
        seen = _examples(layout, "masks", len(masks.paths), masks.paths) + ignored
        if not seen:
            return  # there are no objects
        raise ValueError(f"layout.images: nothing matches {_quoted(layout.image_patterns)}{seen}")
    if not layout.mask_patterns:
        if ignored:
            logger.info("layout: %d images%s", told.images, ignored)
        return
    lonely = masks.lonely()
    message = (
        f"layout: {told.paired} of {told.images} images pair with one of {len(masks.paths)} masks"
        f"{_examples(layout, 'images without a mask', told.bare_count, told.bare)}"
        f"{_examples(layout, 'masks without an image', len(lonely), lonely)}{ignored}"
    )
    if not told.paired:
        raise ValueError(
            f"{message}; the parts that both name in {_quoted(layout.image_patterns)} and "
            f"{_quoted(layout.mask_patterns)} must be equal, in folders the paths but for the suffix"
        )
    if lonely or (told.bare_count and layout.missing_mask == "reject"):
        logger.warning("%s", message)
    elif ignored or told.bare_count:
        logger.info("%s", message)


def _quoted(patterns: Sequence[str]) -> str:
    return ", ".join(repr(pattern) for pattern in patterns)


def _examples(layout: Layout, what: str, count: int, paths: Sequence[str]) -> str:
    shown = ", ".join(shape(layout, path) for path in paths[:_SHOWN])
    return f"; {count} {what}, as {shown}" if count else ""


def shape(layout: Layout, path: str) -> str:
    """The path with x for letters and 0 for digits, but for its suffix and words of the layout: it may name a patient.

    `049/brain/Doe_7.jpg` is `000/brain/xxx_0.jpg` to a layout that names `{patient}/brain/{slice}.jpg`.
    """
    literal = " ".join(re.sub(r"{[^}]*}", " ", pattern) for pattern in (*layout.image_patterns, *layout.mask_patterns))
    known = set(re.findall(r"[^\W_]+", literal))
    stem, suffix = re.fullmatch(r"(.*?)((?:\.[A-Za-z][A-Za-z0-9]{0,5})?)", path, re.DOTALL).groups()  # type: ignore[union-attr]

    def plain(word: re.Match[str]) -> str:
        return word[0] if word[0] in known else re.sub(r"\D", "x", re.sub(r"\d", "0", word[0]))

    return re.sub(r"[^\W_]+", plain, stem) + suffix
