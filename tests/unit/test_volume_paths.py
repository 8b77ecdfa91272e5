"""A series through a model of volumes by a local call, the bulk job and HTTP: the same masks, and the same files."""

import base64
import email
import email.policy
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from rayseg import storage
from rayseg.data import synthetic
from rayseg.dicom import segmentation
from rayseg.dicom.reading import Slice, read_slice
from rayseg.inference import kept, ledger
from rayseg.inference.archive import SegmentConfig, segment
from rayseg.inference.outputs import settings_digest
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import _load_pyfunc, load_any
from rayseg.inference.remake import Model, remake_series
from rayseg.inference.series import Task, segment_series
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.models.engine import Engine
from rayseg.tracking.registry import ModelVersion
from serving import routes
from serving.replica import ModelReplica
from serving.segment import Settings
from tests import bundles
from tests.kills import undecodable
from tests.unit.test_kept import content
from tests.unit.test_served_series import shuffled, zipped

PROFILES = ("seg", "seg-labelmap", "seg-fractional", "report", "nifti", "stl", "glb", "png", "overlays")
OF_MASKS = ("seg", "seg-labelmap", "report", "nifti", "stl", "glb", "png", "overlays")
LEVEL_HU = 55.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volumes")


@pytest.fixture(scope="module")
def tracking_uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def model(folder: Path, tracking_uri: str) -> ModelVersion:
    return bundles.register(
        tracking_uri, "volumes", bundles.write_volume_bundle(folder / "bundle", LEVEL_HU), "champion"
    )


@pytest.fixture(scope="module")
def predictor(folder: Path, model: ModelVersion) -> VolumePredictor:
    found = load_any(folder / "bundle", threads=2)
    assert isinstance(found, VolumePredictor)
    return found


@pytest.fixture(scope="module")
def client(tracking_uri: str, model: ModelVersion) -> Iterator[TestClient]:
    replica = ModelReplica(tracking_uri=tracking_uri, model_uri="models:/volumes@champion", poll_s=3600)
    with TestClient(routes.create(replica, Settings(2**24))) as client:
        yield client


@pytest.fixture(scope="module")
def series(folder: Path) -> list[Path]:
    """The files of a tilted patient, in the order of their planes."""
    written = synthetic.write_studies(str(folder / "studies"), patients=3, slices=12, size=96, seed=3, masks=False)
    files = Path(written.images.removeprefix("file://"), "phantom-3-002").rglob("*.dcm")
    return sorted(files, key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])


@pytest.fixture(scope="module")
def local(predictor: VolumePredictor, series: list[Path]) -> np.ndarray:
    slices = [read_slice(path.read_bytes()) for path in series]
    masks = np.stack(predictor.predict([one for one in slices if isinstance(one, Slice)]))
    assert 100 < masks.sum() < 0.2 * masks.size
    return masks


def task(folder: Path, model: ModelVersion, profiles: tuple[Any, ...] = PROFILES) -> Task:
    settings = settings_digest(Postprocess(), Engine(), None)
    return Task(
        str(folder / "out"), model, "", profiles, settings=settings, keep=kept.Keep(str(folder / "k"), "k" * 64)
    )


def bulk(predictor: VolumePredictor, of: Task, paths: list[Path], **changed: Any) -> dict[str, Any]:
    values = {"uris": [str(path) for path in paths], "frames": [None] * len(paths)} | changed
    return segment_series(predictor, of, series_key="s", patient_key="p", **values)


@pytest.fixture(scope="module")
def files(folder: Path, predictor: VolumePredictor, model: ModelVersion, series: list[Path]) -> dict[str, list[bytes]]:
    row = bulk(predictor, task(folder, model), series)
    assert row["verdict"] == "segmented", row["detail"]
    assert row["not_made"] == []
    assert row["flags"] == ["modality", "spacing"]
    made: dict[str, list[bytes]] = {}
    for one in row["outputs"]:
        made.setdefault(one["profile"], []).append(storage.read(one["uri"]))
    assert set(made) == set(PROFILES)
    return made


