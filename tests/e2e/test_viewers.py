"""More tables in docs/reference/interoperability.md: what a PACS and viewers in a browser make of our files.

    RAYSEG_WRITE_TABLE=1 python -m pytest tests/e2e/test_viewers.py

writes them anew.
"""

import base64
import copy
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient

from serving import page
from tests import ohif
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
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def viewer(browser: Any) -> Any:
    """A tab with nothing but NiiVue's module at hand."""
    module = page.niivue()

    def answer(route: Any) -> None:
        if route.request.url.endswith("/niivue.js"):
            route.fulfill(body=module, content_type="text/javascript")
        else:
            route.fulfill(body="<html><body></body></html>", content_type="text/html")

    tab = browser.new_page()
    tab.route("**/*", answer)
    tab.goto("http://viewer.test/")
    return tab


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


def of_ohif(browser: Any, url: str, client: DICOMwebClient, delete: Callable[[], None]) -> Callable[..., np.ndarray]:
    """The only study of the server is opened, the SEG's thumbnail clicked twice, and the question answered with yes."""

    def read(known: Case, data: bytes) -> np.ndarray:
        delete()
        segmentation = pydicom.dcmread(io.BytesIO(data))
        client.store_instances([*map(with_pixels, known.sources), segmentation])
        tab = browser.new_page(viewport={"width": 1300, "height": 800})
        try:
            tab.goto(f"{url}/viewer?StudyInstanceUIDs={segmentation.StudyInstanceUID}")
            tab.get_by_text("Skip all").click(timeout=90_000)
            tab.get_by_text(f"S:{segmentation.SeriesNumber}").first.dblclick(timeout=60_000)
            tab.get_by_role("button", name="Yes", exact=True).click(timeout=30_000)
            tab.wait_for_function(ohif.LOADED, timeout=30_000)
            return np.reshape(tab.evaluate(ohif.POINTS), (-1, 3))
        except playwright_timeout():
            raise RefusedError from None
        finally:
            tab.close()

    return read


def playwright_timeout() -> type[Exception]:
    from playwright.sync_api import TimeoutError as Timeout

    return Timeout


def with_pixels(source: pydicom.Dataset) -> pydicom.Dataset:
    made = copy.deepcopy(source)
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.RescaleIntercept, made.RescaleSlope, made.WindowCenter, made.WindowWidth = -1024, 1, 40, 80
    made.PixelData = np.full((made.Rows, made.Columns), 1000, "<u2").tobytes()
    made["PixelData"].VR = "OW"
    return made


def compare(name: str, rows: Sequence[tuple[str, Reader]]) -> None:
    """Of one of the page's tables."""
    lines = [line(*row) for row in rows]
    if os.environ.get("RAYSEG_WRITE_TABLE"):
        write(name, lines)
    assert lines == written(name)


def test_orthanc(server: str, session: requests.Session, client: DICOMwebClient) -> None:
    name = f"Orthanc {session.get(f'{server}/system', timeout=10).json()['Version']}"
    ways = {f"{name}, whole": False, f"{name}, by frames": True}
    rows = [(one, Reader(way, (), of_orthanc(client, frames))) for way, frames in ways.items() for one in SEGMENTATIONS]
    compare("Orthanc", rows)


def test_niivue(viewer: Any) -> None:
    name = f"NiiVue of ipyniivue {page._VERSION}"
    files = {"nifti": "x.nii.gz", "nifti-upright": "x.nii.gz", "stl": "x.stl"}
    compare("NiiVue", [(profile, Reader(name, (), of_niivue(viewer, file))) for profile, file in files.items()])


def test_ohif(server: str, session: requests.Session, client: DICOMwebClient, browser: Any, tmp_path: Path) -> None:
    folder = ohif.fetched(tmp_path)
    if folder is None:
        pytest.skip("OHIF cannot be fetched: no npm, or no registry")

    def delete() -> None:
        for study in session.get(f"{server}/studies", timeout=60).json():
            session.delete(f"{server}/studies/{study}", timeout=60).raise_for_status()

    with ohif.ohif(folder, server, session) as url:
        reader = Reader(f"OHIF {ohif.VERSION}", (), of_ohif(browser, url, client, delete))
        compare("OHIF", [(profile, reader) for profile in ("seg", "seg-labelmap")])
