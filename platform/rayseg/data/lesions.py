"""Lesions of the phantom: what they are, where they may lie, how they change the picture and the mask."""

from dataclasses import dataclass

import numpy as np

HEMORRHAGE, INFARCT = 1, 2  # values in the mask
_OEDEMA = 20.0


@dataclass(frozen=True)
class Lesion:
    """One lesion in the head's frame. `label` is what its pixels get in the mask."""

    label: int
    shape: str  # "blob", "crescent" (along the skull) or "wedge" (from the cortex inward)
    centre_mm: tuple[float, float, float]
    radii_mm: tuple[float, float, float]  # blob: semi-axes; crescent: -, thickness, half height; wedge: -, depth, -
    angle: float  # radians: blob: of its first axis; crescent and wedge: half of the sector it spans
    value_hu: float
    edge_mm: float  # width of the soft border


def random_lesion(
    random: np.random.Generator, label: int, z_mm: tuple[float, ...], half_axes_mm: tuple[float, float], small: bool
) -> Lesion:
    """Draws a lesion of kind `label` for a head whose slices lie at `z_mm`, never at their very ends."""
    side, bearing = random.choice([-1.0, 1.0]), np.deg2rad(random.uniform(-60, 70))
    z = float(z_mm[0] + (z_mm[-1] - z_mm[0]) * random.uniform(0.3, 0.7))

    def at(fraction: float) -> tuple[float, float, float]:
        x = side * fraction * half_axes_mm[0] * np.cos(bearing)
        return float(x), float(fraction * half_axes_mm[1] * np.sin(bearing)), z

    def blob(low_mm: float, high_mm: float, fraction: float, value_hu: float, edge_mm: float) -> Lesion:
        length = float(random.uniform(low_mm, high_mm))
        radii = (length, length * float(random.uniform(0.6, 0.95)), length * float(random.uniform(0.8, 1.1)))
        turn = float(random.uniform(0, np.pi))
        return Lesion(label, "blob", at(fraction), radii, turn, value_hu, edge_mm)

    if label == HEMORRHAGE:
        value = float(random.uniform(55, 72))
        if small:
            return blob(5.0, 8.0, random.uniform(0.3, 0.7), value, 1.5)
        if random.random() < 0.3:
            height, thickness = float(random.uniform(18, 30)), float(random.uniform(7, 12))
            return Lesion(label, "crescent", at(1.0), (0.0, thickness, height), random.uniform(0.7, 1.2), value, 1.5)
        return blob(14, 24, random.uniform(0.3, 0.6), value, 2.0)
    value = float(random.uniform(13, 19))
    if small:
        return blob(7.0, 10.0, random.uniform(0.3, 0.5), value, 3.0)
    height, inward = float(random.uniform(20, 32)), float(random.uniform(32, 48))
    return Lesion(label, "wedge", at(1.0), (0.0, inward, height), random.uniform(0.5, 0.85), value, 4.0)


def draw_lesion(
    lesion: Lesion,
    hu: np.ndarray,
    label: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    z: float,
    depth: np.ndarray,
    tissue: np.ndarray,
    texture: np.ndarray,
    folds: np.ndarray,
) -> None:
    """Draws one lesion into `hu` and `label`, in place. All arrays are (size, size).

    Args:
        lesion: the lesion.
        hu: the picture so far.
        label: the mask so far.
        x: mm in the head's frame; also `y`, and `z` of the slice.
        y: see `x`.
        z: see `x`.
        depth: mm from the skull inward.
        tissue: 0..1, where there is brain rather than ventricle or bone.
        texture: random field that makes borders and values uneven; also `folds`.
        folds: see `texture`.
    """
    dx, dy, dz = x - lesion.centre_mm[0], y - lesion.centre_mm[1], z - lesion.centre_mm[2]
    ragged = 1.6 * texture + 0.8 * folds
    height = float(np.sqrt(max(0.0, 1 - (dz / lesion.radii_mm[2]) ** 2)))
    if lesion.shape == "blob":
        cosine, sine = np.cos(lesion.angle), np.sin(lesion.angle)
        first, second, third = lesion.radii_mm
        along, across = (cosine * dx + sine * dy) / first, (cosine * dy - sine * dx) / second
        distance = (np.sqrt(along**2 + across**2 + (dz / third) ** 2) - 1) * second + ragged * min(1.0, second / 8)
    elif height == 0:
        return
    else:
        centre = np.arctan2(lesion.centre_mm[1], lesion.centre_mm[0])
        off = np.abs((np.arctan2(y, x) - centre + np.pi) % (2 * np.pi) - np.pi) / lesion.angle  # 1 at the sector's rim
        if lesion.shape == "crescent":
            thickness = lesion.radii_mm[1] * height * np.sqrt(np.maximum(0, 1 - off**2)) - 0.4 * ragged
            distance = np.where(off < 1, depth - thickness, 9.0)
        else:
            rim = height * (0.45 + 0.55 * np.clip(1 - depth / lesion.radii_mm[1], 0, 1))
            beside = (off - rim) * lesion.angle * np.hypot(x, y)
            beyond_midline = 3 - np.sign(lesion.centre_mm[0]) * x
            distance = np.maximum(beside, depth - lesion.radii_mm[1] * height) + 1.5 * ragged
            distance = np.maximum(distance, beyond_midline)
    alpha = fill(distance, lesion.edge_mm)
    if lesion.label == HEMORRHAGE:
        if lesion.shape == "blob":
            paint(hu, 0.5 * fill(distance - 5, 6.0) * tissue, _OEDEMA)  # around it, no part of the mask
        alpha = alpha * fill(-depth - 0.3, 1.0)
        paint(hu, alpha, lesion.value_hu + 2.5 * texture)
    else:  # dead tissue swells: inside it the sulci close, and grey and white matter look alike
        alpha = alpha * tissue
        paint(hu, 0.92 * alpha, lesion.value_hu + texture)
    label[alpha > 0.5] = lesion.label


def fill(distance_mm: np.ndarray, edge_mm: float) -> np.ndarray:
    """1 inside (negative distance), 0 outside, a linear ramp `edge_mm` wide between: partial volume."""
    return np.clip(0.5 - distance_mm / edge_mm, 0.0, 1.0)


def paint(hu: np.ndarray, alpha: np.ndarray, value_hu: float | np.ndarray) -> None:
    """Blends `value_hu` into `hu` in place, `alpha` of it."""
    hu += alpha * (value_hu - hu)
