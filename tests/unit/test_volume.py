from dataclasses import replace

import highdicom
import numpy as np
import pytest
from highdicom import spatial
from scipy.spatial.transform import Rotation

from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.geometry.volume import volume_ml, voxels_mm3

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


def turned(turn: int) -> tuple[float, ...]:
    """Direction cosines of some oblique plane."""
    axes = Rotation.random(random_state=turn).as_matrix()
    return (*axes[:, 0].tolist(), *axes[:, 1].tolist())


@pytest.mark.parametrize("turn", range(6))
def test_even_stacks_are_as_highdicom_has_them(turn: int) -> None:
    """Normals, order, distances and the size of a voxel, of planes that lie anyhow, in any order."""
    orientation, count, step_mm = turned(turn), 3 + turn, 1.5 + turn
    normal = planes.normal(orientation)
    assert normal == pytest.approx(spatial.get_normal_vector(orientation), abs=1e-9)
    shuffled = np.random.default_rng(turn).permutation(count)
    positions_mm = np.array([7.0, -3.0, 11.0]) + shuffled[:, np.newaxis] * step_mm * normal
    order, along_mm = planes.in_order(positions_mm, orientation)
    # Its convention for volumes counts against our normal.
    assert order.tolist() == spatial.get_plane_sort_index(positions_mm, orientation)[::-1]
    distance_mm, _ = spatial.get_volume_positions(positions_mm.tolist(), orientation)
    assert np.diff(along_mm) == pytest.approx(distance_mm)
    volume = highdicom.Volume.from_components(
        np.zeros((count, 4, 4), np.uint8),
        spacing=(distance_mm, 0.5, 2.0),
        coordinate_system="PATIENT",
        position=positions_mm[order[0]].tolist(),
        direction=np.column_stack([normal, orientation[3:], orientation[:3]]),
    )
    geometries = [
        at(0, image_position_mm=tuple(position), image_orientation=orientation) for position in positions_mm.tolist()
    ]
    assert voxels_mm3(geometries) == pytest.approx(volume.voxel_volume)


def test_a_plane_and_many_have_the_same_normals() -> None:
    orientations = [turned(turn) for turn in range(5)]
    assert planes.normal(orientations) == pytest.approx(np.stack([planes.normal(one) for one in orientations]))
