"""From studies full of canaries to a served model, as a user runs it: nothing that is written holds one of them.

Beside it what the same run says to who watches it: its log lines, and its figures in a real Prometheus.
"""

import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.datadict import dictionary_VR, tag_for_keyword

from rayseg.data import synthetic
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.inference import ledger
from tests.canaries import PLACES, Allowed, Canaries, Search
from tests.ports import free_port
from tests.promql import CONFIGS, names, recorded, rules, shown

ROOT = Path(__file__).parents[2]
PATIENTS, SLICES, SIZE = 6, 3, 32
JOB_S = 240

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

DICOM = "DICOM obliges it to carry its source's patient and study modules and the UIDs it refers to"
URIS = "says where an object lies, without which nothing could read it: names of files, and nothing of what is in them"
ALLOWED = [
    Allowed("segmentations/*/*.dcm", DICOM),
    *(
        Allowed(pattern, URIS, column, (PLACES,))
        for pattern in ("manifest.parquet/*", "segmentations/manifest.parquet/*", "bulk/manifest.parquet/*")
        for column in ("uri", "masks.uri")
    ),
    *(
        Allowed("prepared/split=*/*.parquet", URIS, column, (PLACES,))
        for column in ("uri", "masks.uri", "neighbours.uri", "metadata rayseg.shard")
    ),
    Allowed("manifest.masks-without-image.parquet/*", URIS, "uri", (PLACES,)),
    Allowed("prepared/rejects.parquet/*", URIS, "uri", (PLACES,)),
    Allowed("*/rejects/*.parquet", URIS, "uri", (PLACES,)),
]

RECIPE = """
catalog:
  source: SOURCE/studies
  output: OUT/manifest.parquet
  layout: {images: images, masks: masks}
  max_reject_fraction: 0.5
prepare:
  manifest: OUT/manifest.parquet
  output: OUT/prepared
  preprocess: {size: [32, 32], window: {center: 40, width: 80}, percentiles: null}
  split: {val: 0.3, test: 0.3, seed: "SEED"}
train:
  prepared: OUT/prepared
  storage: OUT/runs
  tracking_uri: sqlite:///OUT/mlflow.db
  model: {widths: [4, 8]}
  batch_size: 4
  epochs: 1
  num_workers: 1
evaluate:
  prepared: OUT/prepared
  model_uri: models:/rayseg/1
  tracking_uri: sqlite:///OUT/mlflow.db
  max_reject_fraction: 0.9
promote: {model_uri: models:/rayseg/1, tracking_uri: sqlite:///OUT/mlflow.db}
segment:
  source: SOURCE/archive
  output: OUT/segmentations
  profiles: [seg, report, nifti, overlays]
  model_uri: models:/rayseg/1
  tracking_uri: sqlite:///OUT/mlflow.db
  max_reject_fraction: 0.9
serve:
  model_uri: models:/rayseg@champion
  tracking_uri: sqlite:///OUT/mlflow.db
  port: 0
  audit: OUT/audit.log
  jobs: {sources: [SOURCE], destinations: [OUT], settings: {max_reject_fraction: 0.1}}
"""


@dataclass
class Watched:
    """What a run has left, and what it was given."""

    out: Path
    canaries: Canaries
    environment: dict[str, str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)  # what Prometheus said; empty where there is none

    def stage(self, name: str) -> None:
        """Runs a job to its end, its streams in files."""
        with (self.out / f"{name}.out").open("w") as out, (self.out / f"{name}.err").open("w") as err:
            command = self.command(name)
            ended = subprocess.run(command, cwd=ROOT, env=self.environment, stdout=out, stderr=err, timeout=JOB_S)
        assert ended.returncode == 0, (self.out / f"{name}.err").read_text()[-5000:]
        self.results[name] = json.loads((self.out / f"{name}.out").read_text().splitlines()[-1])

    def command(self, name: str) -> list[str]:
        return [sys.executable, "-m", f"jobs.{name}", "--config", str(self.out / "recipe.yaml")]


