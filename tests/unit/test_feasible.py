"""A profile that cannot be made costs itself only: known from headers, before the network runs, or where it fails."""

import dataclasses
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import trimesh
from PIL import Image

from rayseg.dicom import segmentation
from rayseg.inference import outputs, plan
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Predictor
from rayseg.records import LEDGER, Reason, Reject
from tests import bundles
from tests.unit import archive_runs
from tests.unit.unread_archives import cataloged, planned, rows_of, segmented, task, written

ALL = ("seg", "seg-labelmap", "seg-fractional", "report", "nifti", "nifti-upright", "stl", "glb", "png", "overlays")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """It finds what is bright: of the ramp of `archive_runs.ct` the right half."""
    return Predictor.load(bundles.write_bundle(tmp_path_factory.mktemp("model") / "bundle", 150))


def ct(number: int, *, without: Sequence[str] = (), **values: Any) -> bytes:
    """A slice of a series of four, 5 mm apart."""
    dataset = pydicom.dcmread(io.BytesIO(archive_runs.ct(1, number)))
    for keyword in without:
        delattr(dataset, keyword)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def series(*slices: bytes) -> dict[str, bytes]:
    return {f"{number}.dcm": data for number, data in enumerate(slices)}


def not_made(row: dict[str, Any]) -> dict[str, str]:
    return {one["profile"]: one["reason"] for one in row["not_made"]}


def decided(folder: Path, files: dict[str, bytes], profiles: Sequence[str] = ALL) -> dict[str, str] | str:
    """What the plan leaves out, by reason; the reason of the series where that is all."""
    found = planned(cataloged(folder, files), task(folder, profiles))
    if not found.todo:
        (row,) = found.unusable
        return str(row["reason"])
    (cell,) = found.todo
    return not_made(plan.unpacked_series(cell))


PLACE = ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient")
OF_PLACE = ("report", "nifti", "nifti-upright", "stl", "glb")
UNEVEN = dict.fromkeys(("nifti", "nifti-upright"), "uneven_slices")
DICOM = ("seg", "seg-labelmap", "seg-fractional", "report")


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ([ct(n) for n in range(4)], {}),
        ([ct(n) for n in (0, 1, 3)], UNEVEN),
        ([ct(n, without=["FrameOfReferenceUID"]) for n in range(4)], dict.fromkeys(DICOM, "missing_attribute")),
        # A radiograph: of it a segmentation, and no more, can be.
        ([ct(0, without=PLACE)], dict.fromkeys(OF_PLACE, "missing_attribute")),
        ([ct(n, without=PLACE) for n in range(3)], dict.fromkeys(OF_PLACE, "missing_attribute")),
        ([ct(n, without=["ImagePositionPatient"]) for n in range(3)], dict.fromkeys(OF_PLACE, "missing_attribute")),
        # A slice alone that is of no known thickness has no volume.
        ([ct(0, without=["SliceThickness"])], dict.fromkeys(OF_PLACE, "missing_attribute")),
        (
            [ct(n, without=["PixelSpacing"]) for n in range(3)],
            dict.fromkeys((*DICOM, *OF_PLACE), "missing_attribute"),
        ),
        # Tilted: a matrix says where they lie.
        ([ct(n, ImagePositionPatient=[0, 1.2 * n, 5 * n]) for n in range(4)], {}),
    ],
    ids=["even", "gap", "no frame of reference", "DX", "several DX", "no position", "alone", "no spacing", "tilted"],
)  # fmt: skip
def test_the_plan_knows_by_headers_what_cannot_be(
    tmp_path: Path, slices: list[bytes], expected: dict[str, str]
) -> None:
    assert decided(tmp_path, series(*slices)) == expected


@pytest.mark.parametrize(
    ("profiles", "reason"),
    [(("nifti",), "uneven_slices"), (("seg", "report"), None), (("nifti", "stl"), None)],
)
def test_a_series_is_rejected_unread_where_nothing_can_be_made(
    tmp_path: Path, profiles: tuple[str, ...], reason: str | None
) -> None:
    found = planned(cataloged(tmp_path, series(ct(0), ct(1), ct(3))), task(tmp_path, profiles))
    assert [row["reason"] for row in found.unusable] == ([reason] if reason else [])
    assert len(found.todo) == (reason is None)
    if reason:
        assert found.unusable[0]["detail"] == "nifti: slices lie up to 2.50 mm off even distances"
        assert found.refusals.counts() == {"uneven_slices": 3}
        assert found.accepted == 3


