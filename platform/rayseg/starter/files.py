"""The files below a folder, by what they are: pictures, volumes, DICOM objects, tables."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeVar

from rayseg import storage

Kind = Literal["picture", "volume", "dicom", "table", "other"]

MOST = 200_000  # files that are listed; a recipe of as many serves for more
_KINDS: dict[Kind, tuple[str, ...]] = {
    "volume": (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha"),
    "picture": (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"),
    "dicom": (".dcm", ".dicom", ".ima"),
    "table": (".csv",),
}
_NO_DATA = (".txt", ".json", ".xml", ".md", ".pdf", ".html", ".yaml", ".yml", ".py", ".zip", ".xlsx", ".parquet")
_SNIFFED = 3  # files of a folder without a known suffix whose first bytes are read: the others are alike
_PREAMBLE_BYTES = 132

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class File:
    """A file below the folder.

    folders: names of the folders on the way.
    stem: its name without `suffix`.
    suffix: as it is spelled; empty where the name has none that is known.
    """

    uri: str = field(repr=False)
    path: str = field(repr=False)  # below the folder
    kind: Kind
    folders: tuple[str, ...] = field(repr=False)
    stem: str = field(repr=False)
    suffix: str


def listed(folder: str) -> tuple[list[File], bool]:
    """The files below the folder, hidden ones left out, at most MOST; and whether there are more.

    Raises:
        ValueError: there is no such folder, or nothing in it.
    """
    root = storage.absolute(folder).rstrip("/")
    try:
        infos = list(islice(storage.list_files(root), MOST + 1))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"init: there is no folder {folder}") from None
    paths = [(info.uri, info.uri[len(root) + 1 :]) for info in infos[:MOST]]
    files = [_file(uri, path) for uri, path in paths if not any(one.startswith(".") for one in path.split("/"))]
    if not files:
        raise ValueError(f"init: there are no files below {folder}")
    return _sniffed(files), len(infos) > MOST


def spread(items: Sequence[ItemT], count: int) -> list[ItemT]:
    """At most `count` of the items, evenly spread over them."""
    if len(items) <= count:
        return list(items)
    return [items[number * (len(items) - 1) // (count - 1)] for number in range(count)]


def _file(uri: str, path: str) -> File:
    *folders, name = path.split("/")
    for kind, suffixes in _KINDS.items():
        for suffix in suffixes:
            if name.lower().endswith(suffix) and len(name) > len(suffix):
                return File(uri, path, kind, tuple(folders), name[: -len(suffix)], name[-len(suffix) :])
    return File(uri, path, "other", tuple(folders), name, "")


def _sniffed(files: list[File]) -> list[File]:
    """Files without a known suffix are DICOM where the first ones of their folder are."""
    unknown: dict[tuple[str, ...], list[File]] = defaultdict(list)
    for file in files:
        if file.kind == "other" and not file.stem.lower().endswith(_NO_DATA):
            unknown[file.folders].append(file)
    dicom: set[str] = set()
    for of_folder in unknown.values():
        if any(_is_dicom(file.uri) for file in spread(of_folder, _SNIFFED)):
            dicom.update(file.path for file in of_folder)
    return [
        File(one.uri, one.path, "dicom", one.folders, one.stem, one.suffix) if one.path in dicom else one
        for one in files
    ]


def _is_dicom(uri: str) -> bool:
    try:
        return storage.read(uri, _PREAMBLE_BYTES)[128:] == b"DICM"
    except OSError:
        return False
