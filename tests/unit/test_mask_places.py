"""Labels lie where they say: volumes and segmentations on grids that are turned, mirrored, cut or of other planes.

What is expected is made here by index, or by dcm2niix, SimpleITK and dcmqi, which share no code with what is tested.
"""

import json
import subprocess
import sys
from io import BytesIO
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from rayseg.data.labels import Labels
from rayseg.data.masks import truth
from rayseg.dicom.reading import Header, read_headers
from rayseg.records import MissingMask, Reason, Reject

ROWS, COLUMNS, SLICES = 12, 16, 6
SHAPE = (ROWS, COLUMNS)
SPACING_MM, STEP_MM, CORNER_MM = (0.75, 0.5), 4.0, np.array([-31.5, -20.25, 7.0])
LABELS = Labels(("a", "b"))
# No slice is another one mirrored, the first and the last two are empty.
MASK = np.zeros((SLICES, ROWS, COLUMNS), np.uint8)
MASK[1, 1:4, 2:7], MASK[2, 2:9, 3:5], MASK[2, 5:7, 9:14], MASK[3, 0, 0], MASK[3, 11, 3:16] = 1, 1, 2, 2, 1


def turned(degrees: float) -> np.ndarray:
    """Directions of rows, columns and slices, turned about the first axis."""
    angle = np.deg2rad(degrees)
    return np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]).round(6)


def series(axes: np.ndarray, step_mm: np.ndarray | None = None) -> list[Dataset]:
    """Slices of the grid of MASK; `step_mm` from one to the next leans where it is not along the third axis."""
    step_mm = axes[:, 2] * STEP_MM if step_mm is None else step_mm
    made = []
    for number in range(SLICES):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = CTImageStorage
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{number + 1}"
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.9"
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            setattr(one, keyword, "x" if keyword == "PatientID" else "")
        one.StudyDate, one.StudyTime, one.ReferringPhysicianName = "20200101", "120000", ""
        one.Modality, one.SeriesNumber, one.InstanceNumber = "CT", 1, number + 1
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.Rows, one.Columns, one.PixelSpacing, one.SliceThickness = ROWS, COLUMNS, list(SPACING_MM), STEP_MM
        one.ImagePositionPatient = [round(float(value), 6) for value in CORNER_MM + number * step_mm]
        one.ImageOrientationPatient = [float(value) for value in axes[:, :2].T.ravel()]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation, one.RescaleSlope, one.RescaleIntercept = 15, 0, 1, 0
        one.PixelData = bytes(ROWS * COLUMNS * 2)
        one["PixelData"].VR = "OW"
        made.append(one)
    return made


def saved(dataset: Dataset) -> bytes:
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def headers(sources: list[Dataset]) -> list[Header]:
    found = []
    for source in sources:
        read = read_headers(saved(source))
        assert not isinstance(read, Reject)
        found += read
    return found


AXES = turned(20)
SOURCES = series(AXES)
HEADERS = headers(SOURCES)


def read(data: bytes, of: list[Header] = HEADERS, missing_mask: MissingMask = "empty") -> list[np.ndarray | Reject]:
    shapes = [(header.geometry.rows, header.geometry.columns) for header in of]
    return [
        truth([(data, None)], shape, LABELS, header, missing_mask=missing_mask)
        for shape, header in zip(shapes, of, strict=True)
    ]


def assert_is(found: list[np.ndarray | Reject], expected: np.ndarray = MASK) -> None:
    for number, (one, wanted) in enumerate(zip(found, expected, strict=True)):
        assert isinstance(one, np.ndarray), f"slice {number}: {one}"
        assert np.array_equal(one, wanted), number


def reasons(found: list[np.ndarray | Reject]) -> list[Reason | None]:
    return [one.reason if isinstance(one, Reject) else None for one in found]


