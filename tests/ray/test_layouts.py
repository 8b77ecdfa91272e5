"""Each layout of docs/reference/layouts.md, from the raw folder through catalog and prepare, against the files."""

import contextlib
import dataclasses
import io
import itertools
import re
from pathlib import Path
from typing import Any

import highdicom
import keras
import numpy as np
import pydicom
import pytest
import tensorflow as tf
import yaml
from PIL import Image
from pydicom.sr.codedict import codes
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

from rayseg import config, storage
from rayseg.data import prepared, synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.feed import batches
from rayseg.data.labels import Labels
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.preprocess import Preprocess
from rayseg.data.split import Split
from rayseg.dicom import segmentation
from rayseg.dicom.pseudonyms import from_environment
from rayseg.evaluation.evaluate import EvaluateConfig, evaluate
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.models.losses import batch_share, bce_dice, ce_dice
from rayseg.models.network import build_network
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import registry, runs
from rayseg.training.trainer import TrainConfig, fit
from tests.folders import nifti

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "layouts.md"
SIDE = 32


def example(name: str, **changes: Any) -> tuple[Layout, Labels, Preprocess]:
    """The YAML example under the page's line with this name, as a recipe would be read."""
    (text,) = re.findall(rf"^\*\*{re.escape(name)}\*\*.*?```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    recipe = yaml.safe_load(text)
    preprocess = recipe.get("prepare", {}).get("preprocess", {}) | {"size": [SIDE, SIDE]} | changes
    return (
        config.build(Layout, recipe["catalog"]["layout"]),
        config.build(Labels, recipe.get("prepare", {}).get("labels", {})),
        config.build(Preprocess, preprocess),
    )


def run(source: Path, layout: Layout, labels: Labels, preprocess: Preprocess) -> dict[str, dict[str, Any]]:
    """Catalogs, prepares and trains a little; the samples by path (and #frame), with image and mask as arrays."""
    output = source.parent / f"{source.name}-out"
    cataloged = catalog(CatalogConfig(str(source), str(output / "manifest.parquet"), layout))
    result = prepare(
        PrepareConfig(cataloged.manifest, str(output / "set"), preprocess, labels, Split(val=0.0, test=0.0))
    )
    assert result.rejected == 0, result.reasons
    found = prepared.describe(result.prepared)
    train_a_little(found)
    rows = {}
    for row in found.read_rows("train").to_pylist():
        row["image"] = np.frombuffer(row["image"], np.uint8).reshape(found.shape)
        row["mask"] = np.frombuffer(row["mask"], np.uint8).reshape(found.shape[:2])
        frame = "" if row["frame"] is None else f"#{row['frame']}"
        rows[row["uri"].removeprefix(f"{source}/") + frame] = row
    return rows


def train_a_little(found: prepared.PreparedSet) -> None:
    """Two steps of the network and the loss that the train job takes for these classes and channels."""
    classes = len(found.labels.names)
    model = build_network(NetworkConfig(widths=(2, 4), convolutions=1), found.shape, classes)
    optimizer = keras.optimizers.SGD(0.1)
    before = model.get_weights()
    feed = batches(found, "train", global_batch=2, rank=0, world_size=1, seed=1, epoch=0)
    with contextlib.closing(feed):
        for step, batch in enumerate(feed):
            assert batch.mask.max() <= classes
            with tf.GradientTape() as tape:
                loss_N = (bce_dice if classes == 1 else ce_dice)(batch.mask, model(batch.image, training=True))
                loss = batch_share(loss_N, batch.weight, 2)
            assert np.isfinite(float(loss))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            if step == 1:
                break
    moved = [np.abs(old - new).max() for old, new in zip(before, model.get_weights(), strict=True)]
    assert np.isfinite(moved).all()
    assert max(moved) > 0


def write(path: Path, values: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)


def disc(row: int, column: int, radius: int) -> np.ndarray:
    rr, cc = np.mgrid[:SIDE, :SIDE]
    return (rr - row) ** 2 + (cc - column) ** 2 < radius**2


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), np.uint8)


