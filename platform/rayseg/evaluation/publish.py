"""What an evaluation leaves in a run of MLflow: metrics, tables, pictures and a report; and the model's new card."""

import csv
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data.grey import grey, sees_color
from rayseg.data.labels import Labels
from rayseg.data.prepared import PreparedSet
from rayseg.data.preprocess import Preprocess
from rayseg.data.volume import VolumePreprocess
from rayseg.dicom.reading import read_slice
from rayseg.evaluation import cases, report
from rayseg.evaluation.failures import Failures
from rayseg.evaluation.metrics import Columns, Estimate
from rayseg.evaluation.record import Findings, Record
from rayseg.evaluation.scores import Counts
from rayseg.inference.heldout import read_truth
from rayseg.records import Reject
from rayseg.tracking import card, figures, runs
from rayseg.tracking.registry import ModelVersion

_REJECTS, _GROUPS, _REPORT = "rejects.csv", "subgroups.csv", "report.html"


@dataclass(frozen=True)
class Artifacts:
    """URIs of files in the run."""

    cases_table: str
    report: str
    overlays: list[str]


def publish(
    tracking_uri: str,
    run_id: str,
    model: str,
    held_out: PreparedSet,
    record: Record,
    findings: Findings,
    *,
    tolerance: str,
    overlays: int,
    worst: int,
    doubts: Sequence[str] = (),
) -> Artifacts:
    """Writes metrics `SPLIT/...`, tags of the set and the tolerance, and the files `SPLIT/...` to the run.

    Args:
        tracking_uri: of MLflow.
        run_id: of the run.
        model: what was evaluated, in words: the report's head.
        held_out: its `model_preprocess` gives the pictures the grey values that the network sees.
        record: the cases.
        findings: of the record.
        tolerance: in words, that of the normalised surface distances.
        doubts: what speaks against the scores, in words, for the report.
        overlays: number of pictures: the largest slice of so many cases, evenly from the worst to the best.
        worst: the slice with most wrong pixels of so many of the worst cases.
    """
    split = record.split
    artifact_uri = runs.client(tracking_uri).get_run(run_id).info.artifact_uri

    def keep(name: str, data: bytes) -> str:
        path = f"{split}/{name}"
        runs.log_bytes(tracking_uri, run_id, path, data)
        return storage.join(artifact_uri, path)

    table = record.table()
    columns = dict(zip(record.labels.names, record.columns(table), strict=True))
    keep(cases.PARQUET, cases.to_parquet(table))
    keep(_GROUPS, _groups_table(findings))
    if record.rejects:
        keep(_REJECTS, _rejects_table(record.rejects))
    charts = _charts(columns, findings)
    risk_chart = _risk_chart(findings.failures)
    for chart in [*charts, *filter(None, [risk_chart])]:
        keep(f"{chart.name}.png", chart.png)

    def drawn(shown: Sequence[dict[str, Any]], slice: str, name: str) -> list[report.Picture]:
        made = []
        for rank, patient in enumerate(shown, start=1):
            caption, png = _picture(patient[slice], patient["dice"], held_out.model_preprocess, record.labels)
            made.append(report.Picture(f"{name}-{rank:02d}", caption, png))
        return made

    ranked = _ranked(record)
    pictures = {
        "overlay": drawn(_spread(ranked, overlays), "largest", "overlay"),
        "worst": drawn(ranked[:worst], "wrongest", "worst"),
    }
    uris = {name: [keep(f"{one.name}.png", one.png) for one in made] for name, made in pictures.items()}
    page = report.Report(
        model=model, doubts=doubts, split=split, patients=record.patients, slices=record.slices,
        rejects=len(record.rejects), tolerance=tolerance, findings=findings, charts=charts, worst=pictures["worst"],
        cases=_worst_first(table), risk_chart=risk_chart,
    )  # fmt: skip
    artifacts = Artifacts(
        cases_table=keep(cases.CSV, cases.to_csv(table)),
        report=keep(_REPORT, report.render(page).encode()),
        overlays=uris["overlay"],
    )
    runs.client(tracking_uri).set_tag(run_id, set_tag(split), record.digest())
    runs.client(tracking_uri).set_tag(run_id, tolerance_tag(split), tolerance)
    runs.log_metrics(tracking_uri, run_id, _metrics(record, findings))
    return artifacts


