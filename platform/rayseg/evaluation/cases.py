"""The table of cases: what is known of each patient and class after an evaluation. numpy, scipy and pyarrow only.

A case is a patient. Slices of one series that have positions make one image, a volume; any other slice is an image by
itself, a plane. Counts, lesions and volumes of a patient's images add up. Distances between surfaces are measured in
each image, and a case's value is the mean over its images that have one.
"""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from rayseg.data import conformal
from rayseg.evaluation.calibration import Probabilities
from rayseg.evaluation.lesions import Lesions, lesions
from rayseg.evaluation.scores import Counts, counts
from rayseg.evaluation.surfaces import Grid, distances, together
from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.geometry.volume import volume_ml, voxels_mm3
from rayseg.records import QualityFlag

SUSPICION = "suspicion_"
_WITHOUT_NUMBER = (QualityFlag.MODALITY, QualityFlag.BODY_PART)
PARQUET, CSV = "cases.parquet", "cases.csv"  # below the split's folder in the model's run

# A row for each patient and class, in order of both; null is undefined or not known. docs/reference/metrics.md defines
# the metrics.
CASES = pa.schema(
    [
        ("patient_key", pa.string()),  # pseudonym of the patient
        ("class", pa.string()),  # name of the class
        ("slices", pa.int64()),  # slices of the patient
        ("images", pa.int64()),  # volumes and planes that these slices make
        ("tp", pa.int64()),  # true positive pixels, of all slices
        ("fp", pa.int64()),  # false positive pixels
        ("fn", pa.int64()),  # false negative pixels
        ("tn", pa.int64()),  # true negative pixels
        ("dice", pa.float64()),  # of these counts
        ("dice_per_image", pa.float64()),  # the mean over the images with any mask
        ("images_scored", pa.int64()),  # how many these are
        ("iou", pa.float64()),  # IoU of these counts
        ("precision", pa.float64()),  # TP / (TP + FP)
        ("recall", pa.float64()),  # TP / (TP + FN)
        ("accuracy", pa.float64()),  # (TP + TN) / pixels
        ("average_precision", pa.float64()),  # of the probabilities of all pixels
        ("brier", pa.float64()),  # Brier score of the probabilities
        ("ece", pa.float64()),  # expected calibration error
        ("hd95_mm", pa.float64()),  # of images whose spacing is known: the mean over those with both masks
        ("assd_mm", pa.float64()),  # the same of the average distance
        ("nsd_mm", pa.float64()),  # at the tolerance; the mean over those with any mask, 0 where the other is empty
        ("hd95_px", pa.float64()),  # of images whose spacing is not known, in pixels
        ("assd_px", pa.float64()),  # the same of the average distance
        ("nsd_px", pa.float64()),  # share of the surface within the tolerance in pixels
        ("lesions_true", pa.int64()),  # lesions of the truth
        ("lesions_found", pa.int64()),  # of the true ones
        ("lesions_predicted", pa.int64()),  # lesions of the prediction
        ("lesions_false", pa.int64()),  # of the predicted ones
        ("lesion_f1", pa.float64()),  # F1 of lesions
        ("truth_ml", pa.float64()),  # volumes; null where a slice has no place, or one alone no thickness
        ("predicted_ml", pa.float64()),  # predicted volume, likewise
        # Of the series that is farthest off, see `data.conformal`; null where a volume is not known.
        ("volume_error_mm", pa.float64()),
        ("foreground_error_mm", pa.float64()),  # of all classes together
        ("modality", pa.string()),  # what subgroups go by: of most of the patient's slices; null for image files
        ("scanner", pa.string()),  # its maker and model, likewise
        ("pixel_spacing_mm", pa.float64()),  # the mean of that between rows and that between columns, over the slices
        ("slice_distance_mm", pa.float64()),  # the median within volumes; null without any
        # What the patient's slices have of each flag with a number, see `quality.suspicion`; null where not known.
        *((f"{SUSPICION}{flag}", pa.float64()) for flag in QualityFlag if flag not in _WITHOUT_NUMBER),
    ]
)


@dataclass(frozen=True)
class Tolerance:
    """How far surfaces may lie apart and still agree, in images with and without a known spacing."""

    mm: float = 2.0  # millimetres, where the spacing is known
    px: float = 2.0  # pixels, elsewhere

    def __str__(self) -> str:
        return f"{self.mm:g} mm, {self.px:g} px"


@dataclass(frozen=True, eq=False)
class Image:
    """The label maps of one volume or plane: uint8 (slices, rows, columns), the slices in order."""

    prediction: np.ndarray
    truth: np.ndarray
    places: Sequence[Geometry | None]  # of the slices
    grid: Grid


def images(
    predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray], places: Sequence[Geometry | None]
) -> list[Image]:
    """The images that the slices of one series make: one volume where all have a place in it, else planes.

    Args:
        predictions: label maps (rows, columns).
        truths: the same.
        places: of the slices; None where nothing is known.
    """
    volume = _volume(places)
    if volume is None:
        return [
            Image(prediction[np.newaxis], truth[np.newaxis], [place], _plane(place))
            for prediction, truth, place in zip(predictions, truths, places, strict=True)
        ]
    order, grid = volume
    prediction, truth = (np.stack([masks[index] for index in order]) for masks in (predictions, truths))
    return [Image(prediction, truth, [places[index] for index in order], grid)]


