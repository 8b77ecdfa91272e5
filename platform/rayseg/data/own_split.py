"""A split of one's own: a CSV that says of each patient, or of each file, which split it is in."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

from rayseg.data.split import LEFT_OUT, SPLITS
from rayseg.dicom.pseudonyms import Pseudonyms

_KEY = "prepare.split.given"
_SPELLED = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}


def read(data: bytes) -> tuple[Literal["patient", "file"], dict[str, str]]:
    """What the CSV names, and the split of each; raises ValueError where it is malformed."""
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{_KEY}: not a CSV file in UTF-8 ({type(error).__name__})") from None
    header = reader.fieldnames or []
    named: Literal["patient", "file"] = "patient" if "patient" in header else "file"
    if "split" not in header or named not in header:
        raise ValueError(f"{_KEY}: header patient,split or file,split expected")
    splits: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        name, split = (row[named] or "").strip(), (row["split"] or "").strip().lower()
        split = _SPELLED.get(split, split)
        if not name or split not in (*SPLITS, LEFT_OUT):
            raise ValueError(f"{_KEY}: line {number}: a {named} and one of {', '.join(SPLITS)}, {LEFT_OUT} expected")
        if splits.setdefault(name, split) != split:
            raise ValueError(f"{_KEY}: line {number} puts a {named} into a second split")
    if not splits:
        raise ValueError(f"{_KEY}: the CSV has no rows")
    return named, splits


def of_patients(patients: Iterable[str], splits: Mapping[str, str], pseudonyms: Pseudonyms) -> dict[str, str]:
    """The split of each patient key.

    Args:
        patients: keys of the manifest.
        splits: by the patient's ID, the group of the layout, or the key itself.
        pseudonyms: makes keys of the first two.

    Raises:
        ValueError: some are not named.
    """
    by_key: dict[str, str] = {}
    for name, split in splits.items():
        for key in (name, pseudonyms.key("patient", name), pseudonyms.patient(name)):
            by_key[key] = split
    return _complete(patients, by_key)


def of_files(patients: Iterable[str], files: Iterable[tuple[str, str]], splits: Mapping[str, str]) -> dict[str, str]:
    """The split of each patient key, by those of its files.

    Args:
        patients: keys of the manifest.
        files: URI and patient key of each row.
        splits: by path below the source, or its end from a folder on.

    Raises:
        ValueError: files of a patient are in several splits, or no file of some is named.
    """
    depths = sorted({name.count("/") + 1 for name in splits})
    of_patient: dict[str, set[str]] = defaultdict(set)
    for uri, patient in files:
        pieces = uri.split("/")
        for depth in depths:
            split = splits.get("/".join(pieces[-depth:]))
            if split is not None:
                of_patient[patient].add(split)
    several = sorted(key for key, names in of_patient.items() if len(names) > 1)
    if several:
        raise ValueError(
            f"{_KEY}: files of {len(several)} patients are in several splits, as those of patient {several[0]}: a "
            "patient is in one of them"
        )
    return _complete(patients, {key: next(iter(names)) for key, names in of_patient.items()})


def _complete(patients: Iterable[str], by_key: Mapping[str, str]) -> dict[str, str]:
    every = list(patients)
    missing = [key for key in every if key not in by_key]
    if missing:
        raise ValueError(
            f"{_KEY}: {len(missing)} of {len(every)} patients are in no split, as patient {missing[0]}; name them, "
            f"with {LEFT_OUT} to leave them out"
        )
    return {key: by_key[key] for key in every}
