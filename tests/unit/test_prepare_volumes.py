"""Preparing volumes: from NIfTI and from DICOM series, with label volumes, pictures or SEG; rejects, resuming, CT."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow as pa
import pydicom
import pytest
from PIL import Image

from rayseg import snapshots, storage
from rayseg.data import chunks, synthetic, volume_samples
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.feed import batches
from rayseg.data.intensity import Intensity
from rayseg.data.labels import Labels
from rayseg.data.layouts import Layout
from rayseg.data.patches import Patches
from rayseg.data.prepare import REJECTS_FILE, PrepareConfig, PrepareResult, prepare
from rayseg.data.prepared import PreparedSet, describe
from rayseg.data.preprocess import Preprocess
from rayseg.data.range import measure
from rayseg.data.split import Split, read_standing
from rayseg.data.volume import VolumePreprocess
from rayseg.data.volume_augment import VolumeAugment
from rayseg.dicom import segmentation
from rayseg.dicom.reading import Slice, read_slice
from rayseg.records import PREPARED_VOLUMES, Reason

PATCH = (8, 16, 16)
MILLIMETRE = VolumePreprocess((1, 1, 1), PATCH)
TWO = Labels(names=("hemorrhage", "infarct"))
NIFTI = Layout(images="images/{case}.nii.gz", masks="labels/{case}.nii.gz")
BY_HASH = Split(val=0.3, test=0.3, seed="3")
DEALT = Split(val=0.25, test=0.25, stratify=True)


def nifti(folder: Path, cases: int = 8) -> None:
    """Volumes of about 12 x 20 x 18 voxels of 1 mm (to the left, back and head); all but the last have two classes."""
    for number in range(cases):
        rng = np.random.default_rng(number)
        shape = (12 + number % 3, 20, 18)
        labels = np.zeros(shape, np.uint8)
        if number < cases - 1:
            labels[2:6, 3:9, 4:10], labels[6:8, 10:15, 2 : 8 + number % 4] = 1, 2
        image = (rng.integers(0, 300, shape) + 400 * labels.astype(np.int16)).astype(np.int16)
        affine = np.diag([-1.0, -1, 1, 1])
        for name, values in (("images", image), ("labels", labels)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, affine), folder / name / f"case{number}.nii.gz")


def manifest_of(folder: Path, layout: Layout = NIFTI, **values: Any) -> str:
    config = CatalogConfig(source=str(folder), output=str(folder / "manifest.parquet"), layout=layout, **values)
    return catalog(config).manifest


def config_of(manifest: str, output: Path, **values: Any) -> PrepareConfig:
    defaults: dict[str, Any] = {"volume": MILLIMETRE, "labels": TWO, "split": DEALT}
    return PrepareConfig(manifest=manifest, output=str(output), **(defaults | values))


def everything(prepared: PreparedSet) -> list[dict[str, Any]]:
    return [row for split in ("train", "val", "test") for row in prepared.read_rows(split).to_pylist()]


def voxels(prepared: PreparedSet, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    uri = storage.join(prepared.uri, row["path"])
    return chunks.read_index(uri).read(uri, (0, 0, 0), row["shape"])


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("volume-*.arrow")}


def rejects(result: PrepareResult) -> list[dict[str, Any]]:
    with snapshots.reading(storage.join(result.prepared, REJECTS_FILE), "test") as uri:
        return storage.read_table(uri).to_pylist()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nifti")
    nifti(folder)
    manifest_of(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(source: Path) -> str:
    return str(source / "manifest.parquet")


@pytest.fixture(scope="module")
def made(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> PrepareResult:
    return prepare(config_of(manifest, tmp_path_factory.mktemp("set"), split=BY_HASH))


def test_volumes_are_what_nibabel_reads(made: PrepareResult) -> None:
    prepared = describe(made.prepared)
    assert prepared.shape == (*PATCH, 1)
    assert prepared.volume == MILLIMETRE
    rows = everything(prepared)
    assert (made.rows, made.positive, made.patients, made.rejected) == (8, 7, 8, 0)
    assert (made.train, made.val, made.test) == tuple(prepared.rows[split] for split in ("train", "val", "test"))
    assert prepared.read_rows("train").schema == PREPARED_VOLUMES
    for row in rows:
        image, mask = voxels(prepared, row)
        uri = row["slices"][0]["uri"]
        # Stored axes run to the left and to the back, as columns and rows of DICOM do; slices run to the head.
        values = np.asarray(nibabel.load(uri).dataobj).transpose(2, 1, 0).astype(np.float64)
        labels = np.asarray(nibabel.load(row["slices"][0]["masks"][0]["uri"]).dataobj).transpose(2, 1, 0)
        np.testing.assert_allclose(image, (values - values.mean()) / values.std(), atol=2e-3)
        assert np.array_equal(mask, labels)
        assert [one["frame"] for one in row["slices"]] == list(range(18))
        assert row["shape"] == list(values.shape)
        assert row["spacing_mm"] == [1, 1, 1]
        assert row["class_voxels"] == [(labels == value).sum() for value in (1, 2)]
        assert row["foreground_voxels"] == np.count_nonzero(labels)
        assert row["foreground_mm3"] == pytest.approx(np.count_nonzero(labels))
        assert row["foreground_share"] == pytest.approx(max(np.count_nonzero(one) / one.size for one in labels))
        assert row["intensity_mean"] == pytest.approx(0, abs=1e-3)
        assert row["intensity_sd"] == pytest.approx(1, abs=1e-3)


def test_the_range_of_training_is_that_of_its_volumes(made: PrepareResult) -> None:
    prepared = describe(made.prepared)
    masks = [voxels(prepared, row)[1] > 0 for row in prepared.read_rows("train").to_pylist()]
    found = measure(prepared)
    assert found.volume_ml == pytest.approx(max(mask.sum() for mask in masks) / 1000)
    assert found.foreground_share == pytest.approx(max(mask.mean(axis=(1, 2)).max() for mask in masks))
    assert found.spacing_mm is None, "a network sees volumes of one spacing"


def test_patients_are_where_the_hash_puts_them(made: PrepareResult) -> None:
    rows = everything(describe(made.prepared))
    assert all(row["split"] == BY_HASH.assign(row["patient_key"]) for row in rows)
    assert read_standing(describe(made.prepared).read_split()) == {row["patient_key"]: row["split"] for row in rows}


def test_places_of_classes_are_kept_beside_the_volume(made: PrepareResult) -> None:
    prepared = describe(made.prepared)
    for row in everything(prepared):
        index = chunks.read_index(storage.join(prepared.uri, row["path"]))
        _, mask = voxels(prepared, row)
        first = 0
        for value, count in enumerate(index.told["class_places"], 1):
            assert (mask.ravel()[index.places[first : first + count]] == value).all()
            assert count == min(1024, row["class_voxels"][value - 1])
            first += count


def test_an_equal_set_is_found_and_a_set_that_was_not_finished_is_gone_on_with(manifest: str, tmp_path: Path) -> None:
    config = config_of(manifest, tmp_path)
    first = prepare(config)
    before = files(tmp_path)
    assert len(before) == 8
    assert prepare(config).cached
    (tmp_path / "_prepared.json").unlink()
    next(tmp_path.rglob("volume-*.arrow")).unlink()
    again = prepare(config)
    assert not again.cached
    after = files(tmp_path)
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in before) == 1
    assert describe(again.prepared) == describe(first.prepared)


def test_a_set_without_one_of_its_volumes_is_made_whole(manifest: str, tmp_path: Path) -> None:
    config = config_of(manifest, tmp_path)
    prepare(config)
    next(tmp_path.rglob("volume-*.arrow")).unlink()
    assert not prepare(config).cached
    assert len(files(tmp_path)) == 8


def test_another_patch_or_split_is_another_set_and_takes_the_old_one_away(manifest: str, tmp_path: Path) -> None:
    prepare(config_of(manifest, tmp_path))
    before = files(tmp_path)
    prepare(config_of(manifest, tmp_path, volume=VolumePreprocess((1, 1, 1), (4, 16, 16))))
    assert not files(tmp_path).keys() & before.keys()
    assert len(files(tmp_path)) == 8
    prepare(config_of(manifest, tmp_path, split=Split(val=0.25, test=0.25, seed="2", stratify=True)))
    assert len(files(tmp_path)) == 8
    assert len(list(tmp_path.rglob("part-*.parquet"))) <= 3 + 1  # and the rejects


def test_bytes_are_equal_whatever_the_tasks(manifest: str, tmp_path: Path) -> None:
    for name, rows in (("one", 18), ("two", 256)):
        prepare(config_of(manifest, tmp_path / name, rows_per_shard=rows))
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("volume-*.arrow")} for name in ("one", "two")
    )
    assert one == two


def test_a_limit_is_of_volumes(manifest: str, tmp_path: Path) -> None:
    result = prepare(config_of(manifest, tmp_path, limit=5, split=Split(val=0.3, test=0, stratify=True)))
    assert result.rows == 5
    assert describe(result.prepared).limited
    assert all(len(row["slices"]) == 18 for row in everything(describe(result.prepared)))


def test_stratify_deals_volumes_with_and_without_foreground(manifest: str, tmp_path: Path) -> None:
    result = prepare(config_of(manifest, tmp_path, split=DEALT))
    assert (result.train + result.val + result.test, min(result.val, result.test)) == (8, 2)
    split = describe(result.prepared).read_split().decode()
    assert sorted(line.rsplit(",", 1)[1] for line in split.splitlines()[1:]) == ["0"] + ["1"] * 7


def test_one_picture_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    nifti(tmp_path, 6)
    for name in ("images", "labels"):
        for number in range(6, 12):
            shutil.copy(tmp_path / name / f"case{number - 6}.nii.gz", tmp_path / name / f"case{number}.nii.gz")
    with pytest.raises(ValueError, match="show the same picture"):
        prepare(config_of(manifest_of(tmp_path), tmp_path / "set"))


def test_ct_is_clipped_and_scaled_by_the_foreground_of_training(manifest: str, tmp_path: Path) -> None:
    ct = VolumePreprocess((1, 1, 1), PATCH, Intensity(kind="ct"))
    result = prepare(config_of(manifest, tmp_path, volume=ct))
    prepared = describe(result.prepared)
    inside = []
    for row in prepared.read_rows("train").to_pylist():
        values, labels = (
            np.asarray(nibabel.load(uri).dataobj).astype(np.float64)
            for uri in (row["slices"][0]["uri"], row["slices"][0]["masks"][0]["uri"])
        )
        inside.append(values[labels > 0])
    foreground = np.concatenate(inside)
    assert prepared.volume is not None
    found = prepared.volume.intensity
    low, high = np.percentile(foreground, [0.5, 99.5])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert (found.mean, found.deviation) == (pytest.approx(foreground.mean()), pytest.approx(foreground.std()))
    for row in everything(prepared):
        values = np.asarray(nibabel.load(row["slices"][0]["uri"]).dataobj).transpose(2, 1, 0)
        expected = (np.clip(values, low, high) - foreground.mean()) / foreground.std()
        np.testing.assert_allclose(voxels(prepared, row)[0], expected, atol=3e-3)
    assert prepare(config_of(manifest, tmp_path, volume=ct)).cached


def test_the_values_are_measured_alike_when_slices_are_read_twice(
    manifest: str, made: PrepareResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of volumes too large to be held."""
    monkeypatch.setattr(volume_samples, "_HELD_BYTES", 0)
    prepare(config_of(manifest, tmp_path, split=BY_HASH))
    first = {path.name: path.read_bytes() for path in Path(made.prepared).rglob("volume-*.arrow")}
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("volume-*.arrow")} == first


