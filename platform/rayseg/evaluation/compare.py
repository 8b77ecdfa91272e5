"""Compare: models on the same cases, against a baseline, from the tables that evaluating them left."""

import csv
import dataclasses
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rayseg import config as configuration
from rayseg import storage
from rayseg.evaluation import comparison, evaluated, paired
from rayseg.evaluation.comparison import Challenger, Comparison
from rayseg.evaluation.evaluated import Evaluated
from rayseg.evaluation.paired import Difference
from rayseg.evaluation.publish import set_tag
from rayseg.tracking import figures, runs


@dataclass(frozen=True)
class CompareConfig:
    """Which models; the first is the baseline that each of the others is compared with."""

    models: tuple[str, ...]  # models:/NAME/VERSION, models:/NAME@ALIAS, or ids of runs that have scores
    tracking_uri: str  # URI of the MLflow server or database, such as sqlite:///work/mlflow.db
    # which patients; out_of_fold is of cross-validations
    split: Literal["train", "val", "test", "out_of_fold"] = "test"
    metric: str = "dice_per_case"  # metric of single patients that picture and summary show
    level: float = 0.95  # level of the intervals

    def __post_init__(self) -> None:
        if len(self.models) < 2 or len(set(self.models)) < len(self.models):
            raise ValueError("compare.models: at least two models expected, each once, the baseline first")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"compare.level: a level from 0.5 to below 1 expected, got {self.level}")
        if self.metric not in paired.PER_CASE:
            raise ValueError(f"compare.metric: one of {', '.join(paired.PER_CASE)} expected, got {self.metric}")


@dataclass(frozen=True)
class CompareResult:
    """What came out.

    differences: by challenger, of all classes together: each metric's `paired.Difference`.
    """

    run_id: str
    baseline: str
    challengers: list[str]
    split: str
    patients: int
    differences: dict[str, dict[str, dict[str, Any]]]
    report: str  # URI of an HTML file in the run
    table: str  # URI of a CSV of all differences, those of single classes too
    cases: str  # URI of a CSV of the metric of each patient
    scatter: list[str]  # URIs of PNG files, one a challenger
    seconds: float


def compare(config: CompareConfig) -> CompareResult:
    """Compares each model with the first one, and keeps what it finds in an MLflow run of its own beside theirs.

    Raises:
        ValueError: fewer than two models, one that is not there or was never evaluated on the split, or other rows or
            labels than the baseline's.
    """
    began = time.monotonic()
    uri = config.tracking_uri
    baseline, *others = (evaluated.read(uri, model, config.split) for model in config.models)
    if len({one.run_id for one in (baseline, *others)}) <= len(others):
        raise ValueError("compare.models: two of them are the same model")
    evaluated.check_same_set([baseline, *others])
    labels = baseline.labels
    challengers = []
    for other in others:
        together = paired.differences(other.classes(), baseline.classes(), level=config.level)
        single = {
            label: paired.differences(other.classes([label]), baseline.classes([label]), level=config.level)
            for label in (labels if len(labels) > 1 else ())
        }
        challengers.append(Challenger(other.name, together, single, _scatter(config, baseline, other)))
    page = Comparison(baseline.name, config.split, len(baseline.patients), config.metric, config.level, challengers)
    with _run(config, [baseline, *others]) as run_id:
        kept = _keep(config, run_id, page, [baseline, *others])
    return CompareResult(
        run_id=run_id,
        baseline=baseline.name,
        challengers=[one.name for one in others],
        split=config.split,
        patients=len(baseline.patients),
        differences={
            one.name: {name: dataclasses.asdict(found) for name, found in one.together.items()} for one in challengers
        },
        report=kept["report.html"],
        table=kept["differences.csv"],
        cases=kept["cases.csv"],
        scatter=[kept[name] for name in kept if name.endswith(".png")],
        seconds=time.monotonic() - began,
    )


def _scatter(config: CompareConfig, baseline: Evaluated, other: Evaluated) -> bytes:
    across, up = (paired.of_patients(config.metric, one.classes()) for one in (baseline, other))
    low = config.metric in paired.LOWER_IS_BETTER
    return figures.pairs(across, up, (baseline.name, other.name), config.metric, low=low)


