#!/bin/sh
# imagecodecs 2026.3.6 (OpenJPH 0.26.3): `htj2k_decode` of an irreversible HTJ2K codestream lets values beyond the
# precision wrap around instead of clamping them, so that white pixels become black. `jpeg2k_decode` (OpenJPEG 2.5.4)
# decodes the same codestream within 2 of the image. Seen on a white square on black, 64x64, 8 bits:
#
#     htj2k_decode: greatest error 255 in 74 pixels; jpeg2k_decode: greatest error 2
#
# Exits non-zero where that is not so any more.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet imagecodecs==2026.3.6 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import imagecodecs
import numpy as np

image = np.zeros((64, 64), np.uint8)
image[16:48, 16:48] = 255
codestream = imagecodecs.htj2k_encode(image, reversible=False, level=0.01)
errors = [np.abs(decode(codestream).astype(int) - image) for decode in (imagecodecs.htj2k_decode, imagecodecs.jpeg2k_decode)]
print(f"htj2k_decode: greatest error {errors[0].max()} in {(errors[0] > 128).sum()} pixels; jpeg2k_decode: greatest error {errors[1].max()}")
raise SystemExit(0 if errors[0].max() > 128 and errors[1].max() < 10 else 1)
PYTHON
