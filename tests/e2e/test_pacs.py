"""An archive in a PACS: Orthanc's studies are cataloged and segmented, and what is made is stored there."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient

from rayseg import pacs, retry, snapshots, storage
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.dicom import segmentation
from rayseg.dicom.reading import Slice, read_slice
from rayseg.inference import ledger
from rayseg.inference.archive import SegmentConfig, segment
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Prediction
from rayseg.inference.series import Task, segment_series
from rayseg.tracking import registry
from tests.faults import faulty
from tests.orthanc import PASSWORD
from tests.ray.test_archive import Models, models  # noqa: F401 (a fixture)
from tests.unit.guarded import asked, mask, service

pytestmark = pytest.mark.e2e

PATIENTS, SLICES = 3, 3


@pytest.fixture(scope="module")
def files(client: DICOMwebClient, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The studies that are in the PACS: SOPInstanceUID -> file."""
    folder = tmp_path_factory.mktemp("studies")
    synthetic.write_studies(str(folder), patients=PATIENTS, slices=SLICES, size=48, seed=3, masks=False)
    found = [path.read_bytes() for path in sorted(folder.rglob("*.dcm"))]
    datasets = [pydicom.dcmread(BytesIO(data)) for data in found]
    datasets[0].compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    stream = BytesIO()
    datasets[0].save_as(stream)
    found[0] = stream.getvalue()
    client.store_instances(datasets)
    return {str(dataset.SOPInstanceUID): data for dataset, data in zip(datasets, found, strict=True)}


def query(server: str) -> str:
    return f"dicomweb+{server}/dicom-web?ModalitiesInStudy=CT&Modality=CT"


def refuse(server: str, session: requests.Session, refused: bool) -> None:
    """Whether the server refuses to store by DICOMweb from now on."""
    condition = "method == 'POST' and uri == '/dicom-web/studies'" if refused else "false"
    script = f"function IncomingHttpRequestFilter(method, uri) return not ({condition}) end"
    session.post(f"{server}/tools/execute-script", data=script, timeout=10).raise_for_status()


def test_instances_are_listed_and_come_as_they_are_stored(
    server: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs, "PAGE", 2)
    uris = list(pacs.instances(query(server)))
    assert {uri.rpartition("/")[2]: storage.read(uri) for uri in uris} == files
    assert [info.uri for info in storage.list_files(query(server))] == uris
    assert list(pacs.instances(f"{query(server)}&StudyDate=-19000101")) == []
    assert list(pacs.instances(f"dicomweb+{server}/dicom-web?Modality=MR")) == []
    first = pydicom.dcmread(BytesIO(next(iter(files.values()))), stop_before_pixels=True)
    found = list(pacs.instances(f"dicomweb+{server}/dicom-web?PatientID={first.PatientID}"))
    assert len(found) == SLICES
    assert all(f"/{first.StudyInstanceUID}/" in uri for uri in found)
    with pytest.raises(FileNotFoundError):
        storage.read(f"{uris[0]}.1")
    monkeypatch.setenv(PASSWORD, "wrong")
    with pytest.raises(retry.CredentialsError, match="HTTP 401"):
        storage.read(uris[0])


