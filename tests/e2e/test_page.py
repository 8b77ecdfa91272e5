"""The page as people use it: a real service, a real browser, and what is seen on the screen."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from rayseg.data.synthetic import write_studies
from serving import page
from serving.jobs import JobAnswer, JobRequest, Progress
from tests import bundles

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
ORANGE = (213, 94, 0)  # of the first class: Okabe and Ito's vermilion
SLICES = 12

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")


@dataclass
class Opened:
    """The page in a browser that reaches its own origin only."""

    page: Any
    url: str
    files: list[Path]
    spoiled: Path
    elsewhere: list[str] = field(default_factory=list)  # requests that left the origin
    errors: list[str] = field(default_factory=list)  # of scripts, and of the content security policy

    def open(self, *files: Path) -> None:
        """Chooses files as a person does, and waits for the outcome."""
        self.page.set_input_files("#files", [str(file) for file in files])
        name = f"{len(files)} files" if len(files) > 1 else files[0].name
        self.page.locator("#problem, #details").filter(has_text=name, visible=True).wait_for()

    def pixels(self, selector: str) -> np.ndarray:
        """What an element shows, uint8 (rows, columns, 3)."""
        with Image.open(io.BytesIO(self.page.locator(selector).screenshot())) as picture:
            return np.asarray(picture.convert("RGB"))

    def overlay(self) -> int:
        """Pixels of the overlay's outline in the picture."""
        return int((np.abs(self.pixels("#canvas").astype(int) - ORANGE).max(axis=-1) < 8).sum())

    def slice(self) -> int:
        """Which one is shown, from 1, as it says itself."""
        return int(re.match(r"Slice (\d+) of", self.page.inner_text("#corner-tl"))[1])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A served model that finds what is brighter than 50 HU."""
    folder = tmp_path_factory.mktemp("page")
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    bundles.register(tracking_uri, "tiny", bundles.write_bundle(folder / "bundle", 160, size=128), "champion")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, ["platform", os.environ.get("PYTHONPATH")]))
    settings = {"tracking_uri": tracking_uri, "model_uri": "models:/tiny@champion", "port": 0}
    command = [sys.executable, "-m", "jobs.serve", *(f"--set={key}={json.dumps(settings[key])}" for key in settings)]
    with (folder / "serve.log").open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=kept, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        ready = json.loads(process.stdout.readline() or "{}")  # ends with the process
        assert "url" in ready, (folder / "serve.log").read_text()[-5000:]
        yield ready["url"]
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def opened(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """A window with a series of twelve slices; tests leave it as they find it, showing slices."""
    folder = tmp_path_factory.mktemp("studies")
    write_studies(str(folder), patients=1, slices=SLICES, size=128, seed=1, masks=False, spoiled=True)
    files = sorted((folder / "images" / "phantom-1-000").glob("*.dcm"))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        tab = browser.new_page(viewport={"width": 960, "height": 640})
        tab.set_default_timeout(30_000)
        made = Opened(tab, url, files, folder / "images" / "spoiled" / "IM_0002.dcm")

        def guard(route: Any) -> None:
            if route.request.url.startswith((f"{url}/", "data:", "blob:")):
                route.fallback()
            else:
                made.elsewhere.append(route.request.url)
                route.abort()

        tab.route("**/*", guard)
        tab.on("pageerror", lambda error: made.errors.append(str(error)))
        tab.on(
            "console",
            lambda told: made.errors.append(told.text) if "Content Security Policy" in told.text else None,
        )
        tab.goto(url)
        made.open(*files)
        yield made
        browser.close()


def figures(opened: Opened) -> dict[str, Any]:
    parts = [("file", ("slice", path.read_bytes())) for path in opened.files]
    answer = httpx.post(f"{opened.url}/v1/segment", files=parts, headers={"accept": "application/json"}, timeout=60)
    assert answer.status_code == 200
    return answer.json()


def test_the_findings_are_those_of_the_answer(opened: Opened):
    expected = figures(opened)
    assert expected["lesion_count"] > 0
    told = opened.page.locator("#lesions button").all_inner_texts()
    assert len(told) == len(expected["lesions"])
    for line, lesion in zip(told, expected["lesions"], strict=True):
        first, last = (number + 1 for number in lesion["slices"])
        volume = float(re.search(r"([\d.,]+) mL", line)[1].replace(",", ""))
        assert volume == pytest.approx(lesion["volume_ml"], abs=0.051)
        assert (f"slices {first} to {last}" if first < last else f"slice {first}") in line
    total = float(re.search(r"([\d.,]+) mL", opened.page.inner_text("#total"))[1].replace(",", ""))
    assert total == pytest.approx(expected["volume_ml"], abs=0.051)
    details = opened.page.inner_text("#details")
    assert f"128 \N{MULTIPLICATION SIGN} 128 \N{MULTIPLICATION SIGN} {SLICES}" in details
    assert f"tiny {expected['version']}" in details
    assert "not a medical device" in opened.page.inner_text("header")


def test_the_mask_lies_over_the_slice(opened: Opened):
    opened.page.focus("#canvas")
    grey = opened.pixels("#canvas").astype(int)
    assert np.ptp(grey, axis=-1).max() > 100, "colour"
    assert (np.ptp(grey, axis=-1) < 3).mean() > 0.5, "and grey"
    with_mask = opened.overlay()
    assert with_mask > 100
    opened.page.keyboard.press("m")
    assert opened.overlay() == 0
    opened.page.keyboard.press("m")
    assert opened.overlay() == with_mask


def test_scrolling_changes_the_slice(opened: Opened):
    opened.page.focus("#canvas")
    opened.page.keyboard.press("Home")
    assert opened.slice() == 1
    before = opened.pixels("#canvas")
    opened.page.mouse.move(300, 350)
    opened.page.mouse.wheel(0, 100)
    playwright.expect(opened.page.locator("#slider")).to_have_value("2")
    assert (opened.pixels("#canvas") != before).mean() > 0.01
    opened.page.keyboard.press("ArrowDown")
    assert opened.slice() == 3
    opened.page.keyboard.press("End")
    assert opened.slice() == SLICES
    opened.page.focus("#slider")
    opened.page.keyboard.press("Home")
    assert opened.slice() == 1
    assert opened.page.get_attribute("#slider", "aria-valuetext") == f"Slice 1 of {SLICES}"


def test_windows_by_key_and_by_dragging(opened: Opened):
    opened.page.focus("#canvas")
    shown = {}
    for key, told in {"4": "L 600 W 2800", "2": "L 80 W 200", "3": "L 40 W 40", "1": "L 40 W 80"}.items():
        opened.page.keyboard.press(key)
        assert " ".join(opened.page.inner_text("#corner-bl").split()) == told
        shown[key] = opened.pixels("#canvas").astype(int).mean()
    assert len({round(mean, 1) for mean in shown.values()}) == 4
    opened.page.mouse.move(300, 350)
    opened.page.mouse.down()
    opened.page.mouse.move(360, 350)
    opened.page.mouse.up()
    level, width = map(int, re.findall(r"\d+", opened.page.inner_text("#corner-bl")))
    assert (level, width > 80) == (40, True)
    opened.page.keyboard.press("1")


def test_a_lesion_leads_to_its_slice(opened: Opened):
    lesion = figures(opened)["lesions"][0]
    opened.page.focus("#canvas")
    opened.page.keyboard.press("Home" if lesion["slices"][0] > 0 else "End")
    opened.page.locator("#lesions button").first.click()
    assert lesion["slices"][0] + 1 <= opened.slice() <= lesion["slices"][1] + 1
    assert opened.overlay() > 100


def test_downloads_are_what_the_interface_gives(opened: Opened):
    parts = [("file", ("slice", path.read_bytes())) for path in opened.files]
    for name, kind in (("DICOM SEG", "application/dicom"), ("NIfTI", "application/nifti")):
        with opened.page.expect_download() as download:
            opened.page.get_by_role("button", name=name).click()
        expected = httpx.post(f"{opened.url}/v1/segment", files=parts, headers={"accept": kind}, timeout=60).content
        assert Path(download.value.path()).read_bytes() == expected


def drop(opened: Opened, *paths: Path) -> None:
    """Lets go of files over the page as a mouse does: the browser reads them, folders too."""
    session = opened.page.context.new_cdp_session(opened.page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 350, "data": data})
        if kind == "dragOver":
            opened.page.wait_for_selector("#stage.over")
    session.detach()
    assert opened.page.locator("#stage.over").count() == 0


def test_what_is_dropped_is_segmented(opened: Opened, tmp_path: Path):
    expected = opened.page.inner_text("#total")
    folder, zipped = tmp_path / "head", tmp_path / "scan.zip"
    shutil.copytree(opened.files[0].parent, folder / "of a CT")
    with zipfile.ZipFile(zipped, "w") as archive:
        for path in opened.files[::2]:
            archive.write(path, f"DICOM/{path.name}")
    details = opened.page.locator("#details")
    drop(opened, folder)
    details.filter(has_text=f"head: {SLICES} files").wait_for()
    assert opened.page.inner_text("#total") == expected
    drop(opened, zipped)
    details.filter(has_text="scan.zip").wait_for()
    assert f"\N{MULTIPLICATION SIGN} {SLICES // 2}" in details.inner_text()
    opened.open(*opened.files)


def test_three_dimensions(opened: Opened):
    try:
        page.niivue()
    except LookupError as error:
        pytest.skip(str(error))
    opened.page.focus("#canvas")
    opened.page.keyboard.press("v")
    opened.page.wait_for_selector("#busy:not([hidden])")
    opened.page.wait_for_selector("#busy", state="hidden")
    glass = opened.pixels("#solid-canvas").astype(int)
    assert (glass.max(axis=-1) > 30).mean() > 0.02, "not blank"
    red, green, blue = np.moveaxis(glass, -1, 0)
    assert ((red > 80) & (red > 1.5 * green) & (green > 1.5 * blue)).sum() > 100, "the lesion, in its colour"
    opened.page.get_by_role("button", name="Lesions only").click()
    alone = opened.pixels("#solid-canvas").astype(int)
    assert (np.ptp(alone, axis=-1) < 10).mean() > (np.ptp(glass, axis=-1) < 10).mean() - 0.01
    assert (alone != glass).any()
    opened.page.focus("#solid-canvas")
    opened.page.keyboard.press("ArrowLeft")
    assert (opened.pixels("#solid-canvas") != alone).mean() > 0.005, "it turns"
    opened.page.keyboard.press("v")
    assert opened.page.is_visible("#canvas")


def test_a_file_that_is_no_image_is_told_kindly_and_the_scan_stays(opened: Opened):
    opened.open(opened.spoiled)
    told = opened.page.inner_text("[role=alert]")
    assert "Not segmented: IM_0002.dcm" in told
    assert "neither DICOM nor a picture" in told
    assert opened.page.evaluate("document.activeElement.id") == "problem", "read aloud at once"
    assert opened.page.is_visible("#canvas")
    opened.page.get_by_role("button", name="Close").first.press("Enter")
    assert not opened.page.is_visible("[role=alert]")


def test_the_keyboard_alone_gets_everywhere(opened: Opened):
    reached = set()
    for _ in range(40):  # once around, past the end of the page
        opened.page.keyboard.press("Tab")
        where = opened.page.evaluate(
            "(({id, tagName, textContent, ariaLabel}) => ({id, tag: tagName, name: ariaLabel || textContent,"
            " ring: getComputedStyle(document.activeElement).outlineStyle}))(document.activeElement)"
        )
        if where["tag"] == "BODY":
            continue
        assert where["ring"] != "none", where
        assert where["name"], where
        reached.add(where["id"] or where["name"])
    assert {"tab-viewer", "view-slices", "view-solid", "Brain", "opacity", "canvas", "slider"} <= reached
    assert {"DICOM SEG", "NIfTI", "another"} <= reached
    opened.page.focus("#tab-viewer")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.is_visible("#job-form")
    opened.page.keyboard.press("ArrowLeft")
    assert opened.page.is_visible("#canvas")
    opened.page.focus("#canvas")
    opened.page.keyboard.press("?")
    assert opened.page.is_visible("#keys")
    opened.page.keyboard.press("Escape")
    assert not opened.page.is_visible("#keys")


def test_a_token_is_asked_for_and_sent(opened: Opened):
    """What stands before the service asks for it here; that the service does is tested elsewhere."""
    given = []

    def locked(route: Any) -> None:
        given.append(route.request.headers.get("authorization"))
        if given[-1] == "Bearer secret":
            route.fallback()
        else:
            route.fulfill(status=401, json={"reason": "unauthorized", "detail": "send a token"})

    opened.page.route("**/v1/segment", locked)
    opened.page.set_input_files("#files", [str(opened.files[4])])
    for token in ("wrong", "secret"):
        opened.page.wait_for_selector("#token[open]")
        opened.page.fill("#token-value", token)
        opened.page.keyboard.press("Enter")
    opened.page.locator("#details").filter(has_text="IM_0005.dcm").wait_for()
    assert given == [None, "Bearer wrong", "Bearer secret"]
    assert "mm²" in opened.page.inner_text("#total"), "of a slice alone"
    opened.page.unroute("**/v1/segment", locked)


def test_jobs_are_started_and_followed(opened: Opened):
    """By answers of the interface's form: real jobs are tested with the interface."""
    sent = []
    job = JobAnswer(
        id="0123456789abcdef",
        owner=None,
        state="running",
        created=1.7e9,
        request=JobRequest(source="s3://archive/ct", destination="s3://results/ct"),
        ledger="s3://results/ct/ledger",
        progress=Progress(
            series=3,
            series_total=12,
            slices=120,
            slices_total=480,
            slices_per_second=12.5,
            eta_s=28.8,
            reasons={"truncated": 2},
            run_id="1",
        ),
    ).model_dump(mode="json")

    def jobs(route: Any) -> None:
        if route.request.method == "GET":
            route.fulfill(json=[job] if sent else [])
        else:
            sent.append(route.request.post_data_json)
            route.fulfill(status=202, json=job)

    opened.page.route("**/v1/jobs", jobs)
    opened.page.click("#tab-jobs")
    opened.page.fill("[name=source]", "s3://archive/ct")
    opened.page.fill("[name=destination]", "s3://results/ct")
    opened.page.get_by_label("NIfTI").check()
    opened.page.get_by_role("button", name="Start").click()
    told = opened.page.locator("#job-list li")
    told.wait_for()
    JobRequest.model_validate(sent[0])
    assert sent == [{"source": "s3://archive/ct", "destination": "s3://results/ct", "profiles": ["seg", "nifti"]}]
    assert "120 of 480 slices" in told.inner_text()
    assert "29 s left" in told.inner_text()
    assert "2 \N{MULTIPLICATION SIGN} truncated" in told.inner_text()
    assert opened.page.get_by_role("progressbar").evaluate("bar => bar.position") == 0.25
    opened.page.click("#tab-viewer")
    opened.page.unroute("**/v1/jobs", jobs)


def test_nothing_left_the_origin_and_nothing_broke(opened: Opened):
    """Last: after all that was done above."""
    assert opened.elsewhere == []
    assert opened.errors == []
    policy = httpx.get(opened.url, timeout=60).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
