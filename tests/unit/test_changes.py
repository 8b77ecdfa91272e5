"""What changed between two segmentations of a series: squares whose overlap and volume are known by counting."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayseg.data import synthetic
from rayseg.dicom import segmentation
from rayseg.dicom.reading import Header, read_header
from rayseg.evaluation.changes import DIFF, compare_series
from rayseg.geometry.volume import volume_ml
from tests.unit.archive_runs import SIZE, SLICES, empty, file, seg, squares


def compared(folder: Path, baseline: bytes | None, challenger: bytes | None) -> dict[str, Any]:
    files = {
        side: None if data is None else file(folder / f"{side}.dcm", data)
        for side, data in (("baseline", baseline), ("challenger", challenger))
    }
    return compare_series({"series_key": "series-0", "patient_key": "patient-0", **files})


def test_a_square_moved_by_half_its_side_shares_half_of_it(tmp_path: Path) -> None:
    found = compared(tmp_path, seg(0, squares((1, 20, 20))), seg(0, squares((1, 20, 25)), kind="LABELMAP"))
    together, lesion = found["rows"]
    expected = {
        "series_key": "series-0", "patient_key": "patient-0", "verdict": "changed", "slices": SLICES,
        "one_sided_slices": 0, "baseline_pixels": 100, "challenger_pixels": 100, "changed_pixels": 100, "dice": 0.5,
        "baseline_ml": 1.0, "challenger_ml": 1.0, "change_ml": 0.0, "changed_ml": 1.0, "baseline_lesions": 1,
        "challenger_lesions": 1, "appeared": 0, "vanished": 0,
    }  # fmt: skip
    assert together == pytest.approx(expected | {"class": ""})
    assert lesion == pytest.approx(expected | {"class": "lesion"})
    assert set(together) <= set(DIFF.names)
    shown = found["shown"]
    assert (shown["slice_uid"], shown["number"], shown["position_mm"]) == ("1.2.3.0.1", 2, (0.0, 0.0, 5.0))


def test_lesions_appear_and_vanish_where_the_other_side_has_none_of_their_voxels(tmp_path: Path) -> None:
    # The first lesion stays, two vanish (one reaches over two slices), one appears; the volumes are 4 and 2.5 mL.
    before = squares((0, 5, 5), (1, 40, 5), (2, 40, 5), (3, 5, 40))
    after = squares((0, 5, 5), (2, 20, 20))
    after[0, 5:10, 15:25] = 1  # 50 pixels more of the first one
    (together, _) = compared(tmp_path, seg(0, before), seg(0, after))["rows"]
    names = ("baseline_lesions", "challenger_lesions", "appeared", "vanished")
    assert [together[name] for name in names] == [3, 2, 1, 2]
    assert together["baseline_ml"] == pytest.approx(4.0)
    assert together["challenger_ml"] == pytest.approx(2.5)
    assert together["change_ml"] == pytest.approx(-1.5)
    assert together["changed_ml"] == pytest.approx(3.0 + 1.5)
    assert together["dice"] == pytest.approx(2 * 100 / (400 + 250))


def test_classes_are_matched_by_name_and_not_by_number(tmp_path: Path) -> None:
    edema, core = squares((1, 10, 10)), squares((2, 10, 10), side=20)
    one = np.maximum(edema, 2 * core)
    other = np.maximum(2 * edema, core)
    same = compared(tmp_path, seg(0, one, ("edema", "core")), seg(0, other, ("core", "edema"), "LABELMAP"))
    assert [row["class"] for row in same["rows"]] == ["", "edema", "core"]
    assert {(row["verdict"], row["dice"], row["changed_pixels"]) for row in same["rows"]} == {("identical", 1.0, 0)}
    assert [row["baseline_ml"] for row in same["rows"]] == pytest.approx([5.0, 1.0, 4.0])
    assert same["shown"] is None
    # What only changed its class is changed, though as foreground it stays.
    turned = compared(tmp_path, seg(0, one, ("edema", "core")), seg(0, one, ("core", "edema")))["rows"]
    assert [(row["dice"], row["changed_pixels"], row["vanished"]) for row in turned] == [
        (1.0, 500, 0), (0.0, 500, 1), (0.0, 500, 1),
    ]  # fmt: skip
    # A class that one model does not know is none of the classes, and still foreground.
    alone = compared(tmp_path, seg(0, one, ("edema", "core")), seg(0, edema, ("edema",)))["rows"]
    assert [row["class"] for row in alone] == ["", "edema"]
    assert alone[0]["challenger_pixels"] == 100
    assert [row["verdict"] for row in alone] == ["changed", "identical"]


def test_a_side_that_wrote_no_file_found_nothing(tmp_path: Path) -> None:
    found = compared(tmp_path, None, seg(0, squares((3, 0, 0), (3, 50, 50))))
    assert [(row["class"], row["appeared"], row["dice"], row["change_ml"]) for row in found["rows"]] == [
        ("", 2, 0.0, 2.0), ("lesion", 2, 0.0, 2.0),
    ]  # fmt: skip
    assert found["shown"]["number"] == SLICES
    (neither,) = compared(tmp_path, None, None)["rows"]
    assert (neither["verdict"], neither["change_ml"], neither["baseline_pixels"]) == ("identical", 0.0, 0)
    (together, _) = compared(tmp_path, seg(0, empty()), None)["rows"]
    assert (together["verdict"], together["dice"], together["slices"]) == ("identical", None, SLICES)


def test_slices_of_one_side_only_are_counted_and_not_compared(tmp_path: Path) -> None:
    masks = squares((1, 10, 10), (3, 10, 10))
    (together, _) = compared(tmp_path, seg(0, masks), seg(0, masks, slices=range(3)))["rows"]
    assert (together["slices"], together["one_sided_slices"], together["verdict"]) == (3, 1, "changed")
    assert (together["dice"], together["baseline_pixels"], together["changed_pixels"]) == (1.0, 100, 0)
    (refused,) = compared(tmp_path, seg(0, masks), seg(1, masks))["rows"]
    assert (refused["verdict"], refused["reason"]) == ("not_compared", "corrupt")
    assert "no slice in common" in refused["detail"]


def test_a_bad_file_is_a_row_with_a_reason(tmp_path: Path) -> None:
    good = file(tmp_path / "good.dcm", seg(0, squares((0, 0, 0))))
    text = file(tmp_path / "text.dcm", b"no DICOM at all")
    changed = file(tmp_path / "changed.dcm", seg(0, squares((0, 0, 0))))
    (tmp_path / "changed.dcm").write_bytes(seg(0, squares((0, 0, 1))))
    missing = good | {"uri": str(tmp_path / "missing.dcm")}
    for bad, reason, said in (
        (text, "corrupt", "segmentation"),
        (changed, "corrupt", "sha256"),
        (missing, "not_found", "the challenger's file"),
    ):
        found = compare_series({"series_key": "k", "patient_key": "p", "baseline": good, "challenger": bad})
        (row,) = found["rows"]
        assert (row["verdict"], row["reason"], found["shown"]) == ("not_compared", reason, None)
        assert said in row["detail"]
        assert str(tmp_path) not in row["detail"]


def test_masks_are_shown_whole_whatever_was_cut_out_to_measure(tmp_path: Path) -> None:
    before, after = squares((2, 30, 40)), squares((2, 33, 40))
    shown = compared(tmp_path, seg(0, before), seg(0, after))["shown"]
    for side, masks in (("baseline", before), ("challenger", after)):
        assert zlib.decompress(shown[side]) == masks[2].tobytes()
    assert (shown["rows"], shown["columns"]) == (SIZE, SIZE)


def test_volumes_are_those_of_the_source_slices_tilted_ones_too(tmp_path: Path) -> None:
    synthetic.write_studies(str(tmp_path), patients=3, slices=5, size=32, masks=False)
    for folder in sorted((tmp_path / "images").iterdir()):
        sources = [path.read_bytes() for path in sorted(folder.iterdir())]
        headers = [header for data in sources if isinstance(header := read_header(data), Header)]
        masks = [np.zeros((32, 32), np.uint8) for _ in sources]
        for number, mask in enumerate(masks):
            mask[4 : 6 + number, 4:10] = 1
        encoded = segmentation.encode(sources, masks, ("lesion",), "m", "1", "0" * 64)
        assert isinstance(encoded, bytes)
        (together, _) = compared(tmp_path, encoded, None)["rows"]
        assert together["baseline_ml"] == pytest.approx(
            volume_ml([int(mask.sum()) for mask in masks], [header.geometry for header in headers]), rel=1e-6
        )
        assert (together["change_ml"], together["vanished"]) == (-together["baseline_ml"], 1)
