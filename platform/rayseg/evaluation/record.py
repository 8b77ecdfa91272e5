"""What an evaluation keeps: sums by case while rows come in, then metrics, a table and pictures in the model's run."""

import csv
import dataclasses
import io
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayseg import config, storage
from rayseg.data.labels import Labels
from rayseg.data.masks import truth
from rayseg.data.preprocess import Preprocess
from rayseg.dicom.reading import Slice, read_slice
from rayseg.evaluation import scores
from rayseg.evaluation.scores import Counts, Scores
from rayseg.records import Reject
from rayseg.tracking import figures, runs


@dataclass(frozen=True)
class Artifacts:
    """URIs of what `Record.log` put into the run."""

    cases_table: str
    overlays: list[str]


class Record:
    """The scores of one model on one split, by patient; rows may come in any order."""

    def __init__(self, split: str, labels: Labels) -> None:
        self.split = split
        self.labels = labels
        self.cases: dict[str, list[Counts]] = {}  # by patient: of each class
        self.slices: Counter[str] = Counter()
        self.rejects: list[dict[str, Any]] = []
        self._row_ids: list[str] = []
        self._largest: dict[str, dict[str, Any]] = {}  # by patient: the row with most to find, kept for its picture

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row of `evaluate.SCORED`: a slice with its counts, or with the reason why it has none."""
        if row["reason"] is not None:
            self.rejects.append(row)
            return
        patient = row["patient_key"]
        found = _counts(row)
        before = self.cases.get(patient, [Counts()] * len(found))
        self.cases[patient] = [one + more for one, more in zip(before, found, strict=True)]
        self.slices[patient] += 1
        self._row_ids.append(row["row_id"])
        if row["prediction"] is not None:
            best = self._largest.get(patient)
            if best is None or _size(row) > _size(best):
                self._largest[patient] = row

    def scores(self) -> dict[str, Scores]:
        """The scores of each class, by its name."""
        return {
            name: scores.scores(case[index] for case in self.cases.values())
            for index, name in enumerate(self.labels.names)
        }

    def log(self, tracking_uri: str, run_id: str, preprocess: Preprocess, overlays: int) -> Artifacts:
        """Writes metrics `SPLIT/...`, the tag of the set and, as files, tables and pictures to the run.

        Args:
            tracking_uri: of MLflow.
            run_id: the run that trained the model.
            preprocess: gives the pictures the grey values that the network sees.
            overlays: number of pictures: the largest slice of so many cases, evenly from the worst to the best.
        """
        artifact_uri = runs.client(tracking_uri).get_run(run_id).info.artifact_uri

        def keep(name: str, data: bytes) -> str:
            path = f"{self.split}/{name}"
            runs.log_bytes(tracking_uri, run_id, path, data)
            return storage.join(artifact_uri, path)

        shown = _spread(list(self._largest.values()), overlays)
        artifacts = Artifacts(
            cases_table=keep("cases.csv", self._table()),
            overlays=[
                keep(f"overlay-{rank:02d}.png", _picture(row, preprocess, self.labels))
                for rank, row in enumerate(shown, start=1)
            ],
        )
        if self.rejects:
            keep("rejects.csv", self._rejects_table())
        digest = config.digest({"rows": sorted(self._row_ids), "labels": config.plain(self.labels)})
        runs.client(tracking_uri).set_tag(run_id, set_tag(self.split), digest)
        runs.log_metrics(tracking_uri, run_id, self._metrics())
        return artifacts

    def _metrics(self) -> dict[str, float]:
        by_class = self.scores()
        values = dataclasses.asdict(scores.over_classes(list(by_class.values())))
        if len(by_class) > 1:
            for name, of_class in by_class.items():
                values |= {f"{key}/{name}": value for key, value in dataclasses.asdict(of_class).items()}
        values |= {"slices": sum(self.slices.values()), "rejected": len(self.rejects)}
        return {f"{self.split}/{name}": value for name, value in values.items() if value is not None}

    def _table(self) -> bytes:
        """CSV of the cases, a line a class, worst first, those without a Dice last."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(
            ["patient_key", "class", "slices", "tp", "fp", "fn", "tn", "dice", "iou", "precision", "recall", "accuracy"]
        )
        lines = [
            (patient, name, case)
            for patient, of_patient in self.cases.items()
            for name, case in zip(self.labels.names, of_patient, strict=True)
        ]
        for patient, name, case in sorted(lines, key=lambda line: (line[2].dice is None, line[2].dice, *line[:2])):
            told = (case.dice, case.iou, case.precision, case.recall, case.accuracy)
            cells = ["" if score is None else f"{score:.6f}" for score in told]
            writer.writerow([patient, name, self.slices[patient], case.tp, case.fp, case.fn, case.tn, *cells])
        return table.getvalue().encode()

    def _rejects_table(self) -> bytes:
        """CSV without the URIs: a path can name a patient, and who may see the run need not know them."""
        table = io.StringIO()
        writer = csv.DictWriter(
            table, ["row_id", "patient_key", "reason", "detail"], extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(sorted(self.rejects, key=lambda row: str(row["row_id"])))
        return table.getvalue().encode()


def set_tag(split: str) -> str:
    """Name of the run's tag with the digest of the rows and labels that its scores are of: equal tags, equal sets."""
    return f"rayseg.{split}_set"


def read_truth(row: Mapping[str, Any], slice: Slice, labels: Labels) -> np.ndarray | Reject:
    """The true classes of a slice, uint8 (rows, columns), by `masks` and `frame` of its prepared row.

    Raises:
        OSError: a mask cannot be read.
    """
    masks = [(storage.read(mask["uri"]), mask["label"]) for mask in row["masks"]]
    return truth(masks, slice.shape, labels, slice.header, row["frame"], slice.geometry)


def _counts(row: dict[str, Any]) -> list[Counts]:
    """Of each class."""
    return [Counts(*of_class) for of_class in zip(row["tp"], row["fp"], row["fn"], row["tn"], strict=True)]


def _together(row: dict[str, Any]) -> Counts:
    """Of all classes: what a picture is chosen and titled by."""
    return sum(_counts(row), Counts())


def _size(row: dict[str, Any]) -> tuple[int, int, str]:
    """Most truth first, then most false alarm; the id decides between equals, so that any order of rows ends alike."""
    found = _together(row)
    return found.tp + found.fn, found.fp, row["row_id"]


def _spread(rows: list[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
    """`wanted` rows at even steps from the worst Dice to the best."""
    ordered = sorted(rows, key=lambda row: (_together(row).dice, row["row_id"]))
    if len(ordered) <= wanted:
        return ordered
    return [ordered[round(place)] for place in np.linspace(0, len(ordered) - 1, wanted)]


def _picture(row: dict[str, Any], preprocess: Preprocess, labels: Labels) -> bytes:
    slice = read_slice(storage.read(row["uri"]), row["frame"], preprocess.color)
    assert not isinstance(slice, Reject), "was read a moment ago"
    rows, columns = slice.shape
    classes = read_truth(row, slice, labels)
    assert not isinstance(classes, Reject), "was read a moment ago"
    # The same grey values that the network sees, on the slice's own grid.
    grey_HW = dataclasses.replace(preprocess, size=(rows, columns), neighbours=0).apply(slice)[..., 0]
    prediction = np.frombuffer(zlib.decompress(row["prediction"]), np.uint8).reshape(rows, columns)
    dice = _together(row).dice
    assert dice is not None, "only rows with foreground are shown"
    return figures.overlay(grey_HW, classes, prediction, f"case {row['patient_key'][:10]} · Dice {dice:.2f}")
