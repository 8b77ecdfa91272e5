"""How far a model's volumes are off: the patients of validation segmented as any series will be, beside their truth."""

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rayseg.data import conformal
from rayseg.data.conformal import VolumeErrors
from rayseg.data.prepared import PreparedSet
from rayseg.geometry.grid import Geometry
from rayseg.geometry.volume import volume_ml
from rayseg.inference.heldout import HeldOut, Judged, slices
from rayseg.inference.predictor import AnyPredictor, load_any
from rayseg.models.engine import Engine
from rayseg.records import Reject

logger = logging.getLogger(__name__)

_PATIENTS = 100  # looked at: with more the interval hardly changes, and the driver may have few cores

# Predicted and true volume of a series, of each class and of all together.
_Volumes = list[tuple[float | None, float | None]]


def volume_errors(bundle_dir: Path, prepared: PreparedSet) -> VolumeErrors:
    """Of the model of a bundle, by its threshold, on the validation split; of no class where there is nothing to say.

    The source objects are read again, so that volumes are those that the segment job would give. What cannot be read
    is left out. At most 100 patients are looked at, those with the least keys, which say nothing of them.
    """
    if prepared.limited:
        logger.info("volumes get no interval: with prepare.limit series are not whole")
        return VolumeErrors()
    rows = _with_volumes(prepared)
    if len(rows) < conformal.least_patients():
        logger.info(
            "volumes get no interval: %d validation patients have volumes, %d are needed for %d %%",
            len(rows), conformal.least_patients(), conformal.PERCENT,
        )  # fmt: skip
        return VolumeErrors()
    threads = len(os.sched_getaffinity(0))
    predictor = load_any(bundle_dir, engine=Engine("openvino", "float32"), threads=threads)
    kept = [rows[key] for key in sorted(rows)[:_PATIENTS]]
    logger.info("measuring volumes of %d validation patients for their intervals", len(kept))
    with ThreadPoolExecutor(threads, "patients") as pool:
        of_patients = list(pool.map(lambda one: _distances_mm(predictor, one), kept))
    by_class = zip(*of_patients, strict=True)
    return conformal.errors([[one for one in of if one is not None] for of in by_class])


def _with_volumes(prepared: PreparedSet) -> dict[str, list[dict[str, Any]]]:
    """The rows of each patient all of whose slices have a place, series by series."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in slices(prepared, "val").to_pylist():
        rows[row["patient_key"]].append(row)
    return {
        patient: sorted(of, key=lambda row: row["series_key"])
        for patient, of in rows.items()
        if all(row["series_key"] is not None and row["foreground_mm3"] is not None for row in of)
    }


def _distances_mm(predictor: AnyPredictor, rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Of a patient, for each class and for all together, see `conformal.farthest_mm`."""
    names = predictor.bundle.labels.names
    held_out = HeldOut(predictor, predictor.bundle.labels)
    series = [
        volumes
        for _, of in groupby(rows, key=lambda row: row["series_key"])
        if (volumes := _volumes_ml(held_out, list(of), len(names))) is not None
    ]
    return [conformal.farthest_mm(one[place] for one in series) for place in range(len(names) + 1)]


def _volumes_ml(held_out: HeldOut, rows: Sequence[Mapping[str, Any]], classes: int) -> _Volumes | None:
    """Of a series; None where no slice of it can be read."""
    judged = [_counted(one, classes) for one in held_out.judged(rows) if not isinstance(one, Reject)]
    if not judged:
        return None
    counts_S2K, places = np.stack([counts for counts, _ in judged]), [place for _, place in judged if place is not None]
    if len(places) < len(judged):
        return [(None, None)] * (classes + 1)
    counts_S2K = np.concatenate([counts_S2K, counts_S2K.sum(axis=-1, keepdims=True)], axis=-1)
    return [
        (volume_ml(counts_S2K[:, 0, place].tolist(), places), volume_ml(counts_S2K[:, 1, place].tolist(), places))
        for place in range(classes + 1)
    ]


def _counted(judged: Judged, classes: int) -> tuple[np.ndarray, Geometry | None]:
    """Pixels of prediction and truth by class, int64 (2, classes), and where the slice lies."""
    masks = (judged.prediction, judged.truth)
    return np.stack([np.bincount(mask.ravel(), minlength=classes + 1)[1:] for mask in masks]), judged.place
