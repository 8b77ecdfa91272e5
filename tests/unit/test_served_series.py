"""A series over HTTP, around a real predictor: what is answered, and that it is what the bulk job writes."""

import email
import email.policy
import gzip
import io
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from fastapi.testclient import TestClient
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from scipy import ndimage

from rayseg.data import synthetic
from rayseg.data.conformal import VolumeErrors
from rayseg.dicom import segmentation
from rayseg.inference.outputs import settings_digest
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Predictor
from rayseg.inference.series import Task, segment_series
from rayseg.models.engine import Engine
from rayseg.tracking import bundle
from rayseg.tracking.registry import ModelVersion
from serving import routes
from serving.replica import ModelReplica
from serving.segment import Settings
from serving.upload import Limits
from tests import bundles

LEVEL = 150
RADIUS_MM = 1.5  # how far volumes of the model in use are off


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def tracking_uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def model(folder: Path, tracking_uri: str) -> ModelVersion:
    bundles.register(tracking_uri, "tiny", bundles.write_bundle(folder / "flat", LEVEL), "flat")
    deep = bundles.write_bundle(folder / "deep", LEVEL, neighbours=1)
    bundle.calibrate(deep, VolumeErrors((RADIUS_MM, RADIUS_MM), (19, 19)))
    return bundles.register(tracking_uri, "tiny", deep, "deep")


@pytest.fixture(scope="module")
def client(tracking_uri: str, model: ModelVersion) -> Iterator[TestClient]:
    """The model of stacks (2.5D) is the one in use."""
    replica = ModelReplica(tracking_uri=tracking_uri, model_uri="models:/tiny@deep", poll_s=3600)
    with TestClient(routes.create(replica, Settings(2**24))) as client:
        yield client


@pytest.fixture(scope="module")
def series(folder: Path) -> list[Path]:
    """The files of one patient, in the order of their planes."""
    written = synthetic.write_studies(str(folder / "studies"), patients=1, slices=12, size=96, seed=3, masks=False)
    files = Path(written.images.removeprefix("file://")).rglob("*.dcm")
    return sorted(files, key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])


@pytest.fixture(scope="module")
def bulk(folder: Path, series: list[Path], model: ModelVersion) -> dict[str, bytes]:
    """What the bulk job writes, by profile, for the model of stacks."""
    task = Task(
        str(folder / "bulk"),
        model,
        "",
        ("seg", "nifti", "glb"),
        settings=settings_digest(Postprocess(), Engine(), None),
    )
    row = segment_series(
        Predictor.load(folder / "deep"),
        task,
        series_key="s",
        patient_key="p",
        uris=[str(path) for path in series],
        frames=[None] * len(series),
    )
    assert row["verdict"] == "segmented"
    assert row["foreground_pixels"] > 100
    return {one["profile"]: Path(one["uri"].removeprefix("file://")).read_bytes() for one in row["outputs"]}


