"""Patient and study go into segmentations and reports as they stand in the source; dcmtk, not pydicom, is the judge."""

import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from rayseg.dicom import report, segmentation
from rayseg.dicom.patient import PATIENT, STUDY
from rayseg.records import Reason, Reject
from tests.unit.test_segmentation import LABELS, as_bytes, source

MASK_HW = np.zeros((12, 10), np.uint8)
needs_dcmtk = pytest.mark.skipif(shutil.which("dcmdump") is None, reason="no dcmtk: apt-get install dcmtk")


def with_bytes(values: dict[str, bytes], character_set: list[str] | None, **changes: Any) -> Dataset:
    """A slice whose values are these bytes, whatever pydicom thinks of them."""
    dataset = source(
        changes.pop("number", 1), [0, 0, 5.0 * changes.pop("place", 0)], SpecificCharacterSet=character_set
    )
    if character_set is None:
        dataset.PatientName = "Nobody"
    for keyword, value in values.items():
        tag, padded = Tag(tag_for_keyword(keyword)), value + b" " * (len(value) % 2)
        dataset[tag] = RawDataElement(tag, dictionary_VR(keyword), len(padded), padded, 0, False, True)
    return dataset


def encoded(*datasets: Dataset) -> bytes | Reject:
    sources = [as_bytes(dataset) for dataset in datasets]
    return segmentation.encode(sources, [MASK_HW] * len(sources), LABELS, "m", "1", "d")


def of_dcmtk(data: bytes, path: Path) -> dict[str, str]:
    """Values of the attributes in UTF-8."""
    path.write_bytes(data)
    tags = [Tag(tag_for_keyword(keyword)) for keyword in (*PATIENT, *STUDY)]
    wanted = [part for tag in tags for part in ("+P", f"{tag.group:04x},{tag.element:04x}")]
    told = subprocess.run(
        ["dcmdump", "+U8", "+L", *wanted, path], capture_output=True, text=True, timeout=60, check=True
    )
    found = re.findall(r"^\(\S+\) \w\w \[(.*?) *\] +# .* (\w+)$", told.stdout, re.M)
    return {keyword: value for value, keyword in found}


NAMES = {  # PS3.5 annexes H to K, and others made for this
    "Latin-1": (["ISO_IR 100"], "Buc^Jérôme".encode("latin-1")),
    "Cyrillic": (["ISO_IR 144"], b"\xbb\xee\xda\x63\x65\xdc\xd1\x79\x70\xd3"),
    "Greek": (["ISO_IR 126"], "Διονυσιος".encode("iso8859-7")),
    "UTF-8": (["ISO_IR 192"], "Wang^XiaoDong=王^小东=".encode()),
    "GB18030": (["GB18030"], "Wang^XiaoDong=王^小东".encode("gb18030")),
    # The second byte of 昞 in GB18030 and that of ー in JIS is that of a backslash.
    "GB18030 with a byte like a backslash": (["GB18030"], "Li^Bing=李^昞".encode("gb18030")),
    "Korean": (
        ["", "ISO 2022 IR 149"],
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
    ),
    "two single-byte sets": (["ISO 2022 IR 100", "ISO 2022 IR 144"], b"J\xe9r^\x1b-L\xbb\xee\xda"),
}


@needs_dcmtk
@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_any_character_set_is_the_same_name(name: str, tmp_path: Path) -> None:
    character_set, value = NAMES[name]
    text = {"PatientName": value} | ({} if b"=" in value else {"StudyDescription": value.replace(b"^", b" ")})
    dataset = with_bytes(text, character_set)
    data = encoded(dataset)
    assert isinstance(data, bytes), data
    told = report.encode(data, LABELS, [report.Measured(1.0, None)] * 2, "m", "1")
    assert isinstance(told, bytes), told
    expected = of_dcmtk(as_bytes(dataset), tmp_path / "source.dcm")
    assert len(expected["PatientName"]) > 4
    assert not expected["PatientName"].isascii()
    for made in (data, told):
        found = of_dcmtk(made, tmp_path / "made.dcm")
        assert {keyword: found[keyword] for keyword in text} == {keyword: expected[keyword] for keyword in text}


@needs_dcmtk
def test_a_japanese_name_is_the_same_name(tmp_path: Path) -> None:
    """PS3.5 H.3.1, where bytes of letters look like a caret and, of the ID, a backslash.

    dcmtk's own library of character sets has none of these.
    """
    value = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"
    dataset = with_bytes({"PatientName": value, "PatientID": b"\x1b$B!\\\x1b(B"}, ["", "ISO 2022 IR 87"])
    data = encoded(dataset)
    assert isinstance(data, bytes), data
    found = of_dcmtk(data, tmp_path / "made.dcm")
    assert found["PatientName"] == "Yamada^Tarou=山田^太郎=やまだ^たろう"
    assert found["PatientID"] == "\uff0b"


