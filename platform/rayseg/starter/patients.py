"""Patients: who each image is of, by a table, by a folder, by a part of the name, or by the DICOM header."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from rayseg import storage
from rayseg.data.layouts import read_groups
from rayseg.starter.files import File, spread
from rayseg.starter.looks import look
from rayseg.starter.naming import Group
from rayseg.starter.pairing import NAME, Candidate

_SETS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_LEVEL_NAMES = ("patient", "study", "series", "part", "folder")
_CLASSES = 6  # folders that may be classes, at most
_HEADERS = 30  # that are read, to see whether they name patients
_SPARSE = 0.3  # of the numbers between the least and the greatest name: where fewer are there, digits have parts
_LEAST_DIGITS = 6  # of names that are nothing but a number of a patient and one of a slice
_TABLE_BYTES = 2**24
_SLICES = 1.5  # of a patient on average, at least, where a part of the name is to be one

Source = Literal["table", "folder", "name", "volume", "header", "unknown"]


@dataclass(frozen=True)
class Patients:
    """How the layout tells patients.

    source: what tells them.
    name: what stands for a name in patterns.
    table: the CSV below the folder, for `layout.groups`.
    parts: how the levels that vary are called.
    guessed: whether it is no more than likely.
    doubts: of tables that nearly fit.
    """

    source: Source
    parts: dict[int, str]
    name: str = NAME
    table: str | None = None
    guessed: bool = False
    classes: tuple[str, ...] = ()  # folders that look like classes, where one level is `{label}`
    doubts: list[str] = field(default_factory=list)


def find(candidate: Candidate, files: Sequence[File]) -> Patients:
    """Who is who: the first of table, folder, name and header that tells several images apart."""
    images = candidate.images
    doubts: list[str] = []
    table = _table(files, images, doubts)
    header = images.kind == "dicom" and _headers_tell(images)
    bases = [member.base for member in images.members] if images.named else []
    name = _separated(bases)
    level = _class_level(candidate)
    # A folder of words may be a class or a person: a class only where something else tells persons.
    known = table is not None or header or name is not None
    if level is not None and not known:
        doubts.append(
            f"{len(_names(images, level))} folders are taken for patients; where they are classes, write {{label}} in "
            "place of {patient} in the layout, and labels.sources"
        )
    classes = level if known else None
    parts = _parts(images, classes, header or table is not None)
    labels = () if classes is None else tuple(_names(images, classes))
    if table is not None:
        return Patients("table", parts, table=table, classes=labels, doubts=doubts)
    if header:
        return Patients("header", parts, classes=labels, doubts=doubts)
    if "patient" in parts.values() and classes is None:
        return Patients("folder", parts, doubts=doubts)
    if name is not None:
        return Patients("name", parts, name, classes=labels, doubts=doubts)
    if images.kind == "volume" and bases:
        return Patients("volume", parts, "{patient}", doubts=doubts)
    if digits := _digits(bases):
        return Patients("name", parts, f"{{patient:{digits}}}{{slice}}", guessed=True, doubts=doubts)
    return Patients("unknown", parts, doubts=doubts)


def _table(files: Sequence[File], images: Group, doubts: list[str]) -> str | None:
    """The CSV with file and group that names most images."""
    best, most = None, 0
    for file in files:
        if file.kind != "table" or len(file.folders) > 1:
            continue
        try:
            groups = read_groups(storage.read(file.uri, _TABLE_BYTES))
        except (OSError, ValueError):
            continue
        paths = [member.file.path for member in images.members]
        prefix = "/".join(name for name in images.levels[: _fixed(images)] if name)
        below = [path[len(prefix) + 1 :] if prefix else path for path in paths]
        hits = sum(path in groups or short in groups for path, short in zip(paths, below, strict=True))
        if hits > most:
            best, most = file.path, hits
        without = {PurePosixPath(one).stem for one in groups}
        if not hits and any(PurePosixPath(path).stem in without for path in paths):
            doubts.append(
                "a CSV with file,group is there, but its files are not spelled as they lie: write each path below the "
                "images' folder, with its ending"
            )
    if best is not None and most < len(images.members):
        doubts.append(f"the CSV of groups names {most} of {len(images.members)} images")
    return best


def _fixed(images: Group) -> int:
    """How many folders on the way come before the first that varies."""
    return next((level for level, name in enumerate(images.levels) if name is None), len(images.levels))


def _headers_tell(images: Group) -> bool:
    """Whether DICOM headers have a PatientID each, several of them where folders suggest several."""
    seen = [look(member.file) for member in spread(images.members, _HEADERS)]
    named = {one.header.patient_id for one in seen if one is not None and one.header is not None}
    return "" not in named and (len(named) > 1 or (len(named) == 1 and not images.varying))


def _class_level(candidate: Candidate) -> int | None:
    """The level whose few folders are words, in images and masks alike: classes, or persons."""
    images, masks = candidate.images, candidate.masks
    if masks is None or candidate.many:
        return None
    for level in images.varying:
        names = _names(images, level)
        words = all(re.fullmatch(r"[A-Za-z][A-Za-z _-]*", name) for name in names)
        if level in masks.varying and 2 <= len(names) <= _CLASSES and words and not set(map(str.lower, names)) <= _SETS:
            return level
    return None


def _names(images: Group, level: int) -> list[str]:
    """The folders at a level that varies."""
    place = images.varying.index(level)
    return sorted({member.varying[place] for member in images.members})


def _parts(images: Group, classes: int | None, told: bool) -> dict[int, str]:
    """Names of the levels that vary; the first is the patient, unless something else tells who that is."""
    names = [name for name in _LEVEL_NAMES if not (told and name == "patient")]
    parts = {}
    for level in images.varying:
        if level == classes:
            parts[level] = "label"
        elif set(map(str.lower, _names(images, level))) <= _SETS:
            parts[level] = "set"
        else:
            parts[level] = names.pop(0) if names else f"level_{'abcdefghij'[level]}"
    return parts


def _separated(bases: Sequence[str]) -> str | None:
    """`{patient}_{slice}` where what stands before the last number repeats, with the words that all begin with."""
    for separator in ("_", "-", " ", "."):
        parts = [base.rpartition(separator) for base in bases]
        patients = {one[0] for one in parts}
        if (
            not bases
            or not all(one[0] and re.search(r"\d", one[2]) for one in parts)
            or not 1 < len(patients) <= len(bases) / 1.5
        ):
            continue
        start = re.match(r"(?:[A-Za-z]+[_\-. ])?", bases[0])
        word = start[0] if start else ""
        shared = word and all(one.startswith(word) and len(one) > len(word) for one in patients)
        return f"{word if shared else ''}{{patient}}{separator}{{slice}}"
    return None


def _digits(bases: Sequence[str]) -> int | None:
    """How many digits are the patient's in names that are one number of equal width, and are far from counting on."""
    widths = {len(base) for base in bases}
    if len(widths) != 1 or not all(base.isascii() and base.isdigit() for base in bases):
        return None
    (width,) = widths
    numbers = [int(base) for base in bases]
    share = len(bases) / (max(numbers) - min(numbers) + 1)
    first = width // 2
    patients = {base[:first] for base in bases}
    if width < _LEAST_DIGITS or share > _SPARSE or not 1 < len(patients) < len(bases):
        return None
    return first
