#!/usr/bin/env bash
# OpenVINO: the error of a group normalisation on the CPU grows with the size of the image, in float32.
#
# Versions: openvino 2026.4.1, numpy 2.4.6; x86 with AVX2 or AVX-512.
# The node GroupNormalization (opset 12 and later) over 16 channels in 4 groups, one thread, INFERENCE_PRECISION_HINT f32.
# The same formula with numpy's means, in float32 as well, keeps its error at every size: numpy adds in pairs. What the
# plugin adds loses digits with the number of pixels in a group, and so a threshold on a network's probabilities cuts other
# pixels at 1024x1024 than the same weights do elsewhere. Means in two steps (over a row, then over the rows) do not.
#
# Output seen (largest difference from float64, OpenVINO and numpy float32; values with mean 2 and deviation 1):
#    128 x 128:  4.1e-07  4.6e-07
#    512 x 512:  3.2e-06  5.4e-07
#   1024 x 1024: 2.2e-05  7.4e-07
# Exits 1 where OpenVINO's error at 1024 x 1024 is less than ten times numpy's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
cat > "$folder/errors.py" <<'PYTHON'
import sys

import numpy as np
import openvino
from openvino import opset13

GROUPS, CHANNELS, EPSILON = 4, 16, 1e-3


def normalized(image_NCHW, dtype):
    groups = image_NCHW.astype(dtype).reshape(1, GROUPS, CHANNELS // GROUPS, *image_NCHW.shape[2:])
    axes = {"axis": (2, 3, 4), "keepdims": True, "dtype": dtype}
    centred = groups - groups.mean(**axes)
    return (centred / np.sqrt((centred**2).mean(**axes) + dtype(EPSILON))).reshape(image_NCHW.shape)


random = np.random.default_rng(0)
for side in (128, 512, 1024):
    image_NCHW = np.abs(random.normal(2.0, 1.0, (1, CHANNELS, side, side))).astype(np.float32)
    node = opset13.parameter(list(image_NCHW.shape), np.float32)
    scale, shift = (opset13.constant(np.full(CHANNELS, value, np.float32)) for value in (1.0, 0.0))
    output = opset13.group_normalization(node, scale, shift, GROUPS, EPSILON)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = openvino.Core().compile_model(openvino.Model([output], [node]), "CPU", settings)
    exact = normalized(image_NCHW, np.float64)
    theirs = np.abs(network([image_NCHW])[0] - exact).max()
    pairwise = np.abs(normalized(image_NCHW, np.float32) - exact).max()
    print(f"{side:5} x {side}: {theirs:.1e}  {pairwise:.1e}")
sys.exit(0 if theirs > 10 * pairwise else 1)
PYTHON
"$folder/venv/bin/python" "$folder/errors.py"
