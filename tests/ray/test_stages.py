"""Archive runs in two stages: files of other profiles, for other places, from masks that a run before has kept."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pyarrow.compute as pc
import pydicom
import pytest
import ray

from rayseg import tables
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout
from rayseg.evaluation.diff import DiffConfig, diff
from rayseg.inference import ledger
from rayseg.inference.archive import SegmentConfig, segment
from rayseg.models.engine import Engine
from rayseg.tracking import registry
from tests import bundles
from tests.drivers import dying_at_the_first_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PATIENTS, SLICES = 4, 3
_FETCH = registry.fetch


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with two versions of `brain`."""
    folder = tmp_path_factory.mktemp("models")
    uri = f"sqlite:///{folder}/mlflow.db"
    for level in (60, 120):
        bundles.register(uri, "brain", bundles.write_bundle(folder / str(level), level))
    return uri


@pytest.fixture(scope="module")
def done(tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> SegmentConfig:
    """An archive, cataloged and segmented: not to be spoiled."""
    folder = tmp_path_factory.mktemp("done")
    synthetic.write_studies(
        str(folder / "archive"), patients=PATIENTS, slices=SLICES, size=bundles.SIZE, seed=3, masks=False
    )
    config = SegmentConfig("models:/brain/1", tracking_uri, str(folder / "out"), cataloged(folder))
    assert calls(segment(config), config) == PATIENTS
    return config


def cataloged(folder: Path) -> str:
    manifest = str(folder / "manifest.parquet")
    catalog(CatalogConfig(str(folder / "archive"), manifest, Layout(), max_reject_fraction=1.0))
    return manifest


@pytest.fixture
def copy(done: SegmentConfig, tmp_path: Path) -> SegmentConfig:
    """The output of that, to be gone on with: its ledger names files of the other folder."""
    shutil.copytree(done.output, tmp_path / "out")
    return replace(done, output=str(tmp_path / "out"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From here on no bundle has a network: a run that wants one cannot load it."""

    def fetch(tracking_uri: str, model_uri: str) -> Any:
        folder, version = _FETCH(tracking_uri, model_uri)
        bare = tmp_path / f"bare-{version.version}"
        bare.mkdir(exist_ok=True)
        shutil.copy(Path(folder, "bundle.json"), bare)
        return bare, version

    monkeypatch.setattr(registry, "fetch", fetch)


def calls(result: Any, config: SegmentConfig) -> int:
    """How many series of the run went through the network, by what the ledger says of its time."""
    table = tables.read(f"{config.output}/{ledger.FOLDER}", where=pc.field("run_id") == result.run_id)
    assert table is not None
    rows = table.to_pylist()
    assert len(rows) == result.segmented + result.rejected
    assert sum(not row["forward_s"] for row in rows if row["verdict"] == "segmented") == result.from_masks
    return sum(row["forward_s"] > 0 for row in rows)


def contents(config: SegmentConfig, below: str = "brain-*") -> dict[str, str]:
    """SHA-256 of every file by its path below the output; the ledger's and the report are told apart by times."""
    output = Path(config.output)
    files = [path for path in output.glob(f"{below}/**/*") if path.is_file()]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def masks(config: SegmentConfig) -> list[Path]:
    return sorted(Path(config.output, "masks").rglob("*.parquet"))


@contextmanager
def pacs(asked: Callable[[], None] = lambda: None) -> Iterator[str]:
    """A DICOMweb service that stores what it gets, and calls `asked` before it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked()
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/dicom-web"
        server.shutdown()


@pytest.mark.parametrize(
    "changed",
    [
        {"profiles": ("glb", "seg-labelmap", "seg", "report", "nifti", "png", "overlays")},
        {"engine": Engine("openvino"), "nothing_found": "ledger", "cpus_per_actor": 2},
    ],
    ids=["more profiles, in another order", "openvino for auto"],
)
def test_other_files_are_made_without_the_network_and_are_those_of_a_fresh_run(
    copy: SegmentConfig, tmp_path: Path, request: pytest.FixtureRequest, changed: dict[str, Any]
) -> None:
    fresh = replace(copy, output=str(tmp_path / "fresh"), **changed)
    assert calls(segment(fresh), fresh) == PATIENTS
    request.getfixturevalue("no_network")
    other = replace(copy, **changed)
    estimate = segment(replace(other, dry_run=True)).estimate
    assert estimate is not None
    assert (estimate.series, estimate.from_masks) == (PATIENTS, PATIENTS)
    result = segment(other)
    assert (result.segmented, result.from_masks, result.rejected, calls(result, other)) == (PATIENTS, PATIENTS, 0, 0)
    made = contents(fresh)
    assert {path: contents(other).get(path) for path in made} == made
    assert [path.read_bytes() for path in masks(other)] == [path.read_bytes() for path in masks(fresh)]
    assert segment(other).skipped == PATIENTS


def test_another_pacs_gets_files_of_kept_masks_and_a_slash_is_no_other(copy: SegmentConfig, no_network: None) -> None:
    stored: list[int] = []
    with pacs(lambda: stored.append(1)) as url:
        result = segment(replace(copy, pacs=url))
        assert (calls(result, copy), result.from_masks, len(stored)) == (0, PATIENTS, PATIENTS)
        assert segment(replace(copy, pacs=f"{url}/")).skipped == PATIENTS


def test_what_changes_masks_or_needs_more_than_masks_runs_the_network(copy: SegmentConfig) -> None:
    for changed in (
        {"engine": Engine(precision="float32")},
        {"profiles": ("seg", "seg-fractional")},
        {"only_changed": False},
    ):
        other = replace(copy, **changed)
        assert calls(segment(other), other) == PATIENTS, changed


def test_masks_that_are_gone_are_made_again_when_they_are_needed(copy: SegmentConfig) -> None:
    before = {path: path.read_bytes() for path in masks(copy)}
    assert len(before) == PATIENTS
    gone, spoiled, *_ = before
    gone.unlink()
    spoiled.write_bytes(before[spoiled][:-1])
    assert segment(copy).skipped == PATIENTS
    other = replace(copy, profiles=("nifti", "seg"))
    result = segment(other)
    assert (result.segmented, result.from_masks, calls(result, other)) == (PATIENTS, PATIENTS - 2, 2)
    assert {path: path.read_bytes() for path in masks(other)} == before


def test_files_that_are_gone_come_from_kept_masks(done: SegmentConfig, tmp_path: Path) -> None:
    config = replace(done, output=str(tmp_path / "out"))
    segment(config)
    made = contents(config)
    Path(config.output, next(iter(made))).unlink()
    result = segment(replace(config, verify=True))
    assert (result.segmented, result.skipped, calls(result, config)) == (1, PATIENTS - 1, 0)
    assert contents(config) == made


def test_another_input_is_segmented_anew(done: SegmentConfig, tmp_path: Path) -> None:
    shutil.copytree(Path(str(done.manifest)).parent / "archive", tmp_path / "archive")
    config = replace(done, manifest=cataloged(tmp_path), output=str(tmp_path / "out"))
    segment(config)
    one, other, *_ = sorted((tmp_path / "archive").rglob("*.dcm"))[::SLICES]
    # The one is cataloged again. The other one is not: its header tells.
    dataset = pydicom.dcmread(one)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(one)
    cataloged(tmp_path)
    again = pydicom.dcmread(other)
    again.StudyDescription = "changed since"
    again.save_as(other)
    changed = replace(config, profiles=("seg", "nifti"))
    result = segment(changed)
    assert (result.segmented, result.from_masks, calls(result, changed)) == (PATIENTS, PATIENTS - 2, 2)
    fresh = replace(changed, output=str(tmp_path / "fresh"))
    segment(fresh)
    made = contents(fresh)
    assert {path: contents(changed).get(path) for path in made} == made


@pytest.mark.parametrize("stage", ["masks", "files"])
def test_an_actor_that_dies_amid_a_stage_loses_and_doubles_nothing(
    done: SegmentConfig, copy: SegmentConfig, tmp_path: Path, stage: str
) -> None:
    """It dies when its first file comes to the PACS: masks are kept then, and the row is not written."""
    config = copy if stage == "files" else replace(done, output=str(tmp_path / "new"))
    killed: list[int] = []

    def kill() -> None:
        if not killed:
            assert len(masks(config)) > 0
            ours = psutil.Process().children(recursive=True)
            actor = next(one for one in ours if "_Segmenter" in " ".join(one.cmdline()))
            killed.append(actor.pid)
            actor.kill()

    with pacs(kill) as url:
        config = replace(config, pacs=url)
        result = segment(config)
        assert len(killed) == 1
        assert (result.segmented, result.rejected) == (PATIENTS, 0)
        assert (calls(result, config) == 0) == (stage == "files")
        rows = ledger.read(config.output).to_pylist()
        assert len({(row["series_key"], row["config_digest"]) for row in rows}) == len(rows)
        assert {path.split("/")[1] for path in contents(config)} == {path.split("/")[1] for path in contents(done)}
        assert set(contents(config).values()) == set(contents(done).values())
        assert [path.read_bytes() for path in masks(config)] == [path.read_bytes() for path in masks(done)]
        assert segment(config).skipped == PATIENTS


def test_a_run_that_is_killed_amid_its_files_goes_on_without_the_network(
    done: SegmentConfig, copy: SegmentConfig, no_network: None
) -> None:
    other = replace(copy, profiles=("seg", "glb"), unrecorded=1)
    script = dying_at_the_first_rows(other)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    result = segment(other)
    assert 1 <= result.skipped < PATIENTS
    assert (result.segmented, calls(result, other)) == (PATIENTS - result.skipped, 0)
    assert set(contents(done).values()) <= set(contents(other).values())
    assert len(list(Path(other.output).glob("brain-*/*.glb"))) == PATIENTS


def test_runs_without_segmentations_are_compared_by_their_masks(done: SegmentConfig, tmp_path: Path) -> None:
    config = replace(done, output=str(tmp_path / "out"), profiles=("nifti",))
    both = [segment(replace(config, model_uri=f"models:/brain/{version}")) for version in (1, 2)]
    rows = ledger.read(config.output).to_pylist()
    pixels = [sum(row["foreground_pixels"] for row in rows if row["model_version"] == version) for version in "12"]
    assert [one.segmented for one in both] == [PATIENTS, PATIENTS]
    told = diff(
        DiffConfig(config.output, config.output, str(config.manifest), str(tmp_path / "diff"), "brain/1", "brain/2", 1)
    )
    assert (told.compared, told.changed, told.not_compared) == (PATIENTS, PATIENTS, {})
    # What the one finds above 60 has all that the other one finds above 120.
    assert told.summary["dice_pooled"] == pytest.approx(2 * pixels[1] / sum(pixels))
    assert "cannot be read" not in Path(told.report).read_text()
