"""The report as a browser's parser sees it, and the pictures of an archive against the masks that were encoded."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pydicom
import pytest
from PIL import Image

from rayseg import storage
from rayseg.data import synthetic
from rayseg.data.preprocess import Preprocess, Window
from rayseg.demo import gallery
from rayseg.demo.report import Headline, Picture, Report, Request, render, write_report
from rayseg.dicom import pseudonyms, segmentation
from rayseg.records import MANIFEST
from rayseg.tracking.figures import tile

VOID = {"meta", "img", "line", "circle", "path", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Text, tags with attributes, and whether every element that opens closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def example(**changes: Any) -> Report:
    picture = tile(np.full((20, 30), 99, np.uint8), np.eye(20, 30))
    values: dict[str, Any] = {
        "title": "A run",
        "data": "24 patients",
        "finished": "2025-01-01 12:00",
        "seconds": 312.4,
        "stages": {"catalog": 30.0, "train": 90.0},
        "headlines": [Headline("0.79", "test Dice", "pooled")],
        "history": [
            {"epoch": 1, "train/loss": 1.0, "val/loss": 1.2, "val/dice_pooled": 0.25},
            {"epoch": 2, "train/loss": 0.5, "val/loss": 0.6, "val/dice_pooled": 0.5},
        ],
        "untrained_dice": 0.1,
        "overlays": [Picture(picture, "case 1")],
        "cases": [
            {"patient_key": "0123456789abcdef", "slices": "10", "tp": "8", "fp": "2", "fn": "4", "tn": "86",
             "dice": "0.727273", "iou": "0.571429", "precision": "0.8", "recall": "0.666667"},
            {"patient_key": "fedcba9876543210", "slices": "10", "tp": "0", "fp": "0", "fn": "0", "tn": "100",
             "dice": "", "iou": "", "precision": "", "recall": ""},
        ],
        "series": [
            {"series_key": "aaaa", "verdict": "segmented", "reason": None, "slices": 23, "rejected_slices": 1,
             "volume_ml": 41.26, "outputs": [{"profile": "seg", "uri": "s3://bucket/rayseg-v1/aaaa.dcm"}]},
            {"series_key": "bbbb", "verdict": "rejected", "reason": "series_mixed", "slices": 0, "rejected_slices": 5,
             "volume_ml": None, "outputs": []},
        ],
        "rejects": {"truncated": 2},
        "gallery": [Picture(picture, "aaaa · 3 of 23")],
        "request": Request("curl http://127.0.0.1:8000/v1/segment", 200, {"foreground_pixels": 17}),
        "commands": [("make mlflow", "compare")],
        "config": {"train": {"epochs": 2}},
    }  # fmt: skip
    return Report(**values | changes)


def test_the_page_is_whole_stands_alone_and_says_what_it_was_given(tmp_path: Path) -> None:
    write_report(str(tmp_path / "report.html"), example())
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    for wanted in (
        "A run", "24 patients", "5 min 12 s", "0.79", "1 min 30 s", "0.727", "true negative", "41.3", "series_mixed",
        "s3://bucket/rayseg-v1/aaaa.dcm", "truncated", "HTTP 200", '"foreground_pixels": 17', "make mlflow",
        "epochs: 2", "not a medical device",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert "abcdef01" not in page.text.replace("0123456789ab", "")  # keys are shortened
    # Nothing is fetched: no script, no sheet, no link out; pictures are in the page and decode.
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("a")
    assert "url(" not in html
    pictures = [attributes["src"] or "" for attributes in page.all("img")]
    assert len(pictures) == 2
    for source in pictures:
        prefix, _, content = source.partition(",")
        assert prefix == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    assert all(attributes["alt"] for attributes in page.all("img"))


def test_curves_lie_where_their_values_are() -> None:
    page = Page(render(example()))
    drawn = {attributes["class"]: attributes["d"] or "" for attributes in page.all("path")}
    assert set(drawn) == {"curve val", "curve train"}
    # The Dice axis runs from 0 at y = 192 to 1 at y = 12, and the chart of Dice comes first.
    (dice,) = [d["d"] or "" for d in page.all("path")][:1]
    assert [round(float(point.split(",")[1])) for point in dice.removeprefix("M").split(" L")] == [147, 102]
    floor = next(line for line in page.all("line") if line["class"] == "floor")
    assert round(float(floor["y1"] or 0)) == 174
    assert "untrained 0.10" in page.text


def test_values_are_text_and_never_markup() -> None:
    page = Page(render(example(title="<script>alert(1)</script>", config={"x": "</pre><b>"})))
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.text
    assert not [attributes for attributes in page.all("b") if attributes == {} and "</pre>" not in page.text]


def test_parts_without_content_are_left_out() -> None:
    page = Page(render(Report(title="t", data="d", finished="now", seconds=3.0, stages={})))
    for heading in ("Stages", "Learning curves", "Scores by case", "Segmented archive", "Over HTTP", "Configuration"):
        assert heading not in page.text
    assert "not a medical device" in page.text
    one_epoch = Page(render(example(history=[{"epoch": 1, "val/dice_pooled": 0.3, "val/loss": None}])))
    assert len(one_epoch.all("svg")) == 1


def test_a_failed_request_is_not_shown_as_good() -> None:
    good, bad = (Page(render(example(request=Request("curl", status, {})))) for status in (200, 422))
    assert "status ok" in [attributes.get("class") for attributes in good.all("span")]
    assert "status ok" not in [attributes.get("class") for attributes in bad.all("span")]
    assert "HTTP 422" in bad.text


def test_gallery_shows_each_series_with_the_masks_of_its_segmentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "test")
    key = pseudonyms.from_environment().key
    synthetic.write_studies(str(tmp_path), patients=2, slices=6, size=64, seed=2)
    rows, ledger = [], []
    for number, folder in enumerate(sorted((tmp_path / "images").iterdir())):
        paths = sorted(folder.iterdir())
        headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
        masks = [np.zeros((64, 64), np.uint8) for _ in paths]
        for k in (1, 4) if number == 0 else ():
            masks[k][20:40, 10 : 20 + 5 * k] = 1
        series_key = key("series", headers[0].SeriesInstanceUID)
        output = str(tmp_path / f"{series_key}.dcm")
        encoded = segmentation.encode([path.read_bytes() for path in paths], masks, ("lesion",), "m", "1", "0" * 64)
        assert isinstance(encoded, bytes)
        storage.write(output, encoded)
        ledger.append(
            {"series_key": series_key, "verdict": "segmented", "outputs": [{"profile": "seg", "uri": output}]}
        )
        rows += [
            {"uri": str(path), "verdict": "ok", "series_key": series_key,
             "instance_key": key("instance", header.SOPInstanceUID)}
            for path, header in zip(paths, headers, strict=True)
        ]  # fmt: skip
    ledger.append({"series_key": "none", "verdict": "rejected", "outputs": []})
    manifest = str(tmp_path / "manifest.parquet")
    storage.write_table(manifest, pa.Table.from_pylist(rows, schema=MANIFEST))

    preprocess = Preprocess(size=(32, 32), window=Window(40, 80), percentiles=None)
    shown = gallery.pictures(manifest, ledger, preprocess, wanted=8)
    first, second = ledger[0]["series_key"][:8], ledger[1]["series_key"][:8]  # type: ignore[index]
    assert [picture.caption for picture in shown] == [f"{first} · 2 of 6", f"{first} · 5 of 6", f"{second} · 4 of 6"]
    tinted = []
    for picture in shown:
        pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(int)
        tinted.append(int((pixels[..., 0] - pixels[..., 2] > 40).sum()))
    scale = (240 / 64) ** 2
    assert tinted[0] == pytest.approx(20 * 15 * scale, rel=0.1)
    assert tinted[1] == pytest.approx(20 * 30 * scale, rel=0.1)
    assert tinted[2] == 0
