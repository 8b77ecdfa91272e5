#!/usr/bin/env bash
# pydicom: a palette of more than 256 entries of 8 bits loses those beyond the 256th, without a word.
#
# Version: pydicom 3.0.2, numpy 2.4.6.
# PS3.3 C.7.6.3.1.5 lets a palette of 8-bit entries have up to 65,536 of them: an image of 16 bits may point at any.
# `apply_color_lut` shows stored values from 256 on in another colour than the palette names (DCMTK 3.6.7 shows the
# right one; GDCM refuses the file). Seen with 300 stored values, each once:
#
#     wrong colours: 44 of 300, the first at stored value 256
#
# Exits non-zero where that is not so any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

entries = 300
palette = np.random.default_rng(0).integers(0, 256, (entries, 3)).astype(np.uint8)
dataset = Dataset()
for colour, name in enumerate(("Red", "Green", "Blue")):
    dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [entries, 0, 8])
    dataset.add_new(f"{name}PaletteColorLookupTableData", "OW", palette[:, colour].tobytes())
shown = apply_color_lut(np.arange(entries, dtype=np.uint16), dataset)
wrong = np.flatnonzero((shown != palette).any(axis=1))
print(f"wrong colours: {len(wrong)} of {entries}, the first at stored value {wrong[0] if len(wrong) else None}")
raise SystemExit(0 if len(wrong) and wrong[0] == 256 else 1)
PYTHON
