#!/bin/sh
# A mask of truth values written by tifffile comes back inside out from Pillow and OpenCV.
#
# tifffile 2026.3.3 stores True as 1, as one would expect, and calls the file white-is-zero (TIFF 6.0
# PhotometricInterpretation 0): 1 is black. tifffile gives stored values, Pillow 13.0.0 and OpenCV 5.0.0.93 what is shown: of a
# mask of 18 pixels in 1333 they make one of 1315. The same mask as uint8 is the same to all of them.
#
# Output seen:
#   truth values: photometric MINISWHITE, tifffile 18, Pillow 1315, OpenCV 1315
#   uint8: photometric MINISBLACK, tifffile 18, Pillow 18, OpenCV 18
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93 tifffile==2026.3.3 imagecodecs==2026.3.6
"$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import sys
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

mask = np.zeros((31, 43), bool)
mask[2:5, 3:9] = True
found = {}
for name, values in (("truth values", mask), ("uint8", mask.astype(np.uint8) * 255)):
    path = Path(sys.argv[1]) / "mask.tif"
    tifffile.imwrite(path, values)
    with tifffile.TiffFile(path) as file:
        photometric = file.pages[0].photometric.name
        stored = int((file.asarray() > 0).sum())
    shown = int((np.asarray(Image.open(path)) > 0).sum())
    by_opencv = int((cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0).sum())
    found[name] = (photometric, stored, shown, by_opencv)
    print(f"{name}: photometric {photometric}, tifffile {stored}, Pillow {shown}, OpenCV {by_opencv}")
sys.exit(found != {"truth values": ("MINISWHITE", 18, 1315, 1315), "uint8": ("MINISBLACK", 18, 18, 18)})
PROGRAM