def zipped(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def shuffled(series: list[Path]) -> dict[str, bytes]:
    """Under names that say another order, or lead elsewhere."""
    paths = random.Random(1).sample(series, len(series))
    return {f"../../{number}/../{number}": path.read_bytes() for number, path in enumerate(paths)}


def post(client: TestClient, body: bytes, accept: str = "application/json", kind: str = "application/zip", **query):
    return client.post("/v1/segment", content=body, headers={"content-type": kind, "accept": accept}, params=query)


@pytest.mark.parametrize(
    ("accept", "profile"), [("application/dicom", "seg"), ("application/nifti", "nifti"), ("model/gltf-binary", "glb")]
)
def test_a_zip_in_any_order_gives_the_bulk_jobs_bytes(
    client: TestClient, series: list[Path], bulk: dict[str, bytes], accept: str, profile: str
) -> None:
    answer = post(client, zipped(shuffled(series)), accept)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == accept
    assert answer.headers["x-model-version"] == "2"
    assert answer.content == bulk[profile]


def test_a_form_is_a_series_too(client: TestClient, series: list[Path], bulk: dict[str, bytes]) -> None:
    parts = [("file", (name, content)) for name, content in shuffled(series).items()]
    answer = client.post("/v1/segment", files=[*parts, ("note", b"x")], headers={"accept": "application/dicom"})
    assert answer.status_code == 200
    assert answer.content == bulk["seg"]


def test_figures_are_those_of_the_masks(client: TestClient, series: list[Path], bulk: dict[str, bytes]) -> None:
    masks = np.stack([segmentation.decode(bulk["seg"])[pydicom.dcmread(path).SOPInstanceUID] for path in series])
    first = pydicom.dcmread(series[0])
    step = float(
        np.linalg.norm(np.subtract(pydicom.dcmread(series[1]).ImagePositionPatient, first.ImagePositionPatient))
    )
    voxel_ml = float(np.prod(first.PixelSpacing)) * step / 1000
    told = post(client, zipped(shuffled(series))).json()
    assert (told["slices"], told["rows"], told["columns"]) == masks.shape
    assert told["foreground_pixels"] == np.count_nonzero(masks)
    assert told["volume_ml"] == pytest.approx(np.count_nonzero(masks) * voxel_ml, rel=0.01)
    assert told["labels"][0]["name"] == "lesion"
    _, count = ndimage.label(masks, np.ones((3, 3, 3)))
    assert told["lesion_count"] == count
    assert sum(lesion["pixels"] for lesion in told["lesions"]) == np.count_nonzero(masks)
    largest = told["lesions"][0]
    where = np.flatnonzero(masks.any(axis=(1, 2)))
    assert where[0] <= largest["slices"][0] <= largest["slices"][1] <= where[-1]
    assert largest["max_diameter_mm"] < 300
    assert (told["rejected"], told["version"]) == ({}, "2")
    assert "modality" in told["quality"]["flags"]
    assert "modality: CT, not MR" in told["quality"]["detail"]
    assert told["quality"]["pairwise_dice"] is None, "one model has nobody to agree with"
    assert 0 <= told["quality"]["entropy_bits"] <= 1


def test_volumes_have_the_interval_of_the_model_in_use(client: TestClient, series: list[Path]) -> None:
    data = zipped(shuffled(series))
    told = post(client, data).json()
    radius_mm = np.cbrt(1000 * told["volume_ml"] * 3 / (4 * np.pi))
    ends_ml = [4 / 3 * np.pi * (radius_mm + step) ** 3 / 1000 for step in (-RADIUS_MM, RADIUS_MM)]
    for of in (told, told["labels"][0]):
        assert [of["volume_low_ml"], of["volume_high_ml"]] == pytest.approx(ends_ml, abs=2e-3)
    # Other masks than those of the model's own threshold have other errors, and another model has none that are known.
    for other in ({"threshold": 0.4}, {"model": "flat"}):
        told = post(client, data, **other).json()
        assert told["volume_ml"] > 0
        assert (told["volume_low_ml"], told["labels"][0]["volume_high_ml"]) == (None, None)


def test_a_picture_of_one_slice_has_its_neighbours(
    client: TestClient, series: list[Path], bulk: dict[str, bytes]
) -> None:
    masks = segmentation.decode(bulk["seg"])
    for number in (0, 5, 11):
        answer = post(client, zipped(shuffled(series)), "image/png", slice=number)
        expected = masks[pydicom.dcmread(series[number]).SOPInstanceUID]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), expected)
    overlay = post(client, zipped(shuffled(series)), "image/png", slice=5, picture="overlay")
    assert Image.open(io.BytesIO(overlay.content)).size == (96, 96)
    assert Image.open(io.BytesIO(overlay.content)).mode == "RGB"
    assert post(client, zipped(shuffled(series)), "image/png").status_code == 406
    assert post(client, zipped(shuffled(series)), "image/png", slice=12).json()["reason"] == "invalid_parameter"