def _volume(places: Sequence[Geometry | None]) -> tuple[np.ndarray, Grid] | None:
    """The order of the slices along their normal and their grid; None where they are no volume."""
    known = [place for place in places if place is not None and place.pixel_spacing_mm and place.image_orientation]
    if len(known) < max(2, len(places)) or len({(place.rows, place.columns) for place in known}) > 1:
        return None
    spacings = np.array([place.pixel_spacing_mm for place in known])
    if np.ptp(spacings, axis=0).max() > planes.SAME_SPACING * spacings.min() or voxels_mm3(known) is None:
        return None  # of other sizes, without positions, not parallel, or several at one place
    origins = np.array([place.image_position_mm for place in known], np.float64)
    orientation = np.array(known[0].image_orientation)
    order, _ = planes.in_order(origins, orientation)
    right, down = orientation.reshape(2, 3)
    return order, Grid(origins[order], down * spacings[0, 0], right * spacings[0, 1], "mm")


def _plane(place: Geometry | None) -> Grid:
    spacing = None if place is None else place.pixel_spacing_mm
    row, column = spacing or (1.0, 1.0)
    down, right = np.array([row, 0.0, 0.0]), np.array([0.0, column, 0.0])
    return Grid(np.zeros((1, 3)), down, right, "px" if spacing is None else "mm")


class Case:
    """One patient and one class, while its series come in."""

    def __init__(self, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self.counts, self.lesions, self.probabilities = Counts(), Lesions(), Probabilities.nothing()
        self._surfaces: dict[str, list[float]] = defaultdict(list)
        self._dice_of_images: list[float] = []
        self.volumes_ml: list[tuple[float | None, float | None]] = []  # of each series, predicted and true

    def add_series(self, made: Sequence[Image], index: int) -> None:
        """Adds the class `index` of all images that one series makes; of slices without a place, of each by itself."""
        true: list[int] = []
        predicted: list[int] = []
        for image in made:
            prediction, truth = image.prediction == index, image.truth == index
            of_image = counts(prediction, truth)
            self.counts += of_image
            if of_image.dice is not None:
                self._dice_of_images.append(of_image.dice)
            self._add_surfaces(prediction, truth, image.grid)
            if truth.any() or prediction.any():
                self.lesions += lesions(prediction, truth)
            true += truth.sum(axis=(1, 2)).tolist()
            predicted += prediction.sum(axis=(1, 2)).tolist()
        known = [place for image in made for place in image.places]
        places = [place for place in known if place is not None and place.image_position_mm is not None]
        if len(places) < len(true):
            self.volumes_ml.append((None, None))
        else:
            self.volumes_ml.append((volume_ml(predicted, places), volume_ml(true, places)))

    def _add_surfaces(self, prediction: np.ndarray, truth: np.ndarray, grid: Grid) -> None:
        unit = grid.unit
        between = distances(prediction, truth, grid)
        if between is not None:
            self._surfaces[f"hd95_{unit}"].append(between.hd95)
            self._surfaces[f"assd_{unit}"].append(between.assd)
            self._surfaces[f"nsd_{unit}"].append(between.nsd(getattr(self._tolerance, unit)))
        elif prediction.any() or truth.any():
            self._surfaces[f"nsd_{unit}"].append(0.0)

    def row(self) -> dict[str, Any]:
        """The metrics among the columns of `CASES`."""
        surfaces = [f"{name}_{unit}" for name in ("hd95", "assd", "nsd") for unit in ("mm", "px")]
        predicted_ml, truth_ml = conformal.total_ml(self.volumes_ml) if self.volumes_ml else (None, None)
        return {
            **dataclasses.asdict(self.counts),
            **{name: getattr(self.counts, name) for name in ("dice", "iou", "precision", "recall", "accuracy")},
            **{name: getattr(self.probabilities, name) for name in ("average_precision", "brier", "ece")},
            **{name: together(self._surfaces[name]) for name in surfaces},
            **{f"lesions_{name}": value for name, value in dataclasses.asdict(self.lesions).items()},
            "dice_per_image": together(self._dice_of_images),
            "images_scored": len(self._dice_of_images),
            "lesion_f1": self.lesions.f1,
            "truth_ml": truth_ml,
            "predicted_ml": predicted_ml,
            "volume_error_mm": conformal.farthest_mm(self.volumes_ml),
        }


def slice_distance_mm(grid: Grid) -> float | None:
    """The median distance between the slices of a volume along their normal; None for a plane."""
    if len(grid.origins) < 2:
        return None
    return float(np.median(np.diff(planes.along_mm(grid.origins, np.concatenate([grid.right, grid.down])))))


def to_parquet(table: pa.Table) -> bytes:
    """The table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def read(data: bytes) -> pa.Table:
    """A table of the schema `CASES`, of the bytes of `cases.parquet`."""
    return pq.read_table(io.BytesIO(data), schema=CASES)


def to_csv(table: pa.Table) -> bytes:
    """The table as CSV, worst Dice first, those without one last."""
    order = pc.sort_indices(table, [("dice", "ascending"), ("patient_key", "ascending"), ("class", "ascending")])
    rounded = [pc.round(column, 6) if column.type == pa.float64() else column for column in table.columns]
    sink = io.BytesIO()
    options = pyarrow.csv.WriteOptions(quoting_style="needed")
    pyarrow.csv.write_csv(pa.table(rounded, schema=table.schema).take(order), sink, options)
    return sink.getvalue()
