"""Evaluation on a Ray cluster, of a registered bundle, against scikit-learn on the same masks."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pydicom
import pytest
from medpy.metric import binary
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from rayseg import storage, work
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.labels import Labels
from rayseg.data.layouts import Layout
from rayseg.data.prepare import PrepareConfig, prepare
from rayseg.data.prepared import describe
from rayseg.data.preprocess import Preprocess, Window
from rayseg.data.split import Split
from rayseg.dicom.reading import Slice, read_slice
from rayseg.evaluation.cases import read
from rayseg.evaluation.compare import CompareConfig, compare
from rayseg.evaluation.evaluate import EvaluateConfig, evaluate
from rayseg.inference.predictor import Prediction, Predictor
from rayseg.tracking import bundle, registry, runs

pytestmark = pytest.mark.ray

NATIVE, INPUT = 80, 64
PREPROCESS = Preprocess(size=(INPUT, INPUT), window=Window(center=40, width=80), percentiles=None)


class World(NamedTuple):
    prepared: str
    tracking: str
    model_uri: str
    run_id: str
    bundle: Path


def bright_but_no_bone(shift: int = 0) -> keras.Model:
    """A model that needs no training: grey values of about 0.66 to 0.97 are a bleed.

    It finds them `shift` columns too far left.
    """
    image = keras.Input((INPUT, INPUT, 1), dtype="uint8")
    above = keras.layers.Conv2D(2, (1, 2 * shift + 1), padding="same", activation="relu")
    decide = keras.layers.Conv2D(1, 1, activation="sigmoid", dtype="float32")
    model = keras.Model(image, decide(above(keras.layers.Rescaling(1 / 255)(image))))
    kernel = np.zeros((1, 2 * shift + 1, 1, 2))
    kernel[0, -1] = 1.0
    above.set_weights([kernel, np.array([-0.66, -0.95])])
    decide.set_weights([np.array([[[[200.0], [-4000.0]]]]), np.array([-0.5])])
    return model


@pytest.fixture(scope="module")
def world(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("evaluate")
    synthetic.write_studies(str(root / "source"), patients=8, slices=5, size=NATIVE, seed=5)
    manifest, prepared, tracking = str(root / "manifest.parquet"), str(root / "prepared"), f"sqlite:///{root}/mlflow.db"
    catalog(CatalogConfig(source=str(root / "source"), output=manifest, layout=Layout(images="images", masks="masks")))
    prepare(PrepareConfig(manifest=manifest, output=prepared, preprocess=PREPROCESS, split=Split(val=0.1, test=0.6)))
    bundle.save(root / "bundle", bright_but_no_bone(), PREPROCESS, Labels(), 0.5, synthetic.slice_bytes())
    run_id = runs.start(tracking, "evaluate", "by hand")
    version = registry.register(tracking, run_id, root / "bundle", "bright")
    return World(prepared, tracking, version.uri, run_id, root / "bundle")


def test_scores_are_those_of_the_source_objects_on_their_own_grid(world: World) -> None:
    config = EvaluateConfig(prepared=world.prepared, model_uri=world.model_uri, tracking_uri=world.tracking, overlays=3)
    result = evaluate(config)

    rows = describe(world.prepared).read_rows("test").to_pylist()
    predictor = Predictor.load(world.bundle)
    truths: dict[str, list[np.ndarray]] = {}
    predictions: dict[str, list[np.ndarray]] = {}
    for row in rows:
        (found,) = predictor.segment([Path(row["uri"]).read_bytes()])
        assert isinstance(found, Prediction)
        predictions.setdefault(row["patient_key"], []).append(found.mask.ravel() > 0)
        truths.setdefault(row["patient_key"], []).append(np.asarray(Image.open(row["masks"][0]["uri"])).ravel() > 0)
    all_truth, all_predicted = (
        np.concatenate([mask for slices in masks.values() for mask in slices]) for masks in (truths, predictions)
    )
    assert result.dice_pooled == pytest.approx(f1_score(all_truth, all_predicted))
    assert result.metrics["iou_pooled"] == pytest.approx(jaccard_score(all_truth, all_predicted))
    assert result.metrics["precision_pooled"] == pytest.approx(precision_score(all_truth, all_predicted))
    assert result.metrics["recall_pooled"] == pytest.approx(recall_score(all_truth, all_predicted))
    dice = {
        patient: f1_score(np.concatenate(truths[patient]), np.concatenate(predictions[patient]), zero_division=np.nan)
        for patient in truths
    }
    assert result.dice_per_case == pytest.approx(np.nanmean(list(dice.values())))
    assert 0.1 < result.dice_pooled < 0.99  # else the comparison would say little
    assert result.dice_per_case != result.dice_pooled
    assert result.background_dice == 0.0
    assert (result.slices, result.cases, result.rejected) == (len(rows), len(truths), 0)
    healthy = [patient for patient, masks in truths.items() if not np.any(masks)]
    assert result.metrics["cases_false_alarms"] + result.metrics["cases_true_negative"] == len(healthy) > 0

    table = list(csv.DictReader(io.StringIO(storage.read(result.cases_table).decode())))
    assert {row["patient_key"] for row in table} == set(truths)
    for row in table:
        assert sum(int(row[name]) for name in ("tp", "fp", "fn", "tn")) == int(row["slices"]) * NATIVE * NATIVE
        if row["dice"]:
            assert float(row["dice"]) == pytest.approx(dice[row["patient_key"]], abs=1e-6)

    # Series with positions are volumes, in millimetres: against MedPy, whose grids are rectangular.
    cases = {row["patient_key"]: row for row in read(storage.read(f"{result.cases_table[:-4]}.parquet")).to_pylist()}
    compared = 0
    for patient, case in cases.items():
        assert (case["images"], case["modality"], case["scanner"], case["hd95_px"]) == (1, "CT", "rayseg phantom", None)
        series = [pydicom.dcmread(row["uri"]) for row in rows if row["patient_key"] == patient]
        order = np.argsort([slice.ImagePositionPatient[2] for slice in series])
        truth, found = (
            np.stack([masks[patient][place].reshape(NATIVE, NATIVE) for place in order])
            for masks in (truths, predictions)
        )
        heights_mm = np.sort([float(slice.ImagePositionPatient[2]) for slice in series])
        spacing_mm = (heights_mm[1] - heights_mm[0], *map(float, series[0].PixelSpacing))
        tilted = any(series[0].ImageOrientationPatient[place] for place in (2, 5))
        if tilted or not np.ptp(np.diff(heights_mm)) < 1e-6 or not (truth.any() and found.any()):
            continue
        ways = [binary.__dict__["__surface_distances"](*pair, spacing_mm) for pair in ((found, truth), (truth, found))]
        assert case["hd95_mm"] == pytest.approx(max(np.percentile(way, 95) for way in ways), abs=1e-6)
        assert case["assd_mm"] == pytest.approx(np.concatenate(ways).mean(), abs=1e-6)
        assert case["nsd_mm"] == pytest.approx((np.concatenate(ways) <= 2.0 + 1e-6).mean(), abs=1e-6)
        assert case["truth_ml"] == pytest.approx(truth.sum() * np.prod(spacing_mm) / 1000)
        compared += 1
    assert compared > 0

    # The run that trained the model tells the same, and shows pictures.
    logged = runs.client(world.tracking).get_run(world.run_id).data.metrics
    assert logged["test/dice_pooled"] == result.dice_pooled
    assert logged["test/dice_per_case"] == result.dice_per_case
    assert logged["test/background_dice"] == 0.0
    for name, (low, high) in result.intervals.items():
        assert (logged[f"test/{name}_low"], logged[f"test/{name}_high"]) == (low, high)
    assert {"dice_pooled", "dice_per_case", "average_precision", "ece"} <= result.intervals.keys()
    assert len(result.overlays) == 3
    for uri in result.overlays:
        assert Image.open(io.BytesIO(storage.read(uri))).size > (400, 200)


def test_few_slices_are_scored_without_ray_and_have_the_same_scores(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(prepared=world.prepared, model_uri=world.model_uri, tracking_uri=world.tracking, overlays=1)
    in_actors = evaluate(config)
    table = storage.read(in_actors.cases_table)
    monkeypatch.setattr(work, "in_cluster", lambda *_: False)
    alone = evaluate(config)
    assert storage.read(alone.cases_table) == table
    assert replace(alone, seconds=0.0) == replace(in_actors, seconds=0.0)


def test_an_ensemble_and_mirror_images_have_a_run_of_their_own_to_compare(world: World, tmp_path: Path) -> None:
    plain = EvaluateConfig(prepared=world.prepared, model_uri=world.model_uri, tracking_uri=world.tracking, overlays=1)
    alone = evaluate(plain)
    assert alone.run_id == world.run_id
    models = [bright_but_no_bone(), bright_but_no_bone(shift=4)]
    rows = describe(world.prepared).read_rows("test")
    folder = tmp_path / "shifted"
    bundle.save(folder, models[1], PREPROCESS, Labels(), 0.4, synthetic.slice_bytes())
    trained = runs.start(world.tracking, "evaluate", "shifted")
    patient = rows["patient_key"][0].as_py()
    runs.log_bytes(world.tracking, trained, "split.csv", f"patient_key,split\n{patient},train\n".encode())
    shifted = registry.register(world.tracking, trained, folder, "shifted")
    result = evaluate(replace(plain, ensemble=(shifted.uri,), mirror="columns"))

    truths, predictions = [], []
    for row in rows.to_pylist():
        slice = read_slice(Path(row["uri"]).read_bytes())
        assert isinstance(slice, Slice)
        both_NHWC = np.stack([image := PREPROCESS.apply(slice), image[:, ::-1]])
        found_NHW = [model.predict(both_NHWC, verbose=0)[..., 0] for model in models]
        mean_HW = np.mean([(one + mirrored[:, ::-1]) / 2 for one, mirrored in found_NHW], axis=0)
        predictions.append(PREPROCESS.restore(mean_HW, *slice.shape).ravel() >= (0.5 + 0.4) / 2)
        truths.append(np.asarray(Image.open(row["masks"][0]["uri"])).ravel() > 0)
    expected = f1_score(np.concatenate(truths), np.concatenate(predictions))
    assert result.dice_pooled == pytest.approx(expected, abs=1e-4)
    assert abs(expected - alone.metrics["dice_pooled"]) > 0.01  # else the comparison would say little

    client = runs.client(world.tracking)
    run = client.get_run(result.run_id)
    assert run.info.run_name == "evaluate-bright-v1+shifted-v1-mirror-columns"
    assert run.info.experiment_id == client.get_run(world.run_id).info.experiment_id
    assert (run.info.status, run.data.metrics["test/dice_pooled"]) == ("FINISHED", result.dice_pooled)
    assert 0 <= run.data.metrics["test/aurc_optimum"] <= run.data.metrics["test/aurc_pairwise_dice"] <= 1
    assert "test/aurc_pairwise_dice" not in client.get_run(world.run_id).data.metrics, "one model has no members"
    assert "test/aurc_entropy" in client.get_run(world.run_id).data.metrics
    assert json.loads(run.data.tags["rayseg.models"]) == {world.model_uri: world.run_id, shifted.uri: trained}
    assert len(run.inputs.model_inputs) == 2
    assert "tracking_uri" not in run.data.params
    assert client.get_run(world.run_id).data.metrics["test/dice_pooled"] == alone.dice_pooled
    assert "test/dice_pooled" not in client.get_run(trained).data.metrics

    # The first one's run cannot tell whom it was trained on, the second one's names one of them.
    unknown, leaked = result.doubts
    assert world.model_uri in unknown
    assert f"1 of {result.cases} test patients" in leaked
    report = storage.read(result.report).decode()
    assert leaked in report
    assert f"{world.model_uri} + {shifted.uri}, mirror columns on test" in report

    told = compare(CompareConfig(models=(world.model_uri, result.run_id), tracking_uri=world.tracking))
    (found,) = told.differences.values()
    assert found["dice_pooled"]["difference"] == pytest.approx(expected - alone.metrics["dice_pooled"], abs=1e-4)


def test_what_is_no_ensemble_is_refused(world: World, tmp_path: Path) -> None:
    image = keras.Input((INPUT, INPUT, 3), dtype="uint8")
    of_colours = keras.Model(image, keras.layers.Conv2D(1, 1, activation="sigmoid")(keras.layers.Rescaling(1)(image)))
    colour = replace(PREPROCESS, window=None, percentiles=(0, 100), color=True)
    for name, model, preprocess, labels, refused in (
        ("tumors", bright_but_no_bone(), PREPROCESS, Labels(("tumor",)), "finds .'tumor',., the prepared set is of"),
        ("colours", of_colours, colour, Labels(), "all at grey or all at colour images"),
    ):
        bundle.save(tmp_path / name, model, preprocess, labels, 0.5, synthetic.slice_bytes())
        run_id = runs.start(world.tracking, "evaluate", name)
        other = registry.register(world.tracking, run_id, tmp_path / name, name)
        with pytest.raises(ValueError, match=refused):
            evaluate(EvaluateConfig(world.prepared, world.model_uri, world.tracking, ensemble=(other.uri,)))


def test_rows_that_cannot_be_read_any_more_end_the_job_by_the_budget_with_their_reasons(world: World) -> None:
    rows = describe(world.prepared).read_rows("test").to_pylist()
    gone, changed = Path(rows[0]["uri"]), Path(rows[1]["masks"][0]["uri"])
    kept = gone.read_bytes(), changed.read_bytes()
    try:
        gone.unlink()
        Image.new("L", (NATIVE, NATIVE + 1)).save(changed)
        with pytest.raises(ValueError, match=r"2 of \d+ rows .*'mask_mismatch': 1, 'not_found': 1"):
            evaluate(
                EvaluateConfig(
                    prepared=world.prepared,
                    model_uri=world.model_uri,
                    tracking_uri=world.tracking,
                    max_reject_fraction=0.0,
                )
            )
    finally:
        gone.write_bytes(kept[0])
        changed.write_bytes(kept[1])


def test_an_unknown_model_or_set_is_named(world: World) -> None:
    with pytest.raises(ValueError, match="models:/bright/99"):
        evaluate(EvaluateConfig(prepared=world.prepared, model_uri="models:/bright/99", tracking_uri=world.tracking))
    with pytest.raises(ValueError, match="/nowhere"):
        evaluate(EvaluateConfig(prepared="/nowhere", model_uri=world.model_uri, tracking_uri=world.tracking))