def test_what_does_not_belong_is_left_out_and_told(client: TestClient, series: list[Path]) -> None:
    contents = shuffled(series)
    scout = pydicom.dcmread(series[0])
    scout.ImageType, scout.SOPInstanceUID, scout.SeriesInstanceUID = (
        ["ORIGINAL", "PRIMARY", "LOCALIZER"],
        "1.2.3",
        "1.2",
    )
    buffer = io.BytesIO()
    scout.save_as(buffer)
    extra = {"scout": buffer.getvalue(), "copy": series[3].read_bytes(), "readme.txt": b"x" * 200, "empty": b""}
    told = post(client, zipped(contents | extra)).json()
    assert told["slices"] == 12
    assert told["rejected"] == {"localizer": 1, "series_duplicates": 1, "not_dicom": 1, "empty_object": 1}


def test_two_series_are_refused_with_their_sizes(client: TestClient, series: list[Path]) -> None:
    contents = shuffled(series)
    for path in series[:3]:
        other = pydicom.dcmread(path)
        other.SeriesInstanceUID = "1.2.3"
        other.SOPInstanceUID += ".1"
        buffer = io.BytesIO()
        other.save_as(buffer)
        contents[path.name] = buffer.getvalue()
    refused = post(client, zipped(contents))
    assert refused.status_code == 422
    assert refused.json()["reason"] == "series_mixed"
    assert "12, 3 slices" in refused.json()["detail"] or "3, 12 slices" in refused.json()["detail"]


def test_a_volume_is_segmented_in_its_own_frame(client: TestClient, bulk: dict[str, bytes], series: list[Path]) -> None:
    """A NIfTI of the same scan gives the same masks as its DICOM."""
    expected = nib.Nifti1Image.from_bytes(gzip.decompress(bulk["nifti"]))
    values = np.stack(
        [
            pixels.pixel_array * float(pixels.RescaleSlope) + float(pixels.RescaleIntercept)
            for pixels in map(pydicom.dcmread, series)
        ]
    )
    source = nib.Nifti1Image(values.transpose(2, 1, 0).astype(np.int16), expected.affine)
    answer = post(client, gzip.compress(source.to_bytes()), "application/nifti", "application/octet-stream")
    assert answer.status_code == 200
    found = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    assert np.allclose(found.affine, expected.affine, atol=1e-3)
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    refused = post(client, source.to_bytes(), "application/dicom", "application/octet-stream")
    assert (refused.status_code, refused.json()["reason"]) == (422, "missing_attribute")


@pytest.mark.parametrize("codes", ["RAS", "PSR"])
def test_a_volumes_mask_comes_back_on_its_own_voxels(
    client: TestClient, folder: Path, model: ModelVersion, codes: str
) -> None:
    """However the upload is stored: a box of bright voxels is found where it is, and as the bulk job finds it."""
    values = np.full((64, 64, 7), 5, np.int16)
    values[40:50, 6:14, 2:6] = 100
    upright = nib.Nifti1Image(values, np.diag([0.9, 1.1, 4.0, 1.0]))
    turn = ornt_transform(io_orientation(upright.affine), axcodes2ornt(codes))
    image = upright.as_reoriented(turn)
    image.set_qform(image.affine, code=1)
    answer = post(client, image.to_bytes(), "application/nifti", "application/octet-stream")
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    assert np.array_equal(mask.affine, image.affine)
    assert mask.shape == image.shape
    box = np.zeros(values.shape)
    box[40:50, 6:14, 3:5] = 1  # all three slices of a stack have to be bright in the mean
    expected = np.asarray(nib.Nifti1Image(box, upright.affine).as_reoriented(turn).dataobj)
    inside = mask.get_fdata()
    assert inside[expected > 0].all()
    assert not inside[image.get_fdata() < 50].any()
    path = folder / f"{codes}.nii"
    path.write_bytes(image.to_bytes())
    row = segment_series(
        Predictor.load(folder / "deep"),
        Task(str(folder / codes), model, "", ("nifti",)),
        series_key="s",
        patient_key="p",
        uris=[str(path)] * 7,
        frames=range(7),
        kind="volume",
    )
    assert Path(row["outputs"][0]["uri"]).read_bytes() == answer.content
    # The form's volumes count slices as the figures beside them do, from the feet.
    told = post(client, image.to_bytes(), "multipart/form-data", "application/octet-stream")
    assert told.status_code == 200
    shapes = [nib.Nifti1Image.from_bytes(gzip.decompress(part)).shape for part in volumes_of(told)]
    assert shapes == [(64, 64, 7)] * 2