def _run(config: CompareConfig, models: Sequence[Evaluated]) -> AbstractContextManager[str]:
    """A run in the experiment of the baseline, which names the models and has them as its inputs."""
    client = runs.client(config.tracking_uri)
    trained = [client.get_run(one.run_id) for one in models]
    experiment = client.get_experiment(trained[0].info.experiment_id).name
    links = [
        f"- {'baseline' if one is models[0] else 'challenger'}: "
        f"[{one.name}](#/experiments/{run.info.experiment_id}/runs/{one.run_id})"
        for one, run in zip(models, trained, strict=True)
    ]
    return runs.running(
        config.tracking_uri,
        experiment,
        "compare-" + "-".join(_short(one.name) for one in models),
        configuration.flat(config),
        {
            "rayseg.kind": "comparison",
            "rayseg.baseline": models[0].name,
            "rayseg.models": json.dumps({one.name: one.run_id for one in models}),
            set_tag(config.split): models[0].digest,
            "mlflow.note.content": "\n".join([f"Compared on {config.split}, research software:", "", *links]),
        },
        [one.run_id for one in models],
    )


def _keep(config: CompareConfig, run_id: str, page: Comparison, models: Sequence[Evaluated]) -> dict[str, str]:
    """Writes metrics and files to the run; returns the files' URIs by name."""
    uri = config.tracking_uri
    files = {
        "differences.csv": _differences(page),
        "cases.csv": _cases(config, models),
        "report.html": comparison.render(page).encode(),
        **{f"scatter-{_short(one.name)}.png": one.scatter for one in page.challengers},
    }
    told: dict[str, float] = {f"{config.split}/cases": page.patients}
    for one in page.challengers:
        # As evaluating tells of classes: a name after a slash where there are several.
        suffix = f"/{_short(one.name)}" if len(page.challengers) > 1 else ""
        for name, found in one.together.items():
            values = {
                "difference": found.difference, "difference_low": found.low, "difference_high": found.high,
                "p_value": found.p_value, "wins": found.wins, "ties": found.ties, "losses": found.losses,
            }  # fmt: skip
            told |= {
                f"{config.split}/{name}_{key}{suffix}": value for key, value in values.items() if value is not None
            }
    runs.log_metrics(uri, run_id, told)
    artifact_uri = runs.client(uri).get_run(run_id).info.artifact_uri
    for name, data in files.items():
        runs.log_bytes(uri, run_id, name, data)
    return {name: storage.join(artifact_uri, name) for name in files}


def _differences(page: Comparison) -> bytes:
    """CSV: a line for each challenger, class and metric; `class` is empty for all classes together."""
    fields = [field.name for field in dataclasses.fields(Difference)]
    lines = [
        [one.name, page.baseline, label, name, *(_cell(getattr(found, field)) for field in fields)]
        for one in page.challengers
        for label, of_class in {"": one.together, **one.classes}.items()
        for name, found in of_class.items()
    ]
    return _csv(["challenger_model", "baseline_model", "class", "metric", *fields], lines)


def _cases(config: CompareConfig, models: Sequence[Evaluated]) -> bytes:
    """CSV: the metric of each patient, a column a model, the greatest gain over the baseline last."""
    values: Mapping[str, np.ndarray] = {one.name: paired.of_patients(config.metric, one.classes()) for one in models}
    first, second, *_ = values.values()
    patients = models[0].patients
    order = np.argsort(np.nan_to_num(second - first, nan=np.inf), kind="stable")
    lines = [[patients[at], *(_cell(float(column[at])) for column in values.values())] for at in order]
    return _csv(["patient_key", *(f"{config.metric} of {name}" for name in values)], lines)


def _csv(names: Sequence[str], lines: Sequence[Sequence[Any]]) -> bytes:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([names, *lines])
    return table.getvalue().encode()


def _cell(value: Any) -> Any:
    if value is None or value != value:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _short(name: str) -> str:
    """A model's name as part of a run's, a file's or a metric's: `models:/brain/3` is brain-v3."""
    version = re.fullmatch(r"models:/(.+)/(\d+)", name)
    return re.sub(r"[^\w.-]+", "-", f"{version[1]}-v{version[2]}" if version else name)