def add_to_card(
    tracking_uri: str,
    version: ModelVersion,
    held_out: PreparedSet,
    record: Record,
    findings: Findings,
    *,
    tolerance: str,
) -> None:
    """Writes the card of the model anew, with these scores of the split; arguments as `publish` has them."""
    card.add_evaluation(tracking_uri, version, evaluation(record, held_out, findings, tolerance))


def set_tag(split: str) -> str:
    """Name of the run's tag with the digest of the rows, labels and masks that its scores are of, see `Record`."""
    return f"rayseg.{split}_set"


def tolerance_tag(split: str) -> str:
    """Name of the run's tag with the tolerance of its normalised surface distances."""
    return f"rayseg.{split}_tolerance"


def _metrics(record: Record, findings: Findings) -> dict[str, float]:
    """By their names in MLflow: `SPLIT/NAME`, `SPLIT/NAME_low`, `SPLIT/NAME_high`, and of a class `.../CLASS`."""
    told: dict[str, float] = {}
    parts = [("", findings.together)]
    if len(findings.classes) > 1:
        parts += [(f"/{name}", of_class) for name, of_class in findings.classes.items()]
    for suffix, estimates in parts:
        for name, one in estimates.items():
            ends = {"": one.value, "_low": one.low, "_high": one.high}
            told |= {f"{name}{end}{suffix}": value for end, value in ends.items() if value is not None}
    told |= {"slices": record.slices, "rejected": len(record.rejects), "cases": record.patients}
    if findings.background_dice is not None:
        told["background_dice"] = findings.background_dice
    failures = findings.failures
    for flag, detector in failures.detectors.items():
        for name, estimate in ((f"aurc_{flag}", detector.aurc), (f"eaurc_{flag}", detector.excess)):
            ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
            told |= {f"{name}{end}": value for end, value in ends.items() if value is not None}
    if failures.at_random is not None and failures.optimum is not None:
        told |= {"aurc_at_random": failures.at_random, "aurc_optimum": failures.optimum}
    for label, of in failures.covered.items():
        suffix = f"/{label}" if len(failures.covered) > 1 else ""
        told |= {f"volume_covered{suffix}": of.covered, f"volume_covered_of{suffix}": of.patients}
    return {f"{record.split}/{name}": value for name, value in told.items()}


def _charts(columns: Mapping[str, Columns], findings: Findings) -> list[report.Picture]:
    """Bland and Altman's picture of volumes, where any are known, and how far probabilities can be believed."""
    charts = []
    for name, of_class in columns.items():
        estimates = findings.classes[name]
        unit = "ml" if "volume_bias_ml" in estimates else "px"
        if f"volume_bias_{unit}" not in estimates:
            continue
        truth = of_class["truth_ml"] if unit == "ml" else of_class["tp"] + of_class["fn"]
        difference = of_class[f"volume_difference_{unit}"]
        lines = [
            one.value
            for key in ("volume_lower_limit", "volume_bias", "volume_upper_limit")
            if (one := estimates.get(f"{key}_{unit}")) is not None
        ]
        suffix = f"-{name}" if len(columns) > 1 else ""
        told = {"ml": "mL", "px": "pixels"}[unit]
        png = figures.agreement(truth + difference / 2, difference, lines, told)
        of = f"{estimates['volume_cases'].value} of {len(difference)} patients"
        charts.append(report.Picture(f"bland-altman{suffix}", f"Volumes, predicted minus true: {name}, {of}", png))
    sums = {name: of_class["reliability"].sum(axis=0, dtype=np.float64) for name, of_class in columns.items()}
    charts.append(report.Picture("reliability", "How far probabilities can be believed", figures.reliability(sums)))
    return charts


