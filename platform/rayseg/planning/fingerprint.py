"""Fingerprint: shapes and spacings of the volumes of a manifest, which all that is planned depends on."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayseg import snapshots, storage
from rayseg.geometry import planes

_COLUMNS = (
    "verdict", "series_key", "rows", "columns", "pixel_spacing_mm", "slice_thickness_mm", "image_position_mm",
    "image_orientation", "modality",
)  # fmt: skip

_PLACE = ("series_key", "pixel_spacing_mm", "image_position_mm", "image_orientation", "rows", "columns")


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """The volumes of a set, on their own grids.

    Attributes:
        shapes: int (volumes, 3): slices, rows, columns.
        spacings_mm: float64 (volumes, 3): between slices, rows, columns; of uneven slices the mean.
        modalities: how many volumes are of each Modality; none where the files do not say.
        unplaced: slices that are left out, as they do not say where they lie.
    """

    shapes: np.ndarray
    spacings_mm: np.ndarray
    modalities: dict[str, int] = field(default_factory=dict)
    unplaced: int = 0


@dataclass
class _Series:
    """What has been seen of a series."""

    rows: int
    columns: int
    spacing_mm: tuple[float, float]
    thickness_mm: float | None
    modality: str | None
    slices: int = 0
    first_mm: float = np.inf
    last_mm: float = -np.inf

    @property
    def distance_mm(self) -> float | None:
        """Between slices, the mean; of one alone its thickness."""
        return (self.last_mm - self.first_mm) / (self.slices - 1) if self.slices > 1 else self.thickness_mm


def of_manifest(manifest: str) -> Fingerprint:
    """Of the accepted slices of a manifest, a piece of it at a time.

    Raises:
        ValueError: there is no manifest, or it has no volume.
    """
    series: dict[str, _Series] = {}
    unplaced = 0
    try:
        with snapshots.reading(manifest, "plan") as file:
            for piece in storage.read_row_groups(file, _COLUMNS):
                unplaced += _look(piece, series)
    except FileNotFoundError:
        raise ValueError(f"plan.manifest: there is no {manifest}; run the catalog job") from None
    volumes = [one for one in series.values() if one.distance_mm]
    unplaced += sum(one.slices for one in series.values() if not one.distance_mm)
    if not volumes:
        raise ValueError(
            f"plan.manifest: no accepted slice of {manifest} says where it lies (position, orientation and spacing); "
            "plans are made of volumes"
        )
    shapes = [(one.slices, one.rows, one.columns) for one in volumes]
    spacings_mm = [(one.distance_mm, *one.spacing_mm) for one in volumes]
    modalities = Counter(one.modality for one in volumes if one.modality)
    return Fingerprint(np.array(shapes), np.array(spacings_mm, float), dict(modalities), unplaced)


def _look(piece: pa.Table, series: dict[str, _Series]) -> int:
    """Adds the accepted slices that are placed to their series; gives how many are not."""
    accepted = piece.filter(pc.equal(piece["verdict"], "ok"))
    placed = accepted
    for name in _PLACE:
        placed = placed.filter(pc.is_valid(placed[name]))
    for key, along_mm, row in _slices(placed):
        if key not in series:
            series[key] = _Series(
                row["rows"].as_py(), row["columns"].as_py(), tuple(row["pixel_spacing_mm"].as_py()),
                row["slice_thickness_mm"].as_py(), row["modality"].as_py(),
            )  # fmt: skip
        one = series[key]
        one.slices += len(along_mm)
        one.first_mm, one.last_mm = min(one.first_mm, along_mm.min()), max(one.last_mm, along_mm.max())
    return len(accepted) - len(placed)


def _slices(placed: pa.Table) -> Iterator[tuple[str, np.ndarray, dict[str, pa.Scalar]]]:
    """Of each series its key, where its slices lie along the normal of the first one, and that one's row."""
    if not len(placed):
        return
    keys = placed["series_key"].combine_chunks().dictionary_encode()
    numbers = np.asarray(keys.indices)
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    positions_mm = pc.list_flatten(placed["image_position_mm"]).to_numpy().reshape(-1, 3)
    orientations = pc.list_flatten(placed["image_orientation"]).to_numpy().reshape(-1, 6)
    for number, rows in enumerate(np.split(order, starts[1:])):
        along_mm = planes.along_mm(positions_mm[rows], orientations[rows[0]])
        row = {name: placed[name][int(rows[0])] for name in placed.column_names}
        yield keys.dictionary[number].as_py(), along_mm, row
