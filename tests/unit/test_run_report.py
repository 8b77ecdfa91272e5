"""The page of a segment run, from hand-made rows: with the columns of any ledger, and with more."""

import re
from typing import Any

from rayseg.inference.refusals import Refusals
from rayseg.inference.report import Run, render
from tests.unit.archive_runs import row

ASKED = {"model_uri": "models:/brain/1", "profiles": ["seg", "report"], "postprocess.fill_holes": True, "retry": None}


def text_of(html: str) -> str:
    """What a reader sees, in one line."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def reject(reason: str, detail: str = "") -> dict[str, Any]:
    return {"uri": "x", "frame": None, "stage": "segment", "reason": reason, "detail": detail, "series_key": "d"}


def test_the_page_tells_what_was_asked_and_what_became_of_it() -> None:
    rows = [
        row("quick", slices=10, seconds=0.5, volume_ml=4.0, foreground_pixels=40),
        row("slow", slices=20, seconds=3.0, volume_ml=8.0, foreground_pixels=80),
        row("healthy", slices=10, seconds=0.5, volume_ml=0.0),
        row("unplaced", slices=10, seconds=1.0, volume_ml=None, foreground_pixels=7),
        row("mixed", verdict="rejected", reason="series_mixed", detail="3 sizes", slices=0),
    ]
    rejects = [
        reject("series_mixed", "3 sizes"),
        reject("truncated"),
        reject("truncated", "PixelData"),
        reject("truncated"),
    ]
    refusals = Refusals()
    refusals.add(rejects)
    text = text_of(render(Run(3, 1, 1, 75.0), ASKED, rows, refusals))
    for wanted in (
        "3 series segmented in 75 s, 1 rejected, 1 done before",
        "models:/brain/1", "profiles seg, report", "postprocess.fill_holes True", "retry \u2013",
        "50 slices with a mask, 100 ms each",  # 5 s for 50
        "3 series with a finding 1 with none",
        "1 rejected series; 4 objects",
        "truncated 3 0 PixelData series_mixed 1 1 3 sizes",
        "Median 6 mL, 12 mL in all, of 2 series with a finding; of 1 series the positions give no volume",
        "slow 20 3 s 150 ms unplaced 10 1 s 100 ms quick 10 500 ms 50 ms",
        "not a medical device",
    ):  # fmt: skip
        assert wanted in text, (wanted, text)
    for absent in ("engine", "Quality control", "stage"):
        assert absent not in text


def test_columns_that_a_ledger_may_have_are_told() -> None:
    stages = {"read_s": 1.0, "forward_s": 2.0, "write_s": None}
    rows = [
        row(
            "a",
            seconds=4.0,
            engine="openvino bfloat16",
            flags=["low_entropy", "spacing"],
            flags_detail="3 mm",
            **stages,
        ),
        row("b", seconds=4.0, engine="openvino bfloat16", flags=["spacing"], **stages),
        row("c", verdict="rejected", reason="corrupt", detail=None, slices=0, flags=None),
    ]
    html = render(Run(2, 1, 0, 8.0), ASKED, rows, Refusals())
    text = text_of(html)
    assert "engine openvino bfloat16" in text
    assert "2 series flagged" in text
    assert "spacing 2 low_entropy 1" in text
    assert "a low_entropy, spacing 3 mm b spacing" in text
    assert "read 2 s forward 4 s write 0 ms other 2 s" in text
    assert re.findall(r'<i style="width: ([0-9.]+)%', html) == ["25.0", "50.0", "0.0", "25.0"]


def test_profiles_that_could_not_be_made_are_told_by_reason() -> None:
    uneven = {"profile": "nifti", "reason": "uneven_slices", "detail": "slices lie up to 2.00 mm off even distances"}
    refused = {"profile": "seg", "reason": "write_failed", "detail": "a type"}
    rows = [
        row("a", not_made=[uneven]),
        row("b", not_made=[uneven | {"detail": "others"}, refused]),
        row("c", not_made=[]),
        row("d", not_made=None),  # of an earlier version
        row("e", verdict="rejected", reason="corrupt", slices=0, not_made=[uneven]),
    ]
    text = text_of(render(Run(4, 1, 0, 1.0), ASKED, rows, Refusals()))
    assert "Profiles that could not be made Of 2 segmented series" in text
    assert "nifti uneven_slices 2 slices lie up to 2.00 mm off even distances seg write_failed 1 a type" in text
    assert "could not be made" not in text_of(render(Run(1, 0, 0, 1.0), ASKED, rows[2:4], Refusals()))


def test_a_run_without_any_series_and_text_that_looks_like_markup() -> None:
    html = render(Run(0, 0, 0, 0.01), {"model_uri": "<script>"}, [], Refusals())
    assert "0 series segmented in 10 ms" in text_of(html)
    assert "<script" not in html
    assert "<img" not in html
    assert "Rejects" not in html