def affine_lps(axes: np.ndarray = AXES, step_mm: np.ndarray | None = None) -> np.ndarray:
    """(column, row, slice) to millimetres."""
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = axes[:, 0] * SPACING_MM[1], axes[:, 1] * SPACING_MM[0]
    affine[:3, 2] = axes[:, 2] * STEP_MM if step_mm is None else step_mm
    affine[:3, 3] = CORNER_MM
    return affine


def stored(order: tuple[int, ...], flips: tuple[bool, ...], values: np.ndarray, affine: np.ndarray) -> bytes:
    """NIfTI of values (column, row, slice) with other axes; the affine goes with them, as nibabel reorients."""
    image = nibabel.Nifti1Image(values, np.diag([-1.0, -1, 1, 1]) @ affine)
    turning = np.array([[order[axis], -1 if flips[axis] else 1] for axis in range(3)])
    return image.as_reoriented(turning).to_bytes()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_label_volume_is_of_a_series_in_whatever_order_it_is_stored(order: tuple[int, ...]) -> None:
    for flips in product([False, True], repeat=3):
        assert_is(read(stored(order, flips, MASK.transpose(2, 1, 0), affine_lps())))


def test_a_leaning_series_has_a_sheared_label_volume() -> None:
    step_mm = np.array([0.0, 0.0, 5.0])  # planes are turned by 20 degrees, and follow one another straight up
    leaning = headers(series(AXES, step_mm))
    data = stored((0, 1, 2), (True, True, False), MASK.transpose(2, 1, 0), affine_lps(step_mm=step_mm))
    assert_is(read(data, leaning))
    upright = stored((0, 1, 2), (True, True, False), MASK.transpose(2, 1, 0), affine_lps())
    assert set(reasons(read(upright, leaning))[1:5]) == {Reason.MASK_MISMATCH}


def test_a_label_volume_of_a_part_of_the_series_and_of_its_planes() -> None:
    part = MASK.transpose(2, 1, 0)[2:15, 1:10, 1:4]
    affine = affine_lps()
    affine[:3, 3] = (affine @ (2, 1, 1, 1))[:3]
    data = stored((1, 0, 2), (True, False, True), part, affine)
    expected = np.zeros_like(MASK)
    expected[1:4, 1:10, 2:15] = MASK[1:4, 1:10, 2:15]
    assert_is(read(data), expected)
    ended = [Reason.NO_MASK, None, None, None, Reason.NO_MASK, Reason.NO_MASK]
    assert reasons(read(data, missing_mask="reject")) == ended


@pytest.mark.parametrize(
    "change",
    [
        np.diag([2.0, 2, 1, 1]),  # coarser
        np.diag([1.0, 1, 0.6, 1]),  # other planes
        np.array([[1.0, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),  # half a pixel aside
        np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 1]]),  # between two planes
        np.array([[1.0, 0, 0, 400], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),  # far aside
        np.linalg.inv(affine_lps()) @ np.diag([0.5, 0.75, 4, 1.0]),  # a place that was lost
    ],
)
def test_a_label_volume_on_another_grid_is_refused_by_name(change: np.ndarray) -> None:
    data = stored((0, 1, 2), (False, False, False), MASK.transpose(2, 1, 0), affine_lps() @ change)
    assert Reason.MASK_MISMATCH in reasons(read(data))
    assert not any(isinstance(one, np.ndarray) and one.any() for one in read(data))


@pytest.mark.parametrize("name", ["label.nrrd", "label.mha", "label.nii.gz"])
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SPR", "AIL"])
def test_label_volumes_of_other_formats(tmp_path: Path, name: str, orientation: str) -> None:
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(itk_mask(), orientation), tmp_path / name)
    assert_is(read((tmp_path / name).read_bytes()))


def itk_mask() -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(MASK)
    image.SetSpacing((SPACING_MM[1], SPACING_MM[0], STEP_MM))
    image.SetOrigin(CORNER_MM.tolist())
    image.SetDirection(AXES.ravel().tolist())
    return image


