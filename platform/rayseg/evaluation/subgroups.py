"""Metrics of groups of cases: by size of the lesion, kind of scanner and spacing. numpy, scipy and pyarrow only."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayseg.evaluation.metrics import METRICS, Columns, Estimate, columns_of, estimate, subset

TOLD = ("dice_pooled", "dice_per_case", "recall_pooled", "precision_pooled", "lesion_recall")
_PIXEL_SPACING_MM = (0.5, 1.0)  # ends of the groups: below, between, from the last one on
_SLICE_DISTANCE_MM = (2.0, 4.0)


@dataclass(frozen=True)
class Group:
    """Some of the cases of a class."""

    name: str  # of the class
    by: str
    group: str
    patients: int
    metrics: dict[str, Estimate]


def groups(cases: pa.Table, names: Sequence[str], *, resamples: int, min_patients: int) -> list[Group]:
    """Every group of at least one case, where there are two groups or more to tell apart.

    Args:
        cases: of the schema `cases.CASES`.
        names: of the classes.
        resamples: see `statistics.interval`.
        min_patients: groups of fewer get no intervals.
    """
    made = []
    for name in names:
        columns = columns_of(cases, name)
        rows = cases.filter(pc.field("class") == name)
        devices = {by: np.array(rows[by].to_pylist(), object) for by in ("modality", "scanner")}
        for by, told in _divided(columns, devices):
            for group, chosen in told:
                of_group = [subset(columns, chosen)]
                found = {
                    metric: one
                    for metric in TOLD
                    if (one := estimate(METRICS[metric], of_group, resamples=resamples, min_patients=min_patients))
                }
                made.append(Group(name, by, group, int(chosen.sum()), found))
    return made


def _divided(columns: Columns, devices: Mapping[str, np.ndarray]) -> Iterator[tuple[str, list[tuple[str, np.ndarray]]]]:
    """What the cases are divided by, and the groups that have any, where there are several."""
    spacings = {"pixel spacing": _PIXEL_SPACING_MM, "slice distance": _SLICE_DISTANCE_MM}
    divisions = {
        "size": _sizes(columns),
        **{
            by: [(kind, kinds == kind) for kind in sorted({kind for kind in kinds if kind is not None})]
            for by, kinds in devices.items()
        },
        **{by: _ranges(columns[f"{by.replace(' ', '_')}_mm"], cuts, "mm") for by, cuts in spacings.items()},
    }
    for by, found in divisions.items():
        filled = [(group, chosen) for group, chosen in found if chosen.any()]
        if len(filled) > 1:
            yield by, filled


def _sizes(columns: Columns) -> list[tuple[str, np.ndarray]]:
    """Thirds of the cases with a truth by its volume, by its pixels where not all volumes are known; and the rest."""
    pixels = columns["tp"] + columns["fn"]
    volumes = columns["truth_ml"]
    known, unit = (volumes, "mL") if np.isfinite(volumes[pixels > 0]).all() else (pixels, "px")
    true = known[pixels > 0]
    if not true.size:
        return []
    cuts = np.quantile(true, [1 / 3, 2 / 3])
    thirds = _ranges(np.where(pixels > 0, known, np.nan), (float(cuts[0]), float(cuts[1])), unit)
    return [("nothing to find", pixels == 0), *thirds]


def _ranges(values: np.ndarray, cuts: tuple[float, float], unit: str) -> list[tuple[str, np.ndarray]]:
    low, high = (f"{cut:.0f}" if cut >= 1000 else f"{cut:.3g}" for cut in cuts)
    with np.errstate(invalid="ignore"):
        return [
            (f"below {low} {unit}", values < cuts[0]),
            (f"{low} to {high} {unit}", (values >= cuts[0]) & (values < cuts[1])),
            (f"{high} {unit} and more", values >= cuts[1]),
        ]
