"""The anatomy of the phantom: Hounsfield units of one axial slice of a made-up head, with its lesions' mask.

Everything is drawn in millimetres in the head's own frame (x to the patient's left, y to the back, z to the vertex,
origin at the middle of the head, z counted from the orbitomeatal line), so pixel size and image size are free. Organic
shapes come from smooth random fields that are continuous over the slices of a head: the zero crossings of a band-passed
field run like sulci, and two slow fields bend all coordinates so that nothing is a perfect ellipse. Tissue values are
textbook ones: air -1000, fat -90, liquor 5, white matter 28, grey matter 37, fresh blood 55 to 80, bone 600 to 1400 HU.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rayseg.data.lesions import HEMORRHAGE, INFARCT, Lesion, draw_lesion, fill, paint, random_lesion

_PATTERN: tuple[tuple[int, ...], ...] = (
    (HEMORRHAGE,), (INFARCT,), (), (HEMORRHAGE,), (HEMORRHAGE, INFARCT), (INFARCT,), (HEMORRHAGE,), (),
)  # fmt: skip  # lesions of patient 0, 1, ...: a fixed round, so that a few patients hold each case
_GRID = 128  # points along x and y of the random fields
_REACH_MM = 105.0  # the fields cover -reach..reach
_CSF, _WHITE, _GREY = 5.0, 28.5, 37.5


@dataclass(frozen=True)
class Head:
    """One patient's anatomy; `fields` are the random fields (4, slices, grid, grid): two bends, texture, sulci."""

    half_axes_mm: tuple[float, float]
    centre_mm: tuple[float, float]
    rotation: float
    outline: tuple[float, ...]
    skull_mm: float
    ventricles: float  # relative size; 1 is a middle-aged adult
    atrophy: float  # 0 (narrow sulci) to 1 (wide)
    calcified: tuple[bool, bool]  # pineal gland, choroid plexus: bright, yet no lesion
    field_of_view_mm: float
    noise_hu: float
    z_mm: tuple[float, ...]
    lesions: tuple[Lesion, ...]
    fields: np.ndarray
    seed: tuple[int, int]


def head(seed: int, index: int, slices: int) -> Head:
    """Patient `index` of the family `seed`, with `slices` planes 5 mm apart, closer where that would leave the head."""
    random = np.random.default_rng([seed, index])
    distance_mm = min(5.0, 70.0 / slices)
    lowest_mm = random.uniform(12.0, 18.0) if slices > 3 else 24.0
    z_mm = tuple(float(lowest_mm + distance_mm * (k + 0.5)) for k in range(slices))
    half_axes_mm = (float(random.uniform(62, 71)), float(random.uniform(77, 88)))
    lesions = tuple(
        random_lesion(random, label, z_mm, half_axes_mm, small=random.random() < 0.15)
        for label in _PATTERN[index % len(_PATTERN)]
    )
    return Head(
        half_axes_mm=half_axes_mm,
        centre_mm=(float(random.uniform(-7, 7)), float(random.uniform(-7, 7))),
        rotation=float(np.deg2rad(random.uniform(-9, 9))),
        outline=tuple(random.normal(0, 0.008, 6)),
        skull_mm=float(random.uniform(5.5, 8.0)),
        ventricles=float(random.uniform(0.7, 1.5)),
        atrophy=float(random.uniform(0, 1)),
        calcified=(bool(random.random() < 0.5), bool(random.random() < 0.5)),
        field_of_view_mm=float(random.choice([220.0, 230.0, 240.0])),
        noise_hu=float(random.uniform(3.8, 5.2)),
        z_mm=z_mm,
        lesions=lesions,
        fields=_fields(random, slices, distance_mm),
        seed=(seed, index),
    )