def test_calls_that_fail_are_made_again(server: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "sleep", lambda pause: None)
    with faulty(server, seed=5) as faults:
        faults.share, faults.stall_s = 0.3, 0.01
        uris = list(pacs.instances(query(faults.url)))
        assert {uri.rpartition("/")[2]: data for uri, data in zip(uris, storage.read_each(uris), strict=True)} == files
        assert set(faults.counts) >= {"500", "503", "stall", "reset", "truncate"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_archive_is_segmented_from_a_pacs_into_it(
    server: str,
    session: requests.Session,
    client: DICOMwebClient,
    files: dict[str, bytes],
    models: Models,  # noqa: F811
    tmp_path: Path,
) -> None:
    manifest = str(tmp_path / "manifest.parquet")
    found = catalog(CatalogConfig(query(server), manifest))
    assert (found.objects, found.accepted, found.series) == (PATIENTS * SLICES, PATIENTS * SLICES, PATIENTS)
    assert sorted(snapshots.read_table(manifest)["bytes"].to_pylist()) == sorted(map(len, files.values()))
    config = SegmentConfig(
        *("models:/brain@champion", models.tracking_uri, str(tmp_path / "segmented"), manifest),
        profiles=("seg", "report", "stl"),
        pacs=f"{server}/dicom-web",
    )

    refuse(server, session, True)
    with pytest.raises(ValueError, match="write_failed 9"):
        segment(config)
    refuse(server, session, False)
    rows = ledger.read(config.output).to_pylist()
    assert {row["detail"] for row in rows} == {"seg: PACS: HTTP 403"}
    assert client.search_for_series(search_filters={"Modality": "SEG"}) == []

    assert segment(config).segmented == PATIENTS
    before = session.get(f"{server}/statistics", timeout=10).json()["CountInstances"]
    assert before == PATIENTS * (SLICES + 2)
    predictor = models.predictor(1)
    studies = {str(pydicom.dcmread(BytesIO(data)).StudyInstanceUID) for data in files.values()}
    masks: dict[str, np.ndarray] = {}
    for study in studies:
        [place] = client.search_for_instances(study, search_filters={"Modality": "SEG"})
        seg = client.retrieve_instance(study, place["0020000E"]["Value"][0], place["00080018"]["Value"][0])
        stream = BytesIO()
        seg.save_as(stream, enforce_file_format=True)
        masks |= segmentation.decode(stream.getvalue())
        assert len(client.search_for_instances(study, search_filters={"Modality": "SR"})) == 1
    assert masks.keys() == files.keys()
    for uid, data in files.items():
        (expected,) = predictor.segment([data])
        assert isinstance(expected, Prediction)
        np.testing.assert_array_equal(masks[uid], expected.mask)
    for row in ledger.read(config.output).to_pylist():
        places = {output["profile"]: output["pacs"] for output in row["outputs"]}
        assert places["stl"] is None
        for profile, modality in (("seg", "SEG"), ("report", "SR")):
            [there] = session.get(places[profile], headers={"Accept": "application/dicom+json"}, timeout=10).json()
            assert there["00080060"]["Value"] == [modality]
            assert there["0020000D"]["Value"][0] in studies
            assert not any(uid in places[profile] for uid in (*files, *studies))

    catalog(CatalogConfig(query(server), manifest))
    assert segment(config).skipped == PATIENTS
    assert session.get(f"{server}/statistics", timeout=10).json()["CountInstances"] == before


def test_storing_twice_doubles_nothing_and_another_setting_is_another_object(
    server: str,
    session: requests.Session,
    files: dict[str, bytes],
    models: Models,  # noqa: F811
    tmp_path: Path,
) -> None:
    _, model = registry.fetch(models.tracking_uri, "models:/brain/2")
    study = pydicom.dcmread(BytesIO(next(iter(files.values()))), stop_before_pixels=True).StudyInstanceUID
    uris = [uri for uri in pacs.instances(query(server)) if f"/{study}/" in uri]
    task = Task(str(tmp_path), model, "0", pacs=f"{server}/dicom-web")

    def count(task: Task) -> int:
        row = segment_series(
            models.predictor(2), task, series_key="s", patient_key="p", uris=uris, frames=[None] * len(uris)
        )
        assert row["verdict"] == "segmented", row["detail"]
        return session.get(f"{server}/statistics", timeout=10).json()["CountInstances"]

    first = count(task)
    assert count(task) == first
    # Orthanc keeps what it has: under the same UID the new masks would be lost.
    assert count(replace(task, postprocess=Postprocess(fill_holes=True), settings="holes filled")) == first + 1


def test_the_service_segments_a_series_of_the_pacs_and_stores_the_seg_there(
    server: str, session: requests.Session, client: DICOMwebClient, files: dict[str, bytes]
) -> None:
    app = service(pacs=f"{server}/dicom-web")
    first = pydicom.dcmread(BytesIO(next(iter(files.values()))), stop_before_pixels=True)
    wanted = {"study": str(first.StudyInstanceUID), "series": str(first.SeriesInstanceUID)}
    route = "/v1/dicomweb/segment"
    done, again, absent, spoiled, without = (
        *asked(
            app,
            lambda client: client.post(route, json=wanted),
            lambda client: client.post(route, json=wanted),
            lambda client: client.post(route, json=wanted | {"series": "1.2.3"}),
            lambda client: client.post(route, json=wanted | {"study": "1.2/../.."}),
        ),
        *asked(service(), lambda client: client.post(route, json=wanted)),
    )
    assert done.status_code == 200, done.text
    told = done.json()
    assert (told["figures"]["slices"], told["figures"]["rejected"]) == (SLICES, {})
    seg = client.retrieve_instance(wanted["study"], told["series_instance_uid"], told["sop_instance_uid"])
    stream = BytesIO()
    seg.save_as(stream, enforce_file_format=True)
    masks = segmentation.decode(stream.getvalue())
    assert len(masks) == SLICES
    for uid, found in masks.items():
        slice = read_slice(files[uid])
        assert isinstance(slice, Slice)
        np.testing.assert_array_equal(found, mask(slice))
    assert again.json()["sop_instance_uid"] == told["sop_instance_uid"]
    assert [(one.status_code, one.json()["reason"]) for one in (absent, spoiled, without)] == [
        (404, "unknown_series"),
        (422, "invalid_parameter"),
        (422, "no_pacs"),
    ]
    refuse(server, session, True)
    try:
        (refused,) = asked(app, lambda client: client.post(route, json=wanted | {"threshold": 0.25}))
        assert (refused.status_code, refused.json()["reason"]) == (502, "pacs_failed")
    finally:
        refuse(server, session, False)
