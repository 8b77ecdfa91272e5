"""The grid of one slice: its pixels, and where they lie in the patient."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Where the slice's pixels lie. What the object lacks, or says in an unusable way, is None."""

    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None = None  # between rows, between columns
    slice_thickness_mm: float | None = None
    image_position_mm: tuple[float, float, float] | None = None  # centre of the first pixel, patient coordinates
    image_orientation: tuple[float, float, float, float, float, float] | None = None  # along a row, along a column
