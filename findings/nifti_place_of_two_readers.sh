#!/usr/bin/env bash
# Where a NIfTI volume lies and how large its voxels are: nibabel and SimpleITK answer differently for valid files.
#
# Tried with nibabel 5.4.2 and SimpleITK 2.5.7, Python 3.11, Linux x86-64. Seen:
#
#   micron: nibabel 500 750 4000, SimpleITK 0.5 0.75 4.0
#     xyzt_units is micrometres. ITK converts spacing and origin to millimetres; nibabel's affine and zooms are as they
#     are stored, and nothing says so: the same file is a thousand times larger in one of the two.
#   sform 1, qform 1: nibabel 1 1 2 at -1 -2 3, SimpleITK 0.5 0.75 4.0 at -1 -2 3
#     Both forms are set, with the same code, and differ. nibabel takes all of the sform. ITK takes position and
#     directions from the sform, but the spacing from pixdim, which is the qform's: a grid that neither form describes.
#     It warns of "unexpected scales in sform" on stderr.
#   sform 2, qform 1: nibabel 1 1 2 at -1 -2 3, SimpleITK 0.5 0.75 4.0 at -10 -20 -30
#     With another code of the sform ITK takes the qform, nibabel still the sform.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nibabel==5.4.2 SimpleITK==2.5.7 numpy==2.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null | tee seen.txt
import nibabel
import numpy as np
import SimpleITK

values = np.zeros((5, 4, 3), np.int16)


def show(name, image):
    nibabel.save(image, "x.nii")
    affine = np.diag([-1, -1, 1, 1]) @ nibabel.load("x.nii").affine
    itk = SimpleITK.ReadImage("x.nii")
    ours = " ".join(f"{abs(affine[i, i]):g}" for i in range(3)), " ".join(f"{x:g}" for x in affine[:3, 3])
    theirs = " ".join(f"{x:g}" for x in itk.GetSpacing()), " ".join(f"{x:g}" for x in itk.GetOrigin())
    print(f"{name}: nibabel {ours[0]} at {ours[1]}, SimpleITK {theirs[0]} at {theirs[1]}")


microns = nibabel.Nifti1Image(values, np.diag([-500.0, -750, 4000, 1]))
microns.header.set_xyzt_units("micron")
show("micron", microns)
sform, qform = np.diag([-1.0, -1, 2, 1]), np.diag([-0.5, -0.75, 4, 1])
sform[:3, 3], qform[:3, 3] = (1, 2, 3), (10, 20, -30)
for code in (1, 2):
    image = nibabel.Nifti1Image(values, sform)
    image.set_sform(sform, code)
    image.set_qform(qform, 1)
    show(f"sform {code}, qform 1", image)
PYTHON
diff seen.txt - <<'SEEN'
micron: nibabel 500 750 4000 at 0 0 0, SimpleITK 0.5 0.75 4 at 0 0 0
sform 1, qform 1: nibabel 1 1 2 at -1 -2 3, SimpleITK 0.5 0.75 4 at -1 -2 3
sform 2, qform 1: nibabel 1 1 2 at -1 -2 3, SimpleITK 0.5 0.75 4 at -10 -20 -30
SEEN