def saved(dataset: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def studies(folder: Path, canaries: Canaries, patients: int, seed: int, masks: bool) -> list[Path]:
    """Phantoms whose every name, inside and of files, is a canary; returns their files."""
    plain = folder.parent / f"plain-{seed}"
    made = synthetic.write_studies(str(plain), patients=patients, slices=SLICES, size=SIZE, seed=seed, masks=masks)
    found = []
    for patient in sorted(Path(made.images).iterdir()):
        place = f"{canaries.new(PLACES)}^{canaries.new(PLACES)}"
        for path in sorted(patient.iterdir()):
            dataset = pydicom.dcmread(path)
            canaries.fill(dataset, f"{seed} {patient.name}")
            name = f"{canaries.new(PLACES)} {path.stem}"
            target = folder / "images" / place / f"{name}.dcm" if masks else folder / place / f"{name}.dcm"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(saved(dataset))
            found.append(target)
            if masks:
                mask = folder / "masks" / place / f"{name}.png"
                mask.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(plain / "masks" / patient.name / f"{path.stem}.png", mask)
    shutil.rmtree(plain)
    return found


def undecodable(data: bytes, canaries: Canaries) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([f"no codestream, but {canaries.new('fragment')}".encode()])
    return saved(dataset)


def mistyped(data: bytes, keyword: str, text: str) -> bytes:
    """With a text where the attribute's VR allows none."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    tag, vr = tag_for_keyword(keyword), dictionary_VR(keyword)
    dataset[tag] = pydicom.DataElement(tag, "LO", text)
    place = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")
    assert place + b"LO" in saved(dataset)
    return saved(dataset).replace(place + b"LO", place + vr.encode())


def spoil(folder: Path, good: Path, canaries: Canaries) -> None:
    """Puts beside a good slice what no reader can use, and what says so."""
    data = good.read_bytes()

    def put(name: str, content: bytes) -> None:
        (folder / f"{canaries.new(PLACES)} {name}").write_bytes(content)

    def changed(**values: Any) -> bytes:
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.SOPInstanceUID = canaries.add(f"2.25.{secrets.randbits(120)}", "SOPInstanceUID")
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        return saved(dataset)

    put("truncated.dcm", data[:-500])
    put("header.dcm", data[:1500])
    put("copy.dcm", data)
    put("empty.dcm", b"")
    put("note.dcm", f"A letter about {canaries.new('letter')}".encode())
    put("pixels.dcm", changed(PixelData=None))
    put("rows.dcm", changed(Rows=None))
    put(
        "characters.dcm",
        changed(PatientName=f"{canaries.new('characters')}\xe9\xff", SpecificCharacterSet="ISO_IR 192"),
    )
    # Values that their VRs do not allow: pydicom's warnings and errors quote them.
    for keyword in ("PixelSpacing", "InstanceNumber", "PatientBirthDate", "ImageOrientationPatient", "RescaleSlope"):
        put(f"{keyword}.dcm", mistyped(data, keyword, canaries.new(keyword)))
    text = f"{canaries.new('free text')}^{canaries.new('free text')}"
    put("modality.dcm", changed(Modality=text, BodyPartExamined=text))
    put("syntax.dcm", undecodable(data, canaries))
    unknown = undecodable(data, canaries).replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.99999.1.2.4.90")
    put("unknown.dcm", unknown)
    picture, told = io.BytesIO(), PngInfo()
    told.add_text("Comment", canaries.new("PNG text"))
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(picture, "PNG", pnginfo=told)
    put("picture.png", picture.getvalue())
    put("half.png", picture.getvalue()[:60])


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    # Ray's sockets have short paths.
    root = Path(tempfile.mkdtemp(prefix="rayseg-", dir="/tmp"))
    canaries = Canaries()
    source, out = root / "in", root / "out"
    for folder in (source, out, out / "tmp", out / "answers"):
        folder.mkdir()
    labelled = studies(source / "studies", canaries, PATIENTS, seed=71, masks=True)
    lonely = source / "studies" / "masks" / f"{canaries.new(PLACES)}.png"
    shutil.copy(next((source / "studies" / "masks").rglob("*.png")), lonely)
    next((source / "studies" / "masks").rglob(f"{labelled[-1].stem}.png")).unlink()
    archive = studies(source / "archive", canaries, 4, seed=72, masks=False)
    spoil(archive[0].parent, archive[0], canaries)
    for path in archive[SLICES : 2 * SLICES]:
        path.write_bytes(undecodable(path.read_bytes(), canaries))
    token, key = canaries.new("token of the service"), canaries.new("key of the pseudonyms")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYSEG_", "AWS_"))},
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT))),
        "TMPDIR": str(out / "tmp"),
        "RAYSEG_PSEUDONYM_KEY": key,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": canaries.new("token of the cluster"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_LOGGING_CONFIG_ENCODING": "JSON",
    }
    recipe = (
        RECIPE.replace("SOURCE", str(source))
        .replace("OUT", str(out))
        .replace("SEED", seed_for_all_splits(labelled, key))
    )
    (out / "recipe.yaml").write_text(recipe)
    watched = Watched(out, canaries, environment)
    try:
        with ExitStack() as stack:
            environment["RAY_ADDRESS"] = stack.enter_context(cluster(out, environment))
            watched.stage("catalog")
            watched.stage("prepare")
            watched.stage("train")
            # One of the patients to test on has lost a slice: an error path of its own.
            table = pq.read_table(out / "prepared" / "split=test")
            Path(table["uri"][0].as_py()).unlink()
            watched.stage("evaluate")
            watched.stage("promote")
            watched.stage("segment")
            with running(watched, "serve") as url, prometheus(out, url) as server:
                ask(watched, url, token, archive)
                if server:
                    look(watched, server)
        yield watched
    finally:
        shutil.rmtree(root, ignore_errors=True)


def seed_for_all_splits(labelled: list[Path], key: str) -> str:
    """One that leaves no split empty."""
    from rayseg.data.split import Split

    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in labelled]
    pseudonyms = Pseudonyms(key.encode())
    keys = sorted({pseudonyms.patient(one.PatientID, one.get("IssuerOfPatientID", "")) for one in headers})
    for seed in map(str, range(1000)):
        parts = [Split(0.3, 0.3, seed).assign(patient) for patient in keys]
        if parts.count("train") >= 3 and {"val", "test"} <= set(parts):
            return seed
    raise AssertionError("no seed")


KEEPER = """
import sys
import ray
from rayseg.cluster import own_agent_port
with own_agent_port():
    told = ray.init(
        address="local", num_cpus=4, object_store_memory=200_000_000, _temp_dir=sys.argv[1], log_to_driver=False,
        include_dashboard=True, dashboard_host="127.0.0.1",
    )
print(told.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


class cluster:  # noqa: N801 (a context manager)
    """A Ray cluster of a process of its own, whose session folder is searched, too; gives its address."""

    def __init__(self, out: Path, environment: dict[str, str]) -> None:
        self._out = out
        with (out / "cluster.err").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", KEEPER, str(out / "ray")],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> str:
        assert self._process.stdout is not None
        address = self._process.stdout.readline().strip()
        assert address, (self._out / "cluster.err").read_text()[-5000:]
        return address

    def __exit__(self, *error: object) -> None:
        self._process.communicate("", timeout=60)


class running:  # noqa: N801 (a context manager)
    """The service, at the URL that it tells."""

    def __init__(self, watched: Watched, name: str) -> None:
        self._out, self._name = watched.out, name
        with (watched.out / f"{name}.err").open("w") as errors:
            self._process = subprocess.Popen(
                watched.command(name),
                cwd=ROOT,
                env=watched.environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self._out / f"{self._name}.err").read_text()[-5000:]
        return json.loads(line)["url"]

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        told, _ = self._process.communicate(timeout=60)
        (self._out / f"{self._name}.out").write_text(told)


@contextmanager
def prometheus(out: Path, url: str) -> Iterator[str | None]:
    """A Prometheus with the shipped configuration, in its places and pace alone changed; None where there is none."""
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    settings = yaml.safe_load((CONFIGS / "prometheus.yaml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    ray_nodes, service = settings["scrape_configs"]
    ray_nodes["file_sd_configs"] = [{"files": [str(out / "ray/session_latest/prom_metrics_service_discovery.json")]}]
    service["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    folder = out / "prometheus"
    folder.mkdir()
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    shutil.copy(CONFIGS / "prometheus-alerts.yaml", folder)
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def asked(server: str, expression: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{server}/api/v1/query", params={"query": expression}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]["result"]


def look(watched: Watched, server: str) -> None:
    """Keeps what Prometheus says: names of figures, values of some, the dashboard's answers, and the alerts."""

    def there(expression: str) -> list[dict[str, Any]]:
        with suppress(httpx.TransportError):
            return asked(server, expression)
        return []

    until(lambda: there('rayseg_http_requests_total{route="/v1/jobs/{id}"}'))
    until(lambda: there('rayseg:jobs:30m{stage="segment", outcome="refused"}'))
    figures = asked(server, '{__name__=~"(ray_)?rayseg.*"}')
    shown_now = {expression: asked(server, expression) for expression in shown()}
    alerts = httpx.get(f"{server}/api/v1/rules", timeout=60).json()["data"]["groups"]
    watched.figures = {
        "all": figures,
        "shown": shown_now,
        "rules": [rule for group in alerts for rule in group["rules"]],
    }
    (watched.out / "figures.json").write_text(json.dumps(watched.figures))


def until(call: Callable[[], Any], seconds: float = 120) -> Any:
    """What the call gives, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := call()):
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.2)
    return found


def ask(watched: Watched, url: str, token: str, archive: list[Path]) -> None:
    """Uploads that succeed and fail, and a bulk job that fails: all with names where a client may put some."""
    canary = watched.canaries.new
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for path in archive[:SLICES]:
            zipped.write(path, f"{canary('zip entry')}/{path.name}")
    slice, series = archive[0].read_bytes(), buffer.getvalue()
    mixed = [("file", (f"{canary('form file')}.dcm", path.read_bytes())) for path in (archive[0], archive[-1])]
    given = {"x-request-id": canary("header"), "user-agent": canary("header")}
    segment, other = f"{url}/v1/segment?name={canary('query')}", {"content-type": "application/octet-stream"}
    requests = {
        "slice": lambda: httpx.post(segment, content=slice, headers=given | other, timeout=60),
        "series": lambda: httpx.post(
            segment, content=series, headers=given | {"content-type": "application/zip"}, timeout=60
        ),
        "half": lambda: httpx.post(segment, content=slice[:2500], headers=given | other, timeout=60),
        "note": lambda: httpx.post(segment, content=canary("body").encode(), headers=given | other, timeout=60),
        "mixed": lambda: httpx.post(segment, files=mixed, headers=given, timeout=60),
        "path": lambda: httpx.get(f"{url}/{canary('path')}", headers=given, timeout=60),
        "model": lambda: httpx.post(
            f"{url}/v1/segment?model={canary('model')}", content=slice, headers=given | other, timeout=60
        ),
        "place": lambda: httpx.post(
            f"{url}/v1/jobs", json={"source": f"/{canary('source')}", "destination": "/tmp"}, headers=given, timeout=60
        ),
        "bad job": lambda: httpx.post(
            f"{url}/v1/jobs", json={"source": 1, canary("key"): canary("value")}, headers=given, timeout=60
        ),
        "token": lambda: httpx.get(
            f"{url}/v1/models", headers=given | {"authorization": f"Bearer {token}"}, timeout=60
        ),
    }
    watched.answers = {name: request() for name, request in requests.items()}
    for name, answer in watched.answers.items():
        # Whoever chooses the id of a request gets it back, from Ray Serve.
        heads = b"".join(b": ".join(pair) + b"\n" for pair in answer.headers.raw if pair[0] != b"x-request-id")
        (watched.out / "answers" / name).write_bytes(heads + answer.content)
    source = str(archive[0].parents[1])
    job = {"source": source, "destination": str(watched.out / "bulk")}
    asked = httpx.post(f"{url}/v1/jobs", json=job, timeout=60).json()
    watched.job = until(lambda: ended(httpx.get(f"{url}/v1/jobs/{asked['id']}", timeout=60).json()), 120)
    (watched.out / "metrics.txt").write_text(httpx.get(f"{url}/metrics", timeout=60).text)


def ended(job: dict[str, Any]) -> dict[str, Any] | None:
    return None if job["state"] in ("running", "cancelling") else job


def test_the_run_met_errors_and_rejects(watched: Watched) -> None:
    """Else the search below would show little."""
    assert watched.results["catalog"]["reasons"] == {"no_mask": 1}
    assert watched.results["evaluate"]["reasons"] == {"not_found": 1}
    reasons = watched.results["segment"]["reasons"]
    assert {"truncated", "empty_object", "not_dicom", "no_pixels", "series_duplicates"} <= set(reasons), reasons
    assert watched.results["segment"]["segmented"] >= 2
    statuses = {name: answer.status_code for name, answer in watched.answers.items()}
    assert statuses.pop("slice") == statuses.pop("series") == statuses.pop("token") == 200, statuses
    assert all(400 <= status < 500 for status in statuses.values()), statuses
    assert (watched.job["state"], watched.job["error"].split(":")[0]) == ("failed", "segment"), watched.job


def test_nothing_written_holds_an_identity(watched: Watched) -> None:
    search = Search(watched.canaries, ALLOWED)
    leaks = search.folder(watched.out)
    shown = "\n".join(sorted({f"{leak.path} [{leak.place}]: {leak.kind}: {leak.context!r}" for leak in leaks}))
    assert not leaks, f"{len(leaks)} leaks:\n{shown[:20000]}"
    assert search.files > 100
    assert len(watched.canaries.told) > 600


def test_what_must_carry_them_does(watched: Watched) -> None:
    """So the search looks at files in which canaries can be found."""
    found = {leak.path.split("/")[0] for leak in Search(watched.canaries).folder(watched.out)}
    tables = {"manifest.parquet", "manifest.masks-without-image.parquet"}
    assert found == {"segmentations", "prepared", "bulk", *tables}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        if line.startswith("{"):
            with suppress(ValueError):  # a driver's last line is its result
                yield json.loads(line)


def test_lines_of_drivers_and_workers_say_what_they_are_of(watched: Watched) -> None:
    drivers = {}
    for stage in ("catalog", "prepare", "train", "evaluate", "segment", "serve"):
        of = [line["rayseg"] for line in lines(watched.out / f"{stage}.err") if "rayseg" in line]
        assert {one["stage"] for one in of} == {stage}
        # Ray repeats lines of workers in their driver's; replicas of the service outlive it, and have no run.
        (drivers[stage],) = {one["run"] for one in of if "run" in one}
    assert len(set(drivers.values())) == len(drivers)
    logs = watched.out / "ray" / "session_latest" / "logs"
    written = [line for path in logs.rglob("*worker*") if path.suffix in (".err", ".log") for line in lines(path)]
    workers = [line for line in written if "rayseg" in line]
    epochs = [line for line in workers if line["message"].startswith("epoch 1/1")]
    assert {line["rayseg"]["run"] for line in epochs} == {drivers["train"]}
    rejected = [line for line in workers if line["message"].endswith("is rejected: decode_failed")]
    assert {(line["rayseg"]["run"], line["rayseg"]["stage"]) for line in rejected} == {(drivers["segment"], "segment")}
    rows = ledger.read(str(watched.out / "segmentations")).to_pylist()
    undecodable = {row["series_key"] for row in rows if row["reason"] == "decode_failed"}
    assert {line["rayseg"]["series"] for line in rejected} == undecodable
    assert len(rejected) == 1


def test_a_real_prometheus_has_every_figure_that_is_shown(watched: Watched) -> None:
    if not watched.figures:
        pytest.skip("prometheus is not installed")
    found = {one["metric"]["__name__"] for one in watched.figures["all"]} | {"ALERTS", "up"}
    wanted = set().union(*map(names, shown()), *(names(rule["expr"]) for rule in rules()), recorded())
    # No sweep was run, and the stages had ended, whose gauges go with them.
    assert wanted - found <= {"ray_rayseg_trials_total", "ray_rayseg_waiting"}

    def value(name: str, **labels: str) -> float:
        of = [one for one in watched.figures["all"] if {"__name__": name, **labels}.items() <= one["metric"].items()]
        return sum(float(one["value"][1]) for one in of)

    for stage in ("catalog", "prepare", "train", "evaluate"):
        assert value("ray_rayseg_jobs_total", stage=stage, outcome="succeeded") == 1, stage
    assert value("ray_rayseg_slices_total", stage="prepare") == watched.results["prepare"]["rows"]
    told = watched.results["segment"]
    assert value("ray_rayseg_slices_total", stage="segment", verdict="accepted") == told["slices"]
    assert value("ray_rayseg_series_total", verdict="segmented") == told["segmented"]
    assert value("ray_rayseg_rejects_total", stage="evaluate", reason="not_found") == 1
    assert value("rayseg_http_requests_total", route="/v1/segment", status="200") == 2
    assert {rule["health"] for rule in watched.figures["rules"]} == {"ok"}
    firing = {rule["name"] for rule in watched.figures["rules"] if rule.get("state") == "firing"}
    assert firing <= {"RaysegUnreadable"}