def test_what_can_be_made_of_a_series_with_a_gap_is(tmp_path: Path, predictor: Predictor) -> None:
    uri = cataloged(tmp_path, series(ct(0), ct(1), ct(3)))
    (row,) = segmented(uri, task(tmp_path, ALL), predictor)
    assert (row["verdict"], row["slices"], not_made(row)) == ("segmented", 3, UNEVEN)
    files = written(row)
    counts = dict.fromkeys(ALL, 1) | {"png": 3, "overlays": 3}
    assert {profile: len(data) for profile, data in files.items()} == {
        n: c for n, c in counts.items() if n not in UNEVEN
    }
    masks = segmentation.decode(files["seg"][0])
    assert len(masks) == 3
    for number, png in zip((0, 1, 3), files["png"], strict=True):
        image = Image.open(io.BytesIO(png))
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), masks[f"1.2.3.1.{number}"])
    names = [Path(one["uri"]).name for one in row["outputs"] if one["profile"] == "png"]
    assert names == ["00000.mask.png", "00001.mask.png", "00002.mask.png"]
    assert trimesh.load(io.BytesIO(files["stl"][0]), file_type="stl").volume > 0
    assert row["rejects"] == []


def test_the_real_uneven_head_has_all_but_its_nifti(tmp_path: Path, predictor: Predictor, shared_data: Path) -> None:
    files = {path.name: path.read_bytes() for path in sorted((shared_data / "real-ct").glob("*.dcm"))}
    uri = cataloged(tmp_path, files)
    (row,) = segmented(uri, task(tmp_path, ("seg", "nifti", "stl")), predictor)
    assert (row["verdict"], row["slices"], not_made(row)) == ("segmented", 28, {"nifti": "uneven_slices"})
    assert row["not_made"][0]["detail"].startswith("slices lie up to ")
    made = written(row)
    assert sorted(made) == ["seg", "stl"]
    assert len(segmentation.decode(made["seg"][0])) == 28
    # Without its frame of reference the files of DICOM cannot be, and only these.
    for name, data in files.items():
        dataset = pydicom.dcmread(io.BytesIO(data))
        del dataset.FrameOfReferenceUID
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        files[name] = buffer.getvalue()
    (row,) = segmented(cataloged(tmp_path, files), task(tmp_path, ("seg", "report", "stl", "png")), predictor)
    assert (row["verdict"], set(not_made(row))) == ("segmented", {"seg", "report"})
    assert written(row)["stl"] == made["stl"]


@pytest.mark.parametrize("count", [1, 3])
def test_radiographs_have_a_segmentation_and_pictures(tmp_path: Path, predictor: Predictor, count: int) -> None:
    uri = cataloged(tmp_path, series(*(ct(number, without=PLACE) for number in range(count))))
    (row,) = segmented(uri, task(tmp_path, ("seg", "nifti", "png")), predictor)
    assert (row["verdict"], row["slices"], not_made(row)) == ("segmented", count, {"nifti": "missing_attribute"})
    made = written(row)
    dataset = pydicom.dcmread(io.BytesIO(made["seg"][0]))
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    assert len(frames) == count
    assert {frame.tobytes() for frame in frames} == {
        np.asarray(Image.open(io.BytesIO(png))).tobytes() for png in made["png"]
    }


def refuse(*arguments: object, **options: object) -> Reject:
    return Reject(Reason.WRITE_FAILED, "the segmentation cannot be made: TypeError")


def fail(*arguments: object, **options: object) -> Reject:
    raise KeyError("a defect")


@pytest.mark.parametrize(("encode", "reason"), [(refuse, "write_failed"), (fail, "internal")])
def test_an_encoder_that_refuses_costs_its_profile_and_what_is_about_it(
    tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, encode: Any, reason: str
) -> None:
    monkeypatch.setattr(segmentation, "encode", encode)
    uri = cataloged(tmp_path, series(*map(ct, range(4))))
    (row,) = segmented(uri, task(tmp_path, ("seg", "report", "nifti")), predictor)
    assert (row["verdict"], not_made(row)) == ("segmented", {"seg": reason, "report": reason})
    assert set(written(row)) == {"nifti"}
    # As a rejected series would be, it is tried again.
    assert planned(uri, task(tmp_path, ("seg", "report", "nifti")), row).done == set()
    (row,) = segmented(uri, task(tmp_path, ("seg", "report")), predictor)
    assert (row["verdict"], row["reason"], row["outputs"]) == ("rejected", reason, [])
    assert row["detail"].startswith("seg: ")
    assert {reject["reason"] for reject in row["rejects"]} == {reason}


def test_what_headers_forbid_is_not_tried_again(tmp_path: Path, predictor: Predictor) -> None:
    uri, of = cataloged(tmp_path, series(ct(0), ct(1), ct(3))), task(tmp_path, ("seg", "nifti"))
    (row,) = segmented(uri, of, predictor)
    assert planned(uri, of, row).done == {row["series_key"]}
    assert planned(uri, of, row | {"not_made": None}).done == {row["series_key"]}  # of an earlier version


