"""Kept masks: files that are made of them are those that the network's own run makes, and nothing stale is used."""

import gzip
import io
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import highdicom
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image

from rayseg.data.conformal import VolumeErrors
from rayseg.dicom import segmentation
from rayseg.inference import kept, ledger, plan, remake
from rayseg.inference.kept import Keep
from rayseg.inference.postprocess import Postprocess
from rayseg.inference.predictor import Predictor
from rayseg.inference.remake import Model, remake_series
from rayseg.inference.series import Task, segment_series
from rayseg.inference.watch import STEPS
from rayseg.models.engine import Engine
from rayseg.tracking import bundle
from tests import bundles
from tests.canaries import PLACES, Canaries, Search
from tests.unit.test_feasible import ct, series
from tests.unit.unread_archives import cataloged, for_network, planned, task

ALL = ("seg", "seg-labelmap", "report", "nifti", "nifti-upright", "stl", "glb", "png", "overlays")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """It finds what is bright, and was trained on MR: CT is flagged. Volumes have intervals."""
    folder = bundles.write_bundle(tmp_path_factory.mktemp("model") / "bundle", 150)
    bundle.calibrate(folder, VolumeErrors((3.0, 3.0), (19, 19)))
    return Predictor.load(folder)


def model(predictor: Predictor) -> Model:
    return Model(predictor.known, predictor.bundle.preprocess)


def keeping(folder: Path, profiles: tuple[str, ...] = ALL, **values: Any) -> Task:
    return task(folder, profiles, keep=Keep(str(folder / "output"), "k" * 64), **values)


def elsewhere(of: Task, **values: Any) -> Task:
    return replace(of, folder=f"{of.folder}-again", **values)


def made_again(of: Task, cell: bytes, row: dict[str, Any], predictor: Predictor) -> dict[str, Any] | None:
    return remake_series(model(predictor), of, **for_network(cell), masks=row["masks"])


def content(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """A row without times and folders, and its files' bytes."""
    files = {one["uri"].removeprefix(folder): Path(one["uri"]).read_bytes() for one in row["outputs"]}
    timeless = {name: value for name, value in row.items() if name not in ("seconds", *(f"{s}_s" for s in STEPS))}
    return timeless | {"outputs": [one | {"uri": ""} for one in row["outputs"]], "files": files}


def multi_frame() -> dict[str, bytes]:
    joined = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        legacy_datasets=[pydicom.dcmread(io.BytesIO(ct(number))) for number in range(4)],
        series_instance_uid="1.2.3",
        series_number=1,
        sop_instance_uid="1.2.3.4",
        instance_number=1,
    )
    buffer = io.BytesIO()
    joined.save_as(buffer, enforce_file_format=True)
    return {"joined.dcm": buffer.getvalue()}


def deflated(number: int) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(ct(number)))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def volume() -> dict[str, bytes]:
    values = np.full((64, 64, 5), 5, "<i2")
    values[40:50, 6:14, 1:3] = 100
    return {"a.nii.gz": gzip.compress(nib.Nifti1Image(values, np.diag([-1.0, -2.0, 3.0, 1.0])).to_bytes())}


def picture() -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).save(buffer, "PNG")
    return {"a.png": buffer.getvalue()}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


INPUTS: dict[str, Callable[[], dict[str, bytes]]] = {
    "cut short": lambda: series(*map(ct, range(4))),
    "uneven": lambda: series(ct(0), ct(1), ct(3)),
    "no place": lambda: series(*(ct(n, without=("ImagePositionPatient", "ImageOrientationPatient")) for n in range(3))),
    "multi-frame": multi_frame,
    "deflated": lambda: series(*map(deflated, range(3))),
    "volume": volume,
    "picture": picture,
}