def test_a_set_in_a_bucket_is_fed_from_there(manifest: str, made: PrepareResult, s3_store: str) -> None:
    config = dataclasses.replace(config_of(manifest, Path(), split=BY_HASH), output=f"{s3_store}/volumes")
    assert prepare(config).rows == made.rows
    assert prepare(config).cached
    fed = [
        list(
            batches(
                describe(uri),
                "train",
                global_batch=3,
                rank=0,
                world_size=1,
                seed=1,
                epoch=0,
                patches=Patches(2, augment=VolumeAugment()),
                threads=2,
            )
        )
        for uri in (config.output, made.prepared)
    ]
    for one, other in zip(*fed, strict=True):
        assert all(np.array_equal(*arrays) for arrays in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CT series, one of them tilted, with a picture of the mask of each slice."""
    folder = tmp_path_factory.mktemp("studies")
    synthetic.write_studies(str(folder), patients=6, slices=8, size=64)
    return folder


PICTURES = Layout(images="images/{patient}/{slice}.dcm", masks="masks/{patient}/{slice}.png")


def test_dicom_series_with_a_mask_a_slice(studies: Path, tmp_path: Path) -> None:
    coarse = VolumePreprocess((4, 5, 5), PATCH)
    result = prepare(config_of(manifest_of(studies, PICTURES), tmp_path, volume=coarse))
    prepared = describe(result.prepared)
    assert result.rows == 6
    for row in everything(prepared):
        image, mask = voxels(prepared, row)
        slices = [read_slice(storage.read(one["uri"])) for one in row["slices"]]
        assert all(isinstance(one, Slice) for one in slices)
        whole = coarse.apply([one for one in slices if isinstance(one, Slice)])
        assert isinstance(whole, np.ndarray)
        assert np.array_equal(image, whole[..., 0])
        assert row["modality"] == "CT"
        # On the network's grid the foreground has about the volume that it has on the slices.
        truth = sum(np.count_nonzero(np.asarray(Image.open(one["masks"][0]["uri"]))) for one in row["slices"])
        assert bool(row["foreground_voxels"]) <= bool(truth)
        if row["foreground_voxels"] > 40:
            assert row["foreground_voxels"] * 4 * 5 * 5 == pytest.approx(row["foreground_mm3"], rel=0.15)
        assert mask.max() <= 2


def test_dicom_series_with_a_seg(studies: Path, tmp_path: Path) -> None:
    """The same volumes as with pictures of masks."""
    shutil.copytree(studies / "images", tmp_path / "images")
    for folder in sorted((tmp_path / "images").iterdir()):
        sources = [path.read_bytes() for path in sorted(folder.iterdir())]
        masks = [np.asarray(Image.open(path)) for path in sorted((studies / "masks" / folder.name).iterdir())]
        encoded = segmentation.encode(sources, masks, TWO.names, "m", "1", "0" * 64)
        assert isinstance(encoded, bytes)
        (tmp_path / "segs").mkdir(exist_ok=True)
        (tmp_path / "segs" / f"{folder.name}.dcm").write_bytes(encoded)
    volume = VolumePreprocess((None, 2, 2), (1, 32, 32))
    layout = Layout(images="images/{patient}/*.dcm", masks="segs/{patient}.dcm")
    labels = Labels(names=TWO.names, sources={name: name for name in TWO.names})
    by_seg = prepare(config_of(manifest_of(tmp_path, layout), tmp_path / "a", volume=volume, labels=labels))
    by_pictures = prepare(config_of(manifest_of(studies, PICTURES), tmp_path / "b", volume=volume))
    found = []
    for result in (by_seg, by_pictures):
        prepared = describe(result.prepared)
        found.append({row["patient_key"]: voxels(prepared, row) for row in everything(prepared)})
        assert all(row["shape"][0] == 8 for row in everything(prepared)), "slices stay as they are"
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        assert all(np.array_equal(one, other) for one, other in zip(found[0][key], found[1][key], strict=True))
    assert any(mask.any() for _, mask in found[0].values())


def spoiled(studies: Path, folder: Path) -> str:
    """Patient 0 has a slice without a mask, 1 a mask of another size, 2 a slice that cannot be decoded."""
    shutil.copytree(studies / "images", folder / "images")
    shutil.copytree(studies / "masks", folder / "masks")
    patients = sorted((folder / "images").iterdir())
    (folder / "masks" / patients[0].name / "IM_0004.png").unlink()
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(folder / "masks" / patients[1].name / "IM_0003.png")
    path = patients[2] / "IM_0002.dcm"
    dataset = pydicom.dcmread(path)
    dataset.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    data = bytearray(dataset.PixelData)
    data[100:] = bytes(len(data) - 100)
    dataset.PixelData = bytes(data)
    dataset.save_as(path)
    return manifest_of(folder, PICTURES)


def test_a_series_that_is_no_volume_is_a_reject(studies: Path, tmp_path: Path) -> None:
    manifest = spoiled(studies, tmp_path)
    result = prepare(
        config_of(manifest, tmp_path / "set", max_reject_fraction=0.5, split=Split(val=0.4, test=0, stratify=True))
    )
    told = {Path(row["uri"]).parent.name[-1]: row for row in rejects(result)}
    assert {name: row["reason"] for name, row in told.items()} == {
        "0": Reason.NO_MASK,
        "1": Reason.MASK_MISMATCH,
        "2": Reason.DECODE_FAILED,
    }
    assert Path(told["1"]["uri"]).name == "IM_0003.dcm"  # the slice at fault
    assert Path(told["2"]["uri"]).name == "IM_0002.dcm"
    assert "missing_mask" in told["0"]["detail"]
    assert (result.rows, result.rejected) == (3, 3)
    assert all(row["stage"] == "prepare" for row in told.values())
    with pytest.raises(ValueError, match="3 of 6 rows rejected"):
        prepare(
            config_of(manifest, tmp_path / "set", max_reject_fraction=0.4, split=Split(val=0.4, test=0, stratify=True))
        )


def test_pictures_lie_nowhere(tmp_path: Path) -> None:
    for number in range(4):
        for name in ("images", "masks"):
            (tmp_path / name / str(number)).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / name / str(number) / "a.png")
    manifest = manifest_of(tmp_path, Layout(images="images/{patient}/{name}.png", masks="masks/{patient}/{name}.png"))
    with pytest.raises(ValueError, match=r"4 of 4 rows rejected.*missing_attribute"):
        prepare(config_of(manifest, tmp_path / "set", labels=Labels()))


def test_a_mask_that_ends_before_the_image_follows_the_layout(tmp_path: Path) -> None:
    """By `missing_mask` the series has no mask, or its other slices are background."""
    nifti(tmp_path, 4)
    path = tmp_path / "labels" / "case0.nii.gz"
    labels = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(labels.dataobj)[..., :12], labels.affine), path)
    split = Split(val=0.5, test=0, stratify=True)
    strict = prepare(config_of(manifest_of(tmp_path), tmp_path / "a", max_reject_fraction=0.5, split=split))
    assert strict.reasons == {Reason.NO_MASK: 1}
    layout = Layout(images=NIFTI.images, masks=NIFTI.masks, missing_mask="empty")
    lenient = prepare(config_of(manifest_of(tmp_path, layout), tmp_path / "b", split=split))
    assert (lenient.rows, lenient.rejected) == (4, 0)


def test_a_slice_that_the_store_did_not_give_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nifti(tmp_path, 4)
    manifest = manifest_of(tmp_path)
    config = config_of(manifest, tmp_path / "set", max_reject_fraction=0.5, split=Split(val=0.5, test=0, stratify=True))
    original = storage.read

    def failing(uri: str, length: int | None = None) -> bytes:
        if uri.endswith("labels/case1.nii.gz"):
            raise OSError("the store is ill")
        return original(uri, length)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "read", failing)
        ill = prepare(config)
    assert ill.reasons == {Reason.READ_FAILED: 1}
    well = prepare(config)
    assert (well.cached, well.rows, well.reasons) == (False, 4, {})


def test_the_digest_of_a_set_of_slices_is_as_before_there_were_volumes() -> None:
    from rayseg.data.prepare import _digest

    config = PrepareConfig("m", "o", preprocess=Preprocess(size=(8, 8)))
    assert _digest(config, "0" * 64, {}) == "47128efa772e45cd5c76a0463956c4e9157d8537acf69f1ee19c7bade6987434"


def test_rows_of_a_manifest_are_series(source: Path, tmp_path: Path) -> None:
    from rayseg.data import accepted

    with snapshots.reading(str(source / "manifest.parquet"), "test") as uri:
        accepted.write(Path(uri), tmp_path / "rows")
    assert accepted.series_firsts(tmp_path / "rows").tolist() == list(range(0, 8 * 18, 18))


def test_real_volumes(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "hippocampus-mr"
    manifest = catalog(CatalogConfig(source=str(source), output=str(tmp_path / "m.parquet"), layout=NIFTI)).manifest
    labels = Labels(names=("anterior", "posterior"))
    result = prepare(config_of(manifest, tmp_path / "set", labels=labels, limit=12))
    assert (result.rows, result.positive, result.rejected) == (12, 12, 0)
    prepared = describe(result.prepared)
    for row in everything(prepared):
        labels_of = nibabel.as_closest_canonical(nibabel.load(row["slices"][0]["masks"][0]["uri"]))
        truth = np.asarray(labels_of.dataobj)[::-1, ::-1].transpose(2, 1, 0)
        assert np.array_equal(voxels(prepared, row)[1], truth)
    assert pa.compute.max(prepared.read_rows("train")["foreground_voxels"]).as_py() > 1000