def test_a_tilted_series_is_told_and_comes_upright_on_request(
    client: TestClient, folder: Path, series: list[Path], model: ModelVersion
) -> None:
    """ITK reads the upright volume, which is the bulk job's, and refuses the others instead of moving them."""
    leaning = folder / "leaning"
    leaning.mkdir()
    for path in series:
        dataset = pydicom.dcmread(path)
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y + 0.25 * z, z]
        dataset.save_as(leaning / path.name)
    body = zipped({path.name: path.read_bytes() for path in leaning.iterdir()})
    row = segment_series(
        Predictor.load(folder / "deep"),
        Task(str(folder / "leaned"), model, "", ("nifti", "nifti-upright")),
        series_key="s",
        patient_key="p",
        uris=[str(leaning / path.name) for path in series],
        frames=[None] * len(series),
    )
    expected = {one["profile"]: Path(one["uri"].removeprefix("file://")).read_bytes() for one in row["outputs"]}
    own, straight = post(client, body, "application/nifti"), post(client, body, "application/nifti", grid="upright")
    assert (own.content, straight.content) == (expected["nifti"], expected["nifti-upright"])
    form = post(client, body, "multipart/form-data")
    assert "grid=upright" in own.headers["X-Warning"] == form.headers["X-Warning"]
    assert "X-Warning" not in straight.headers
    assert "X-Warning" not in post(client, body).headers
    path = folder / "tilted.nii.gz"
    for refused in (own.content, *volumes_of(form)):
        path.write_bytes(refused)
        with pytest.raises(RuntimeError, match="orthonormal"):
            SimpleITK.ReadImage(str(path))
    path.write_bytes(straight.content)
    read = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    assert np.count_nonzero(read) == np.count_nonzero(nib.Nifti1Image.from_bytes(gzip.decompress(own.content)).dataobj)
    assert post(client, body, "application/nifti", grid="tilted").status_code == 422


def volumes_of(answer: httpx.Response) -> list[bytes]:
    """Image and mask of a form, by the email package."""
    whole = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode() + answer.content
    form = email.message_from_bytes(whole, policy=email.policy.HTTP)
    return [part.get_content() for part in form.iter_parts() if part.get_content_type() == "application/nifti"]


def test_another_version_and_threshold_by_query(client: TestClient, series: list[Path], folder: Path) -> None:
    body = series[6].read_bytes()
    refused = post(client, body, kind="application/dicom")
    assert (refused.status_code, refused.json()["reason"]) == (422, "needs_neighbours")
    predictor = Predictor.load(folder / "flat")
    (expected,) = predictor.segment([body])
    for name in ("1", "flat"):
        answer = post(client, body, "image/png", "application/dicom", model=name)
        assert answer.headers["x-model-version"] == "1"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), expected.mask)
    least = post(client, body, kind="application/dicom", model="1", threshold=0.001).json()["foreground_pixels"]
    most = post(client, body, kind="application/dicom", model="1", threshold=0.999).json()["foreground_pixels"]
    assert least > np.count_nonzero(expected.mask) > most
    assert post(client, body, kind="application/dicom", model="nobody").status_code == 404
    assert post(client, body, kind="application/dicom", model="../1").status_code == 422
    held = client.get("/v1/models").json()
    assert [(one["version"], one["roles"], one["state"]) for one in held["models"]] == [
        ("2", ["current"], "serving"),
        ("1", [], "held"),
    ]
    assert client.get("/v1/models/deep").json()["version"] == "2"
    assert client.get("/v1/models/77").status_code == 404
    assert client.get("/healthz").json()["version"] == "2"