@pytest.mark.parametrize("name", INPUTS)
def test_files_of_kept_masks_are_those_of_the_network(tmp_path: Path, predictor: Predictor, name: str) -> None:
    of = keeping(tmp_path)
    (cell,) = planned(cataloged(tmp_path, INPUTS[name]()), of).todo
    if name == "cut short":
        cut_short(tmp_path / "archive" / "1.dcm")
    first = segment_series(predictor, of, **for_network(cell))
    assert first["verdict"] == "segmented"
    assert first["foreground_pixels"] > 0
    assert (first["volume_ml"] is None) == (first["volume_low_ml"] is None)
    again = made_again(elsewhere(of), cell, first, predictor)
    assert again is not None
    assert (again["forward_s"], again["read_s"] > 0) == (0, True)
    assert content(again, f"{of.folder}-again") == content(first, of.folder)
    assert {one["profile"] for one in first["outputs"]} | {one["profile"] for one in first["not_made"]} == set(ALL)


@pytest.mark.parametrize("write_empty", [True, False])
@pytest.mark.parametrize("least_mm3", [1.0, 1e9])
def test_masks_are_kept_as_they_are_after_postprocessing(
    tmp_path: Path, predictor: Predictor, least_mm3: float, write_empty: bool
) -> None:
    of = keeping(tmp_path, ("seg", "report", "nifti"), write_empty=write_empty)
    of = replace(of, postprocess=Postprocess(min_lesion_mm3=least_mm3, fill_holes=True))
    (cell,) = planned(cataloged(tmp_path, series(*map(ct, range(4)))), of).todo
    first = segment_series(predictor, of, **for_network(cell))
    again = made_again(elsewhere(of), cell, first, predictor)
    assert again is not None
    assert content(again, f"{of.folder}-again") == content(first, of.folder)
    assert (first["foreground_pixels"] == 0) == (least_mm3 == 1e9)
    assert not remake.is_enough(of, ("overlays",)), "these show what the model has found"


def test_several_models_agree_as_they_did(tmp_path: Path) -> None:
    folders = [bundles.write_bundle(tmp_path / str(level), level) for level in (50, 200)]
    together = Predictor.load(*folders, mirror="columns")
    of = keeping(tmp_path)
    (cell,) = planned(cataloged(tmp_path, series(*map(ct, range(4)))), of).todo
    first = segment_series(together, of, **for_network(cell))
    assert 0 < first["pairwise_dice"] < 1
    again = remake_series(Model.read(folders[0], True, None), elsewhere(of), **for_network(cell), masks=first["masks"])
    assert again is not None
    assert content(again, f"{of.folder}-again") == content(first, of.folder)


def test_a_file_says_what_is_in_it_and_of_nobody(tmp_path: Path, predictor: Predictor) -> None:
    of = keeping(tmp_path)
    (cell,) = planned(cataloged(tmp_path, series(*map(ct, range(3)))), of).todo
    cut_short(tmp_path / "archive" / "1.dcm")
    row = segment_series(predictor, of, **for_network(cell))
    assert of.keep is not None
    path = Path(of.keep.uri(row["series_key"]))
    assert path == tmp_path / "output" / "masks" / ("k" * 16) / f"{row['series_key']}.parquet"
    assert path.stat().st_size == row["masks"]["bytes"]
    (heads,) = duckdb.sql(f"SELECT list(DISTINCT head_bytes) FROM '{path}' WHERE reason IS NULL").fetchall()
    # Before tag, VR and length of the pixels.
    assert heads == ([(tmp_path / "archive" / "0.dcm").stat().st_size - 64 * 64 * 2 - 12],)
    rows = duckdb.sql(f"SELECT number, reason, rows, columns, mask FROM '{path}' ORDER BY number").fetchall()
    assert [(number, reason) for number, reason, *_ in rows] == [(0, None), (1, "truncated"), (2, None)]
    seg = segmentation.decode(Path(next(one["uri"] for one in row["outputs"])).read_bytes())
    (mask,) = [np.frombuffer(zlib.decompress(m), np.uint8).reshape(r, c) for n, _, r, c, m in rows if n == 2]
    assert np.array_equal(mask, seg["1.2.3.1.2"])
    whole = b"".join(str(rows).encode() for rows in duckdb.sql(f"SELECT * EXCLUDE mask FROM '{path}'").fetchall())
    for name in (b"A^B", b"P1", b"1.2.3.1", b".dcm"):
        assert name not in whole + path.read_bytes(), name