@needs_dcmtk
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientSex", b"Female"),
        ("PatientSex", b"U"),
        ("PatientBirthDate", b"1950-01-02"),
        ("PatientBirthDate", b"19500231"),
        ("PatientAge", b"71"),
        ("PatientWeight", b"70,5"),
        ("PatientSize", b"1m80"),
        ("PatientID", b"P" * 70),
        ("PatientName", b"N" * 80),
        ("IssuerOfPatientID", b"a hospital"),
        ("StudyDate", b"2021.03.04"),
        ("StudyTime", b"5 o'clock"),
        ("StudyDescription", b"HEAD\\NECK"),
        ("AccessionNumber", b"an accession number of over sixteen"),
        ("ReferringPhysicianName", b"Doe^J\\Roe^R"),
    ],
)
def test_what_is_malformed_is_copied_too(keyword: str, value: bytes, tmp_path: Path) -> None:
    data = encoded(with_bytes({keyword: value}, ["ISO_IR 100"]))
    assert isinstance(data, bytes), data
    told = report.encode(data, LABELS, [report.Measured(1.0, None)] * 2, "m", "1")
    assert isinstance(told, bytes), told
    for made in (data, told):
        assert of_dcmtk(made, tmp_path / "made.dcm")[keyword] == value.decode()
        others = set(of_dcmtk(made, tmp_path / "made.dcm")) - {keyword}
        assert {"PatientName", "PatientID", "StudyID"} - {keyword} <= others


@pytest.mark.parametrize("keyword", ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge"])
def test_a_patient_who_is_two_is_refused(keyword: str) -> None:
    two = encoded(with_bytes({keyword: b"A\\B"}, ["ISO_IR 100"]))
    assert two == Reject(Reason.MISSING_ATTRIBUTE, keyword)
    others = encoded(with_bytes({keyword: b"A"}, None), with_bytes({keyword: b"B"}, None, number=2, place=1))
    assert others == Reject(Reason.SERIES_MIXED, f"{keyword} differs within the series")


def test_a_slice_that_says_nothing_contradicts_nobody() -> None:
    data = encoded(with_bytes({"PatientAge": b""}, None), with_bytes({"PatientAge": b"071Y"}, None, number=2, place=1))
    assert isinstance(data, bytes)
    assert pydicom.dcmread(BytesIO(data)).PatientAge == "071Y"


@pytest.mark.parametrize("character_set", [["ISO_IR 192"], ["", "ISO 2022 IR 87"], ["ISO_IR 999"]])
def test_what_is_not_of_its_character_set_is_refused(character_set: list[str]) -> None:
    """Latin-1 under other names; a decoder would put question marks in its place."""
    value = b"M\xfcller^J\xf6rg" if len(character_set) == 1 else b"\x1b$)C\xfb\xf3^X"
    data = encoded(with_bytes({"PatientName": value}, character_set))
    assert data == Reject(Reason.MISSING_ATTRIBUTE, "PatientName")


@pytest.mark.parametrize("value", [b"M\xfcller^J\xf6rg", "Müller^Jörg".encode(), b"Wang=\xcd\xf5^\xd0\xa1"])
def test_bytes_of_an_unsaid_character_set_stay_the_same_bytes(value: bytes) -> None:
    data = encoded(with_bytes({"PatientName": value}, None))
    assert isinstance(data, bytes), data
    made = pydicom.dcmread(BytesIO(data))
    assert "SpecificCharacterSet" not in made
    assert made.get_item("PatientName").value.rstrip() == value
    told = report.encode(data, LABELS, [report.Measured(1.0, None)] * 2, "m", "1")
    assert isinstance(told, bytes), told
    assert pydicom.dcmread(BytesIO(told)).get_item("PatientName").value.rstrip() == value
    # The names of segments would then have no character set either.
    refused = segmentation.encode([with_bytes({"PatientName": value}, None)], [MASK_HW], ("Läsion",), "m", "1", "d")
    assert isinstance(refused, Reject)


def test_what_the_source_does_not_say_is_empty_or_absent() -> None:
    dataset = source(1, [0, 0, 0])
    for keyword in (*PATIENT, *STUDY):
        if keyword in dataset:
            del dataset[keyword]
    data = encoded(dataset)
    assert isinstance(data, bytes), data
    made = pydicom.dcmread(BytesIO(data))
    assert [made.get(keyword) for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")] == [""] * 4
    assert not {"PatientAge", "PatientSize", "PatientWeight", "IssuerOfPatientID", "StudyDescription"} & set(made.dir())
