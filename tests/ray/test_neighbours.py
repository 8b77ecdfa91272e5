"""2.5D from files to masks: hand-made series through catalog, prepare, scoring, bulk and a local call."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from rayseg.data import prepared, synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.feed import batches
from rayseg.data.labels import Labels
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.preprocess import Preprocess, Window
from rayseg.data.split import Split
from rayseg.data.stacks import along
from rayseg.dicom import segmentation
from rayseg.dicom.reading import Slice, read_slice
from rayseg.evaluation import evaluate
from rayseg.inference.heldout import COLUMNS, HeldOut, Judged
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.inference.series import Task, segment_series
from rayseg.models.network import build_network
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import bundle, registry
from rayseg.tracking.registry import ModelVersion

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SIDE = 8
PREPROCESS = Preprocess((SIDE, SIDE), Window(center=128, width=256), None, neighbours=1)  # value v becomes v
# By patient: the left half's value of each slice, from the feet up, and where it lies. A gap is no end.
VALUES = {"A": [10, 60, 40, 200, 90], "B": [50, 30, 70, 20, 80]}
HEIGHTS_MM = {"A": [0, 5, 10, 30, 35], "B": [0, 5, 10, 15, 20]}
UNREADABLE = ("B", 2)  # its header is sound, its pixels are not


def slice_of(patient: str, place: int) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = uid.CTImageStorage
    number = "AB".index(patient)
    dataset.PatientID, dataset.PatientName = patient, f"{patient}^{patient}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"1.2.{number}", f"1.2.{number}.3"
    dataset.SOPInstanceUID, dataset.FrameOfReferenceUID = f"1.2.{number}.3.{place + 1}", f"1.2.{number}.4"
    dataset.Modality, dataset.InstanceNumber = "CT", 100 - place
    dataset.ImagePositionPatient = ["0", "0", str(HEIGHTS_MM[patient][place])]
    dataset.ImageOrientationPatient, dataset.PixelSpacing = ["1", "0", "0", "0", "1", "0"], ["1", "1"]
    dataset.SliceThickness = "5"
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "0"
    dataset.Rows = dataset.Columns = SIDE
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    stored = np.zeros((SIDE, SIDE), np.uint16)
    stored[:, : SIDE // 2] = VALUES[patient][place]
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    if (patient, place) == UNREADABLE:
        dataset.file_meta.TransferSyntaxUID = uid.RLELossless
        dataset.PixelData = encapsulate([b"\xff" * 80])
        dataset["PixelData"].is_undefined_length = True
    return dataset


@dataclass(frozen=True)
class World:
    manifest: str
    bundle: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """File names and instance numbers run against the positions, which are what counts."""
    folder = tmp_path_factory.mktemp("series")
    for patient in VALUES:
        for place in range(5):
            image, mask = (folder / kind / patient / f"{9 - place}" for kind in ("images", "masks"))
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            slice_of(patient, place).save_as(image.with_suffix(".dcm"), enforce_file_format=True)
            centre = np.zeros((SIDE, SIDE), np.uint8)
            centre[place] = 1  # another mask for each slice
            Image.fromarray(centre).save(mask.with_suffix(".png"))
    manifest = str(folder / "manifest.parquet")
    catalog(CatalogConfig(str(folder), manifest, Layout(images="images", masks="masks")))
    bundle.save(folder / "bundle", rising(), PREPROCESS, Labels(), 0.5, synthetic.slice_bytes(0, 64))
    return World(manifest, folder / "bundle")


def rising() -> keras.Model:
    """Foreground where the slice above is brighter than the one below, whatever the slice itself is."""
    model = keras.Sequential([keras.layers.Input((SIDE, SIDE, 3), dtype="uint8"), keras.layers.Rescaling(1.0)])
    decide = keras.layers.Conv2D(1, 1, activation="sigmoid")
    model.add(decide)
    decide.set_weights([np.array([[[[-1.0], [0.0], [1.0]]]], np.float32), np.array([-0.5], np.float32)])
    return model


def seen(patient: str) -> dict[int, list[int]]:
    """By place of each readable slice the values below it, its own and above it, by the rule, by hand."""
    values: list[int | None] = list(VALUES[patient])
    if patient == UNREADABLE[0]:
        values[UNREADABLE[1]] = None
    found = {}
    for place, value in enumerate(values):
        if value is not None:
            below = values[place - 1] if place > 0 else None
            above = values[place + 1] if place < 4 else None
            found[place] = [value if below is None else below, value, value if above is None else above]
    return found


def place_of(uri: str) -> tuple[str, int]:
    return Path(uri).parent.name, 9 - int(Path(uri).stem)


def made(world: World, output: Path, **values: Any) -> prepared.PreparedSet:
    values = {"preprocess": PREPROCESS, "split": Split(val=0.0, test=0.0)} | values
    return prepared.describe(prepare(PrepareConfig(world.manifest, str(output), **values)).prepared)


def test_hand_values() -> None:
    assert seen("A") == {0: [10, 10, 60], 1: [10, 60, 40], 2: [60, 40, 200], 3: [40, 200, 90], 4: [200, 90, 90]}
    assert seen("B") == {0: [50, 50, 30], 1: [50, 30, 30], 3: [20, 20, 80], 4: [20, 80, 80]}


def test_prepared_rows_have_the_neighbours_channels_and_the_centres_mask(world: World, tmp_path: Path) -> None:
    found = made(world, tmp_path / "set")
    assert found.shape == (SIDE, SIDE, 3)
    rows = {place_of(row["uri"]): row for row in found.read_rows("train").to_pylist()}
    expected = {(patient, place): values for patient in VALUES for place, values in seen(patient).items()}
    assert rows.keys() == expected.keys()
    for (patient, place), row in rows.items():
        image_HWC = np.frombuffer(row["image"], np.uint8).reshape(found.shape)
        assert (image_HWC[:, : SIDE // 2] == expected[patient, place]).all()
        assert not image_HWC[:, SIDE // 2 :].any()
        mask_HW = np.frombuffer(row["mask"], np.uint8).reshape(SIDE, SIDE)
        assert mask_HW[place].all()
        assert mask_HW.sum() == SIDE
        around = [None if one is None else place_of(one["uri"]) for one in row["neighbours"]]
        assert around == [(patient, at) if 0 <= at < 5 else None for at in (place - 1, place + 1)]
    # The feed and the network take the shape as it is.
    feed = batches(found, "train", global_batch=3, rank=0, world_size=1, seed=1, epoch=0)
    with contextlib.closing(feed):
        fed = next(iter(feed)).image
    assert {image_HWC.tobytes() for image_HWC in fed} <= {row["image"] for row in rows.values()}
    assert build_network(NetworkConfig(widths=(2, 4), convolutions=1), found.shape, 1)(fed).shape == (3, SIDE, SIDE, 1)
    (reject,) = pq.read_table(tmp_path / "set/rejects.parquet").to_pylist()
    assert (place_of(reject["uri"]), reject["reason"]) == (UNREADABLE, "decode_failed")


def test_bulk_scoring_and_a_local_call_give_the_same_bytes(world: World, tmp_path: Path) -> None:
    manifest = pq.read_table(world.manifest).to_pylist()
    predictor = Predictor.load(world.bundle)
    local: dict[str, np.ndarray] = {}
    bulk: dict[str, np.ndarray] = {}
    for patient in VALUES:
        rows = [row for row in manifest if place_of(row["uri"])[0] == patient]
        task = Task(str(tmp_path / "out"), ModelVersion("m", "1", "models:/m/1", "r", "d"), "c", ("seg-labelmap",))
        done = segment_series(
            predictor,
            task,
            series_key=patient,
            patient_key=patient,
            uris=[row["uri"] for row in rows],
            frames=[row["frame"] for row in rows],
        )
        assert (done["verdict"], done["slices"]) == ("segmented", len(seen(patient)))
        assert [place_of(reject["uri"]) for reject in done["rejects"]] == [UNREADABLE] * (patient == "B")
        bulk |= segmentation.decode(Path(done["outputs"][0]["uri"]).read_bytes())
        slices = [read_slice(Path(row["uri"]).read_bytes()) for row in rows]
        for result in map(predictor.predict_stack, along(slices, 1)):
            if isinstance(result, Prediction):
                assert result.slice.header is not None
                local[result.slice.header.sop_instance_uid] = result.mask
        if patient == "A":
            usable = [slice for slice in slices if isinstance(slice, Slice)]
            for slice, mask in zip(usable, predictor.predict(usable), strict=True):
                assert slice.header is not None
                assert mask.tobytes() == local[slice.header.sop_instance_uid].tobytes()

    # Of a set that knows more neighbours than the model looks at, and of a few of its rows.
    two = made(world, tmp_path / "set", preprocess=Preprocess((SIDE, SIDE), neighbours=2))
    scored: dict[str, np.ndarray] = {}
    rows = two.read_rows("train", COLUMNS).to_pylist()
    for row, judged in zip(rows, HeldOut(predictor, Labels()).judged(rows), strict=True):
        assert isinstance(judged, Judged)
        scored[pydicom.dcmread(io.BytesIO(Path(row["uri"]).read_bytes())).SOPInstanceUID] = judged.prediction

    expected = {}
    for number, patient in enumerate(VALUES):
        for place, (below, _, above) in seen(patient).items():
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[:, : SIDE // 2] = above > below
            expected[f"1.2.{number}.3.{place + 1}"] = mask
    assert 0 < sum(mask.any() for mask in expected.values()) < len(expected)
    for found in (bulk, local, scored):
        assert found.keys() == expected.keys()
        for name, mask in expected.items():
            assert found[name].tobytes() == mask.tobytes()


def test_a_set_that_does_not_know_the_neighbours_cannot_score_the_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = made(world, tmp_path / "set", preprocess=Preprocess((SIDE, SIDE)), limit=4)
    version = ModelVersion("m", "1", "models:/m/1", "r", "d")
    monkeypatch.setattr(registry, "fetch", lambda *arguments: (world.bundle, version))
    config = evaluate.EvaluateConfig(single.uri, version.uri, "sqlite://", split="train")
    with pytest.raises(ValueError, match=r"looks at 1 slices on each side, the set names 0; prepare one with"):
        evaluate.evaluate(config)