def test_bombs_and_rubble_are_refused(client: TestClient, series: list[Path]) -> None:
    app = routes.create(
        client.app,  # never asked
        Settings(2**24, limits=Limits(objects=20, inflated_bytes=2**20)),
    )
    strict = TestClient(app)
    bomb = zipped({"a": b"\0" * 2**21})
    many = zipped({str(number): b"" for number in range(21)})
    broken = zipped({"a": series[0].read_bytes()})[:-30]
    bzip = io.BytesIO()
    with zipfile.ZipFile(bzip, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", b"x")
    cases = [(bomb, 413), (many, 413), (broken, 400), (bzip.getvalue(), 400), (b"PK\3\4", 400), (b"", 400)]
    for body, status in cases:
        answer = post(strict, body)
        assert answer.status_code == status, json.dumps(answer.json())
    lonely = strict.post("/v1/segment", content=b"--x--", headers={"content-type": "multipart/form-data"})
    assert lonely.status_code == 400
    unfinished = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc'
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert strict.post("/v1/segment", content=unfinished, headers=form).json()["reason"] == "truncated"


def test_odd_entries_of_a_zip_are_read_or_refused(client: TestClient, series: list[Path]) -> None:
    """No name; then, in the directory and by hand: an encrypted entry, a name that is no UTF-8."""
    contents = {path.name: path.read_bytes() for path in series}
    expected = post(client, zipped(contents), "application/nifti").content
    first = next(iter(contents.values()))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, content in enumerate(contents.values()):
            archive.writestr(zipfile.ZipInfo("" if number == 0 else str(number)), content)
    assert post(client, buffer.getvalue(), "application/nifti").content == expected
    for at, flag in ((8, 1), (9, 8)):  # of the flags: encrypted, a name in UTF-8
        spoiled = bytearray(zipped({"\xff": first, "b": first}))
        directory = spoiled.index(b"PK\1\2")
        spoiled[directory + at] |= flag
        spoiled[directory + 46] = 0xFF
        answer = post(client, bytes(spoiled))
        assert (answer.status_code, answer.json()["reason"]) == (400, "corrupt")


def test_frames_of_one_object_are_a_series(client: TestClient, folder: Path, model: ModelVersion, enhanced, as_file):
    """Slices with one rescale each, and in an order of their own."""
    rows, columns = np.mgrid[:48, :64]
    words_NHW = np.stack([np.hypot(rows - 20 - n, columns - 30) < 12 for n in range(5)]).astype(np.uint16) * 40
    body = as_file(enhanced(words_NHW, [(0, 0, z) for z in (8, 0, 4, 2, 6)]))
    (folder / "frames.dcm").write_bytes(body)
    row = segment_series(
        Predictor.load(folder / "deep"),
        Task(str(folder / "bulk"), model, "", settings=settings_digest(Postprocess(), Engine(), None)),
        series_key="frames",
        patient_key="p",
        uris=[str(folder / "frames.dcm")] * 5,
        frames=[1, 3, 2, 4, 0],
    )
    assert row["foreground_pixels"] > 0
    answer = post(client, body, "application/dicom", "application/dicom")
    assert answer.status_code == 200
    assert answer.content == Path(row["outputs"][0]["uri"].removeprefix("file://")).read_bytes()
    assert post(client, body, kind="application/dicom").json()["slices"] == 5