def test_a_slice_that_is_lost_on_the_way_may_cost_a_profile(tmp_path: Path, predictor: Predictor) -> None:
    uri = cataloged(tmp_path, series(*map(ct, range(4))))
    (tmp_path / "archive" / "1.dcm").unlink()
    (row,) = segmented(uri, task(tmp_path, ("nifti", "seg")), predictor)
    assert (row["slices"], row["rejected_slices"], not_made(row)) == (3, 1, {"nifti": "uneven_slices"})


def test_a_report_is_about_the_segmentation_that_could_be_made(
    tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = segmentation.encode

    def but_binary(*arguments: Any, kind: str, **options: Any) -> bytes | Reject:
        return refuse() if kind == "BINARY" else encode(*arguments, kind=kind, **options)

    monkeypatch.setattr(segmentation, "encode", but_binary)
    uri = cataloged(tmp_path, series(*map(ct, range(4))))
    (row,) = segmented(uri, task(tmp_path, ("seg", "seg-labelmap", "report")), predictor)
    assert not_made(row) == {"seg": "write_failed"}
    report, made = (pydicom.dcmread(io.BytesIO(written(row)[name][0])) for name in ("report", "seg-labelmap"))
    assert made.SOPInstanceUID in str(report)


def test_every_profile_has_a_rule() -> None:
    assert set(ALL) == set(outputs.Profile.__args__)  # type: ignore[attr-defined]
    assert LEDGER.field("not_made").type.value_type.num_fields == 3


def png(seed: int, side: int = 48) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


def nifti(shape: tuple[int, ...] = (40, 32, 5)) -> bytes:
    values = np.random.default_rng(3).integers(0, 100, shape).astype(np.int16)
    return nib.Nifti1Image(values, np.diag([-1.0, 1, 2, 1])).to_bytes()


def test_volumes_and_image_files_have_the_profiles_that_can_say_them(tmp_path: Path) -> None:
    of_image = dict.fromkeys(DICOM, "not_dicom") | dict.fromkeys(OF_PLACE[1:], "missing_attribute")
    assert decided(tmp_path / "a", {"a.png": png(1)}) == of_image
    assert decided(tmp_path / "b", {"b.nii": nifti()}) == dict.fromkeys(DICOM, "not_dicom")
    assert decided(tmp_path / "c", {"a.png": png(1)}, ("seg",)) == "not_dicom"
    assert decided(tmp_path / "d", {"b.nii": nifti()}, ("seg", "report")) == "not_dicom"
    assert decided(tmp_path / "e", {"a.png": png(1)}, ("nifti",)) == "missing_attribute"


def test_an_image_file_is_a_series_that_its_instance_key_names(tmp_path: Path, predictor: Predictor) -> None:
    files = {"one/a.png": png(1), "one/b.png": png(2), "two/a.png": png(1, 64), "v.nii": nifti()}
    uri = cataloged(tmp_path, files)
    of = task(tmp_path, ("png", "overlays"))
    rows = segmented(uri, of, predictor)
    keys = {row["instance_key"]: row["uri"] for row in rows_of(uri) if row["frame"] is None}
    assert len(keys) == 3
    assert [row["series_key"] for row in rows[:3]] == list(keys)
    for row in rows[:3]:
        data = Path(keys[row["series_key"]]).read_bytes()
        (expected,) = predictor.segment([data])
        assert not isinstance(expected, Reject)
        assert 0 < expected.mask.sum() < expected.mask.size
        (mask,) = written(row)["png"]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask))), expected.mask)
        names = [Path(one["uri"]).name for one in row["outputs"]]
        assert names == [f"{row['series_key']}.mask.png", f"{row['series_key']}.overlay.png"]
        assert row["volume_ml"] is None
    assert len(written(rows[3])["png"]) == 5
    assert rows[3]["volume_ml"] == pytest.approx(rows[3]["foreground_pixels"] * 2 / 1000)  # voxels of 1 x 1 x 2 mm


def test_a_model_of_neighbours_takes_volumes_and_refuses_image_files(tmp_path: Path) -> None:
    deep = Predictor.load(bundles.write_bundle(tmp_path / "bundle", 150, neighbours=1))
    uri = cataloged(tmp_path, {"a.png": png(1), "b.nii": nifti()})
    image, volume = segmented(uri, task(tmp_path, ("png",)), deep)
    assert (image["verdict"], image["reason"]) == ("rejected", "needs_neighbours")
    assert (volume["verdict"], volume["slices"]) == ("segmented", 5)


