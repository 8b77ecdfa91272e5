#!/usr/bin/env bash
# highdicom: the uncertainty of a measurement loses the measurement's unit.
#
# Version: highdicom 0.28.2, pydicom 3.0.2, numpy 2.4.6.
# PS3.16 TID 310 lets a measurement say how far its uncertainty reaches above and below it (CID 225), as numbers with
# a unit. `MeasurementProperties(upper_measurement_uncertainty=120.0)` takes no unit, and where it is a property of a
# measurement in mm3 one expects mm3; it is written as "no units" (UCUM 1). Seen with a volume of 1000 mm3:
#
#     1000.0 mm3, + 120.0 1
#
# Who needs the unit appends a NumContentItem of their own to the properties.
# Exits non-zero where that is not so any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet highdicom==0.28.2 pydicom==3.0.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from highdicom.sr import Measurement, MeasurementProperties
from pydicom.sr.codedict import codes

properties = MeasurementProperties(upper_measurement_uncertainty=120.0)
measurement = Measurement(codes.SCT.Volume, 1000.0, codes.UCUM.CubicMillimeter, properties=properties)
(item,) = measurement[0].ContentSequence
unit = item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue
print(f"{measurement.value} {measurement.unit.value}, + {item.value} {unit}")
raise SystemExit(0 if unit == "1" else 1)
PYTHON
