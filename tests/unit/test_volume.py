from dataclasses import replace

import numpy as np
import pytest

from rayseg.geometry.grid import Geometry
from rayseg.geometry.volume import volume_ml

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def at(z_mm: float, **changes: object) -> Geometry:
    plane = Geometry(100, 100, (0.5, 2.0), 5.0, (0.0, 0.0, z_mm), AXIAL)
    return replace(plane, **changes)  # type: ignore[arg-type]


def test_even_slices_are_voxels_times_their_size() -> None:
    # 3 slices, 1 mm2 pixels, 4 mm apart: 60 pixels * 4 mm3.
    assert volume_ml([10, 20, 30], [at(0), at(4), at(8)]) == pytest.approx(0.24)


def test_uneven_slices_reach_half_way_to_their_neighbours() -> None:
    # At 0, 2, 8 mm: the widths are 2, 1 + 3 and 6 mm.
    assert volume_ml([10, 10, 10], [at(0), at(2), at(8)]) == pytest.approx((20 + 40 + 60) / 1000)


def test_order_does_not_matter_nor_does_the_direction_of_the_normal() -> None:
    expected = volume_ml([1, 20, 300], [at(0), at(2), at(8)])
    assert volume_ml([300, 1, 20], [at(8), at(0), at(2)]) == pytest.approx(expected)
    flipped = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    planes = [at(z, image_orientation=flipped) for z in (0, 2, 8)]
    assert volume_ml([1, 20, 300], planes) == pytest.approx(expected)


def test_a_tilted_gantry_counts_the_distance_along_the_normal() -> None:
    # The table moves 5 mm along z; the planes are tilted by 20 degrees, so they are 5 cos(20) mm apart.
    tilt = np.deg2rad(20)
    orientation = (1.0, 0.0, 0.0, 0.0, float(np.cos(tilt)), float(np.sin(tilt)))
    planes = [at(5.0 * k, image_orientation=orientation) for k in range(4)]
    assert volume_ml([100] * 4, planes) == pytest.approx(400 * 5 * np.cos(tilt) / 1000)


def test_a_sphere_in_uneven_slices_has_its_volume() -> None:
    generator = np.random.default_rng(0)
    z_mm = np.arange(-45, 45, 0.75) + generator.uniform(-0.35, 0.35, 120)
    radius_mm = 30.0
    areas_mm2 = np.pi * np.clip(radius_mm**2 - z_mm**2, 0, None)
    measured = volume_ml([round(area) for area in areas_mm2], [at(float(z)) for z in z_mm])
    assert measured == pytest.approx(4 / 3 * np.pi * radius_mm**3 / 1000, rel=0.02)


def test_one_slice_is_as_thick_as_it_says() -> None:
    assert volume_ml([40], [at(3)]) == pytest.approx(0.2)
    assert volume_ml([40], [at(3, slice_thickness_mm=None)]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"pixel_spacing_mm": None},
        {"image_position_mm": None},
        {"image_orientation": None},
        {"image_position_mm": (0.0, 0.0, 0.0)},  # where the first slice lies already
        {"image_orientation": (1.0, 0.0, 0.0, 0.0, 0.0, 1.0)},  # not parallel to the others
    ],
)
def test_no_volume_without_sound_positions(changes: dict[str, object]) -> None:
    assert volume_ml([1, 1, 1], [at(0), at(4), at(8, **changes)]) is None
