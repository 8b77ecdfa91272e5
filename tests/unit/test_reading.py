"""Reading: every odd object ends as the right slice or the right reason; values as pydicom and by hand."""

import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from rayseg.data.manifest import Item, rows
from rayseg.dicom import parsing, reading
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Header, Slice, read_header, read_slice
from rayseg.records import Reason, Reject

RAMP_HW = np.arange(36 * 48, dtype=np.uint16).reshape(36, 48) * 2  # 0 to 3454: 12 bits


def data_set(words_HW: np.ndarray = RAMP_HW, **attributes: Any) -> Dataset:
    """A small CT image; keyword None leaves an attribute out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    bits = words_HW.dtype.itemsize * 8
    values = {
        "SOPClassUID": uid.CTImageStorage,
        "SOPInstanceUID": "1.2.3.1",
        "SeriesInstanceUID": "1.2.3",
        "StudyInstanceUID": "1.2",
        "PatientID": "P1",
        "Modality": "CT",
        "InstanceNumber": 7,
        "PixelSpacing": [0.5, 0.25],
        "SliceThickness": 3,
        "ImagePositionPatient": [1, 2, 3],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "Rows": words_HW.shape[0],
        "Columns": words_HW.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": attributes.get("BitsStored", bits) - 1,
        "PixelRepresentation": int(words_HW.dtype.kind == "i"),
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        **attributes,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.PixelData = words_HW.tobytes()
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    return dataset


def encoded(dataset: Dataset, syntax: str = uid.ExplicitVRLittleEndian) -> bytes:
    """The bytes of a file in an uncompressed syntax (pixel words are expected little endian and swapped here)."""
    stream = BytesIO()
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == uid.ExplicitVRBigEndian:
        words = np.frombuffer(dataset.PixelData, f"u{dataset.BitsAllocated // 8}")
        dataset.PixelData = words.byteswap().tobytes()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def slice_of(data: bytes) -> Slice:
    result = read_slice(data)
    assert isinstance(result, Slice), result
    return result


def reject_of(data: bytes) -> Reject:
    """The reject of `read_slice`; `read_header` agrees where it finds a fault."""
    result, header = read_slice(data), read_header(data)
    assert isinstance(result, Reject)
    assert isinstance(header, Header) or header == result or header.reason == Reason.NOT_DICOM
    return result


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4"])
def test_uncompressed_layouts(syntax: str, dtype: str) -> None:
    words_HW = np.random.default_rng(0).integers(-100, 100, (5, 7)).astype(dtype)
    if words_HW.dtype == np.uint32:
        words_HW &= 2**31 - 1
    result = slice_of(encoded(data_set(words_HW), syntax))
    assert np.array_equal(result.stored, words_HW)
    assert result.stored.dtype in (np.uint8, np.int16, np.uint16, np.int32)
    np.testing.assert_allclose(result.values(), words_HW.astype(np.float64) - 1024, rtol=1e-7)
    assert result.values().dtype == np.float32
    assert result.header is not None
    assert result.header.transfer_syntax_uid == syntax


def test_big_endian_words_of_8_bit_values() -> None:
    """In big endian OW two 8-bit values share a word, swapped (PS3.5 A.3); an odd count fills the last word."""
    dataset = data_set(np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8))
    dataset.PixelData = bytes([2, 1, 4, 3, 6, 5, 8, 7, 0, 9])
    dataset["PixelData"].VR = "OW"
    stream = BytesIO()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    dataset.save_as(stream, enforce_file_format=True)
    assert slice_of(stream.getvalue()).stored.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_unused_bits_are_removed_and_signs_extended() -> None:
    words_HW = np.array([[0xF001, 0x8FFF], [0x0800, 0x57FF]], np.uint16)
    unsigned = slice_of(encoded(data_set(words_HW, BitsStored=12)))
    assert unsigned.stored.tolist() == [[1, 0xFFF], [0x800, 0x7FF]]
    signed = slice_of(encoded(data_set(words_HW.view(np.int16), BitsStored=12)))
    assert signed.stored.tolist() == [[1, -1], [-2048, 2047]]
    shifted = slice_of(encoded(data_set(words_HW, BitsStored=12, HighBit=15)))
    assert shifted.stored.tolist() == [[0xF00, 0x8FF], [0x080, 0x57F]]


def test_monochrome1_is_inverted() -> None:
    words_HW = np.array([[0, 10], [4095, 100]], np.uint16)
    result = slice_of(encoded(data_set(words_HW, BitsStored=12, PhotometricInterpretation="MONOCHROME1")))
    assert result.stored.tolist() == [[4095, 4085], [0, 3995]]
    signed_HW = np.array([[-3, 0], [5, -2048]], np.int16)
    result = slice_of(encoded(data_set(signed_HW, BitsStored=12, PhotometricInterpretation="MONOCHROME1")))
    assert result.stored.tolist() == [[2, -1], [-6, 2047]]


def test_padding_becomes_the_smallest_real_value() -> None:
    words_HW = np.array([[-2000, 5], [40, -2000]], np.int16)
    result = slice_of(encoded(data_set(words_HW, PixelPaddingValue=-2000)))
    assert result.stored.tolist() == [[5, 5], [40, 5]]
    # A range, given from either end.
    for value, limit in ((-2000, -1990), (-1990, -2000)):
        words_HW = np.array([[-2000, -1995, -1990], [-1989, 7, 3]], np.int16)
        dataset = data_set(words_HW, PixelPaddingValue=value, PixelPaddingRangeLimit=limit)
        assert slice_of(encoded(dataset)).stored.tolist() == [[-1989, -1989, -1989], [-1989, 7, 3]]
    # Outside the stored bits: the word 0xF830 (-2000) among unsigned 12-bit values.
    words_HW = np.array([[0xF830, 9], [0x830, 12]], np.uint16)
    result = slice_of(encoded(data_set(words_HW, BitsStored=12, PixelPaddingValue=0xF830)))
    assert result.stored.tolist() == [[9, 9], [0x830, 12]]
    # Nothing but padding, and MONOCHROME1, where the smallest value is the darkest after inversion.
    words_HW = np.full((2, 2), 7, np.uint16)
    assert slice_of(encoded(data_set(words_HW, PixelPaddingValue=7))).stored.tolist() == [[7, 7], [7, 7]]
    words_HW = np.array([[0, 1], [2, 3]], np.uint8)
    dataset = data_set(words_HW, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1")
    assert slice_of(encoded(dataset)).stored.tolist() == [[252, 254], [253, 252]]


def test_header_and_geometry() -> None:
    header = read_header(encoded(data_set(FrameOfReferenceUID="1.9")))
    assert isinstance(header, Header)
    assert header == Header(
        sop_class_uid=uid.CTImageStorage,
        sop_instance_uid="1.2.3.1",
        series_instance_uid="1.2.3",
        study_instance_uid="1.2",
        patient_id="P1",
        frame_of_reference_uid="1.9",
        modality="CT",
        transfer_syntax_uid=uid.ExplicitVRLittleEndian,
        instance_number=7,
        geometry=reading.Geometry(36, 48, (0.5, 0.25), 3.0, (1.0, 2.0, 3.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)),
    )


def test_a_patient_is_told_by_id_and_issuer() -> None:
    """Encoded by pydicom; `rows` keeps neither."""

    def patient_key(group: str | None = None, **attributes: Any) -> str:
        data = encoded(data_set(**attributes))
        (made,) = rows(Item("u", "u", len(data), [], group), data, Pseudonyms(b"key"))
        assert not {value for value in attributes.values() if value} & set(map(str, made.values()))
        return str(made["patient_key"])

    one = patient_key(PatientID="ab12")
    assert one == patient_key(PatientID="AB12 ") == patient_key(PatientID=" aB12", IssuerOfPatientID="  ")
    of_north = patient_key(PatientID="ab12", IssuerOfPatientID="North")
    assert of_north == patient_key(PatientID="AB12", IssuerOfPatientID="NORTH ")
    latin = {"SpecificCharacterSet": "ISO_IR 100", "IssuerOfPatientID": "Süd"}
    of_south = patient_key(PatientID="ab12", **latin)
    assert of_south == patient_key(PatientID="ab12", **(latin | {"SpecificCharacterSet": "ISO_IR 192"}))
    nobody = [
        patient_key(PatientID=empty, StudyInstanceUID=study) for empty in (None, "  ") for study in ("1.2", "1.3")
    ]
    assert nobody[:2] == nobody[2:], "without an ID the study is the patient"
    assert len({one, of_north, of_south, *nobody}) == 5
    grouped = {patient_key("Group", PatientID=name, IssuerOfPatientID=name) for name in ("x", "y")}
    assert grouped == {Pseudonyms(b"key").key("patient", "Group")}, "the layout's word counts alone, as it stands"


def test_missing_and_unusable_optional_attributes_are_none() -> None:
    dataset = data_set(
        SOPClassUID=uid.MRImageStorage,
        **dict.fromkeys(("PatientID", "Modality", "InstanceNumber", "PixelSpacing", "SliceThickness", "HighBit")),
        **dict.fromkeys(("ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "SamplesPerPixel")),
        **dict.fromkeys(("PhotometricInterpretation", "PixelRepresentation")),
        ImageOrientationPatient=[1, 0, 0, 1, 0, 0],
    )
    result = slice_of(encoded(dataset))
    assert (result.rescale_slope, result.rescale_intercept) == (1.0, 0.0)
    assert np.array_equal(result.stored, RAMP_HW)
    assert result.header is not None
    assert result.header.geometry == reading.Geometry(36, 48)
    assert (result.header.patient_id, result.header.modality, result.header.instance_number) == ("", "", None)


def test_a_class_is_not_needed_to_read() -> None:
    """What is no source image is told by the file meta information, too; a CT needs its intercept either way."""
    dataset = data_set(SOPClassUID=None)
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.1"
    stream = BytesIO()
    dataset.save_as(stream, implicit_vr=False, little_endian=True)
    bare = slice_of(stream.getvalue())
    assert np.array_equal(bare.stored, RAMP_HW)
    assert bare.header is not None
    assert bare.header.sop_class_uid == ""
    del dataset.RescaleIntercept
    stream = BytesIO()
    dataset.save_as(stream, implicit_vr=False, little_endian=True)
    assert reject_of(stream.getvalue()) == Reject(Reason.MISSING_ATTRIBUTE, "RescaleIntercept")
    dataset.file_meta.MediaStorageSOPClassUID = uid.SegmentationStorage
    dataset.preamble = bytes(128)
    stream = BytesIO()
    dataset.save_as(stream)
    assert reject_of(stream.getvalue()).reason == Reason.UNSUPPORTED_SOP_CLASS


@pytest.mark.parametrize("spacing", ["0\\0.5", "-1\\1", "1", "1\\2\\3", "nan\\1", "a\\b", ""])
def test_unusable_spacing_is_none(spacing: str) -> None:
    data = encoded(data_set(PixelSpacing=None))
    dataset = pydicom.dcmread(BytesIO(data))
    dataset.add(pydicom.DataElement(0x00280030, "LO", spacing))  # LO: pydicom writes no such decimal string
    header = read_header(encoded(dataset, uid.ImplicitVRLittleEndian))
    assert isinstance(header, Header)
    assert header.geometry.pixel_spacing_mm is None


def test_patient_id_follows_its_character_set() -> None:
    for charset in ("ISO_IR 100", "ISO_IR 192"):
        header = read_header(encoded(data_set(SpecificCharacterSet=charset, PatientID="Müller-1")))
        assert isinstance(header, Header)
        assert header.patient_id == "Müller-1"


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_no_preamble_and_no_meta_information(syntax: str) -> None:
    data = encoded(data_set(), syntax)
    meta_bytes = 144 + int.from_bytes(data[140:144], "little")
    assert np.array_equal(slice_of(data[132:]).stored, RAMP_HW)
    bare = slice_of(data[meta_bytes:])
    assert np.array_equal(bare.stored, RAMP_HW)
    assert bare.header is not None
    assert bare.header.transfer_syntax_uid == syntax


def compressed(syntax: str, dataset: Dataset | None = None) -> bytes:
    dataset = dataset or data_set(BitsStored=12)
    dataset.SOPClassUID = uid.CTImageStorage
    dataset.compress(syntax, generate_instance_uid=False)
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("syntax", "lowest"),  # JPEG-LS codes no signs
    [
        (uid.RLELossless, 0),
        (uid.RLELossless, -2000),
        (uid.JPEGLSLossless, 0),
        (uid.JPEG2000Lossless, 0),
        (uid.JPEG2000Lossless, -2000),
    ],
)
def test_lossless_compression(syntax: str, lowest: int) -> None:
    words_HW = RAMP_HW.astype(np.int16) + np.int16(lowest) if lowest else RAMP_HW
    result = slice_of(compressed(syntax, data_set(words_HW, BitsStored=12)))
    assert np.array_equal(result.stored, words_HW)


def test_several_fragments_make_one_frame() -> None:
    data = compressed(uid.JPEG2000Lossless)
    dataset = pydicom.dcmread(BytesIO(data))
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame], fragments_per_frame=3)
    stream = BytesIO()
    dataset.save_as(stream)
    assert np.array_equal(slice_of(stream.getvalue()).stored, RAMP_HW)


# (what is wrong, how the object is made, reason, detail's beginning)
WRONG: list[tuple[str, Callable[[], bytes], Reason, str]] = [
    ("nothing", lambda: b"", Reason.EMPTY_OBJECT, ""),
    ("text", lambda: b"this is a text file" * 99, Reason.NOT_DICOM, ""),
    ("zeros", lambda: bytes(4096), Reason.NOT_DICOM, ""),
    ("cut header", lambda: encoded(data_set())[:700], Reason.TRUNCATED, ""),
    ("cut pixels", lambda: encoded(data_set())[:-1], Reason.TRUNCATED, "PixelData"),
    ("short pixels", lambda: encoded(data_set(Rows=37)), Reason.TRUNCATED, "PixelData"),
    ("cut frame", lambda: compressed(uid.RLELossless)[:-40], Reason.TRUNCATED, "PixelData"),
    ("no end of frames", lambda: compressed(uid.RLELossless)[:-8], Reason.TRUNCATED, "PixelData"),
    ("bad deflate", lambda: spoiled_deflate(), Reason.CORRUPT, "the deflated"),
    ("structure set", lambda: without_pixels(), Reason.NO_PIXELS, ""),
    ("dose", lambda: encoded(data_set(SOPClassUID=uid.RTDoseStorage)), Reason.UNSUPPORTED_SOP_CLASS, "RT Dose"),
    ("video", lambda: relabelled(uid.MPEG2MPML), Reason.UNSUPPORTED_TRANSFER_SYNTAX, "MPEG2"),
    ("odd syntax", lambda: relabelled("1.2.3.4.5"), Reason.UNSUPPORTED_TRANSFER_SYNTAX, "not a registered one"),
    ("two samples", lambda: encoded(data_set(SamplesPerPixel=2)), Reason.UNSUPPORTED_PIXELS, "SamplesPerPixel"),
    (
        "grey of three",
        lambda: encoded(data_set(SamplesPerPixel=3)),
        Reason.UNSUPPORTED_PIXELS,
        "PhotometricInterpretation",
    ),
    (
        "palette without colours",
        lambda: encoded(data_set(PhotometricInterpretation="PALETTE COLOR")),
        Reason.MISSING_ATTRIBUTE,
        "RedPaletteColorLookupTableDescriptor",
    ),
    (
        "odd width",
        lambda: encoded(data_set(BitsAllocated=12, BitsStored=12)),
        Reason.UNSUPPORTED_PIXELS,
        "BitsAllocated",
    ),
    ("more bits", lambda: encoded(data_set(BitsStored=17)), Reason.UNSUPPORTED_PIXELS, "BitsStored"),
    (
        "look-up table",
        lambda: encoded(data_set(ModalityLUTSequence=[without_table()])),
        Reason.UNSUPPORTED_PIXELS,
        "Mod",
    ),
    (
        "wide values",
        lambda: encoded(data_set(np.full((2, 2), 2**31, np.uint32))),
        Reason.UNSUPPORTED_PIXELS,
        "PixelData",
    ),
    ("frames", lambda: encoded(data_set(NumberOfFrames=2)), Reason.UNSUPPORTED_MULTIFRAME, "NumberOfFrames"),
    (
        "enhanced without rescale",
        lambda: encoded(data_set(SOPClassUID=uid.EnhancedCTImageStorage, RescaleIntercept=None)),
        Reason.MISSING_ATTRIBUTE,
        "RescaleIntercept",
    ),
    ("noise", lambda: with_frame(uid.JPEG2000Lossless, b"\1" * 99), Reason.DECODE_FAILED, "PixelData: no image header"),
    ("cut codestream", lambda: cut_codestream(), Reason.DECODE_FAILED, "JPEG 2000"),
    ("rle noise", lambda: with_frame(uid.RLELossless, b"\1" * 99), Reason.DECODE_FAILED, "PixelData: not as many RLE"),
    (
        "wide frame",
        lambda: compressed_for_other_size(),
        Reason.DECODE_FAILED,
        "PixelData: the codestream has not the size",
    ),
    ("bomb", lambda: encoded(data_set(Rows=65535, Columns=65535)), Reason.TOO_LARGE, "Rows"),
    ("many frames", lambda: encoded(data_set(NumberOfFrames=10**9)), Reason.TOO_LARGE, "NumberOfFrames"),
    ("many scans", lambda: with_frame(uid.JPEGBaseline8Bit, scans(65)), Reason.TOO_LARGE, "PixelData: scans"),
    ("many tiles", lambda: with_frame(uid.JPEG2000Lossless, tiled(1)), Reason.TOO_LARGE, "PixelData: tiles"),
    (
        "more components",
        lambda: with_frame(uid.JPEG2000Lossless, tiled(48, 99)),
        Reason.DECODE_FAILED,
        "PixelData: the c",
    ),
    *(
        (keyword, lambda keyword=keyword: encoded(data_set(**{keyword: None})), Reason.MISSING_ATTRIBUTE, keyword)
        for keyword in ("Rows", "Columns", "BitsAllocated", "SeriesInstanceUID", "StudyInstanceUID", "RescaleIntercept")
    ),
    ("no rows", lambda: encoded(data_set(Rows=0)), Reason.MISSING_ATTRIBUTE, "Rows"),
    ("zero slope", lambda: encoded(data_set(RescaleSlope=0)), Reason.MISSING_ATTRIBUTE, "RescaleSlope"),
]


def relabelled(syntax: str) -> bytes:
    """An object whose meta information names another transfer syntax."""
    data = encoded(data_set())
    padded = syntax.encode().ljust(len(syntax) + len(syntax) % 2, b"\0")
    old = b"\x02\x00\x10\x00UI\x14\x00" + uid.ExplicitVRLittleEndian.encode() + b"\0"
    assert old in data
    return data.replace(old, b"\x02\x00\x10\x00UI" + len(padded).to_bytes(2, "little") + padded)


def with_frame(syntax: str, frame: bytes) -> bytes:
    dataset = data_set()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def cut_codestream() -> bytes:
    value = pydicom.dcmread(BytesIO(compressed(uid.JPEG2000Lossless))).PixelData
    return with_frame(uid.JPEG2000Lossless, pydicom.encaps.get_frame(value, 0, number_of_frames=1)[:120])


def scans(count: int) -> bytes:
    """A JPEG of 36 x 48 with so many scans that hold nothing (ITU-T T.81 annex B)."""
    start_of_frame = b"\xff\xc2\0\x0b\x08" + (36).to_bytes(2, "big") + (48).to_bytes(2, "big") + b"\1\1\x11\0"
    return b"\xff\xd8" + start_of_frame + b"\xff\xda\0\x08\1\1\0\0\0\0" * count + b"\xff\xd9"


def tiled(side: int, components: int = 1) -> bytes:
    """The start of a JPEG 2000 codestream of 36 rows and 48 columns in square tiles (ISO 15444-1 A.5.1)."""
    size = struct.pack(">HHH8LH", 0xFF51, 41, 0, 48, 36, 0, 0, side, side, 0, 0, components)
    return b"\xff\x4f" + size + b"\x0f\1\1" * components + b"\xff\xd9"


def compressed_for_other_size() -> bytes:
    dataset = pydicom.dcmread(BytesIO(compressed(uid.JPEG2000Lossless)))
    dataset.Rows, dataset.Columns = 48, 36
    stream = BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def without_table() -> Dataset:
    item = Dataset()
    item.ModalityLUTType = "US"
    return item


def without_pixels() -> bytes:
    dataset = data_set(SOPClassUID=uid.RTStructureSetStorage)
    del dataset.PixelData
    return encoded(dataset)


def spoiled_deflate() -> bytes:
    data = encoded(data_set(), uid.DeflatedExplicitVRLittleEndian)
    start = 144 + int.from_bytes(data[140:144], "little")
    return data[:start] + b"\xff" * 60


@pytest.mark.parametrize(("make", "reason", "detail"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_objects(make: Callable[[], bytes], reason: Reason, detail: str) -> None:
    result = reject_of(make())
    assert result.reason == reason, result
    assert result.detail.startswith(detail)


def test_deflated_bomb_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(data_set(), uid.DeflatedExplicitVRLittleEndian)
    start = 144 + int.from_bytes(data[140:144], "little")
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    body = deflater.compress(bytes(1_000_000)) + deflater.flush()
    monkeypatch.setattr(parsing, "_MAX_INFLATED_BYTES", 100_000)
    assert reject_of(data[:start] + body).reason == Reason.TOO_LARGE


def test_unforeseen_errors_name_their_type_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("SECRET")

    monkeypatch.setattr(reading, "_open", fail)
    assert read_slice(encoded(data_set())) == Reject(Reason.INTERNAL, "ZeroDivisionError")
    assert read_header(encoded(data_set())) == Reject(Reason.INTERNAL, "ZeroDivisionError")


def test_header_of_a_prefix() -> None:
    data = encoded(data_set(np.zeros((256, 256), np.uint16)))
    whole = read_header(data)
    assert isinstance(whole, Header)
    assert read_header(data[:4096]) == whole
    assert read_header(data[:4096], object_bytes=len(data)) == whole
    cut = read_header(data[:4096], object_bytes=len(data) - 2)
    assert isinstance(cut, Reject)
    assert cut.reason == Reason.TRUNCATED
    deflated = encoded(data_set(np.zeros((256, 256), np.uint16)), uid.DeflatedExplicitVRLittleEndian)
    assert isinstance(read_header(deflated[: len(deflated) - 20]), Header)


def test_no_cut_of_a_header_passes_for_whole() -> None:
    data = encoded(data_set(SOPClassUID=uid.MRImageStorage))
    pixel_data = data.index(b"\xe0\x7f\x10\x00OW")
    for size in range(pixel_data):
        assert isinstance(read_header(data[:size]), Reject), size


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=400), st.sampled_from([b"", bytes(128) + b"DICM", b"\x08\x00\x16\x00UI", b"\x89PNG\r\n\x1a\n"])
)
def test_any_bytes_raise_nothing(tail: bytes, start: bytes) -> None:
    assert isinstance(read_slice(start + tail), Slice | Reject)
    assert isinstance(read_header(start + tail), Header | Reject)


def test_nothing_that_identifies_is_told(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    """Malformed identities, spoiled in many places: no message, warning, detail or repr holds them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = data_set(
            PatientID="SECRET-ID", PatientName="SECRET^NAME", SOPInstanceUID="1.02.SECRET", BitsStored=12
        )
        dataset.add_new(0x00101010, "AS", "SECRET-AGE-TOO-LONG")
        with pydicom.config.disable_value_validation():
            data = compressed(uid.JPEG2000Lossless, dataset)
    caplog.set_level(logging.DEBUG)
    told = []
    for at in range(132, len(data), 3):
        result = read_slice(data[:at] + b"\xff\x00" + data[at + 2 :])
        told.append(str(result) if isinstance(result, Reject) else repr(result.header))
        told.append(str(read_slice(data[:at])))
    captured = capfd.readouterr()
    everything = "".join((*told, caplog.text, *(str(w.message) for w in recwarn), captured.out, captured.err))
    assert "SECRET" not in everything
    assert not [record for record in caplog.records if record.name.startswith("pydicom")]


