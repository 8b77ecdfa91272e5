"""Which runs a diff is of, which series it compares, what its summary says, and what its pictures and page show."""

import base64
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayseg import config as configuration
from rayseg.evaluation import difference, panes, sides
from rayseg.evaluation.changes import DIFF
from rayseg.evaluation.diff import DiffConfig
from rayseg.inference import ledger
from tests.unit.archive_runs import row


def chosen(folder: Path, *rows: dict[str, object], model: str | None = None) -> sides.Side:
    ledger.append(str(folder), rows, [])
    return sides.choose(str(folder), model, "baseline_model")


def test_the_one_run_of_a_ledger_needs_no_name_and_several_do(tmp_path: Path) -> None:
    output = str(tmp_path)
    with pytest.raises(ValueError, match=r"diff\.baseline: there is no ledger below"):
        sides.choose(output, None, "baseline_model")
    one = chosen(tmp_path, row("a"), row("b", verdict="rejected", reason="series_mixed"))
    assert (one.name, one.run, sorted(one.rows)) == ("brain/1", "brain/1/c0ffeec0ffee", ["a", "b"])
    assert one.engines == ()
    ledger.append(output, [row("a", "2"), row("a", "2", config_digest="beef" * 16)], [])
    there = r"brain/1/c0ffeec0ffee, brain/2/beefbeefbeef, brain/2/c0ffeec0ffee"
    with pytest.raises(ValueError, match=rf"diff\.baseline_model: .* has 3 .*{there}.*name one"):
        sides.choose(output, None, "baseline_model")
    with pytest.raises(ValueError, match=rf"brain/2 is 2 of its runs .*{there}"):
        sides.choose(output, "brain/2", "baseline_model")
    with pytest.raises(ValueError, match=rf"brain/22 is none of its runs .*{there}"):
        sides.choose(output, "brain/22", "baseline_model")
    assert sides.choose(output, "brain/1", "baseline_model").run == "brain/1/c0ffeec0ffee"
    assert sides.choose(output, "brain/2/beef", "baseline_model").config_digest == "beef" * 16


def test_series_that_cannot_be_compared_are_named_with_the_reason(tmp_path: Path) -> None:
    seg = [{"profile": "seg", "uri": "x", "sha256": "0", "bytes": 1, "pacs": None}]
    small = [{"profile": "seg-labelmap", "uri": "y", "sha256": "1", "bytes": 1, "pacs": None}]
    volume = [{"profile": "nifti", "uri": "z", "sha256": "2", "bytes": 1, "pacs": None}]
    rejected = {"verdict": "rejected", "reason": "series_mixed"}
    baseline = [
        row("both", outputs=seg), row("empty"), row("before", outputs=seg), row("bad", **rejected),
        row("worse", **rejected), row("moved", outputs=seg, input_digest="other"), row("volume", outputs=volume),
    ]  # fmt: skip
    challenger = [
        row("both", "2", outputs=[*volume, *seg, *small]), row("empty", "2", outputs=seg), row("now", "2", outputs=seg),
        row("bad", "2", outputs=seg), row("worse", "2", verdict="rejected", reason="corrupt"),
        row("moved", "2", outputs=seg), row("volume", "2", outputs=seg),
    ]  # fmt: skip
    pairs, others = sides.pair(chosen(tmp_path / "a", *baseline), chosen(tmp_path / "b", *challenger))
    assert [(one["series_key"], one["baseline"], one["challenger"]) for one in pairs] == [
        ("both", seg[0], small[0]), ("empty", None, seg[0]),
    ]  # fmt: skip
    assert {one["series_key"]: (one["reason"], one["detail"]) for one in others} == {
        "before": ("only_in_baseline", ""),
        "now": ("only_in_challenger", ""),
        "bad": ("rejected_in_baseline", "series_mixed"),
        "worse": ("rejected_in_both", "series_mixed, corrupt"),
        "moved": ("other_input", "the runs were given other objects, by URI, frame or ETag"),
        "volume": (
            "no_segmentation",
            "the baseline wrote neither of the profiles seg-labelmap, seg, and masks are not kept of both",
        ),
    }


