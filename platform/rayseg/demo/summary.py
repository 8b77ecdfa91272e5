"""What the demo's results say: the page of a finished run."""

import csv
import dataclasses
import datetime
import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rayseg import storage
from rayseg.data.catalog import CatalogResult
from rayseg.data.prepare import PrepareResult
from rayseg.data.preprocess import Preprocess
from rayseg.demo import gallery
from rayseg.demo.online import Answers
from rayseg.demo.report import Headline, Picture, Report, Request
from rayseg.evaluation.evaluate import EvaluateResult
from rayseg.evaluation.promote import PromoteResult
from rayseg.inference.archive import SegmentResult
from rayseg.training.trainer import TrainResult

COMMANDS = (
    ("make mlflow", "the MLflow UI: runs, curves, models"),
    ("make serve", "the service and its page"),
    ("make test", "every test"),
)


@dataclasses.dataclass(frozen=True)
class Results:
    """What each stage gave."""

    data: str  # in words: what was trained on, and what was segmented
    archive: str
    cataloged: CatalogResult
    prepared: PrepareResult
    trained: TrainResult
    evaluated: EvaluateResult
    promoted: PromoteResult
    segmented: SegmentResult
    series: list[dict[str, Any]]  # rows of the ledger
    answers: Answers
    url: str


def page(results: Results, stages: Mapping[str, float], preprocess: Preprocess, archive_manifest: str) -> Report:
    """The report of the results, but for the configuration.

    Args:
        results: of the stages.
        stages: seconds by name.
        preprocess: gives the pictures the grey values that the network sees.
        archive_manifest: URI of the manifest of what was segmented.
    """
    prepared, trained, evaluated = results.prepared, results.trained, results.evaluated
    rows = f"{prepared.train} rows to train, {prepared.val} to validate, {prepared.test} to test"
    reasons = Counter(results.cataloged.reasons) + Counter(prepared.reasons) + Counter(evaluated.reasons)
    with io.StringIO(storage.read(evaluated.cases_table).decode()) as table:
        cases = list(csv.DictReader(table))
    return Report(
        title="From DICOM in a bucket to a served model",
        data=f"Trained on {results.data} ({rows}, split by patient); segmented {results.archive}.",
        finished=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=sum(stages.values()),
        stages=stages,
        headlines=_headlines(results),
        history=trained.history,
        untrained_dice=trained.untrained_val_dice,
        overlays=[Picture(storage.read(uri), "a held-out patient's largest lesion") for uri in evaluated.overlays],
        cases=cases,
        series=results.series,
        rejects=dict(reasons + Counter(results.segmented.reasons)),
        gallery=gallery.pictures(archive_manifest, results.series, preprocess),
        request=_request(results),
        commands=COMMANDS,
    )


def _headlines(results: Results) -> list[Headline]:
    trained, evaluated, segmented, answers = results.trained, results.evaluated, results.segmented, results.answers
    return [
        Headline(_two(trained.val_dice), "Dice, validation", f"untrained {_two(trained.untrained_val_dice)}"),
        Headline(
            _two(evaluated.dice_pooled),
            "Dice, held-out patients",
            f"{evaluated.cases} patients, {evaluated.slices} slices; all background {_two(evaluated.background_dice)}",
        ),
        Headline(str(trained.train_workers), "Ray Train workers", f"{trained.rows} slices, {trained.epochs} epochs"),
        Headline(
            str(segmented.segmented),
            "series to DICOM SEG",
            f"{segmented.slices} slices, {segmented.rejected_slices} objects rejected",
        ),
        Headline(
            "equal" if answers.online_equals_bulk else "differ",
            "masks online and in bulk",
            f"{answers.slices} slices over HTTP, byte for byte",
        ),
        Headline(trained.model_uri.removeprefix("models:/"), "registered model", results.promoted.reason),
    ]


def _request(results: Results) -> Request:
    answers = results.answers
    outcome = "equal to" if answers.online_equals_bulk else "NOT equal to"
    return Request(
        curl=(
            "curl --data-binary @slice.dcm -H 'Content-Type: application/dicom' -H 'Accept: application/json' "
            f"{results.url}/v1/segment"
        ),
        status=answers.http_status,
        answer=answers.answer,
        note=f"The masks of all {answers.slices} slices of the series, asked for as PNG, are {outcome} those in the "
        "DICOM SEG of the bulk run, byte for byte.",
    )


def _two(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
