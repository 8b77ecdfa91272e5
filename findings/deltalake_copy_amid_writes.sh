#!/usr/bin/env bash
# deltalake (delta-rs): a copy of a Delta table that was made while rows were added cannot be opened, though its log is
# whole.
#
# Versions: deltalake 1.6.6, pyarrow 25.0.1.
# `_last_checkpoint` names the newest checkpoint, so that a reader need not list the log; Delta's protocol calls it a hint
# and lets a reader do without. A copy by name (`cp -r`, `aws s3 sync`) takes `_last_checkpoint` when it comes to it, which
# may be after the checkpoint that it names was written and after the log's folder was listed. All commits up to that
# listing are in the copy. delta-rs raises on it and does not fall back to the commits; without the hint the same copy
# opens, with all of its rows.
#
# Output seen:
#   as copied:                DeltaError
#   without _last_checkpoint: version 4, 5 rows
# Exits 1 where deltalake opens the copy as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet deltalake==1.6.6 pyarrow==25.0.1
cat > "$folder/check.py" <<'PYTHON'
import shutil
import sys
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

folder = Path(sys.argv[1])
table, copy = folder / "table", folder / "copy"


def append() -> None:
    configuration = {"delta.checkpointInterval": "10"}
    write_deltalake(table, pa.table({"value": [1]}), mode="append", configuration=configuration)


for _ in range(5):
    append()
shutil.copytree(table, copy)  # the listing: five commits
for _ in range(10):
    append()
hint = "_delta_log/_last_checkpoint"
shutil.copy(table / hint, copy / hint)  # its turn comes now

try:
    print("as copied:               ", f"version {DeltaTable(copy).version()}")
    refused = False
except Exception as error:
    print("as copied:               ", type(error).__name__)
    refused = True
(copy / hint).unlink()
whole = DeltaTable(copy)
print("without _last_checkpoint:", f"version {whole.version()}, {whole.to_pyarrow_table().num_rows} rows")
assert (whole.version(), whole.to_pyarrow_table().num_rows) == (4, 5)
sys.exit(not refused)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder"
