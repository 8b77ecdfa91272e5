#!/usr/bin/env bash
# dcm2niix: the NIfTI of a CT series with a tilted gantry does not lie where its DICOM slices do.
#
# Versions: dcm2niix 1.0.20260724, pydicom 3.0.2, nibabel 5.4.2.
# A gantry tilted by 18.5 degrees; the table moves by 4.22 mm from slice to slice, which is 4.0 mm along the normal of the
# planes. A sheared affine can say this exactly: its third column is (0, 0, 4.22). dcm2niix writes, beside its corrected
# (resampled) file, the slices as they are with a third column of (0, 0, 4.0): the distance along the normal, laid along
# the table. Each slice lies 0.22 mm further off its place than the one before, 4.1 mm at the twentieth, and a label drawn
# on that file cannot be laid back upon the DICOM slices by its place.
#
# Output seen:
#   ImagePositionPatient of slice 20 minus slice 1: 80.14 mm
#   the NIfTI's affine says:                        76.00 mm
# Exits 1 where dcm2niix places the slices as the DICOM objects do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet dcm2niix==1.0.20260724 pydicom==3.0.2 nibabel==5.4.2 numpy==2.4.6
cat > "$folder/series.py" <<'PYTHON'
import math
import sys

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

tilt = math.radians(18.5)
series, study, space = generate_uid(), generate_uid(), generate_uid()
for number in range(20):
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = CTImageStorage
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = series, study, space
    one.Modality, one.Manufacturer, one.PatientID, one.PatientName = "CT", "GE MEDICAL SYSTEMS", "x", "x"
    one.StudyDate, one.StudyTime, one.SeriesNumber, one.InstanceNumber = "20200101", "120000", 1, number + 1
    one.AcquisitionNumber, one.ImageType = 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
    one.Rows = one.Columns = 64
    one.PixelSpacing, one.SliceThickness, one.GantryDetectorTilt = [2, 2], 4, 18.5
    one.ImageOrientationPatient = [1, 0, 0, 0, round(math.cos(tilt), 7), round(-math.sin(tilt), 7)]
    one.ImagePositionPatient = [-64, -64, round(number * 4 / math.cos(tilt), 7)]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit, one.PixelRepresentation, one.RescaleSlope, one.RescaleIntercept = 15, 1, 1, 0
    one.PixelData = np.full((64, 64), number, "<i2").tobytes()
    one.save_as(f"{sys.argv[1]}/{number:03}.dcm", enforce_file_format=True)
PYTHON
cat > "$folder/check.py" <<'PYTHON'
import math
import sys

import nibabel

image = nibabel.load(sys.argv[1])
steps = image.shape[2] - 1
said = abs(float((image.affine @ [0, 0, steps, 1] - image.affine @ [0, 0, 0, 1])[2]))
true = steps * 4 / math.cos(math.radians(18.5))
print(f"ImagePositionPatient of slice 20 minus slice 1: {true:.2f} mm")
print(f"the NIfTI's affine says:                        {said:.2f} mm")
sys.exit(abs(said - true) < 0.5)
PYTHON
mkdir "$folder/dicom" "$folder/nifti"
"$folder/venv/bin/python" "$folder/series.py" "$folder/dicom"
"$folder/venv/bin/dcm2niix" -b n -f ct -o "$folder/nifti" "$folder/dicom" > "$folder/log"
"$folder/venv/bin/python" "$folder/check.py" "$folder/nifti/ct.nii"
