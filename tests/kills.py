"""Jobs on a real store that are killed at random and started again: `python -m tests.kills KILLS SEED [STAGE ...]`.

Of each two rounds one has two drivers on one output, of which one is killed. What is left is compared with what an
undisturbed job leaves, byte for byte.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pydicom
import yaml

from rayseg import lease, snapshots, storage
from rayseg.inference import ledger
from tests.faults import Faults, faulty

ROOT = Path(__file__).parents[1]
STAGES = ("catalog", "prepare", "segment", "volumes")
SEGMENTING = ("segment", "volumes")  # by a model of slices, and by one of volumes
# A killed driver is followed after so long, instead of a minute.
STALE_S, RENEW_S, LOOK_S = 4.0, 0.5, 0.1
LATEST_S = 0.5  # after a call of the store; what is at work in between is in Ray's workers
TIMES = ("read_s", "decode_s", "forward_s", "encode_s", "write_s", "seconds")  # of a ledger
# What tells the time, and who did it.
_OF_THE_RUN = ("report.html", "progress.json")


def drive(stage: str, recipe: str) -> None:
    """A driver: says when it is ready, waits for a line, and does the job."""
    lease.STALE_S, lease.RENEW_S, lease.LOOK_S = STALE_S, RENEW_S, LOOK_S
    from rayseg import job
    from rayseg.data.catalog import CatalogConfig, catalog
    from rayseg.data.prepare import PrepareConfig, prepare
    from rayseg.inference.archive import SegmentConfig, segment

    jobs = {
        "catalog": (CatalogConfig, catalog),
        "prepare": (PrepareConfig, prepare),
        "segment": (SegmentConfig, segment),
    }
    section = _section(stage)
    print("ready", flush=True)
    sys.stdin.readline()
    job.run(section, *jobs[section], ["--config", recipe])


def _section(stage: str) -> str:
    """Of a recipe: the job's."""
    return "segment" if stage in SEGMENTING else stage


