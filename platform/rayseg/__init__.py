"""rayseg: training, comparing, serving and bulk-running medical image segmentation on Ray.

Research software, not a medical device.
"""

import os
import secrets
import sys

from rayseg import quiet

__version__ = "0.1.0"

# No component reports home. Set here because each library reads its switch when it is first imported or started, and
# every process of ours (driver, worker, replica) imports this package before those.
for _switch, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}.items():
    os.environ.setdefault(_switch, _value)

# Terminals and logs show our own lines; of these libraries' those that warn. TensorFlow's own "warning" is a greeting.
for _switch, _value in {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}.items():
    os.environ.setdefault(_switch, _value)
quiet.begin()

# TensorFlow has gradients of grouped convolutions (ResNeXt) on CPUs by oneDNN alone, which it leaves off where it finds
# no AVX-512.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# Processes may share a GPU (`gpus_per_worker` and its like take fractions), and TensorFlow's first one would take all
# of its memory.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

# A cluster that a job starts for itself on this machine (see `cluster.connect`) stays on loopback and asks for a token
# that only the job's own processes know. Ray reads both when it is imported, hence here; a cluster that is joined has
# its own settings.
if "ray" not in sys.modules and not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & os.environ.keys():
    os.environ["RAY_AUTH_MODE"] = "token"
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Named after the systems where Ray does this by default: the node's address is 127.0.0.1, not the machine's.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

# A worker whose code is not its driver's must not touch a job's data. Here, as all that it is sent imports this.
if "RAYSEG_CODE" in os.environ:
    from rayseg import build

    build.require(os.environ[build.VARIABLE])
