"""What an evaluation keeps of the patients while they come in, and what they come to together."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import config
from rayseg.data.conformal import VolumeErrors
from rayseg.data.labels import Labels
from rayseg.data.range import Known, Range
from rayseg.evaluation import cases, metrics, subgroups
from rayseg.evaluation.calibration import BINS
from rayseg.evaluation.failures import Failures, failures, known_of
from rayseg.evaluation.metrics import Estimate

_KEPT = ("cases", "largest", "wrongest")
PROBABILITIES = ("negative", "positive", "reliability")


@dataclass(frozen=True)
class Findings:
    """What the cases come to."""

    together: dict[str, Estimate]  # over all classes
    classes: dict[str, dict[str, Estimate]]
    background_dice: float | None
    groups: list[subgroups.Group]
    failures: Failures = field(default_factory=Failures)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of the metrics over all classes that have one."""
        return {
            name: (one.low, one.high)
            for name, one in self.together.items()
            if one.low is not None and one.high is not None
        }


class Record:
    """The scores of one model on one split, by patient; rows may come in any order."""

    def __init__(self, split: str, labels: Labels) -> None:
        self.split = split
        self.labels = labels
        self.rejects: list[dict[str, Any]] = []
        self._row_ids: list[str] = []
        self._truths: list[str] = []  # of the same slices
        self.of_patient: dict[str, dict[str, Any]] = {}  # some of SCORED, and arrays of each class

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row of `scorer.SCORED`."""
        self.rejects += row["rejects"]
        self._row_ids += row["row_ids"]
        self._truths += row["truths"]
        if row["cases"]:
            assert row["patient_key"] not in self.of_patient, "a patient is scored as one"
            sums: dict[str, list[np.ndarray]] = {
                "negative": [np.frombuffer(one, np.int64) for one in row["negative"]],
                "positive": [np.frombuffer(one, np.int64) for one in row["positive"]],
                "reliability": [np.frombuffer(one, np.float64).reshape(BINS, 3) for one in row["reliability"]],
            }
            # Half the memory; rounds numbers from 2^24 on in the seventh digit.
            kept = {name: [one.astype(np.float32) for one in of_class] for name, of_class in sums.items()}
            self.of_patient[row["patient_key"]] = {name: row[name] for name in _KEPT} | kept

    @property
    def slices(self) -> int:
        """How many were scored."""
        return len(self._row_ids)

    @property
    def patients(self) -> int:
        """How many have a slice that was scored."""
        return len(self.of_patient)

    def table(self) -> pa.Table:
        """The cases, of the schema `cases.CASES`."""
        rows = [row for _, patient in sorted(self.of_patient.items()) for row in patient["cases"]]
        return pa.Table.from_pylist(rows, schema=cases.CASES)

    def findings(
        self,
        *,
        resamples: int,
        min_patients: int,
        errors: VolumeErrors = VolumeErrors(),  # noqa: B008, it is frozen
    ) -> Findings:
        """All metrics with their intervals; see `metrics`, `subgroups` and `failures`.

        `errors` are what the model's bundle says of its volumes.
        """
        table, names = self.table(), self.labels.names
        classes = self.columns(table)
        options: dict[str, int] = {"resamples": resamples, "min_patients": min_patients}
        together = metrics.estimates(classes, **options)
        single = {name: metrics.estimates([of], **options) for name, of in zip(names, classes, strict=True)}
        return Findings(
            together,
            single if len(names) > 1 else {names[0]: together},
            metrics.background_dice(classes),
            subgroups.groups(table, names, **options),
            failures(table, dict(zip(names, classes, strict=True)), errors, **options),
        )

    def known(self, trained: Range | None, *, volumes: bool) -> Known:
        """What the models are to be judged by, if this is of validation: see `failures.known_of`."""
        table = self.table()
        classes = {name: metrics.columns_of(table, name) for name in self.labels.names}
        return known_of(table, classes, trained, volumes=volumes)

    def columns(self, table: pa.Table) -> list[metrics.Columns]:
        """Of each class `metrics.columns_of`, and beside them the sums by probability."""
        patients = [patient for _, patient in sorted(self.of_patient.items())]
        return [
            {
                **metrics.columns_of(table, name),
                **{key: np.stack([patient[key][index] for patient in patients]) for key in PROBABILITIES},
            }
            for index, name in enumerate(self.labels.names)
        ]

    def digest(self) -> str:
        """Of the rows that were scored and their labels, a dash, and of their true classes.

        Equal digests, equal sets; where only the second part differs, masks have changed.
        """
        rows = config.digest({"rows": sorted(self._row_ids), "labels": config.plain(self.labels)})
        return f"{rows}-{config.digest(sorted(zip(self._row_ids, self._truths, strict=True)))}"