@pytest.fixture
def slices(tmp_path: Path) -> list[tuple[bytes, np.ndarray]]:
    """Phantom CT slices of two patients, three each, with their label maps: 1 hemorrhage, 2 infarct."""
    synthetic.write_studies(str(tmp_path / "phantoms"), patients=2, slices=3, size=SIDE, seed=3)
    images = sorted((tmp_path / "phantoms/images").rglob("*.dcm"))
    masks = [Path(str(path).replace("/images/", "/masks/")).with_suffix(".png") for path in images]
    return [(image.read_bytes(), np.asarray(Image.open(mask))) for image, mask in zip(images, masks, strict=True)]


def patient_of(data: bytes) -> str:
    return from_environment().patient(pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True).PatientID)


@pytest.mark.parametrize("multiclass", [True, False])
def test_a_pair_of_folders_a_class(tmp_path: Path, slices: list[tuple[bytes, np.ndarray]], multiclass: bool) -> None:
    source = tmp_path / "source"
    for number, (data, _) in enumerate(slices):
        kind = ("hemorrhagic", "ischemic")[number % 2]
        storage.write(str(source / kind / f"DICOM/{number // 2}.dcm"), data)  # equal names in both
        write(source / kind / f"PNG/{number // 2}.png", disc(8 + number, 16, 5) * np.uint8(255))
    layout, labels, preprocess = example("DICOM images, mask images, a pair of folders a class")
    assert labels.names == ("hemorrhage", "ischemia")
    rows = run(source, layout, labels if multiclass else Labels(("stroke",)), preprocess)
    assert len(rows) == 6
    for number, (data, _) in enumerate(slices):
        kind = ("hemorrhagic", "ischemic")[number % 2]
        row = rows[f"{kind}/DICOM/{number // 2}.dcm"]
        index = {"hemorrhagic": 1, "ischemic": 2}[kind] if multiclass else 1
        assert np.array_equal(row["mask"], disc(8 + number, 16, 5) * index)
        assert row["patient_key"] == patient_of(data)


