#!/bin/sh
# dcmqi 1.5.7, SEGs of tilted stacks (gantry tilt): segimage2itkimage ends with 0 and no error for both ways that a stack
# can lean. For one it writes a volume with right angles, in which the lesion of the last slice lies 9.38 mm beside its
# place; for the other it writes nothing. One would guess an error for both, as an ITK image cannot be sheared. Seen:
#
#     tilt +15: exit 0, 1 volume, last slice off by 9.38 mm
#     tilt -15: exit 0, 0 volumes
#
# Ends with 1 where that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet highdicom==0.28.2 pydicom==3.0.2 dcmqi==1.5.7 simpleitk==2.5.7
cat > "$folder/try.py" <<'PYTHON'
import math
import subprocess
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import SimpleITK
from pydicom.sr.codedict import codes

folder, seen = Path(sys.argv[1]), []
for degrees in (15, -15):
    sources = []
    for number in range(8):
        one = pydicom.Dataset()
        one.SOPClassUID, one.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"1.2.3.{degrees % 360}.{number + 1}"
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = "1.2.3", "1.2.4", "1.2.5"
        one.PatientName = one.PatientID = one.PatientBirthDate = one.PatientSex = ""
        one.StudyDate = one.StudyTime = one.StudyID = one.AccessionNumber = one.ReferringPhysicianName = ""
        one.Modality, one.Rows, one.Columns, one.SliceThickness, one.PixelSpacing = "CT", 32, 32, 5, [1, 1]
        one.ImagePositionPatient = [0, round(math.tan(math.radians(degrees)) * 5 * number, 6), 5 * number]
        one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        sources.append(one)
    masks = np.zeros((8, 32, 32), np.uint8)
    masks[:, 10, 10] = 1
    segment = highdicom.seg.SegmentDescription(
        1, "lesion", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, "MANUAL"
    )
    made = highdicom.seg.Segmentation(
        sources, masks, "BINARY", [segment], highdicom.UID(), 1, highdicom.UID(), 1, "m", "m", "1", "1"
    )
    out = folder / str(degrees)
    out.mkdir()
    made.save_as(out / "seg.dcm")
    reader = Path(sys.executable).with_name("segimage2itkimage")
    command = [reader, "--inputDICOM", out / "seg.dcm", "--outputDirectory", out]
    code = subprocess.run(command, capture_output=True).returncode
    volumes = [SimpleITK.ReadImage(str(path)) for path in sorted(out.glob("*.nrrd"))]
    told = f"tilt {degrees:+d}: exit {code}, {len(volumes)} volume{'s' * (len(volumes) != 1)}"
    for volume in volumes:
        slice_, row, column = (int(place) for place in np.argwhere(SimpleITK.GetArrayFromImage(volume))[-1])
        point = np.array(volume.TransformIndexToPhysicalPoint((column, row, slice_)))
        place = np.array(sources[-1].ImagePositionPatient, float) + [10, 10, 0]
        told += f", last slice off by {np.linalg.norm(point - place):.2f} mm"
    print(told)
    seen.append(told)
sys.exit(seen != ["tilt +15: exit 0, 1 volume, last slice off by 9.38 mm", "tilt -15: exit 0, 0 volumes"])
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
