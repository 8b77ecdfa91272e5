"""Every shipped recipe and the tutorial's: from a raw folder of its layout to an epoch of its own network and size."""

import io
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml
from PIL import Image

from rayseg import config, storage
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.prepared import describe
from rayseg.evaluation.evaluate import EvaluateConfig
from rayseg.evaluation.promote import PromoteConfig
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
from tests.unit.documentation import DOCS, recipes

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

RECIPES = Path(__file__).parents[2] / "configs"
SIDE, PATIENTS, SLICES = 32, 6, 2


def stroke(folder: str) -> None:
    synthetic.write_studies(f"{folder}/made", patients=PATIENTS, slices=SLICES, size=SIDE, seed=3)
    for number, path in enumerate(sorted(Path(folder, "made/images").rglob("*.dcm"))):
        kind = ("hemorrhagic", "ischemic")[number % 2]
        storage.write(f"{folder}/source/{kind}/DICOM/{number}.dcm", path.read_bytes())
        storage.write(f"{folder}/source/{kind}/PNG/{number}.png", encoded(disc(number) * 255, "PNG"))


def bleeds(folder: str) -> None:
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0]], np.uint8)
    for number in range(PATIENTS * SLICES):
        name = f"{number // SLICES:03d}{number % SLICES:03d}.png"
        storage.write(f"{folder}/source/images/{name}", encoded(picture(number), "PNG"))
        storage.write(f"{folder}/source/masks/{name}", encoded(colours[disc(number) * (1 + number % 5)], "PNG"))


def jpegs(folder: str) -> None:
    for number in range(PATIENTS * SLICES):
        path = f"{folder}/source/{number // SLICES:03d}/brain/{number % SLICES}"
        storage.write(f"{path}.jpg", encoded(picture(number), "JPEG"))
        if number % SLICES:
            storage.write(f"{path}_HGE_Seg.jpg", encoded(disc(number) * 255, "JPEG"))


def tifs(folder: str) -> None:
    for number in range(PATIENTS * SLICES):
        path = f"{folder}/source/patient{number // SLICES}/{number % SLICES}"
        colour = np.stack([picture(3 * number + channel) for channel in range(3)], axis=-1)
        storage.write(f"{path}.tif", encoded(colour, "TIFF"))
        storage.write(f"{path}_mask.tif", encoded(disc(number) * 255, "TIFF"))


def pictures(folder: str) -> None:
    groups = ["file,group"]
    for number in range(PATIENTS * SLICES):
        name = f"{number:04d}.png"
        storage.write(f"{folder}/source/images/{name}", encoded(picture(number), "PNG"))
        storage.write(f"{folder}/source/masks/{name}", encoded(disc(number) * 255, "PNG"))
        groups.append(f"{name},{number // SLICES}")
    storage.write(f"{folder}/source/groups.csv", "\n".join(groups).encode())


def disc(number: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return ((rows - 10 - number) ** 2 + (columns - 16) ** 2 < 36).astype(np.uint8)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), np.uint8)


def encoded(values: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "make"),
    [
        ("stroke-dicom", stroke),
        ("hemorrhage-ct", bleeds),
        ("hemorrhage-jpg", jpegs),
        ("glioma-tif", tifs),
        ("images-masks", pictures),
        ("brain-tumor-mri", pictures),
        ("tutorial", pictures),
    ],
)
def test_a_recipe_goes_from_the_folder_to_an_epoch(tmp_path: Path, recipe: str, make: Callable[[str], None]) -> None:
    make(str(tmp_path))
    path = RECIPES / f"{recipe}.yaml"
    if recipe == "tutorial":
        path = tmp_path / "pictures.yaml"
        path.write_text(yaml.safe_dump(recipes(DOCS / "start" / "pictures.md")[path.name]))
    cataloged = catalog(
        config.load(CatalogConfig, "catalog", path, [f"source={tmp_path}/source", f"output={tmp_path}/m.parquet"])
    )
    assert (cataloged.accepted, cataloged.rejected) == (PATIENTS * SLICES, 0)
    # In three of a recipe's splits there may be no patient of so few.
    changes = [f"manifest={cataloged.manifest}", f"output={tmp_path}/set"]
    splits = ["split={val: 0.34, test: 0.0, stratify: true}"]
    prepared = prepare(config.load(PrepareConfig, "prepare", path, changes + splits))
    assert (prepared.rejected, prepared.patients) == (0, PATIENTS)
    for job, section in ((EvaluateConfig, "evaluate"), (PromoteConfig, "promote")):
        config.load(job, section, path)

    given = [f"prepared={prepared.prepared}", "batch_size=2", "num_workers=1", "mixed_precision=float32"]
    settings = config.load(TrainConfig, "train", path, given)
    keras.utils.set_random_seed(1)
    learner = Learner(settings, describe(prepared.prepared), 0, 1, lambda: None)
    before = learner.model.get_weights()
    logs = learner.train(0, keras.callbacks.CallbackList([], model=learner.model))
    assert np.isfinite(logs["train/loss"])
    assert any((old != new).any() for old, new in zip(before, learner.model.get_weights(), strict=True))
    assert np.isfinite(learner.validate()["val/loss"])