def written(folder: Path, sources: list[Dataset]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, source in enumerate(sources):
        (folder / f"{number:03}.dcm").write_bytes(saved(source))
    return folder


def by_dcmqi(images: Path, labels: Path, *options: str) -> bytes:
    """The SEG that dcmqi makes of a label file."""
    code = {
        "CodeValue": "49755003",
        "CodingSchemeDesignator": "SCT",
        "CodeMeaning": "Morphologically Altered Structure",
    }
    names = {"ContentCreatorName": "a", "SeriesDescription": "b", "SeriesNumber": "3", "InstanceNumber": "1"}
    segments = [
        {
            "labelID": number,
            "SegmentLabel": name,
            "SegmentAlgorithmType": "MANUAL",
            "SegmentedPropertyCategoryCodeSequence": code,
            "SegmentedPropertyTypeCodeSequence": code,
        }
        for number, name in enumerate(LABELS.names, start=1)
    ]
    meta = labels.with_name("meta.json")
    meta.write_text(json.dumps({**names, "segmentAttributes": [segments]}))
    made = labels.with_name("seg.dcm")
    made.unlink(missing_ok=True)
    program = Path(sys.executable).with_name("itkimage2segimage")
    files = [
        "--inputImageList",
        labels,
        "--inputDICOMDirectory",
        images,
        "--outputDICOM",
        made,
        "--inputMetadata",
        meta,
    ]
    subprocess.run([program, *files, *options], check=True, capture_output=True, timeout=60)
    return made.read_bytes()


@pytest.mark.parametrize(
    ("orientation", "kind", "skip", "check"),
    [
        ("LPS", "labelmap", "0", "1"),
        ("RAS", "binary", "1", "1"),
        ("RAS", "binary", "1", "0"),  # each frame names all images
        ("LAS", "binary", "0", "0"),
        ("RPI", "labelmap", "1", "0"),
        ("PLS", "binary", "1", "1"),
        ("PSR", "binary", "1", "1"),  # frames across the images
        ("ASL", "labelmap", "0", "0"),
        ("RIP", "binary", "0", "1"),
    ],
)
def test_segmentations_that_dcmqi_makes(tmp_path: Path, orientation: str, kind: str, skip: str, check: str) -> None:
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(itk_mask(), orientation), tmp_path / "label.nrrd")
    options = ["--referencesGeometryCheck", check, "--skip", skip, "--segmentationType", kind]
    data = by_dcmqi(written(tmp_path / "images", SOURCES), tmp_path / "label.nrrd", *options)
    assert_is(read(data))


@pytest.mark.parametrize("maker", ["volume", "dcmqi", "dcmqi without a check"])
def test_labels_of_a_real_series_as_dcm2niix_stores_it(shared_data: Path, tmp_path: Path, maker: str) -> None:
    """Its rows run from below. A label is what is bright there, and what is as bright in the DICOM objects."""
    folder = shared_data / "mr-archive/Study1/12-T1post-05670"
    program = Path(sys.executable).with_name("dcm2niix")
    subprocess.run([program, "-b", "n", "-o", tmp_path, "-f", "mr", folder], check=True, capture_output=True)
    image = nibabel.load(tmp_path / "mr.nii")
    values = np.asarray(image.dataobj)
    bright = np.sort(values.ravel())[-200_000]
    values[:, :, -4:] = 0  # of four slices nothing is known: they stand in no frame
    nibabel.save(nibabel.Nifti1Image((values > bright).astype(np.uint8), image.affine), tmp_path / "label.nii.gz")
    data = (tmp_path / "label.nii.gz").read_bytes()
    if maker != "volume":
        data = by_dcmqi(folder, tmp_path / "label.nii.gz", "--referencesGeometryCheck", "01"[maker == "dcmqi"])
    sources = sorted(
        (pydicom.dcmread(path) for path in folder.glob("*.dcm")), key=lambda one: one.ImagePositionPatient[2]
    )
    expected = np.stack([source.pixel_array > bright for source in sources])
    expected[-4:] = False
    assert [bool(one.any()) for one in expected].count(False) >= 4
    assert_is(read(data, headers(sources)), expected)