def test_kept_masks_hold_no_identity(tmp_path: Path, predictor: Predictor) -> None:
    canaries, files = Canaries(), {}
    for number in range(3):
        dataset = pydicom.dcmread(io.BytesIO(ct(number)))
        for place, level in enumerate(("Study", "Series", "FrameOfReference")):
            setattr(dataset, f"{level}{'' if level[0] == 'F' else 'Instance'}UID", f"2.25.{10**30 + place}")
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"2.25.{10**31 + number}"
        canaries.fill(dataset, "a")
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        files[f"{canaries.new(PLACES)}.dcm"] = buffer.getvalue()
    of = keeping(tmp_path, ("seg",))
    (cell,) = planned(cataloged(tmp_path, files), of).todo
    cut_short(tmp_path / "archive" / next(iter(files)))
    assert segment_series(predictor, of, **for_network(cell))["slices"] == 2
    search = Search(canaries)
    assert not search.folder(tmp_path / "output")
    assert search.files == 1
    assert search.folder(tmp_path / "out"), "a segmentation must carry some"


def test_what_another_try_may_see_is_not_kept(tmp_path: Path, predictor: Predictor) -> None:
    of = keeping(tmp_path)
    uri = cataloged(tmp_path, series(*map(ct, range(3))))
    (tmp_path / "archive" / "1.dcm").unlink()
    (cell,) = planned(uri, of).todo
    row = segment_series(predictor, of, **for_network(cell))
    assert (row["verdict"], row["rejected_slices"], row["masks"]) == ("segmented", 1, None)
    assert not (tmp_path / "output").exists()


def test_masks_that_the_store_does_not_take_cost_the_series(tmp_path: Path, predictor: Predictor) -> None:
    of = keeping(tmp_path)
    (tmp_path / "output").write_bytes(b"a file where a folder is needed")
    (cell,) = planned(cataloged(tmp_path, series(*map(ct, range(3)))), of).todo
    row = segment_series(predictor, of, **for_network(cell))
    assert (row["verdict"], row["reason"], row["masks"], row["outputs"]) == ("rejected", "write_failed", None, [])
    assert not (tmp_path / "out").exists()


def test_a_description_tells_what_the_whole_bundle_does(tmp_path: Path) -> None:
    folder = bundles.write_bundle(tmp_path / "bundle", 150)
    bundle.calibrate(folder, VolumeErrors((3.0, 3.0), (19, 19)))
    for mirror in (None, "both"):
        whole = Predictor.load(folder, mirror=mirror)
        assert Model.read(folder, mirror is not None, None) == model(whole)


def spoil_masks(folder: Path) -> None:
    (path,) = (folder / "output").rglob("*.parquet")
    table = pq.read_table(path)
    empty = pa.array([zlib.compress(bytes(64 * 64))] * len(table))
    pq.write_table(table.set_column(table.column_names.index("mask"), "mask", empty), path)


def remove_masks(folder: Path) -> None:
    (path,) = (folder / "output").rglob("*.parquet")
    path.unlink()


def rename_patient(folder: Path) -> None:
    path = folder / "archive" / "1.dcm"
    path.write_bytes(path.read_bytes().replace(b"A^B", b"C^B"))


def remove_object(folder: Path) -> None:
    (folder / "archive" / "1.dcm").unlink()


@pytest.mark.parametrize("spoil", [spoil_masks, remove_masks, rename_patient, remove_object])
def test_what_is_gone_or_another_one_is_of_no_use(
    tmp_path: Path, predictor: Predictor, spoil: Callable[[Path], None]
) -> None:
    of = keeping(tmp_path)
    (cell,) = planned(cataloged(tmp_path, series(*map(ct, range(3)))), of).todo
    row = segment_series(predictor, of, **for_network(cell))
    spoil(tmp_path)
    for profiles in (("seg",), ("overlays",), ("overlays", "seg")):
        again = made_again(elsewhere(of, profiles=profiles), cell, row, predictor)
        assert again is None or (profiles == ("overlays",) and spoil is not remove_object), profiles
        if "seg" in profiles:
            assert not Path(f"{of.folder}-again", f"{row['series_key']}.dcm").exists()


