"""The second table in docs/interoperability.md: what a PACS and a viewer in a browser make of our files.

    RAYSEG_WRITE_TABLE=1 python -m pytest tests/e2e/test_viewers.py

writes the table anew.
"""

import base64
import io
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient

from serving import page
from tests.interoperability import (
    Case,
    Reader,
    RefusedError,
    line,
    of_plane,
    of_surface,
    write,
    written,
)
from tests.orthanc import PASSWORD, USER, missing, orthanc

CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
SEGMENTATIONS = ("seg", "seg-labelmap", "seg-fractional")
# Where NiiVue puts each voxel that is not 0, or the triangles of a mesh, in its millimetres: right, anterior, superior.
SCRIPT = """async ([name, data]) => {
  const { Niivue } = await import("/niivue.js");
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
  const canvas = document.createElement("canvas");
  document.body.replaceChildren(canvas);
  const niivue = new Niivue();
  await niivue.attachToCanvas(canvas);
  await niivue.loadFromArrayBuffer(bytes.buffer, name);
  if (niivue.meshes.length) {
    const [mesh] = niivue.meshes, corner = (number) => [...mesh.pts.slice(3 * number, 3 * number + 3)];
    return { version: niivue.version, triangles: Array.from(mesh.tris, corner) };
  }
  const [volume] = niivue.volumes, [, columns, rows, slices] = volume.dimsRAS, voxels = volume.img2RAS();
  const points = [];
  for (let z = 0, number = 0; z < slices; z++)
    for (let y = 0; y < rows; y++)
      for (let x = 0; x < columns; x++, number++)
        if (voxels[number]) points.push([...volume.vox2mm([x, y, z], volume.matRAS)].slice(0, 3));
  return { points };
}"""
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DICOMwebClient]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    with orthanc(tmp_path_factory.mktemp("orthanc")) as url:
        session = requests.Session()
        session.auth = (os.environ[USER], os.environ[PASSWORD])
        yield DICOMwebClient(f"{url}/dicom-web", session)


@pytest.fixture(scope="module")
def viewer() -> Iterator[Any]:
    """A tab of a browser with nothing but NiiVue's module at hand."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    module = page.niivue()

    def answer(route: Any) -> None:
        if route.request.url.endswith("/niivue.js"):
            route.fulfill(body=module, content_type="text/javascript")
        else:
            route.fulfill(body="<html><body></body></html>", content_type="text/html")

    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        tab = browser.new_page()
        tab.route("**/*", answer)
        tab.goto("http://viewer.test/")
        yield tab
        browser.close()


def of_orthanc(client: DICOMwebClient, frames: bool) -> Callable[[Case, bytes], np.ndarray]:
    """Stored by STOW-RS, and fetched whole or by frames by WADO-RS."""

    def read(_: Case, data: bytes) -> np.ndarray:
        sent = pydicom.dcmread(io.BytesIO(data))
        names = (sent.StudyInstanceUID, sent.SeriesInstanceUID, sent.SOPInstanceUID)
        try:
            client.store_instances([sent])
            made = client.retrieve_instance(*names)
            pixels = list(made.pixel_array.reshape(-1, made.Rows, made.Columns))
            if frames:
                wanted = list(range(1, made.NumberOfFrames + 1))
                told = client.retrieve_instance_frames(*names, wanted, media_types=("application/octet-stream",))
                size = made.Rows * made.Columns
                if any(len(one) != size for one in told):
                    raise RefusedError  # no byte a pixel
                pixels = [np.frombuffer(one, np.uint8).reshape(made.Rows, made.Columns) for one in told]
        except requests.HTTPError:
            raise RefusedError from None
        groups = made.PerFrameFunctionalGroupsSequence
        places = [one.PlanePositionSequence[0].ImagePositionPatient for one in groups]
        return np.concatenate([of_plane(*one, made) for one in zip(pixels, places, strict=True)])

    return read


def of_niivue(tab: Any, name: str) -> Callable[[Case, bytes], np.ndarray]:
    def read(known: Case, data: bytes) -> np.ndarray:
        told = tab.evaluate(SCRIPT, [name, base64.b64encode(data).decode()])
        if "points" in told:
            return np.reshape(told["points"], (-1, 3)) * _RAS_TO_LPS
        return of_surface(known, np.reshape(told["triangles"], (-1, 3, 3)) * _RAS_TO_LPS)

    return read


def test_the_table_tells_what_they_do(client: DICOMwebClient, viewer: Any) -> None:
    version = client._session.get(f"{client.base_url.removesuffix('/dicom-web')}/system", timeout=10).json()["Version"]
    server, niivue = f"Orthanc {version}", f"NiiVue of ipyniivue {page._VERSION}"
    rows = [
        *((profile, Reader(f"{server}, whole", (), of_orthanc(client, False))) for profile in SEGMENTATIONS),
        *((profile, Reader(f"{server}, by frames", (), of_orthanc(client, True))) for profile in SEGMENTATIONS),
        *((profile, Reader(niivue, (), of_niivue(viewer, "x.nii.gz"))) for profile in ("nifti", "nifti-upright")),
        ("stl", Reader(niivue, (), of_niivue(viewer, "x.stl"))),
    ]
    lines = [line(*row) for row in rows]
    if os.environ.get("RAYSEG_WRITE_TABLE"):
        write("servers and browsers", lines)
    assert lines == written("servers and browsers")
