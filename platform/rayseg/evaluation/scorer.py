"""One patient at a time: its slices read again, segmented and compared with the truth. Knows no Ray."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg.data import conformal
from rayseg.data.labels import Labels
from rayseg.data.range import Range
from rayseg.evaluation.calibration import Probabilities
from rayseg.evaluation.cases import CASES, Case, Image, Tolerance, images, slice_distance_mm
from rayseg.evaluation.scores import Counts, counts
from rayseg.geometry.grid import Geometry
from rayseg.inference import quality
from rayseg.inference.heldout import COLUMNS, HeldOut, Judged
from rayseg.inference.predictor import AnyPredictor
from rayseg.records import PREPARED, QualityFlag, Reject

_REJECT = pa.struct([(name, pa.string()) for name in ("row_id", "patient_key", "reason", "detail")])
# A slice to make a picture of: `tp` to `tn` of all its classes together, `prediction` its label map (uint8, rows x
# columns, zlib).
_SHOWN = pa.struct(
    [
        *(PREPARED.field(name) for name in COLUMNS),
        *((name, pa.int64()) for name in ("tp", "fp", "fn", "tn")),
        ("prediction", pa.binary()),
    ]
)
# A patient.
SCORED = pa.schema(
    [
        ("patient_key", pa.string()),
        ("cases", pa.list_(pa.struct(list(CASES)))),  # of each class; none where all slices were rejected
        # Of each class, the arrays of `calibration.Probabilities`.
        ("negative", pa.list_(pa.binary())),
        ("positive", pa.list_(pa.binary())),
        ("reliability", pa.list_(pa.binary())),
        ("row_ids", pa.list_(pa.string())),  # of the slices that were scored
        ("truths", pa.list_(pa.string())),  # of each of these, `digest_of` its true classes
        ("rejects", pa.list_(_REJECT)),
        # The slices with most to find and with most wrong pixels; null where nothing is to find and nothing was found.
        ("largest", _SHOWN),
        ("wrongest", _SHOWN),
    ]
)


class Scorer:
    """Scores patients with one model. What it holds at a time are the label maps of one series that has positions."""

    def __init__(self, predictor: AnyPredictor, labels: Labels, tolerance: Tolerance) -> None:
        self._labels, self._tolerance, self._range = labels, tolerance, predictor.known.range
        self._held_out = HeldOut(predictor, labels)

    def score(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A row of `SCORED`, of all rows of a patient; those of a series stand together."""
        return _Patient(self._labels, self._tolerance, self._range).finished(rows, self._held_out.judged(rows))


