"""A cross-validation whose driver is killed: everybody is held out once, and nothing is done or registered twice."""

import csv
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from rayseg.config import load, plain
from rayseg.crossvalidation.crossvalidate import CrossValidate, CrossValidateConfig, crossvalidate
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig
from rayseg.data.preprocess import Preprocess
from rayseg.data.split import Split
from rayseg.evaluation.checks import no_leak
from rayseg.inference.predictor import Predictor
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import registry, runs
from rayseg.training.settings import TrainConfig
from tests.drivers import kill_when

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]

PATIENTS, SIDE, FOLDS = 9, 32, 3


def pictures(folder: Path) -> None:
    """A bright square on noise, a patient a picture."""
    random = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    with (folder / "groups.csv").open("w") as groups:
        print("file,group", file=groups)
        for patient in range(PATIENTS):
            y, x = random.integers(2, 20, 2)
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[y : y + 10, x : x + 10] = 255
            image = random.integers(0, 120, mask.shape).astype(np.uint8) + mask // 2
            cv2.imwrite(str(folder / f"images/{patient}.png"), image)
            cv2.imwrite(str(folder / f"masks/{patient}.png"), mask)
            print(f"{patient}.png,p{patient}", file=groups)


def test_a_killed_cross_validation_goes_on_and_scores_everybody_once(tmp_path: Path) -> None:
    pictures(tmp_path / "source")
    layout = Layout(images="images", masks="masks", groups="groups.csv")
    catalog(CatalogConfig(str(tmp_path / "source"), str(tmp_path / "manifest.parquet"), layout=layout))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = CrossValidateConfig(
        prepare=PrepareConfig(
            str(tmp_path / "manifest.parquet"),
            str(tmp_path / "set"),
            Preprocess((SIDE, SIDE), None, (0.5, 99.5)),
            split=Split(test=0.0, stratify=True),
        ),
        train=TrainConfig(
            storage=str(tmp_path / "runs"),
            prepared="each fold has its own",
            tracking_uri=uri,
            name="squares",
            registered_model="squares",
            model=NetworkConfig(widths=(4, 8)),
            batch_size=3,
            epochs=2,
            num_workers=1,
        ),
        crossvalidate=CrossValidate(folds=FOLDS, concurrent=1, mirror="columns"),
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(plain(config)))
    kill_when(
        "crossvalidate", recipe, tmp_path, "runs/squares-folds-*/training/squares-fold-1-*/epoch-00001/state.json"
    )
    (first,) = tmp_path.glob("runs/squares-folds-*/fold-0.json")
    mlflow = runs.client(uri)
    (of_first,) = mlflow.search_model_versions("name = 'squares-folds'")
    ended_ms = mlflow.get_run(of_first.run_id).info.end_time

    result = crossvalidate(load(CrossValidateConfig, None, recipe, ["crossvalidate.concurrent=2"]))

    assert result.doubts == []
    assert not first.exists(), "checkpoints and marks are gone"
    assert mlflow.get_run(of_first.run_id).info.end_time == ended_ms, "a fold that had ended is left alone"
    children = runs.tagged(uri, "rayseg", {"mlflow.parentRunId": result.run_id})
    assert sorted(children) == sorted(fold.run_id for fold in result.folds)
    # By default the precision is measured: once, for all folds, whatever becomes of the driver.
    (decided,) = {mlflow.get_run(child).data.params["mixed_precision"] for child in children}
    assert decided == mlflow.get_run(result.run_id).data.params["train.mixed_precision"] != "auto"
    assert runs.tagged(uri, "rayseg", {"rayseg.kind": "crossvalidation"}) == [result.run_id]
    assert {mlflow.get_run(run_id).info.status for run_id in (*children, result.run_id)} == {"FINISHED"}
    versions = Counter(version.name for version in mlflow.search_model_versions())
    assert versions == {"squares-folds": FOLDS, "squares": 1}

    def artifact(path: str) -> list[dict[str, str]]:
        return list(csv.DictReader(runs.read_bytes(uri, result.run_id, path).decode().splitlines()))

    cases = artifact("out_of_fold/cases.csv")
    assert len({case["patient_key"] for case in cases}) == len(cases) == PATIENTS == result.patients
    sums = {name: sum(int(case[name]) for case in cases) for name in ("tp", "fp", "fn")}
    assert result.dice_pooled == pytest.approx(2 * sums["tp"] / (2 * sums["tp"] + sums["fp"] + sums["fn"]))
    assert result.dice_per_image == pytest.approx(np.mean([float(case["dice"]) for case in cases]), abs=1e-5)
    held_out: list[str] = []
    for fold in result.folds:
        table = runs.read_bytes(uri, fold.run_id, "split.csv").decode().splitlines()  # of what it was trained on
        rows = list(csv.DictReader(table))
        assert Counter(row["split"] for row in rows) == {"train": 3, "val": 3, "test": 3}
        held_out += [row["patient_key"] for row in rows if row["split"] == "test"]
    assert sorted(held_out) == sorted(case["patient_key"] for case in cases)
    assert [line["dice_pooled"] for line in artifact("out_of_fold/folds.csv")] == [
        str(fold.dice_pooled) for fold in result.folds
    ]

    bundle_dir, version = registry.fetch(uri, result.model_uri)
    leak = no_leak(uri, version, held_out)
    assert leak.evidence["leaked_patients"] == PATIENTS, "whoever is in a fold cannot test the ensemble"
    members = [registry.fetch(uri, fold.model_uri)[0] for fold in result.folds]
    assert Predictor.load(bundle_dir).threshold == pytest.approx(Predictor.load(*members).threshold)
    card = runs.read_bytes(uri, result.run_id, "model_card.md").decode()
    assert "The mean of 3 networks and their mirror images" in card
    assert "Judge it on a test set that no fold saw" in card
    again = tmp_path / "crossvalidation.json"
    again.write_bytes(runs.read_bytes(uri, result.run_id, again.name))
    assert again.name in card
    assert load(CrossValidateConfig, None, again).prepare == config.prepare, "an artifact that is a recipe"