class Driver:
    """A process that does a stage; `faults` is the way of its calls to the store."""

    def __init__(self, stage: str, recipe: Path, faults: Faults, errors: IO[bytes]) -> None:
        self._calls, self._kill_at, self._after_s = 0, -1, 0.0
        self._counting = threading.Lock()
        faults.done = self._count
        self._errors = errors
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kills", "drive", stage, str(recipe)],
            cwd=ROOT,
            env=os.environ | {"AWS_ENDPOINT_URL": faults.url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def go(self, kill_at: int = -1, after_s: float = 0.0) -> None:
        """Lets it begin, and kills it so long after that call to the store."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.errors()
        self._kill_at, self._after_s = kill_at, after_s
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> bool:
        """Waits for it; False where it was killed."""
        self.process.communicate(timeout=240)
        assert self.process.returncode in (0, -signal.SIGKILL), self.errors()
        return self.process.returncode == 0

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()[-5000:]

    @property
    def calls(self) -> int:
        return self._calls

    def _count(self, head: bytes) -> None:
        with self._counting:
            self._calls += 1
            here = self._calls == self._kill_at
        if here:
            time.sleep(self._after_s)
            self.process.kill()


class Kills:
    """The inputs of all stages, what undisturbed jobs leave, and rounds of killing."""

    def __init__(self, base: str, folder: Path, stages: tuple[str, ...], seed: int, endpoint: str) -> None:
        self._base, self._folder, self._endpoint = base, folder, endpoint
        self._draw = random.Random(seed)
        self._outputs = 0
        self.done: Counter[str] = Counter()
        self.killed: Counter[str] = Counter()
        write_inputs(base, folder, not {*SEGMENTING}.isdisjoint(stages))
        self._calls: dict[str, int] = {}
        self._expected: dict[str, dict[str, Any]] = {}
        for stage in STAGES[: 1 + max(map(STAGES.index, stages))]:
            if stage in stages or stage == "catalog":
                output, recipe = self._recipe(stage, "undisturbed")
                with self._drivers(stage, recipe, 1) as (driver,):
                    driver.go()
                    assert driver.end()
                self._calls[stage], self._expected[stage] = driver.calls, state(stage, output)

    def round(self, stage: str, drivers: int, kills: int) -> int:
        """Kills up to `kills` drivers at one output, waits for its end, and compares; gives how many were killed."""
        self._outputs += 1
        output, recipe = self._recipe(stage, f"{stage}-{self._outputs}")
        killed = 0
        for number in range(kills):
            with self._drivers(stage, recipe, drivers if number == 0 else 1) as started:
                victim = self._draw.choice(started)
                at, after_s = self._draw.randint(1, self._calls[stage]), self._draw.uniform(0.0, LATEST_S)
                for driver in started:
                    driver.go(*((at, self._draw.choice([0.0, after_s])) if driver is victim else ()))
                ended = [driver.end() for driver in started]
                assert all(one for driver, one in zip(started, ended, strict=True) if driver is not victim)
                killed += ended.count(False)
        if not all(ended) and len(ended) == 1:
            with self._drivers(stage, recipe, 1) as (last,):
                last.go()
                assert last.end()
        found = state(stage, output)
        if not all(ended) and len(ended) == 2:
            # Who is killed after the other one's end leaves a lease, for the next job to take.
            found = {path: left for path, left in found.items() if not path.endswith(lease.SUFFIX)}
        assert found == self._expected[stage], difference(found, self._expected[stage])
        self.done[f"{stage}, {drivers} driver(s)"] += 1
        self.killed[stage] += killed
        return killed

    @contextmanager
    def _drivers(self, stage: str, recipe: Path, count: int) -> Iterator[list[Driver]]:
        with ExitStack() as stack:
            ways = [stack.enter_context(faulty(self._endpoint, seed=0)) for _ in range(count)]
            errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
            yield [Driver(stage, recipe, way, said) for way, said in zip(ways, errors, strict=True)]

    def _recipe(self, stage: str, name: str) -> tuple[str, Path]:
        output = f"{self._base}/{name}/{stage}"
        manifest = f"{self._base}/undisturbed/catalog/manifest.parquet"
        section = _section(stage)
        values: dict[str, Any] = {
            "catalog": {
                "source": f"{self._base}/studies",
                "output": f"{output}/manifest.parquet",
                "layout": {"images": "images", "masks": "masks"},
                "max_reject_fraction": 0.9,
            },
            "prepare": {
                "manifest": manifest,
                "output": output,
                "preprocess": {"size": [32, 32]},
                "split": {"val": 0.25, "test": 0.25},
                "rows_per_shard": 7,
                "max_reject_fraction": 0.9,
            },
            "segment": {
                "manifest": manifest,
                "output": output,
                "model_uri": f"models:/{'volumes' if stage == 'volumes' else 'threshold'}/1",
                "tracking_uri": f"sqlite:///{self._folder}/mlflow.db",
                "engine": {"name": "openvino", "precision": "float32"},
                "unrecorded": 2,
                "max_reject_fraction": 0.9,
            },
        }[section]
        recipe = self._folder / f"{name}-{stage}.yaml"
        recipe.write_text(yaml.safe_dump({section: values}))
        return output, recipe


def write_inputs(base: str, folder: Path, model: bool) -> None:
    """Ten patients with masks, objects that are refused by each stage, a mask too many, and a model."""
    from rayseg.data import synthetic

    synthetic.write_studies(f"{base}/studies", patients=10, slices=4, size=32, seed=2)
    images = sorted(info.uri for info in storage.list_files(f"{base}/studies/images"))
    storage.write(images[0], storage.read(images[0])[:-200])
    for uri in images[5:7]:
        storage.write(uri, undecodable(storage.read(uri)))
    some = next(storage.list_files(f"{base}/studies/masks")).uri
    storage.write(f"{base}/studies/masks/lonely.png", storage.read(some))
    if model:
        from tests import bundles

        tracking_uri = f"sqlite:///{folder}/mlflow.db"
        bundles.register(tracking_uri, "threshold", bundles.write_bundle(folder / "bundle", 120.0, size=32))
        bundles.register(tracking_uri, "volumes", bundles.write_volume_bundle(folder / "volumes", 50.0))


def undecodable(data: bytes) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"no codestream"])
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def state(stage: str, output: str) -> dict[str, Any]:
    """All that a stage has left: bytes by path, and rows where these tell the time."""
    left: dict[str, Any] = {}
    tables = {"ledger", "rejects"} if stage in SEGMENTING else set()
    for info in storage.list_files(output):
        path = info.uri[len(output) + 1 :]
        folder, _, name = path.partition("/")
        if folder in tables or name.startswith("_delta_log/") or path in _OF_THE_RUN:
            continue
        # A segmentation's address has the output's.
        left[path] = storage.read(info.uri)
    for name in {path.partition("/")[0] for path in left if ".parquet/" in path}:
        current = snapshots.current(f"{output}/{name}")[len(output) + 1 :]
        assert {path for path in left if path.startswith(f"{name}/")} == {current}, "one version, and no other file"
    if stage in SEGMENTING:
        left["ledger"] = [row(one, output) for one in ledger.read(output).to_pylist()]
        left["rejects"] = [row(one, output) for one in ledger.rejects(output).to_pylist()]
    return left


def row(values: dict[str, Any], output: str) -> str:
    """Without the times, the run and the output's own address."""
    kept = {name: value for name, value in values.items() if name not in (*TIMES, "run_id", "sequence")}
    return json.dumps(kept, sort_keys=True).replace(output, "OUTPUT")


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    other = [path for path in found.keys() & expected.keys() if found[path] != expected[path]]
    return f"too much: {found.keys() - expected.keys()}; lacks: {expected.keys() - found.keys()}; other: {other}"


def main(kills: int, seed: int, stages: tuple[str, ...]) -> None:
    """As many kills, spread over the stages."""
    import ray

    from rayseg import cluster
    from rayseg.demo.store import object_store

    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AUTH_MODE="disabled",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        MLFLOW_DISABLE_TELEMETRY="true",
        DO_NOT_TRACK="true",
        RAYSEG_PSEUDONYM_KEY="a key for tests only",
        PYTHONPATH=f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
    )
    os.environ[cluster.API_SERVER] = cluster.NOBODY
    with (
        tempfile.TemporaryDirectory(prefix="rayseg-kills-") as name,
        object_store(Path(name, "store"), "tests") as store,
    ):
        os.environ.update(store)
        address = ray.init(
            address="local", num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False
        ).address_info["gcs_address"]
        os.environ["RAY_ADDRESS"] = address
        draw = random.Random(seed)
        rounds = Kills("s3://tests/kills", Path(name), stages, seed, store["AWS_ENDPOINT_URL"])
        began, killed, number = time.monotonic(), 0, 0
        try:
            while killed < kills:
                drivers = 2 - number // len(stages) % 2
                several = 1 if drivers == 2 else min(kills - killed, draw.choice((1, 1, 2)))
                killed += rounds.round(stages[number % len(stages)], drivers, several)
                number += 1
                left_s = (time.monotonic() - began) / max(killed, 1) * (kills - killed)
                print(f"{killed} of {kills} killed, {left_s:.0f} s left", file=sys.stderr, flush=True)
        finally:
            ray.shutdown()
    print(json.dumps({"killed": rounds.killed, "rounds": rounds.done, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        drive(*sys.argv[2:])
    else:
        main(int(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]) or STAGES)
