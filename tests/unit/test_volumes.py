"""What the page gets of a series: places and values as other libraries read them, and what its policy allows."""

import dataclasses
import email
import email.policy
import gzip
import io
import json
from importlib import metadata
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from rayseg.data import synthetic
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice, read_slice
from rayseg.inference.quality import Look
from serving import page, volumes
from serving.findings import Found, measure
from serving.messages import ModelInfo
from serving.upload import Limits, Series, arrange


def objects(folder: str, patient: int) -> list[bytes]:
    written = synthetic.write_studies(folder, patients=patient + 1, slices=5, size=48, seed=7, masks=False)
    files = sorted(Path(written.images, f"phantom-7-{patient:03d}").glob("*.dcm"))
    return [file.read_bytes() for file in files]


def slices_of(data: list[bytes]) -> list[Slice]:
    read = [read_slice(one) for one in data]
    assert all(isinstance(one, Slice) for one in read)
    return [one for one in read if isinstance(one, Slice)]


def opened(data: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(data))


@pytest.mark.parametrize("patient", [0, 2], ids=["straight", "tilted"])
def test_every_voxel_lies_where_dicom_says_and_has_its_value(tmp_path, patient: int):
    data = objects(str(tmp_path), patient)
    slices = slices_of(data)
    masks = [np.full(one.shape, number, np.uint8) for number, one in enumerate(slices)]
    shuffled = [3, 0, 4, 1, 2]
    image, mask = map(opened, volumes.volumes([slices[i] for i in shuffled], [masks[i] for i in shuffled]))
    assert np.array_equal(image.affine, mask.affine)
    assert image.header["sform_code"] > 0
    for number, one in enumerate(map(pydicom.dcmread, map(io.BytesIO, data))):
        place = int(np.flatnonzero(np.asarray(mask.dataobj)[0, 0] == number)[0])
        row, column = 7, 31
        lps = np.array(one.ImagePositionPatient, float)  # PS3.3 C.7.6.2.1.1
        lps += column * one.PixelSpacing[1] * np.array(one.ImageOrientationPatient[:3], float)
        lps += row * one.PixelSpacing[0] * np.array(one.ImageOrientationPatient[3:], float)
        np.testing.assert_allclose(image.affine @ [column, row, place, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-3)
        hu = one.pixel_array * one.RescaleSlope + one.RescaleIntercept
        np.testing.assert_array_equal(image.get_fdata()[:, :, place].T, hu)


def test_slices_at_uneven_distances_or_without_a_place_keep_their_order_and_say_why(tmp_path):
    slices = slices_of(objects(str(tmp_path), 0))
    masks = [np.full(one.shape, number, np.uint8) for number, one in enumerate(slices)]
    image, mask = map(opened, volumes.volumes(slices[:3] + slices[4:], masks[:3] + masks[4:]))
    assert image.header["sform_code"] == image.header["qform_code"] == 0
    assert b"even distances" in image.header["descrip"].tobytes()
    assert np.asarray(mask.dataobj)[0, 0].tolist() == [0, 1, 2, 4]
    spacing_mm = slices[0].header.geometry.pixel_spacing_mm
    np.testing.assert_allclose(image.header.get_zooms()[:2], spacing_mm[::-1], rtol=1e-6)
    picture = dataclasses.replace(slices[0], header=None, rescale_slope=1.0, rescale_intercept=0.0)
    image, _ = map(opened, volumes.volumes([picture], masks[:1]))
    assert image.header["sform_code"] == 0
    assert image.header.get_zooms() == (1, 1, 1)


def test_scales_that_differ_between_slices_are_applied(tmp_path):
    slices = slices_of(objects(str(tmp_path), 0))
    slices[1] = dataclasses.replace(slices[1], rescale_slope=2.0)
    image, _ = map(opened, volumes.volumes(slices, [np.zeros(one.shape, np.uint8) for one in slices]))
    assert np.array_equal(image.get_fdata()[:, :, 1].T, slices[1].stored * 2.0 - 1024)
    assert np.array_equal(image.get_fdata()[:, :, 2].T, slices[2].stored - 1024.0)


def test_the_answer_is_a_form_that_others_take_apart(tmp_path):
    series = arrange(objects(str(tmp_path), 0), Limits())
    assert isinstance(series, Series)
    model = ModelInfo("tiny", "1", None, "d", "r", ("lesion",), Preprocess(size=(48, 48)), 0.5)
    masks = [np.eye(48, dtype=np.uint8)] * 4
    looks = [Look("CT", None, None, 0.0, 0.0, 0.0, 0, 1.0)] * 4
    found = Found(series, model, None, [0, 1, 2, 4], masks, looks, {"truncated": 1})
    body = volumes.view(found, measure(found, {"total": 1.0}))
    told = email.message_from_bytes(
        f"Content-Type: {volumes.MEDIA_TYPE}\r\n\r\n".encode() + body, policy=email.policy.HTTP
    )
    parts = {part.get_param("name", header="content-disposition"): part.get_content() for part in told.iter_parts()}
    assert json.loads(parts["numbers"]) == [0, 1, 2, 4]
    assert json.loads(parts["answer"])["foreground_pixels"] == 4 * 48
    assert opened(parts["image"]).shape == opened(parts["mask"]).shape == (48, 48, 4)
    assert np.asarray(opened(parts["mask"]).dataobj).sum() == 4 * 48
    assert volumes.view(found, measure(found, {"total": 1.0})) == body


def test_without_its_package_the_page_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    page.niivue.cache_clear()
    monkeypatch.setattr(metadata, "distribution", missing)
    app = FastAPI()
    page.add(app)
    with TestClient(app) as client:
        answer = client.get("/web/niivue.js")
        assert (answer.status_code, answer.text) == (404, "ipyniivue is not installed: make setup")
        assert client.get("/web/main.js").headers["content-type"].startswith("text/javascript")
        assert client.get("/web/../app.py").status_code == 404
        assert "unsafe" not in client.get("/").headers["content-security-policy"]
