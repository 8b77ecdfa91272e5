"""Models compared from what evaluating them left: a real MLflow store (SQLite), cases made by hand."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rayseg.evaluation.compare import CompareConfig, compare
from rayseg.evaluation.comparison import Challenger, Comparison, render
from rayseg.evaluation.paired import Difference
from rayseg.evaluation.publish import tolerance_tag
from rayseg.evaluation.scores import Counts
from rayseg.tracking import figures, registry, runs
from tests.unit.evaluated_models import found_of, register, table

HITS = [50, 60, 70, 80, 55, 65, 75, 85]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def cases(*gains: int) -> pa.Table:
    return table({"lesion": found_of([hit + gain for hit, gain in zip(HITS, gains * len(HITS), strict=False)])})


def rows(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode())))


def test_each_model_is_compared_with_the_first_and_all_of_it_is_kept(tracking: str) -> None:
    models = [register(tracking, "three", cases(gain)) for gain in (0, 10, -5)]
    run_of_third = registry.resolve(tracking, models[2]).run_id
    third = f"three run {run_of_third[:8]}"
    result = compare(CompareConfig(models=(models[0], models[1], run_of_third), tracking_uri=tracking))
    assert (result.baseline, result.challengers, result.patients) == (models[0], [models[1], third], 8)
    assert json.loads(json.dumps(result.differences)) == result.differences
    assert result.differences[models[1]]["dice_per_case"]["difference"] == pytest.approx(0.1)
    assert result.differences[third]["dice_pooled"]["difference"] == pytest.approx(-0.05)
    assert result.differences[third]["dice_per_case"]["losses"] == 8

    run = runs.client(tracking).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"compare-three-v1-three-v2-three-run-{run_of_third[:8]}"
    assert run.info.experiment_id == runs.client(tracking).get_run(run_of_third).info.experiment_id
    assert run.data.metrics["test/dice_per_case_difference/three-v2"] == pytest.approx(0.1)
    # All eight signs equal: 2 of 2^8.
    assert run.data.metrics["test/dice_per_case_p_value/three-v2"] == pytest.approx(2 / 256)
    assert json.loads(run.data.tags["rayseg.models"])[third] == run_of_third
    assert f"/runs/{run_of_third})" in run.data.tags["mlflow.note.content"]

    told = rows(runs.read_bytes(tracking, result.run_id, "differences.csv"))
    (line,) = (one for one in told if one["challenger_model"] == third and one["metric"] == "dice_pooled")
    assert (line["baseline_model"], line["better"]) == (models[0], "baseline")
    assert float(line["difference"]) == pytest.approx(-0.05)
    by_patient = rows(runs.read_bytes(tracking, result.run_id, "cases.csv"))
    assert len(by_patient) == 8
    first = next(one for one in by_patient if one["patient_key"] == "patient-000")
    assert [float(first[f"dice_per_case of {name}"]) for name in (models[0], models[1], third)] == [0.5, 0.6, 0.45]

    page = runs.read_bytes(tracking, result.run_id, "report.html").decode()
    assert "Research software, not a medical device" in page
    assert "+0.1000" in page
    assert "0 / 0 / 8" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page), "nothing to fetch"
    assert len(result.scatter) == 2
    for uri in result.scatter:
        assert Image.open(Path(uri.removeprefix("file://"))).size[0] > 300


def test_one_challenger_needs_no_name_in_metrics_and_the_models_are_the_runs_inputs(tracking: str) -> None:
    models = [register(tracking, "two", cases(gain)) for gain in (0, 3)]
    client = runs.client(tracking)
    for uri in models:
        run_id = registry.resolve(tracking, uri).run_id
        experiment = client.get_run(run_id).info.experiment_id
        logged = client.create_logged_model(experiment, name="two", source_run_id=run_id)
        client.log_outputs(run_id, [registry.LoggedModelOutput(logged.model_id, step=0)])
    result = compare(CompareConfig(models=tuple(models), tracking_uri=tracking))
    run = client.get_run(result.run_id)
    assert run.data.metrics["test/dice_pooled_difference"] == pytest.approx(0.03)
    assert run.data.metrics["test/dice_per_case_wins"] == 8
    assert len(run.inputs.model_inputs) == 2


def test_classes_are_told_one_by_one(tracking: str) -> None:
    a, b = found_of(HITS), found_of([hit - 20 for hit in HITS])
    models = tuple(register(tracking, "classes", table(of)) for of in ({"a": a, "b": b}, {"a": b, "b": b}))
    result = compare(CompareConfig(models=models, tracking_uri=tracking))
    told = rows(runs.read_bytes(tracking, result.run_id, "differences.csv"))
    pooled = {line["class"]: float(line["difference"]) for line in told if line["metric"] == "dice_pooled"}
    assert pooled == pytest.approx({"": -0.1, "a": -0.2, "b": 0})


def test_other_rows_are_refused(tracking: str) -> None:
    models = (register(tracking, "rows", cases(0)), register(tracking, "rows", cases(0), rows="set b"))
    with pytest.raises(ValueError, match=r"models:/rows/2 and models:/rows/1 were evaluated on other rows of test"):
        compare(CompareConfig(models=models, tracking_uri=tracking))


def test_other_masks_of_the_same_rows_are_refused(tracking: str) -> None:
    first, changed, early = (
        register(tracking, "masks", cases(0), rows=rows) for rows in ("rows-masks a", "rows-masks b", "rows")
    )
    told = (
        r"masks/2 and models:/masks/1 were evaluated on the same rows of test with other masks: the truth was changed"
    )
    with pytest.raises(ValueError, match=told):
        compare(CompareConfig(models=(first, changed), tracking_uri=tracking))
    for models in ((first, early), (early, first)):
        with pytest.raises(ValueError, match=r"masks/3 was evaluated before .* masks .* evaluate it on test again"):
            compare(CompareConfig(models=models, tracking_uri=tracking))
    # Two of an earlier version say nothing of masks; the pixels to find do.
    halves = [Counts(tp=hit, fp=9, fn=200 - hit, tn=1000) for hit in HITS]
    other = register(tracking, "masks", table({"lesion": halves}), rows="rows")
    with pytest.raises(ValueError, match=r"with other masks"):
        compare(CompareConfig(models=(early, other), tracking_uri=tracking))
    same = register(tracking, "masks", cases(3), rows="rows")
    assert compare(CompareConfig(models=(early, same), tracking_uri=tracking)).patients == len(HITS)


def test_other_tolerances_are_refused(tracking: str) -> None:
    near, far = ({tolerance_tag("test"): told} for told in ("1 mm", "2 mm"))
    models = (register(tracking, "near", cases(0), tags=near), register(tracking, "near", cases(0), tags=far))
    with pytest.raises(ValueError, match=r"other tolerances of surfaces \(2 mm and 1 mm\)"):
        compare(CompareConfig(models=models, tracking_uri=tracking))


def test_models_that_were_never_evaluated_are_named(tracking: str) -> None:
    models = (register(tracking, "never", cases(0)), register(tracking, "never", None))
    with pytest.raises(ValueError, match=r"models:/never/2 was never evaluated on test: run the evaluate job"):
        compare(CompareConfig(models=models, tracking_uri=tracking))
    with pytest.raises(ValueError, match=r"models:/never/1 was never evaluated on val"):
        compare(CompareConfig(models=models, tracking_uri=tracking, split="val"))
    with pytest.raises(ValueError, match=r"run 0{32}: not found"):
        compare(CompareConfig(models=("0" * 32, models[0]), tracking_uri=tracking))
    run_id = registry.resolve(tracking, models[0]).run_id
    with pytest.raises(ValueError, match="two of them are the same model"):
        compare(CompareConfig(models=(models[0], run_id), tracking_uri=tracking))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"models": ("a",)}, "models"), ({"models": ("a", "a")}, "models"), ({"level": 1.0}, "level"),
        ({"metric": "dice_pooled"}, "metric"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(values: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=rf"compare\.{key}"):
        CompareConfig(**{"models": ("a", "b"), "tracking_uri": "", **values})  # type: ignore[arg-type]


def test_names_do_not_become_markup() -> None:
    found = Difference(0.5, 0.4, 0.1)
    page = Comparison("<b>", "test", 3, "dice_per_case", 0.95, [Challenger("<i>", {"dice_pooled": found}, {}, b"")])
    text = render(page)
    assert "<i>" not in text
    assert "&lt;i&gt;" in text


def test_points_lie_on_the_side_of_the_better_model() -> None:
    across, up = np.array([0.2, 0.4, np.nan]), np.array([0.8, 0.9, 0.5])
    better, worse = (
        np.asarray(Image.open(io.BytesIO(figures.pairs(*of, ("a", "b"), "dice", low=low))).convert("RGB")).astype(int)
        for of, low in (((across, up), False), ((up, across), False))
    )
    low = np.asarray(Image.open(io.BytesIO(figures.pairs(up, across, ("a", "b"), "mm", low=True))).convert("RGB"))

    def green(picture: np.ndarray) -> np.ndarray:
        """The rows and columns of greenish pixels."""
        red, green_, blue = np.moveaxis(picture.astype(int), -1, 0)
        return np.argwhere((green_ - red > 60) & (green_ > blue))

    points = green(better)
    rows_, columns = points.mean(axis=0)
    assert rows_ < better.shape[0] / 2, "high up"
    assert columns < better.shape[1] / 2, "on the left: above the line"
    assert len(green(worse)) == 0
    assert len(green(low)) > 0