class _Patient:
    def __init__(self, labels: Labels, tolerance: Tolerance, known: Range | None) -> None:
        self._labels, self._known = labels, known
        self._looks: list[quality.Look] = []
        self._cases = [Case(tolerance) for _ in labels.names]
        self._images = 0
        self._row_ids: list[str] = []
        self._truths: list[str] = []
        self._rejects: list[dict[str, Any]] = []
        self._shown: dict[str, tuple[tuple[int, int, str], dict[str, Any]]] = {}  # by the names in SCORED
        self._modalities: Counter[str] = Counter()
        self._scanners: Counter[str] = Counter()
        self._spacings_mm: list[float] = []
        self._distances_mm: list[float] = []

    def finished(self, rows: Sequence[dict[str, Any]], judged: Iterable[Judged | Reject]) -> dict[str, Any]:
        """A row of `SCORED`; `judged` is what became of each row."""
        for _, series in groupby(zip(rows, judged, strict=True), key=lambda one: one[0]["series_key"]):
            placed = []
            for prediction, true, place in self._slices(series):
                if place is None or place.image_position_mm is None:  # of no volume: nothing to wait for
                    self._add_series(images([prediction], [true], [place]))
                else:
                    placed.append((prediction, true, place))
            if placed:
                self._add_series(images(*zip(*placed, strict=True)))
        patient_key = rows[0]["patient_key"]
        subgroups = {
            "modality": _most(self._modalities),
            "scanner": _most(self._scanners),
            "pixel_spacing_mm": _mean(self._spacings_mm),
            "slice_distance_mm": _mean(self._distances_mm),
        }
        foreground_ml = [conformal.total_ml(of) for of in zip(*(case.volumes_ml for case in self._cases), strict=True)]
        of_patient = {
            "foreground_error_mm": conformal.farthest_mm(foreground_ml),
            **{f"suspicion_{flag}": number for flag, number in self._suspicion(foreground_ml).items()},
        }
        slices = {"patient_key": patient_key, "slices": len(self._row_ids), "images": self._images}
        named = zip(self._labels.names, self._cases, strict=True) if self._row_ids else ()
        sums = [case.probabilities for case in self._cases]
        return {
            "patient_key": patient_key,
            "cases": [{**slices, "class": name, **case.row(), **subgroups, **of_patient} for name, case in named],
            "negative": [one.negative.tobytes() for one in sums],
            "positive": [one.positive.tobytes() for one in sums],
            "reliability": [one.reliability.tobytes() for one in sums],
            "row_ids": self._row_ids,
            "truths": self._truths,
            "rejects": self._rejects,
            **{name: self._shown.get(name, (None, None))[1] for name in ("largest", "wrongest")},
        }

    def _suspicion(self, volumes_ml: Sequence[tuple[float | None, float | None]]) -> dict[QualityFlag, float]:
        """Of all slices as one series; the volume is the greatest of a series."""
        known_ml = [predicted for predicted, _ in volumes_ml if predicted is not None]
        return quality.suspicion(self._known, self._looks, max(known_ml, default=None)) if self._looks else {}

    def _slices(
        self, series: Iterable[tuple[dict[str, Any], Judged | Reject]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Geometry | None]]:
        """Prediction, truth and place of each slice; its probabilities are added up and gone."""
        for row, found in series:
            if isinstance(found, Reject):
                told = {"reason": found.reason.value, "detail": found.detail}
                self._rejects.append({"row_id": row["row_id"], "patient_key": row["patient_key"], **told})
                continue
            self._row_ids.append(row["row_id"])
            self._truths.append(digest_of(found.truth))
            self._looks.append(found.look)
            several = len(found.probabilities) > 1
            for index, case in enumerate(self._cases, start=1):
                probability = found.probabilities[index if several else 0]
                case.probabilities += Probabilities.of(probability, found.truth == index)
            self._show(row, found)
            self._place(found)
            yield found.prediction, found.truth, found.place

    def _show(self, row: dict[str, Any], found: Judged) -> None:
        """Keeps the slices to make pictures of; between equals the id decides, so that any order of rows ends alike."""
        classes = range(1, len(self._cases) + 1)
        together = sum((counts(found.prediction == index, found.truth == index) for index in classes), Counts())
        true, wrong = together.tp + together.fn, together.fp + together.fn
        if not true + wrong:
            return
        for name, size in (
            ("largest", (true, together.fp, row["row_id"])),
            ("wrongest", (wrong, true, row["row_id"])),
        ):
            if name not in self._shown or size > self._shown[name][0]:
                prediction = zlib.compress(found.prediction.tobytes(), 1)
                self._shown[name] = size, {**row, **vars(together), "prediction": prediction}

    def _place(self, found: Judged) -> None:
        if found.slice.header is not None:
            self._modalities[found.slice.header.modality] += 1
            self._scanners[found.slice.header.scanner] += 1
        if found.place is not None and found.place.pixel_spacing_mm is not None:
            self._spacings_mm.append(float(np.mean(found.place.pixel_spacing_mm)))

    def _add_series(self, made: Sequence[Image]) -> None:
        self._images += len(made)
        for index, case in enumerate(self._cases, start=1):
            case.add_series(made, index)
        self._distances_mm += [distance for image in made if (distance := slice_distance_mm(image.grid)) is not None]


def digest_of(classes: np.ndarray) -> str:
    """32 hexadecimal digits of true classes, uint8 (rows, columns): others where a pixel or the size is another."""
    return hashlib.blake2b(classes.tobytes(), digest_size=16, person=repr(classes.shape).encode()[:16]).hexdigest()


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _most(counted: Counter[str]) -> str | None:
    """What most slices have; None where that is nothing."""
    return counted.most_common(1)[0][0] or None if counted else None