def _risk_chart(failures: Failures) -> report.Picture | None:
    """None where there is nothing to draw: no patients, or no failures."""
    if not failures.detectors or not failures.at_random:
        return None
    curves = {str(flag): one.risks for flag, one in failures.detectors.items()}
    png = figures.risk_coverage(curves, failures.oracle, failures.at_random)
    return report.Picture("risk-coverage", f"Risk of the least suspect patients: {failures.patients} patients", png)


def _ranked(record: Record) -> list[dict[str, Any]]:
    """The patients with anything to show, worst Dice of all classes together first, then most wrong pixels."""
    ranked = []
    for key, patient in sorted(record.of_patient.items()):
        case = sum((Counts(*(of[name] for name in ("tp", "fp", "fn", "tn"))) for of in patient["cases"]), Counts())
        if case.dice is not None:
            ranked.append((case.dice, -case.fp - case.fn, key, {**patient, "dice": case.dice}))
    return [patient for *_, patient in sorted(ranked, key=lambda one: one[:3])]


def _spread(ranked: list[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
    """`wanted` of them at even steps from the worst to the best."""
    if len(ranked) <= wanted:
        return ranked
    return [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, wanted)]


def _picture(
    row: dict[str, Any], dice: float, preprocess: Preprocess | VolumePreprocess, labels: Labels
) -> tuple[str, bytes]:
    """Caption and PNG of a row as `scorer.SCORED` has it; `dice` is the case's."""
    slice = read_slice(storage.read(row["uri"]), row["frame"], sees_color(preprocess))
    assert not isinstance(slice, Reject), "was read a moment ago"
    rows, columns = slice.shape
    classes = read_truth(row, slice, labels)
    assert not isinstance(classes, Reject), "was read a moment ago"
    grey_HW = grey(preprocess, slice)
    prediction = np.frombuffer(zlib.decompress(row["prediction"]), np.uint8).reshape(rows, columns)
    of_slice = Counts(row["tp"], row["fp"], row["fn"], row["tn"]).dice
    caption = f"case {row['patient_key'][:10]} · Dice {dice:.2f} · of this slice {of_slice:.2f}"
    return caption, figures.overlay(grey_HW, classes, prediction, caption)


def _worst_first(table: pa.Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(cases.to_csv(table).decode())))


def _groups_table(findings: Findings) -> bytes:
    """CSV: a line for each group and metric."""
    return _csv(
        ("class", "by", "group", "patients", "metric", "value", "low", "high"),
        [
            (group.name, group.by, group.group, group.patients, metric, *(_six(one) for one in _ends(estimate)))
            for group in findings.groups
            for metric, estimate in group.metrics.items()
        ],
    )


def _rejects_table(rejects: Sequence[Mapping[str, Any]]) -> bytes:
    """CSV without the URIs: a path can name a patient, and who may see the run need not know them."""
    names = "row_id", "patient_key", "reason", "detail"
    return _csv(names, [[row[name] for name in names] for row in sorted(rejects, key=lambda row: str(row["row_id"]))])


def _csv(names: Sequence[str], lines: Sequence[Sequence[Any]]) -> bytes:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([names, *lines])
    return table.getvalue().encode()


def _ends(one: Estimate) -> card.Ends:
    return one.value, one.low, one.high


def _six(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def evaluation(record: Record, held_out: PreparedSet, findings: Findings, tolerance: str) -> card.Evaluation:
    """What the card tells of these scores; arguments as `publish` has them."""
    return card.Evaluation(
        split=record.split,
        digest=held_out.digest[:16],
        patients=record.patients,
        slices=record.slices,
        rejected=len(record.rejects),
        tolerance=tolerance,
        metrics={name: _ends(one) for name, one in findings.together.items()},
        classes={name: {key: _ends(one) for key, one in of.items()} for name, of in findings.classes.items()},
        failures=card.Failures(
            {str(flag): _ends(one.aurc) for flag, one in findings.failures.detectors.items()},
            findings.failures.at_random,
            findings.failures.optimum,
            {name: (of.covered, of.patients) for name, of in findings.failures.covered.items()},
        ),
        groups=[
            card.Group(
                group.name,
                group.by,
                group.group,
                group.patients,
                {key: _ends(one) for key, one in group.metrics.items()},
            )
            for group in findings.groups
        ],
    )