def image_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


GREY_HW = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12


@pytest.mark.parametrize(
    ("data", "expected_HW"),
    [
        (image_bytes(Image.fromarray(GREY_HW), "PNG"), GREY_HW),
        (image_bytes(Image.fromarray(GREY_HW.astype(np.uint16) * 257), "PNG"), GREY_HW.astype(np.uint16) * 257),
        (image_bytes(Image.fromarray(np.stack([GREY_HW] * 3, -1)), "PNG"), GREY_HW),
        (image_bytes(Image.fromarray(GREY_HW).convert("LA"), "PNG"), GREY_HW),
        (image_bytes(Image.fromarray(GREY_HW > 90), "PNG"), (GREY_HW > 90) * np.uint8(255)),
        (image_bytes(Image.fromarray(GREY_HW).quantize(), "PNG"), GREY_HW),
        (image_bytes(Image.fromarray(np.full((8, 8), 77, np.uint8)), "JPEG"), np.full((8, 8), 77, np.uint8)),
        (image_bytes(Image.fromarray(GREY_HW), "TIFF"), GREY_HW),
        (image_bytes(Image.fromarray(GREY_HW.astype(np.uint16) * 9), "TIFF"), GREY_HW.astype(np.uint16) * 9),
    ],
    ids=["grey", "16 bit", "rgb", "alpha", "bitmap", "palette", "jpeg", "tiff", "tiff 16 bit"],
)
def test_image_files(data: bytes, expected_HW: np.ndarray) -> None:
    result = slice_of(data)
    assert result.header is None
    assert result.stored.dtype == expected_HW.dtype
    assert np.array_equal(result.stored, expected_HW)
    assert np.array_equal(result.values(), expected_HW.astype(np.float32))
    header = read_header(data)
    assert isinstance(header, Reject)
    assert header.reason == Reason.NOT_DICOM