def post(
    client: TestClient, body: bytes, accept: str = "application/json", kind: str = "application/zip", **query: Any
):
    return client.post("/v1/segment", content=body, headers={"content-type": kind, "accept": accept}, params=query)


def test_the_bulk_jobs_masks_are_the_local_calls(
    files: dict[str, list[bytes]], series: list[Path], local: np.ndarray
) -> None:
    uids = [str(pydicom.dcmread(path).SOPInstanceUID) for path in series]
    for profile in ("seg", "seg-labelmap"):
        decoded = segmentation.decode(files[profile][0])
        empty = np.zeros(local.shape[1:], np.uint8)
        assert np.array_equal(np.stack([decoded.get(uid, empty) for uid in uids]), local)
    assert np.array_equal(np.stack([np.asarray(Image.open(io.BytesIO(one))) for one in files["png"]]), local)
    assert len(files["overlays"]) == np.count_nonzero(local.any(axis=(1, 2)))


@pytest.mark.parametrize(
    ("accept", "profile"), [("application/dicom", "seg"), ("application/nifti", "nifti"), ("model/gltf-binary", "glb")]
)
def test_http_gives_the_bulk_jobs_bytes(
    client: TestClient, series: list[Path], files: dict[str, list[bytes]], accept: str, profile: str
) -> None:
    answer = post(client, zipped(shuffled(series)), accept)
    assert answer.status_code == 200, answer.text
    assert answer.content == files[profile][0]


def test_http_tells_figures_pictures_and_what_a_viewer_needs(
    client: TestClient, series: list[Path], local: np.ndarray
) -> None:
    body = zipped(shuffled(series))
    figures = post(client, body).json()
    assert figures["foreground_pixels"] == local.sum()
    assert figures["quality"]["flags"] == ["modality", "spacing"]
    number = int(local.sum(axis=(1, 2)).argmax())
    mask = post(client, body, "image/png", slice=number)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask.content))), local[number])
    overlay = post(client, body, "image/png", slice=number, picture="overlay")
    assert np.asarray(Image.open(io.BytesIO(overlay.content))).shape == (*local.shape[1:], 3)
    form = post(client, body, "multipart/form-data")
    head = f"content-type: {form.headers['content-type']}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + form.content, policy=email.policy.HTTP)
    contents = {part.get_param("name", header="content-disposition"): part for part in parts.iter_parts()}
    assert json.loads(contents["answer"].get_content())["foreground_pixels"] == local.sum()
    lower = post(client, body, threshold=0.2).json()
    assert lower["foreground_pixels"] > local.sum()


def test_a_slice_alone_is_refused(client: TestClient, series: list[Path], predictor: VolumePredictor) -> None:
    answer = post(client, series[0].read_bytes(), kind="application/dicom")
    assert answer.status_code == 422
    assert answer.json()["reason"] == "needs_neighbours"
    assert "segment its series as a whole" in answer.json()["detail"]


def test_mlflows_rows_of_one_series_are_a_series(
    folder: Path, model: ModelVersion, series: list[Path], local: np.ndarray
) -> None:
    """As `mlflow models serve` hands them over: rows in any order, a reject and one of another series among them."""
    other = synthetic.slice_bytes(9, 64)
    blobs = [path.read_bytes() for path in series]
    order = np.random.default_rng(2).permutation(len(blobs)).tolist()
    table = pd.DataFrame({"dicom": [*(blobs[number] for number in order), b"nothing", other]})
    answer = _load_pyfunc(str(folder / "bundle")).predict(table)
    assert answer["reason"].tolist() == [None] * len(blobs) + ["not_dicom", "needs_neighbours"]
    for number, png in zip(order, answer["mask_png"], strict=False):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))), local[number])