def render(head: Head, k: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Slice `k`: Hounsfield units float32 (size, size) and the mask uint8 (size, size), 0, HEMORRHAGE or INFARCT."""
    pixel_mm = head.field_of_view_mm / size
    axis_mm = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * np.float32(pixel_mm)
    x0, y0 = axis_mm[None, :] - head.centre_mm[0], axis_mm[:, None] - head.centre_mm[1]
    cosine, sine = np.cos(head.rotation), np.sin(head.rotation)
    x = (cosine * x0 + sine * y0).astype(np.float32)
    y = (cosine * y0 - sine * x0).astype(np.float32)
    z = head.z_mm[k]

    depth = _depth(head, x, y, z)
    hu = np.full((size, size), -1000.0, np.float32)
    _draw_headrest(hu, head, x, y)
    _draw_shell(hu, head, depth, z)

    place = [(_GRID - 1) * (y / _REACH_MM + 1) / 2, (_GRID - 1) * (x / _REACH_MM + 1) / 2]
    bend_x, bend_y, texture, folds = (
        ndimage.map_coordinates(field, place, order=1, mode="nearest") for field in head.fields[:, k]
    )
    x, y = x + 2.5 * bend_x, y + 2.5 * bend_y
    for lesion in head.lesions:
        if lesion.shape == "blob" and lesion.label == HEMORRHAGE:  # a bleed pushes what lies around it away
            dx, dy = x - lesion.centre_mm[0], y - lesion.centre_mm[1]
            push = 0.3 * np.exp(-(dx**2 + dy**2) / (2 * (1.6 * lesion.radii_mm[0]) ** 2))
            push = push * np.exp(-0.5 * ((z - lesion.centre_mm[2]) / lesion.radii_mm[2]) ** 2)
            x, y = x - push * dx, y - push * dy

    tissue = _draw_brain(hu, head, x, y, z, depth, texture, folds)
    label = np.zeros((size, size), np.uint8)
    for lesion in head.lesions:
        draw_lesion(lesion, hu, label, x, y, z, depth, tissue, texture, folds)

    hu += np.where(depth > 0, 4 * np.exp(-np.maximum(depth, 0) / 6), 0)  # beam hardening under the skull
    random = np.random.default_rng([*head.seed, k, size])
    grain = ndimage.gaussian_filter(random.standard_normal((size, size), dtype=np.float32), 0.55, truncate=2)
    level = head.noise_hu * np.where(depth > 0, 1.0 + 0.15 * np.tanh(depth / 40), 0.75)
    hu = ndimage.gaussian_filter(hu, 0.55, truncate=3) + grain / grain.std() * level
    return hu.astype(np.float32), label


def _fields(random: np.random.Generator, slices: int, distance_mm: float) -> np.ndarray:
    """Smooth random fields of unit spread, float32 (4, slices, grid, grid): two bends, texture, sulci."""
    step_mm = 2 * _REACH_MM / (_GRID - 1)

    def smooth(field: np.ndarray, sigma_mm: float) -> np.ndarray:
        sigmas = (sigma_mm / distance_mm, sigma_mm / step_mm, sigma_mm / step_mm)
        return ndimage.gaussian_filter(field, sigmas, mode="wrap", truncate=2.5)

    raw = random.standard_normal((4, slices, _GRID, _GRID), dtype=np.float32)
    made = [smooth(raw[0], 11.0), smooth(raw[1], 11.0), smooth(raw[2], 5.0), smooth(raw[3], 3.6) - smooth(raw[3], 6.0)]
    return np.stack([(field - field.mean()) / field.std() for field in made])


def _segment(x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Distance in mm of each point from the line segment."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def _shrink(z: float) -> float:
    """How much narrower the skull is at height `z` than at its widest."""
    return float(np.sqrt(1 - (max(z - 20.0, 0.0) / 80.0) ** 2))


def _depth(head: Head, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    """Distance in mm along the ray to the centre from the skull's inner table; negative outside."""
    half_x, half_y = (half * _shrink(z) for half in head.half_axes_mm)
    v = np.clip(y / half_y, -1.3, 1.3)
    radius = np.hypot(x / (half_x * (1 + 0.09 * v)), y / half_y)
    bearing = np.arctan2(y, x)
    for order, weight in enumerate(head.outline[:4], start=2):
        radius = radius * (1 + weight * np.cos(order * bearing + order * 40 * head.outline[4]))
    return np.hypot(x, y) * (1 / np.maximum(radius, 1e-3) - 1)


def _draw_headrest(hu: np.ndarray, head: Head, x: np.ndarray, y: np.ndarray) -> None:
    radius = np.hypot(x / 1.15, y + 15) - head.half_axes_mm[1] - 36
    below = fill(40 - y, 30.0)
    paint(hu, fill(np.abs(radius + 3) - 5, 2.0) * below, -930.0)  # foam
    paint(hu, fill(np.abs(radius - 3.5) - 0.8, 1.2) * below, -150.0)  # shell


def _draw_shell(hu: np.ndarray, head: Head, depth: np.ndarray, z: float) -> None:
    """Skin, fat, outer table, diploe, inner table; near the vertex cut more slantwise, thus thicker."""
    bone_mm, scalp_mm = head.skull_mm / np.sqrt(_shrink(z)), 7.0
    outside = -depth
    paint(hu, fill(outside - bone_mm - scalp_mm, 1.0), 40.0)
    paint(hu, fill(np.abs(outside - bone_mm - 0.45 * scalp_mm) - 0.17 * scalp_mm, 1.0), -85.0)
    paint(hu, fill(outside - bone_mm, 1.0), 1150.0)
    paint(hu, 0.8 * fill(np.abs(outside - 0.5 * bone_mm) - 0.22 * bone_mm, 1.5), 520.0)
    paint(hu, fill(outside, 1.0), _CSF)


def _draw_brain(
    hu: np.ndarray,
    head: Head,
    x: np.ndarray,
    y: np.ndarray,
    z: float,
    depth: np.ndarray,
    texture: np.ndarray,
    folds: np.ndarray,
) -> np.ndarray:
    """Brain inside the skull; returns where it is and no ventricle, 0..1, float (size, size)."""
    gap_mm = 1.2 + 1.6 * head.atrophy
    fold_mm = np.abs(folds) * 4.2  # about the distance from the nearest sulcus
    reach = fill(depth - 15 - 6 * head.atrophy - 2 * texture, 8.0)  # sulci end some way in
    white = fill(5.0 - np.minimum(depth - gap_mm, fold_mm + 30 * (1 - reach)), 2.5)
    width = abs(x)

    # Deep grey matter: caudate, lentiform nucleus, thalamus; gone above the ventricles' bodies.
    low = float(np.clip((42 - z) / 8, 0, 1))
    nuclei = fill(_segment(width, y, (15, -24), (17, -12)) - 5, 2.0)
    nuclei = np.maximum(nuclei, fill(_segment(width, y, (22, -14), (27, 8)) - 6.5, 2.5))
    nuclei = np.maximum(nuclei, fill(_segment(width, y, (7, 6), (12, 14)) - 7, 2.5))
    white = white * (1 - 0.9 * low * nuclei)

    brain = fill(gap_mm - depth, 1.2)
    paint(hu, brain, _GREY + white * (_WHITE - _GREY) + 0.7 * texture)

    liquor = 0.9 * reach * fill(fold_mm - 0.6 - 0.7 * head.atrophy, 1.2)
    sylvian = _segment(width, y, (37, -12), (0.98 * head.half_axes_mm[0], 2 + 6 * head.outline[0]))
    liquor = np.maximum(liquor, low * fill(sylvian - 1.0 - 1.2 * head.atrophy, 1.5))
    fissure = np.maximum(fill(y + 38, 8.0), fill(50 - y, 8.0))  # front and back of the corpus callosum
    fissure = np.maximum(fissure, np.clip((z - 50) / 8, 0, 1))
    liquor = np.maximum(liquor, fissure * fill(width - 1.4 - 0.8 * head.atrophy, 1.2) * fill(depth - 30, 25.0))
    ventricles = _ventricles(head, x, y, z)
    liquor = np.maximum(liquor, ventricles)
    paint(hu, liquor * brain, _CSF)
    paint(hu, 0.8 * fissure * fill(width - 0.7, 1.0) * brain, 52.0)  # falx
    sinus = fill(np.maximum(width - 1 - 0.4 * (7 - depth), depth - 7), 1.5) * (y > 0)
    paint(hu, sinus * fill(-depth, 1.0), 54.0)  # superior sagittal sinus: as bright as a faint bleed

    pineal, plexus = head.calcified
    if pineal and 18 < z < 28:
        paint(hu, fill(np.hypot(x - 0.5, y - 20) - 2.0, 1.5), 140.0)
    if plexus and 24 < z < 38:
        paint(hu, fill(np.hypot(width - 22, y - 36) - 2.2, 1.5), 110.0)
    return brain * (1 - ventricles)


def _ventricles(head: Head, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    """Lateral ventricles and third ventricle, 0..1: horns apart at the bottom, bodies above, nothing at the top."""
    width, size = np.abs(x), head.ventricles
    front = size * float(np.interp(z, [10, 20, 30, 40, 50], [2.0, 4.2, 4.5, 4.0, 0.0]))
    body = size * float(np.interp(z, [24, 34, 44, 54], [0.0, 4.2, 4.5, 0.0]))
    back = size * float(np.interp(z, [10, 18, 34, 44], [2.0, 4.6, 4.4, 0.0]))
    third = size * float(np.interp(z, [12, 18, 26, 30], [1.6, 1.8, 1.5, 0.0]))
    filled = np.zeros_like(x)
    for radius, start, end in (
        (front, (13.0 + size, -31.0), (6.0 + size, -17.0)),
        (body, (6.0 + size, -17.0), (10.0 + size, 8.0)),
        (body, (10.0 + size, 8.0), (20.0, 30.0)),
        (back, (22.0, 28.0), (19.0, 44.0)),
    ):
        if radius > 0.3:
            filled = np.maximum(filled, fill(_segment(width, y, start, end) - radius, 1.5))
    if third > 0.3:
        filled = np.maximum(filled, fill(_segment(width, y, (0.0, -8.0), (0.0, 14.0)) - third, 1.5))
    septum = 0.7 * fill(width - 0.8, 1.0) * (z > 20)
    return filled * (1 - septum * (y < 0))