def test_another_kind_of_file_than_the_manifest_says_is_refused(tmp_path: Path, predictor: Predictor) -> None:
    uri = cataloged(tmp_path, {"a.png": png(1), "b.dcm": ct(0)})
    (tmp_path / "archive" / "a.png").write_bytes(ct(0))
    (tmp_path / "archive" / "b.dcm").write_bytes(png(1))
    rows = segmented(uri, task(tmp_path, ("png",)), predictor)
    assert [row["reason"] for row in rows] == ["not_an_image", "not_dicom"]


def test_the_ledger_warns_of_a_volume_that_itk_refuses(tmp_path: Path, predictor: Predictor) -> None:
    """Each slice 2 mm beside the one before; the right-angled one is as many pixels wider."""
    tilted = series(*(ct(n, ImagePositionPatient=[0, 2 * n, 5 * n]) for n in range(4)))
    (row,) = segmented(cataloged(tmp_path / "a", tilted), task(tmp_path / "a", ("nifti", "nifti-upright")), predictor)
    assert row["verdict"] == "segmented"
    assert "nifti-upright" in row["detail"]
    sheared, straight = (nib.Nifti1Image.from_bytes(gzip.decompress(data[0])) for data in written(row).values())
    assert (sheared.header["qform_code"], straight.header["qform_code"]) == (0, 1)
    assert straight.shape[1] > sheared.shape[1]
    even = series(*(ct(n) for n in range(4)))
    (row,) = segmented(cataloged(tmp_path / "b", even), task(tmp_path / "b", ("nifti", "nifti-upright")), predictor)
    assert row["detail"] is None


def test_the_ledger_warns_of_a_sheared_nrrd_too(tmp_path: Path, predictor: Predictor) -> None:
    """Its mask is a file of ours; that of a NIfTI has the header of the image, which its readers know already."""
    header = {"space": "LPS", "space directions": [[1, 0, 0], [0, 1, 0], [0, 1.5, 3]], "space origin": [1, 2, 3]}
    nrrd.write(str(tmp_path / "a.nrrd"), np.full((32, 24, 5), 100, np.int16), header)
    sheared = np.array([[-1, 0, 0, -1], [0, -1, -1.5, -2], [0, 0, 3, 3], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.full((32, 24, 5), 100, np.int16), sheared)
    files = {"a.nrrd": (tmp_path / "a.nrrd").read_bytes(), "b.nii": image.to_bytes()}
    ours, theirs = segmented(cataloged(tmp_path, files), task(tmp_path, ("nifti", "nifti-upright")), predictor)
    assert [len(row["outputs"]) for row in (ours, theirs)] == [2, 2]
    assert "nifti-upright" in (ours["detail"] or "")
    assert theirs["detail"] is None
    for row in (ours, theirs):
        np.testing.assert_allclose(
            nib.Nifti1Image.from_bytes(gzip.decompress(written(row)["nifti"][0])).affine, sheared
        )


def test_dense_sections_of_a_tomograph_are_a_stack(tmp_path: Path, predictor: Predictor) -> None:
    """As of the retina: 512 sections over 3 mm, 6 micrometres apart, with pixels of 4 x 6."""
    places = [{"ImagePositionPatient": [0, 0, 0.006 * n], "PixelSpacing": ["0.004", "0.006"]} for n in range(4)]
    files = series(*(ct(n, SliceThickness="0.006", **values) for n, values in enumerate(places)))
    (row,) = segmented(cataloged(tmp_path, files), task(tmp_path, ("seg", "report", "nifti", "stl")), predictor)
    assert (row["verdict"], row["slices"], row["not_made"]) == ("segmented", 4, [])
    assert row["volume_ml"] == pytest.approx(row["foreground_pixels"] * 4 * 6 * 6 * 1e-12)
    measures = pydicom.dcmread(io.BytesIO(written(row)["seg"][0])).SharedFunctionalGroupsSequence[0]
    assert float(measures.PixelMeasuresSequence[0].SpacingBetweenSlices) == pytest.approx(0.006)


def test_lesions_without_a_volume_are_known_before_the_network_runs(tmp_path: Path, predictor: Predictor) -> None:
    of = dataclasses.replace(task(tmp_path, ("seg", "png")), postprocess=Postprocess(min_lesion_mm3=1.0))
    nowhere = cataloged(tmp_path, series(*(ct(number, without=PLACE) for number in range(3))))
    found = planned(nowhere, of)
    assert (found.todo, found.series) == ([], [])
    (row,) = found.unusable
    assert (row["reason"], row["detail"]) == (
        "missing_attribute", "segment.postprocess.min_lesion_mm3: the series' positions give no volumes",
    )  # fmt: skip
    assert len(planned(nowhere, dataclasses.replace(of, postprocess=Postprocess(fill_holes=True))).todo) == 1
    placed = cataloged(tmp_path / "placed", series(*map(ct, range(3))))
    assert len(planned(placed, of).todo) == 1