def test_a_series_without_thickness_or_place_is_refused(
    client: TestClient, predictor: VolumePredictor, model: ModelVersion, folder: Path, tmp_path: Path
) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(picture, "PNG")
    (tmp_path / "x.png").write_bytes(picture.getvalue())
    row = bulk(predictor, task(tmp_path, model, ("png",)), [tmp_path / "x.png"], kind="image")
    assert (row["verdict"], row["reason"]) == ("rejected", "needs_neighbours")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.png", picture.getvalue())
    answer = post(client, buffer.getvalue())
    assert answer.json()["reason"] == "needs_neighbours"


@pytest.mark.parametrize("code", ["LPS", "RAS", "LAS", "PIR"])
def test_a_nifti_volume_in_any_orientation(
    client: TestClient, predictor: VolumePredictor, model: ModelVersion, tmp_path: Path, code: str
) -> None:
    """Bulk and HTTP give the same file, whose voxels are the image's; the bright box is where it was."""
    values = np.full((40, 44, 20), -40, np.int16)  # halfway to the box is the model's level
    values[10:30, 12:30, 6:14] = 150
    image = nib.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0]))
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(code))
    )
    path = tmp_path / "volume.nii"
    path.write_bytes(turned.to_bytes())
    places = {"uris": [str(path)] * 20, "frames": list(range(20))}
    if code == "PIR":
        places = {"uris": [str(path)] * 20, "frames": list(range(20))}
    row = bulk(predictor, task(tmp_path, model, ("nifti",)), [], kind="volume", **places)
    assert row["verdict"] == "segmented", row["detail"]
    written = storage.read(row["outputs"][0]["uri"])
    mask = nib.Nifti1Image.from_bytes(__import__("gzip").decompress(written))
    found, truth = np.asarray(mask.dataobj) > 0, np.asarray(turned.dataobj) > 0
    assert 2 * np.count_nonzero(found & truth) > 0.97 * (found.sum() + truth.sum())
    assert np.array_equal(mask.affine, turned.affine)
    answer = post(client, path.read_bytes(), "application/nifti", "application/nifti")
    assert answer.content == written


def test_files_from_kept_masks_are_the_same(
    predictor: VolumePredictor, model: ModelVersion, series: list[Path], tmp_path: Path
) -> None:
    of = task(tmp_path, model, OF_MASKS)
    row = bulk(predictor, of, series, input_digest="i", kind="dicom")
    again = remake_series(
        Model(predictor.known, predictor.bundle.preprocess), of, series_key="s", patient_key="p",
        uris=[str(path) for path in series], frames=[None] * len(series), input_digest="i", kind="dicom", not_made=[],
        masks=row["masks"],
    )  # fmt: skip
    assert again is not None
    assert content(again, str(tmp_path)) == content(row, str(tmp_path))


def test_an_archive_run_and_again(
    tracking_uri: str, model: ModelVersion, series: list[Path], local: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    """One of the patients lacks a slice that can be decoded: a row, and its neighbours bridge it."""
    archive = tmp_path / "archive"
    for path in (folder / "studies" / "images").rglob("*.dcm"):
        copy = archive / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = archive / "phantom-3-000" / "IM_0005.dcm"
    broken.write_bytes(undecodable(broken.read_bytes()))
    config = SegmentConfig(
        model_uri="models:/volumes/1", source=str(archive), output=str(tmp_path / "out"), tracking_uri=tracking_uri,
        profiles=("seg", "png"), engine=Engine("openvino", "float32"),
    )  # fmt: skip
    result = segment(config)
    assert (result.segmented, result.rejected, result.slices) == (3, 0, 35)
    assert result.reasons == {"decode_failed": 1}
    rows = ledger.read(config.output).to_pylist()
    (row,) = [row for row in rows if row["foreground_pixels"] == local.sum()]
    (seg,) = [one["uri"] for one in row["outputs"] if one["profile"] == "seg"]
    decoded = segmentation.decode(storage.read(seg))
    for path, mask in zip(series, local, strict=True):
        assert np.array_equal(decoded.get(str(pydicom.dcmread(path).SOPInstanceUID), np.zeros_like(mask)), mask)
    assert segment(config).skipped == 3
