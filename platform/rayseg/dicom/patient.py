"""Patient and study of what is written about a series: copied from the source as they are, or refused by name.

Nothing is mended and nothing left out, be it malformed: a segmentation is filed where its images are only where it says
of the patient what they say. The text goes from the source's character set to UTF-8.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from rayseg.records import Reason, Reject

# Of the modules Patient, Patient Study and General Study (PS3.3 C.7.1.1, C.7.2.2, C.7.2.1). Slices of a series say the
# same of their patient.
PATIENT = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
)
STUDY = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDescription")
TYPE_2 = (  # present, and empty where the source does not say
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_ASCII_ONLY = {"", "ISO_IR 6", "ISO 2022 IR 6"}  # what a data set without SpecificCharacterSet is in (PS3.5 6.1.2.1)
_UTF_8 = "ISO_IR 192"
_ESCAPE = "\x1b"
_DELIMITERS = {False: TEXT_VR_DELIMS, True: PN_DELIMS | {ord("=")}}  # after which the first set is in use again
_NO_LETTER = "\ufffd"  # what decoders put in place of what they cannot read


@dataclass(frozen=True)
class Subject:
    """Values by keyword, encoded, without padding; those that the source lacks or leaves empty are not among them."""

    values: Mapping[str, bytes] = field(repr=False)
    # UTF-8; or none, where the source has letters outside ASCII and does not say of which set: its bytes are kept.
    character_set: str | None = _UTF_8


def read(dataset: Dataset) -> Subject | Reject:
    """Of one object; MISSING_ATTRIBUTE, naming it, where a value cannot be read or the patient has several."""
    character_sets = _character_sets(dataset)
    values: dict[str, bytes] = {}
    unsaid = False
    for keyword in (*PATIENT, *STUDY):
        text = _text(dataset, keyword, character_sets)
        if text is None or _NO_LETTER in text or (keyword in PATIENT and "\\" in text):
            return Reject(Reason.MISSING_ATTRIBUTE, keyword)
        if not text:
            continue
        if _ASCII_ONLY.issuperset(character_sets) and not _is_plain(text.encode()):
            unsaid = True
        values[keyword] = text.encode()
    if not unsaid:
        return Subject(values)
    try:  # pydicom and this module take bytes of an unsaid set for Latin-1, which gives the same bytes back
        return Subject({keyword: value.decode().encode("latin-1") for keyword, value in values.items()}, None)
    except UnicodeEncodeError:  # of a data set that was made in memory
        return Reject(Reason.MISSING_ATTRIBUTE, "SpecificCharacterSet")


def of_series(datasets: Iterable[Dataset]) -> Subject | Reject:
    """Of all slices: SERIES_MIXED, naming it, where they contradict each other about their patient; else as `read`.

    Of the study the first slice that says something counts.
    """
    whole: dict[str, bytes] = {}
    character_set: str | None = _UTF_8
    seen: set[tuple[Any, ...]] = set()
    for dataset in datasets:
        said = tuple(_plain(dataset.get_item(keyword)) for keyword in ("SpecificCharacterSet", *PATIENT, *STUDY))
        if said in seen:
            continue
        seen.add(said)
        subject = read(dataset)
        if isinstance(subject, Reject):
            return subject
        for keyword, value in subject.values.items():
            if whole.setdefault(keyword, value) != value and keyword in PATIENT:
                return Reject(Reason.SERIES_MIXED, f"{keyword} differs within the series")
        character_set = character_set and subject.character_set
    if character_set is None and len(seen) > 1 and not all(value.isascii() for value in whole.values()):
        return Reject(Reason.SERIES_MIXED, "SpecificCharacterSet differs within the series")
    return Subject(whole, character_set)


def write(subject: Subject, target: Dataset) -> None:
    """Puts the values into an object whose own text is ASCII or UTF-8."""
    if subject.character_set is None:
        target.pop("SpecificCharacterSet", None)
    else:
        target.SpecificCharacterSet = subject.character_set
    for keyword in (*PATIENT, *STUDY):
        value = subject.values.get(keyword, b"")
        if value or keyword in TYPE_2:
            padded, tag = value + b" " * (len(value) % 2), Tag(tag_for_keyword(keyword) or 0)
            # Raw: pydicom refuses malformed numbers, and checks others.
            target[tag] = RawDataElement(tag, dictionary_VR(keyword), len(padded), padded, 0, False, True)
        else:
            target.pop(keyword, None)


def _character_sets(dataset: Dataset) -> list[str]:
    value = dataset.get("SpecificCharacterSet") or ""
    return [str(one).strip() for one in (value if isinstance(value, MultiValue | list) else [value])]


def _text(dataset: Dataset, keyword: str, character_sets: Sequence[str]) -> str | None:
    """The whole value; empty where there is none, None where it is not in the data set's character sets.

    Never split before it is decoded: in GB18030 and ISO 2022 IR 87 half of a letter may look like a backslash.
    """
    element = dataset.get_item(keyword)
    if element is None or element.value is None:
        return ""
    value = element.value
    if not isinstance(value, bytes):
        text = "\\".join(map(str, value)) if isinstance(value, MultiValue | list) else str(value)
        return text.rstrip(" \0")
    if _ASCII_ONLY.issuperset(character_sets):
        return value.decode("latin-1").rstrip(" \0")
    if not python_encoding.keys() >= set(character_sets):
        return value.decode().rstrip(" \0") if _is_plain(value) else None
    try:
        text = decode_bytes(value, convert_encodings([*character_sets]), _DELIMITERS[dictionary_VR(keyword) == "PN"])
    except Exception:
        return None
    return None if _ESCAPE in text else text.rstrip(" \0")


def _is_plain(value: bytes) -> bool:
    return value.isascii() and _ESCAPE.encode() not in value


def _plain(element: Any) -> Any:
    value = None if element is None else element.value
    return value if isinstance(value, bytes) else str(value)
