"""Training on a private cluster beside somebody else's Ray on the same machine, in namespaces of their own."""

import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from tests import hosts

REASON = hosts.unsupported()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(REASON is not None, reason=f"hosts cannot be made: {REASON}"),
]

ROOT = Path(__file__).parents[2]
HEAD = ("--head", "--num-cpus=1", "--object-store-memory=78643200", "--disable-usage-stats")
# Trains until somebody else's head is up and Ray has asked three times more whether the run's controller lives. That
# question is to have no answer: where the guard sends it, this hangs up.
TRAIN = """
import os, socket, sys, threading, time
from pathlib import Path
from rayseg import cluster

begun, up, asked = (Path(sys.argv[1], name) for name in ("begun", "up", "asked"))
asked.touch()
server = socket.create_server(("127.0.0.1", 9))

def hang_up():
    while True:
        server.accept()[0].close()
        with asked.open("a") as file:
            file.write(".")

def work():
    deadline = time.monotonic() + 200
    def await_(state):
        while not state():
            assert time.monotonic() < deadline, "nobody has asked"
            time.sleep(0.1)
    begun.touch()
    await_(up.exists)
    before = asked.stat().st_size
    await_(lambda: asked.stat().st_size >= before + 3)

threading.Thread(target=hang_up, daemon=True).start()
cluster.connect()
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
scaling = ScalingConfig(num_workers=1)
DataParallelTrainer(work, scaling_config=scaling, run_config=RunConfig(storage_path=sys.argv[1])).fit()
print("trained")
"""


def test_a_head_that_somebody_starts_does_not_end_a_training() -> None:
    with tempfile.TemporaryDirectory(prefix="rayseg-hosts-") as folder, hosts.network(Path(folder)) as network:
        host = network.outside
        host.environment |= {
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",  # the user's own, for jobs that run elsewhere
        }
        training = host.start([sys.executable, "-c", TRAIN, hosts.DISK], stdout=PIPE, stderr=PIPE)
        while not (host.folder / "begun").exists():
            assert training.poll() is None, training.communicate()
            time.sleep(0.1)
        neighbour = host.run(["ray", "start", *HEAD, "--port=6379"], {"RAY_AUTH_MODE": "disabled"})
        assert neighbour.returncode == 0, neighbour.stderr
        assert (host.folder / "ray" / "ray_current_cluster").read_text(encoding="ascii").endswith(":6379")
        (host.folder / "up").touch()
        out, err = training.communicate(timeout=200)
    assert out.splitlines()[-1:] == ["trained"], err
    assert "PlacementGroupCleaner" not in err + out, "nor is anything told of it"