def test_colours_of_image_files_become_their_luminance() -> None:
    """As Pillow's own conversion, which rounds a little differently."""
    colour = Image.fromarray(np.random.default_rng(3).integers(0, 256, (9, 7, 3), np.uint8))
    for kind in ("PNG", "TIFF"):
        stored = slice_of(image_bytes(colour, kind)).stored
        assert stored.dtype == np.uint8
        np.testing.assert_allclose(stored.astype(int), np.asarray(colour.convert("L")).astype(int), atol=1)


def test_wrong_image_files() -> None:
    pages = image_bytes(Image.fromarray(GREY_HW), "TIFF", save_all=True, append_images=[Image.fromarray(GREY_HW)])
    assert reject_of(pages).reason == Reason.UNSUPPORTED_MULTIFRAME
    assert reject_of(image_bytes(Image.fromarray(GREY_HW), "PNG")[:-30]).reason == Reason.NOT_AN_IMAGE
    several = image_bytes(Image.fromarray(GREY_HW).convert("LAB"), "TIFF")
    assert reject_of(several).reason == Reason.UNSUPPORTED_PIXELS


def test_large_image_file_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_PIXELS", 19)
    assert reject_of(image_bytes(Image.fromarray(GREY_HW), "PNG")).reason == Reason.TOO_LARGE


def test_dicom_with_a_tiff_preamble_is_dicom() -> None:
    data = encoded(data_set())
    assert np.array_equal(slice_of(b"II*\0" + data[4:]).stored, RAMP_HW)
