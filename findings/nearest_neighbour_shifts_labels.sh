#!/bin/sh
# Which source pixel "nearest neighbour" takes when a label map is made smaller.
#
# pillow 13.0.0, opencv-python-headless 5.0.0.93, scikit-image 0.26.0, scipy 1.17.1, numpy 2.4.6, Python 3.11.
# A row of 12 labels, each its own column number, is made smaller by 2, 3 and 4. The centre of a new pixel lies between
# two source pixels where the factor is even, and on one where it is odd. Seen:
#
#     factor 2: centres 0.5 2.5 ...   Pillow, scikit-image, scipy, OpenCV INTER_NEAREST_EXACT 1 3 5 7 9 11
#                                     OpenCV INTER_NEAREST 0 2 4 6 8 10
#     factor 3: centres 1 4 7 10      all others 1 4 7 10, OpenCV INTER_NEAREST 0 3 6 9
#     factor 4: centres 1.5 5.5 9.5   all others 2 6 10, OpenCV INTER_NEAREST 0 4 8
#
# One would expect no shift of the whole. But a tie always goes to the same side: labels made smaller by an even factor
# lie half a source pixel towards the first row and column, beside the image that a filter made smaller. And OpenCV's
# usual INTER_NEAREST takes the first pixel of each block, which is half a block to the other side: 0.5, 1, 1.5 pixels.
# No shift have shares of each label, made smaller by the filter of the image, of which the greatest is taken.
#
# Exits 0 while that is so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93 scikit-image==0.26.0 scipy==1.17.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.transform import resize

labels = np.tile(np.arange(12, dtype=np.uint8), (12, 1))
blocks = {2: [0, 2, 4, 6, 8, 10], 3: [0, 3, 6, 9], 4: [0, 4, 8]}
expected = {2: [1, 3, 5, 7, 9, 11], 3: [1, 4, 7, 10], 4: [2, 6, 10]}
changed = False
for factor in (2, 3, 4):
    size = 12 // factor
    taken = {
        "Pillow NEAREST": np.asarray(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST)),
        "OpenCV INTER_NEAREST": cv2.resize(labels, (size, size), interpolation=cv2.INTER_NEAREST),
        "OpenCV INTER_NEAREST_EXACT": cv2.resize(labels, (size, size), interpolation=cv2.INTER_NEAREST_EXACT),
        "skimage resize(order=0)": resize(labels, (size, size), order=0, preserve_range=True, anti_aliasing=False),
        "scipy zoom(order=0, grid_mode)": ndimage.zoom(labels, 1 / factor, order=0, grid_mode=True, mode="nearest"),
    }
    for name, row in taken.items():
        columns = row[0].astype(int).tolist()
        shift = float(np.mean([(number + 0.5) * factor - 0.5 - column for number, column in enumerate(columns)]))
        print(f"factor {factor}: {name:31} takes {columns}, labels move by {shift:+.1f}")
        changed |= columns != (blocks if name == "OpenCV INTER_NEAREST" else expected)[factor]
sys.exit(changed)
PYTHON
