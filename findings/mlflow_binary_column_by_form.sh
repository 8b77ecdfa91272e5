#!/usr/bin/env bash
# MLflow: `mlflow models serve` decodes the base64 of a binary column in two forms of a request, and not in the others.
#
# Versions: mlflow 3.17.2, pandas as it brings it, Python 3.11.
# The signature of the model has one column of type `binary`, and its documentation has bytes sent as base64 in JSON. In
# `dataframe_split` and `dataframe_records` the model gets the bytes. In `inputs` and `instances` the same column, with the
# same signature enforced, holds the base64 text as bytes, and in CSV the text: a model that reads files has to tell these
# apart itself.
#
# Output seen (type and content of the cell that the model gets for b"\x00binary\xff"):
#   dataframe_split: bytes b'\x00binary\xff'
#   dataframe_records: bytes b'\x00binary\xff'
#   inputs: bytes b'AGJpbmFyef8='
#   instances: bytes b'AGJpbmFyef8='
#   csv: str 'AGJpbmFyef8='
# Exits 1 where all forms give the model the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${server:-0}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mlflow==3.17.2
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true PATH="$folder/venv/bin:$PATH"
cd "$folder"
cat > save.py <<'PYTHON'
import mlflow
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema


class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [f"{type(cell).__name__} {cell!r}" for cell in model_input["file"]]


signature = ModelSignature(inputs=Schema([ColSpec("binary", "file")]))
mlflow.pyfunc.save_model("model", python_model=Echo(), signature=signature, pip_requirements=[])
PYTHON
python save.py 2>log
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mlflow models serve --model-uri model --env-manager local --host 127.0.0.1 --port "$port" --workers 1 >log 2>&1 &
server=$!
cat > ask.py <<'PYTHON'
import base64
import json
import sys
import time
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}"
deadline = time.monotonic() + 120
while True:
    try:
        urllib.request.urlopen(f"{url}/ping", timeout=5)
        break
    except (urllib.error.URLError, OSError):
        assert time.monotonic() < deadline, "the server does not come up"
        time.sleep(0.2)
text = base64.b64encode(b"\x00binary\xff").decode()
bodies = {
    "dataframe_split": {"columns": ["file"], "data": [[text]]},
    "dataframe_records": [{"file": text}],
    "inputs": {"file": [text]},
    "instances": [{"file": text}],
}
requests = {name: ("application/json", json.dumps({name: body})) for name, body in bodies.items()}
requests["csv"] = ("text/csv", f"file\n{text}\n")
seen = {}
for name, (kind, body) in requests.items():
    request = urllib.request.Request(f"{url}/invocations", body.encode(), {"Content-Type": kind})
    (seen[name],) = json.load(urllib.request.urlopen(request, timeout=30))["predictions"]
    print(f"{name}: {seen[name]}")
sys.exit(0 if len(set(seen.values())) > 1 else 1)
PYTHON
python ask.py "$port" || { tail -n 5 log; exit 1; }