def test_volumes_and_surfaces_need_no_object(tmp_path: Path, predictor: Predictor) -> None:
    of = keeping(tmp_path, ("nifti", "glb", "png"))
    (cell,) = planned(cataloged(tmp_path, series(*map(ct, range(3)))), of).todo
    first = segment_series(predictor, of, **for_network(cell))
    for path in (tmp_path / "archive").iterdir():
        path.unlink()
    again = made_again(elsewhere(of), cell, first, predictor)
    assert again is not None
    assert content(again, f"{of.folder}-again") == content(first, of.folder)


def test_the_digest_is_of_what_decides_about_a_mask() -> None:
    def digest(**values: Any) -> str:
        usual = {"model_digest": "d", "engine": Engine(), "gpus": 0.0, "mirror": None, "postprocess": Postprocess()}
        return kept.digest(**{**usual, **values})

    assert digest() == digest(engine=Engine("openvino"))
    assert digest(gpus=1.0) == digest(gpus=0.5, engine=Engine("tensorflow"))
    assert digest() == digest(gpus=1.0, engine=Engine("openvino")), "it runs on the CPU"
    others = [
        digest(),
        digest(model_digest="e"),
        digest(engine=Engine("tensorflow")),
        digest(engine=Engine(precision="float32")),
        digest(gpus=1.0),
        digest(mirror="both"),
        digest(postprocess=Postprocess(fill_holes=True)),
    ]
    assert len(set(others)) == len(others)


def test_the_plan_takes_masks_of_the_same_input_that_are_enough(tmp_path: Path, predictor: Predictor) -> None:
    output, of = str(tmp_path / "output"), keeping(tmp_path, ("nifti",))
    uri = cataloged(tmp_path, series(*map(ct, range(3))))
    (cell,) = planned(uri, of).todo
    row = segment_series(predictor, of, **for_network(cell))
    ledger.append(output, [row], row.pop("rejects"))
    assert not ledger.kept(output, of.model.digest, "x" * 64)
    known = ledger.kept(output, of.model.digest, "k" * 64)
    assert known == {row["series_key"]: (row["input_digest"], row["masks"]["sha256"], row["masks"]["bytes"])}

    def split(profiles: tuple[str, ...], manifest: str = uri) -> tuple[int, int, int]:
        asked = replace(of, profiles=profiles)
        found = plan.make(manifest, asked, lambda row: False, lambda *_: None, None, lambda: known)
        assert found.slices - found.kept_slices == 3 * len(found.todo)
        return len(found.todo), len(found.kept), len(found.unusable)

    assert split(("seg", "glb", "overlays")) == (0, 1, 0)
    assert split(("seg", "seg-fractional")) == (1, 0, 0)
    # Another object, and one that no NIfTI can be of: neither has masks.
    other = cataloged(tmp_path / "other", series(ct(0), ct(1), ct(3)))
    assert split(("seg",), other) == (1, 0, 0)
    assert split(("nifti",), other) == (0, 0, 1)


def test_ledgers_of_before_have_no_masks(tmp_path: Path) -> None:
    from rayseg import tables
    from rayseg.records import LEDGER_TABLE
    from tests.unit.archive_runs import row

    output = str(tmp_path)
    before = LEDGER_TABLE.remove(LEDGER_TABLE.get_field_index("masks"))
    tables.append(f"{output}/{ledger.FOLDER}", before.empty_table(), ledger.IDENTITY)
    assert ledger.kept(output, "digest-1", "k" * 64) == {}
    masks = {"digest": "k" * 64, "sha256": "s", "bytes": 1}
    ledger.append(output, [row("series-0"), row("series-1", masks=masks)], [])
    assert ledger.kept(output, "digest-1", "k" * 64) == {"series-1": ("input of series-1", "s", 1)}
    assert [one["masks"] for one in ledger.read(output).to_pylist()] == [None, masks]
