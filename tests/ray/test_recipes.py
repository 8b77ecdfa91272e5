"""Every shipped recipe and the tutorial's: from a raw folder of its layout to an epoch of its own network and size."""

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

from rayseg import config
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.prepared import describe
from rayseg.evaluation.evaluate import EvaluateConfig
from rayseg.evaluation.promote import PromoteConfig
from rayseg.training.learner import Learner
from rayseg.training.settings import TrainConfig
from tests.folders import PATIENTS, SLICES, bleeds, jpegs, pictures, stroke, tifs
from tests.unit.documentation import DOCS, recipes

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

RECIPES = Path(__file__).parents[2] / "configs"


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