def test_slices_as_jpeg_with_masks_where_there_is_a_lesion(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for patient in ("049", "050"):
        for number in (1, 2, 3):
            write(source / patient / "brain" / f"{number}.jpg", picture(number), quality=90)
            write(source / patient / "bone" / f"{number}.jpg", picture(number), quality=90)
        write(source / patient / "brain/2_HGE_Seg.jpg", disc(12, 14, 7) * np.uint8(255), quality=75)
    (source / "patients.csv").write_text("patient,age\n49,1\n")
    rows = run(source, *example("JPEG slices, masks only where there is a lesion"))
    assert set(rows) == {f"{patient}/brain/{number}.jpg" for patient in ("049", "050") for number in (1, 2, 3)}
    for path, row in rows.items():
        # The noise of the JPEG mask is gone: exactly the disc, and nothing where there is no mask.
        assert np.array_equal(row["mask"], disc(12, 14, 7) if path.endswith("/2.jpg") else np.zeros((SIDE, SIDE)))
        assert row["patient_key"] == from_environment().key("patient", path[:3])


def test_colour_tif_slices(tmp_path: Path) -> None:
    source = tmp_path / "source"
    images = {}
    for patient in ("TCGA_CS_4941_19960909", "TCGA_DU_5849_19950405"):
        for number in (1, 2):
            path = f"{patient}/{patient}_{number}.tif"
            images[path] = np.stack([picture(number), picture(number) // 2, disc(9, 9, 5) * np.uint8(200)], axis=-1)
            write(source / path, images[path])
            write(source / path.replace(".tif", "_mask.tif"), disc(16, 16, 4 * (number - 1)) * np.uint8(255))
    (source / "data.csv").write_text("Patient\n")
    layout, labels, preprocess = example("Colour TIFF slices with _mask files", percentiles=[0, 100])
    rows = run(source, layout, labels, preprocess)
    assert set(rows) == set(images)
    assert len({row["patient_key"] for row in rows.values()}) == 2
    for path, row in rows.items():
        expected = images[path].astype(float)
        least, most = expected.min(axis=(0, 1)), expected.max(axis=(0, 1))
        assert row["image"].shape == (SIDE, SIDE, 3)
        assert np.abs(row["image"] - (expected - least) / (most - least) * 255).max() <= 1
        assert np.array_equal(row["mask"], disc(16, 16, 4 * (int(path[-5]) - 1)))


def test_images_and_masks_of_8_and_16_bits_with_a_csv_of_groups(tmp_path: Path) -> None:
    source = tmp_path / "source"
    deep = picture(1).astype(np.uint16) * 16 + 100  # 100..4180 of 65535: the range of a 12-bit detector
    images = {"0.png": picture(0), "1.png": deep, "2.tif": deep}
    for number, (name, values) in enumerate(images.items()):
        write(source / "images" / name, values)
        write(source / "masks" / f"{number}.png", disc(10 + number, 12, 6) * np.uint8(255))
    (source / "groups.csv").write_text("file,group\n0.png,a\n1.png,b\n2.tif,b\n")
    layout, labels, preprocess = example("Images and masks by equal names, groups in a CSV", percentiles=[0, 100])
    rows = run(source, layout, labels, preprocess)
    assert set(rows) == {f"images/{name}" for name in images}
    for number, name in enumerate(images):
        row, values = rows[f"images/{name}"], images[name].astype(float)
        expected = (values - values.min()) / (values.max() - values.min()) * 255  # by its own range
        assert np.abs(row["image"][..., 0] - expected).max() <= 1
        assert np.array_equal(row["mask"], disc(10 + number, 12, 6))
        assert row["patient_key"] == from_environment().key("patient", "abb"[number])


def test_dicom_masks_signed_ones_too(tmp_path: Path, slices: list[tuple[bytes, np.ndarray]]) -> None:
    source = tmp_path / "source"
    for number, (data, _) in enumerate(slices):
        storage.write(str(source / f"p{number // 3}/image/{number}.dcm"), data)
        mask = pydicom.dcmread(io.BytesIO(data))
        values = np.where(disc(10, 10 + number, 6), 32767, -32768).astype("<i2")
        mask.PixelRepresentation, mask.BitsStored, mask.HighBit = 1, 16, 15
        if number % 2:  # a Secondary Capture says nothing of rescaling or of places
            mask.SOPClassUID = mask.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
            for keyword in ("RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImagePositionPatient"):
                del mask[keyword]
            mask.add_new("PixelPaddingValue", "SS", -32768)
        mask.PixelData = values.tobytes()
        buffer = io.BytesIO()
        mask.save_as(buffer)
        storage.write(str(source / f"p{number // 3}/mask/{number}.dcm"), buffer.getvalue())
    rows = run(source, *example("DICOM images, DICOM masks"))
    assert len(rows) == 6
    for number in range(6):
        assert np.array_equal(rows[f"p{number // 3}/image/{number}.dcm"]["mask"], disc(10, 10 + number, 6))


def test_dicom_segmentations(tmp_path: Path, slices: list[tuple[bytes, np.ndarray]]) -> None:
    source = tmp_path / "source"
    for patient in range(2):
        of_patient = slices[3 * patient : 3 * patient + 3]
        for number, (data, _) in enumerate(of_patient):
            storage.write(str(source / f"p{patient}/ct/{number}.dcm"), data)
        datas, masks = zip(*of_patient, strict=True)
        encoded = segmentation.encode(datas, masks, ("Hemorrhage", "Infarct"), "by hand", "1", "d", "BINARY")
        assert isinstance(encoded, bytes)
        storage.write(str(source / f"p{patient}/seg.dcm"), encoded)
    rows = run(source, *example("DICOM images, DICOM segmentations"))
    assert len(rows) == 6
    assert {int(row["mask"].max()) for row in rows.values()} >= {1, 2}
    for number, (_, mask) in enumerate(slices):
        assert np.array_equal(rows[f"p{number // 3}/ct/{number % 3}.dcm"]["mask"], mask)


@pytest.mark.parametrize("missing_mask", ["empty", "reject"])
def test_slices_that_a_sparse_segmentation_leaves_out_are_as_the_layout_says(
    tmp_path: Path, slices: list[tuple[bytes, np.ndarray]], missing_mask: str
) -> None:
    source = tmp_path / "source"
    for patient in range(2):
        datas = [data for data, _ in slices[3 * patient : 3 * patient + 3]]
        for number, data in enumerate(datas):
            storage.write(str(source / f"p{patient}/ct/{number}.dcm"), data)
        storage.write(str(source / f"p{patient}/seg.dcm"), sparse([pydicom.dcmread(io.BytesIO(one)) for one in datas]))
    layout, _, preprocess = example("DICOM images, DICOM segmentations")
    layout = dataclasses.replace(layout, missing_mask=missing_mask)  # type: ignore[arg-type]
    if missing_mask == "reject":
        with pytest.raises(ValueError, match=r"4 of 6 rows rejected.*'no_mask': 4"):
            run(source, layout, Labels(), preprocess)
        return
    rows = run(source, layout, Labels(), preprocess)
    assert len(rows) == 6
    for name, row in rows.items():
        assert np.array_equal(row["mask"], disc(12, 9, 5) * name.endswith("/1.dcm"))


def sparse(sources: list[pydicom.Dataset]) -> bytes:
    """A segmentation of the slice in the middle, which lists no other one."""
    described = highdicom.seg.SegmentDescription(
        1, "Lesion", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, "MANUAL"
    )
    planes = np.stack([disc(12, 9, 5) * (number == 1) for number in range(3)]).astype(np.uint8)
    seg = highdicom.seg.Segmentation(
        sources, planes, "BINARY", [described], generate_uid(), 5, generate_uid(), 1, "someone", "something", "1", "2"
    )
    (series,) = seg.ReferencedSeriesSequence
    series.ReferencedInstanceSequence = [
        one for one in series.ReferencedInstanceSequence if one.ReferencedSOPInstanceUID == sources[1].SOPInstanceUID
    ]
    buffer = io.BytesIO()
    seg.save_as(buffer)
    return buffer.getvalue()


def test_a_label_volume_for_each_series(tmp_path: Path, slices: list[tuple[bytes, np.ndarray]]) -> None:
    source = tmp_path / "source"
    for patient, series in enumerate((slices[:3], slices[3:])):
        for number, (data, _) in enumerate(series):
            storage.write(str(source / f"p{patient}/ct/{number}.dcm"), data)
        headers = [pydicom.dcmread(io.BytesIO(data)) for data, _ in series]
        along = np.array(headers[0].ImageOrientationPatient, float).reshape(2, 3)
        spacing = [float(one) for one in headers[0].PixelSpacing]
        positions = np.array([one.ImagePositionPatient for one in headers], float)
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1] = along[0] * spacing[1], along[1] * spacing[0]
        affine[:3, 2], affine[:3, 3] = positions[1] - positions[0], positions[0]
        if patient:  # rows from below, and the last slice is not in it
            affine[:3, 3] += affine[:3, 1] * (SIDE - 1)
            affine[:3, 1] *= -1
        values = np.stack([mask for _, mask in series], axis=-1).transpose(1, 0, 2).astype(np.uint8)
        values = values[:, ::-1, :2] if patient else values
        storage.write(str(source / f"p{patient}/label.nii.gz"), nifti(values, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine))
    rows = run(source, *example("DICOM images, a label volume for each series"))
    assert len(rows) == 6
    for number, (_, mask) in enumerate(slices):
        expected = mask * (number != 5)
        assert np.array_equal(rows[f"p{number // 3}/ct/{number % 3}.dcm"]["mask"], expected)


def test_nifti_volumes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    random = np.random.default_rng(8)
    # Left, back, head; images are stored so, labels with their axes in another order and towards the front and right.
    images = {patient: random.integers(-1000, 1000, (SIDE, 28, 3), np.int16) for patient in ("a", "b")}
    marks = {patient: random.choice(np.array([0, 1, 2, 4], np.uint8), (SIDE, 28, 3)) for patient in images}
    to_nifti = np.diag([-1.0, -1.0, 1.0, 1.0])
    turned = np.array([[0, -1, 0, SIDE - 1], [0, 0, -1, 27], [5, 0, 0, 0], [0, 0, 0, 1.0]])
    for patient, values in images.items():
        storage.write(str(source / patient / "ct.nii.gz"), nifti(values, to_nifti @ np.diag([1, 1, 5, 1])))
        label = marks[patient].transpose(2, 0, 1)[:, ::-1, ::-1]
        storage.write(str(source / patient / "label.nii.gz"), nifti(label, to_nifti @ turned))
    layout, labels, preprocess = example("NIfTI volumes, label volumes", percentiles=[0, 100])
    rows = run(source, layout, labels, preprocess)
    assert len(rows) == 6
    assert len({row["patient_key"] for row in rows.values()}) == 2
    for patient, index in itertools.product(images, range(3)):
        row = rows[f"{patient}/ct.nii.gz#{index}"]
        values = images[patient][:, :, index].T.astype(float)
        expected = (values - values.min()) / (values.max() - values.min()) * 255
        assert np.abs(row["image"][2:30, :, 0] - expected).max() <= 1  # 28 rows, centred
        assert np.array_equal(row["mask"][2:30], np.array([0, 2, 1, 0, 2])[marks[patient][:, :, index].T])


@pytest.mark.parametrize("name", ["hemorrhage-ct", "ischemic-ct"])
def test_real_colour_coded_masks(shared_data: Path, tmp_path: Path, name: str) -> None:
    # Copied, as the data beside the checkout is read-only and outputs lie beside the source here.
    source = tmp_path / name
    for path in (shared_data / name).rglob("*.png"):
        target = source / path.relative_to(shared_data / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    layout, labels, preprocess = example(f"Colour-coded masks ({name})", size=[512, 512])
    rows = run(source, layout, labels, preprocess)
    assert len(rows) == {"hemorrhage-ct": 36, "ischemic-ct": 12}[name]
    assert len({row["patient_key"] for row in rows.values()}) == {"hemorrhage-ct": 25, "ischemic-ct": 3}[name]
    found = sum(np.bincount(row["mask"].ravel(), minlength=len(labels.names) + 1) for row in rows.values())
    # Counted by colour with Pillow's getcolors over all files: EDH, IPH, IVH, SAH, SDH; ischemic
    expected = {"hemorrhage-ct": [6456, 62046, 27270, 25036, 27799], "ischemic-ct": [71409]}[name]
    assert found[1:].tolist() == expected


@pytest.mark.slow
def test_several_classes_from_the_folder_to_a_registered_model_and_its_scores(
    shared_data: Path, tmp_path: Path, tracking_uri: str
) -> None:
    layout, labels, preprocess = example("Colour-coded masks (hemorrhage-ct)")
    manifest, output = str(tmp_path / "manifest.parquet"), str(tmp_path / "set")
    catalog(CatalogConfig(str(shared_data / "hemorrhage-ct"), manifest, layout))
    prepare(PrepareConfig(manifest, output, preprocess, labels, Split(val=0.3, test=0.3, seed="1")))
    trained = fit(
        TrainConfig(
            output,
            str(tmp_path / "runs"),
            tracking_uri,
            registered_model="bleeds",
            model=NetworkConfig(widths=(4, 8)),
            batch_size=4,
            epochs=2,
            num_workers=1,
        )
    )
    of_classes = {f"val/dice_pooled/{name}" for name in labels.names}
    assert of_classes <= trained.history[-1].keys()
    told = [value for name in of_classes if (value := trained.history[-1][name]) is not None]
    assert trained.history[-1]["val/dice_pooled"] == pytest.approx(np.mean(told))

    scored = evaluate(EvaluateConfig(output, trained.model_uri, tracking_uri, overlays=1))
    assert tuple(scored.classes) == labels.names
    defined = [one["dice_pooled"] for one in scored.classes.values() if "dice_pooled" in one]
    assert scored.dice_pooled == pytest.approx(np.mean(defined))
    logged = runs.client(tracking_uri).get_run(trained.run_id).data.metrics
    for name, one in scored.classes.items():
        assert logged.get(f"test/dice_pooled/{name}") == one.get("dice_pooled")
    described = runs.client(tracking_uri).get_model_version("bleeds", "1").description
    assert f"| dice_pooled | {scored.dice_pooled:.4g} |" in described  # training's card, with the scores
    assert "### test by class" in described

    bundle_dir, version = registry.fetch(tracking_uri, trained.model_uri)
    predictor = Predictor.load(bundle_dir)
    assert predictor.bundle.labels == labels
    data = synthetic.slice_bytes(0, 64)
    (found,) = predictor.segment([data])
    assert isinstance(found, Prediction)
    assert found.mask.shape == (64, 64)
    painted = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 6  # whatever it has learnt: all classes
    encoded = segmentation.encode([data], [painted], labels.names, version.name, version.version, version.digest)
    assert isinstance(encoded, bytes)
    assert [item.SegmentLabel for item in pydicom.dcmread(io.BytesIO(encoded)).SegmentSequence] == list(labels.names)
    assert np.array_equal(next(iter(segmentation.decode(encoded).values())), painted)