def test_kept_masks_of_both_stand_for_the_segmentation_that_one_lacks(tmp_path: Path) -> None:
    seg, volume = (
        [{"profile": name, "uri": "x", "sha256": "0", "bytes": 1, "pacs": None}] for name in ("seg", "nifti")
    )
    kept = {"digest": "d" * 64, "sha256": "s", "bytes": 9}
    baseline = [
        row("both", outputs=seg, masks=kept), row("one", outputs=seg, masks=kept), row("old", outputs=seg),
        row("empty"), row("none", outputs=volume, masks=kept),
    ]  # fmt: skip
    challenger = [
        row("both", "2", outputs=seg, masks=kept), row("one", "2", outputs=volume, masks=kept),
        row("old", "2", outputs=volume, masks=kept), row("empty", "2", outputs=volume, masks=kept),
        row("none", "2", foreground_pixels=7, masks=kept),
    ]  # fmt: skip
    pairs, others = sides.pair(chosen(tmp_path / "a", *baseline), chosen(tmp_path / "b", *challenger))
    assert [(one["series_key"], one["reason"]) for one in others] == [
        ("empty", "no_segmentation"), ("old", "no_segmentation"),
    ]  # fmt: skip
    told = {one["series_key"]: (one["baseline"], one["challenger"]) for one in pairs}
    assert told.pop("both") == (seg[0], seg[0])
    for key, files in told.items():
        for folder, file in zip("ab", files, strict=True):
            uri = f"{tmp_path}/{folder}/masks/{'d' * 16}/{key}.parquet"
            assert file == {"profile": "masks", "uri": uri, "sha256": "s", "bytes": 9}
    assert sorted(told) == ["none", "one"]


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    one = chosen(tmp_path / "a", row("a"))
    assert sides.same(one, one, (str(tmp_path / "a"), f"{tmp_path}/a/"))
    assert not sides.same(one, one, (str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(ValueError, match=r"diff\.worst: 0 or more"):
        configuration.build(
            DiffConfig, {"baseline": "a", "challenger": "b", "manifest": "m", "output": "o", "worst": -1}
        )


def measured(series_key: str, before: int, after: int, both: int, **values: object) -> dict[str, object]:
    """A row of which everything else follows: 100 pixels are a millilitre."""
    base = dict.fromkeys(DIFF.names) | {
        "series_key": series_key, "class": "", "verdict": "identical" if before == after == both else "changed",
        "slices": 4, "one_sided_slices": 0, "baseline_pixels": before, "challenger_pixels": after,
        "changed_pixels": before + after - 2 * both, "dice": 2 * both / (before + after) if before + after else None,
        "baseline_ml": before / 100, "challenger_ml": after / 100, "change_ml": (after - before) / 100,
        "changed_ml": (before + after - 2 * both) / 100, "baseline_lesions": int(before > 0),
        "challenger_lesions": int(after > 0), "appeared": int(after > both == 0), "vanished": int(before > both == 0),
    }  # fmt: skip
    return base | values


ROWS = [
    measured("moved", 100, 100, 50),
    measured("grown", 100, 300, 100),
    measured("new", 0, 500, 0),
    measured("gone", 400, 0, 0),
    measured("nothing", 0, 0, 0),
    measured("flat", 200, 200, 200, baseline_ml=None, challenger_ml=None, change_ml=None, changed_ml=None),
    dict.fromkeys(DIFF.names) | {"series_key": "lost", "class": "", "verdict": "not_compared", "reason": "not_found"},
]


def test_the_summary_counts_what_was_compared() -> None:
    found = difference.summary(ROWS)
    assert (found.identical, found.changed) == (2, 4)
    # Dice of the five with foreground: 0.5, 0.5, 0, 0, 1. Changes of the five with volumes: 0, 2, 5, -4, 0 mL.
    assert dataclasses.astuple(found.dice) == (5, 0.0, 0.5, 0.5)  # type: ignore[arg-type]
    assert dataclasses.astuple(found.change_ml) == (5, 0.0, 0.0, 2.0)  # type: ignore[arg-type]
    assert found.dice_pooled == pytest.approx(2 * (50 + 100 + 200) / (800 + 1100))
    assert (found.baseline_ml, found.challenger_ml) == pytest.approx((6.0, 9.0))
    assert (found.baseline_lesions, found.challenger_lesions, found.appeared, found.vanished) == (4, 4, 1, 1)
    assert (found.series_appeared, found.series_vanished) == (1, 1)
    none = difference.summary(ROWS[-1:])
    assert (none.identical, none.changed, none.dice, none.change_ml, none.dice_pooled) == (0, 0, None, None, None)


def near(picture_HWC: np.ndarray, colour: tuple[int, int, int], tolerance: int = 0) -> np.ndarray:
    return np.abs(picture_HWC.astype(int) - colour).max(axis=-1) <= tolerance


def test_the_panes_show_each_side_and_what_differs_on_the_slice() -> None:
    before, after = np.zeros((2, 64, 64), np.uint8)
    before[20:30, 10:20] = 1
    after[20:30, 15:25] = 1
    ramp_HW = np.tile(np.arange(64), (64, 1))
    picture = np.asarray(Image.open(io.BytesIO(panes.png(ramp_HW, before, after, ("one", "two")))))
    assert picture.shape == (380, 3 * 320 + 2 * 8, 3)
    inner = picture[30:350]
    left, middle, right = inner[:, :320], inner[:, 328:648], inner[:, 656:]
    # Half of the slice is shown, ten pixels to one: the outlines are of squares of 100 pixels, two pixels wide.
    for pane, colour in ((left, panes.BASELINE), (middle, panes.CHALLENGER)):
        rows, columns = np.nonzero(near(pane, colour))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1, len(rows)) == (100, 100, 100**2 - 96**2)
        assert not near(pane, panes.BASELINE if colour == panes.CHALLENGER else panes.CHALLENGER).any()
    starts = [
        np.nonzero(near(pane, colour))[1].min() for pane, colour in ((left, panes.BASELINE), (middle, panes.CHALLENGER))
    ]
    assert starts[1] - starts[0] == 50
    # Blue: of the baseline only, then yellow (both), then red (of the challenger only), 50 pixels each.
    tints = right[(np.nonzero(near(left, panes.BASELINE))[0].min() + 50)].astype(int)
    run = tints[starts[0] : starts[0] + 150]
    assert (run[:50, 2] > run[:50, 0]).all()
    assert (run[50:100, 1] > run[50:100, 2] + 40).all()
    assert (run[100:, 0] > run[100:, 1] + 30).all()
    legend = picture[350:]
    for colour in (panes.BASELINE, panes.CHALLENGER, panes.BOTH):
        assert near(legend, colour).sum() == 14**2
    assert not near(legend, panes.OTHER_CLASS).any()


def test_a_slice_that_cannot_be_read_and_one_of_a_single_pixel_have_a_picture() -> None:
    before, after = np.zeros((2, 5, 40), np.uint8)
    after[0, 39] = 2
    before[0, 39] = 1
    picture = np.asarray(Image.open(io.BytesIO(panes.png(None, before, after, ("a" * 200, "b")))))
    assert near(picture[350:], panes.OTHER_CLASS).sum() == 14**2


def test_the_page_says_it_all_and_fetches_nothing() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    together = difference.summary(ROWS)
    page = difference.Page(
        "brain/1", "brain/2 <b>", {"baseline": "brain/1/c0ffee"}, together, {}, ROWS,
        [difference.Picture("Series grown, slice 2 of 4", buffer.getvalue())],
    )  # fmt: skip
    html = difference.render(page)
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)
    for wanted in (
        "brain/2 &lt;b&gt; against brain/1",
        "2 identical, 4 changed",
        "not_found: 1",
        "not a medical device",
    ):
        assert wanted in text, wanted
    assert "<b>" not in re.search(r"<h1>.*?</h1>", html)[0]  # type: ignore[index]
    assert "<script" not in html
    assert "url(" not in html
    sources = re.findall(r'<img[^>]* src="([^"]*)"', html)
    assert len(sources) == 3  # volumes, their changes, and the picture
    for source in sources:
        prefix, _, content = source.partition(",")
        assert prefix == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
