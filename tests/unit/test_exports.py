"""Volumes and surfaces lie where the patient's voxels do, by the field's own readers."""

import dataclasses
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import trimesh
from scipy.spatial.transform import Rotation

from rayseg.geometry.grid import Geometry
from rayseg.geometry.stack import Stack, stack
from rayseg.geometry.upright import upright
from rayseg.inference import exports
from rayseg.records import Reason, Reject

ROWS, COLUMNS = 20, 24


def places(distances_mm: list[float], **changes: Any) -> list[Geometry]:
    """Slices of an oblique series, so many millimetres along the normal each."""
    row = np.array([0.8, 0.6, 0.0])
    column = np.array([0.0, 0.0, -1.0])
    normal = np.cross(row, column)
    values = {
        "rows": ROWS,
        "columns": COLUMNS,
        "pixel_spacing_mm": (0.7, 0.5),
        "slice_thickness_mm": 2.0,
        "image_orientation": (*row, *column),
    } | changes
    tilt = values.pop("tilt_mm", 0.0)
    return [
        Geometry(
            image_position_mm=tuple(np.array([-30.0, 12.0, 5.0]) + along * normal + tilt * along * column), **values
        )
        for along in distances_mm
    ]


def stacked(distances_mm: list[float], **changes: Any) -> Stack:
    rng = np.random.default_rng(1)
    masks = [rng.integers(0, 3, (ROWS, COLUMNS), np.uint8) for _ in distances_mm]
    made = stack(masks, places(distances_mm, **changes))
    assert isinstance(made, Stack)
    return made


def test_slices_are_put_in_the_order_of_their_planes() -> None:
    masks = [np.full((ROWS, COLUMNS), value, np.uint8) for value in (2, 0, 1)]
    made = stack(masks, places([4.0, 0.0, 2.0]))
    assert isinstance(made, Stack)
    assert made.masks[:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("tilt_mm", [0.0, 0.0005, 0.004, 0.3, -0.3])
def test_a_voxel_of_the_nifti_is_at_the_patient_coordinates_of_its_pixel(tilt_mm: float, tmp_path: Path) -> None:
    """For ITK, too, where the stack leans by so little that no voxel is off by a quarter of a pixel."""
    made = stacked([0.0, 2.0, 4.0], tilt_mm=tilt_mm)
    data = exports.nifti(made, ("a", "b"))
    assert isinstance(data, bytes)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(data))
    for place in ((0, 0, 0), (2, 19, 23), (1, 3, 7)):
        slice, row, column = place
        geometry = places([0.0, 2.0, 4.0], tilt_mm=tilt_mm)[slice]
        cosines = np.array(geometry.image_orientation).reshape(2, 3)
        # PS3.3 equation C.7.6.2.1-1
        expected = np.array(geometry.image_position_mm) + cosines[0] * 0.5 * column + cosines[1] * 0.7 * row
        ras = image.affine @ [column, row, slice, 1]
        assert ras[:3] * [-1, -1, 1] == pytest.approx(expected)
        assert np.asarray(image.dataobj)[column, row, slice] == made.masks[place]
    (tmp_path / "x.nii.gz").write_bytes(data)
    if abs(tilt_mm) < 0.01:
        assert exports.nifti_warning(made) is None
        read = SimpleITK.ReadImage(str(tmp_path / "x.nii.gz"))
        lps = read.TransformIndexToPhysicalPoint((7, 3, 1))
        assert lps == pytest.approx(made.points_mm(np.array([1.0, 3.0, 7.0])), abs=1e-4 + made.tolerance_mm)
        assert read[7, 3, 1] == made.masks[1, 3, 7]
    else:
        assert "nifti-upright" in (exports.nifti_warning(made) or "")
        with pytest.raises(RuntimeError, match="orthonormal"):
            SimpleITK.ReadImage(str(tmp_path / "x.nii.gz"))
    assert exports.nifti(made, ("a", "b")) == data


def test_three_decimals_of_an_orientation_are_no_shear(tmp_path: Path) -> None:
    """Cosines of a stack turned about all axes, as some scanners write them; ITK wants them orthonormal to 1e-4."""
    turned = Rotation.from_euler("xyz", [-11, 6, 23], degrees=True).as_matrix()
    grid = {"rows": ROWS, "columns": COLUMNS, "pixel_spacing_mm": (0.7, 0.5)}
    geometries = [
        Geometry(
            **grid,
            image_position_mm=tuple(np.round(turned[:, 2] * 3 * number, 3)),
            image_orientation=tuple(np.round([*turned[:, 0], *turned[:, 1]], 3)),
        )
        for number in range(20)
    ]
    made = stack([np.full((ROWS, COLUMNS), number, np.uint8) for number in range(20)], geometries)
    assert isinstance(made, Stack)
    data = exports.nifti(made, ("a",))
    assert isinstance(data, bytes)
    (tmp_path / "x.nii.gz").write_bytes(data)
    read = SimpleITK.ReadImage(str(tmp_path / "x.nii.gz"))
    for column, row, number in ((0, 0, 0), (COLUMNS - 1, 0, 19), (0, ROWS - 1, 19), (COLUMNS - 1, ROWS - 1, 0)):
        expected = made.points_mm(np.array([number, row, column], float))
        assert read.TransformIndexToPhysicalPoint((column, row, number)) == pytest.approx(expected, abs=0.125)
        assert read[column, row, number] == number


@pytest.mark.parametrize("tilt_mm", [(0.3, 0.0), (-0.3, 0.0), (0.2, -0.35)])
def test_itk_reads_a_tilted_stack_made_upright(tilt_mm: tuple[float, float], tmp_path: Path) -> None:
    """Every voxel of a lesion within half a pixel of its place, along rows and columns, and none else."""
    steps_mm = [0.0, 2.0, 4.0, 6.0, 8.0]
    geometries = [
        dataclasses.replace(
            one,
            image_position_mm=tuple(
                np.array(one.image_position_mm)
                + z * (tilt_mm[0] * np.array([0.0, 0.0, -1.0]) + tilt_mm[1] * np.array([0.8, 0.6, 0.0]))
            ),
        )
        for z, one in zip(steps_mm, places(steps_mm), strict=True)
    ]
    masks = [np.random.default_rng(number).integers(0, 3, (ROWS, COLUMNS), np.uint8) for number in range(5)]
    made = stack(masks, geometries)
    assert isinstance(made, Stack)
    straight = upright(made)
    data = exports.nifti(straight, ("a", "b"))
    assert isinstance(data, bytes)
    (tmp_path / "x.nii.gz").write_bytes(data)
    read = SimpleITK.ReadImage(str(tmp_path / "x.nii.gz"))
    assert np.count_nonzero(SimpleITK.GetArrayFromImage(read)) == np.count_nonzero(masks)
    for number, (mask, geometry) in enumerate(zip(masks, geometries, strict=True)):
        first = np.array(geometry.image_position_mm)
        for row, column in ((0, 0), (7, 3), (ROWS - 1, COLUMNS - 1)):
            point = first + np.array([0.8, 0.6, 0.0]) * 0.5 * column + np.array([0.0, 0.0, -1.0]) * 0.7 * row
            index = np.array(read.TransformPhysicalPointToContinuousIndex(point))
            assert np.abs(index - np.rint(index)).max() <= 0.5 + 1e-3
            assert index[2] == pytest.approx(number, abs=1e-3)
            # What lies half a pixel off may be either's neighbour: the slice as a whole says which.
            moved = np.argwhere(SimpleITK.GetArrayFromImage(read)[number])[0] - np.argwhere(mask)[0]
            assert np.abs(moved - (index[1::-1] - (row, column))).max() <= 0.5 + 1e-3
            assert read[tuple(int(i) for i in (column + moved[1], row + moved[0], number))] == mask[row, column]


def test_a_stack_with_right_angles_is_upright_as_it_is() -> None:
    made = stacked([0.0, 2.0, 4.0])
    straight = upright(made)
    np.testing.assert_array_equal(straight.masks, made.masks)
    assert exports.nifti(straight, ("a",)) == exports.nifti(made, ("a",))


def test_uneven_slices_are_no_nifti_and_are_a_surface() -> None:
    mask = np.zeros((3, ROWS, COLUMNS), np.uint8)
    mask[:2, 4:9, 4:9] = 1
    made = stack(list(mask), places([0.0, 2.0, 5.0]))
    assert isinstance(made, Stack)
    refused = exports.nifti(made, ("a",))
    assert isinstance(refused, Reject)
    assert refused.reason == Reason.UNEVEN_SLICES
    mesh = exports.surfaces(made, ("a",))["a"]
    assert mesh.is_watertight
    along = mesh.vertices @ np.cross([0.8, 0.6, 0.0], [0.0, 0.0, -1.0])
    assert along.max() - along.min() == pytest.approx(1.0 + 2.0 + 1.5)  # to the middles before, between and behind


def test_a_ball_has_its_volume_and_place() -> None:
    spacing, radius = np.array([2.0, 0.7, 0.5]), 4.0
    centre = np.array([6, 10, 12])
    grid = np.moveaxis(np.indices((13, ROWS, COLUMNS)), 0, -1)
    ball = (np.linalg.norm((grid - centre) * spacing, axis=-1) <= radius).astype(np.uint8)
    made = stack(list(ball), places([2.0 * number for number in range(13)]))
    assert isinstance(made, Stack)
    meshes = exports.surfaces(made, ("ball", "nothing"))
    assert list(meshes) == ["ball"]
    mesh = meshes["ball"]
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(ball.sum() * spacing.prod(), rel=0.15)
    assert mesh.volume > 0
    assert mesh.centroid == pytest.approx(made.points_mm(centre.astype(float)), abs=0.1)
    assert np.linalg.norm(mesh.vertices - mesh.centroid, axis=1).max() <= radius + 1.1


def test_what_touches_the_border_is_closed_and_one_voxel_is_where_it_is() -> None:
    mask = np.zeros((3, ROWS, COLUMNS), np.uint8)
    mask[0, 0, 0] = 1
    made = stack(list(mask), places([0.0, 2.0, 4.0]))
    assert isinstance(made, Stack)
    mesh = exports.surfaces(made, ("a",))["a"]
    assert mesh.is_watertight
    assert mesh.centroid == pytest.approx([-30.0, 12.0, 5.0])


def test_surfaces_come_back_from_their_files() -> None:
    mask = np.zeros((4, ROWS, COLUMNS), np.uint8)
    mask[1:3, 5:9, 5:9], mask[1:3, 12:15, 12:15] = 1, 2
    made = stack(list(mask), places([0.0, 2.0, 4.0, 6.0]))
    assert isinstance(made, Stack)
    meshes = exports.surfaces(made, ("a", "b"))
    whole = trimesh.load(io.BytesIO(exports.stl(meshes)), file_type="stl")
    assert whole.volume == pytest.approx(meshes["a"].volume + meshes["b"].volume, rel=1e-5)
    vertices = np.vstack([mesh.vertices for mesh in meshes.values()])
    assert whole.bounds == pytest.approx(np.array([vertices.min(0), vertices.max(0)]), rel=1e-5)
    scene = trimesh.load(io.BytesIO(exports.glb(meshes)), file_type="glb")
    assert set(scene.geometry) == {"a", "b"}
    low, high = scene.bounds  # metres, Y is the patient's superior
    patient = np.vstack([mesh.vertices for mesh in meshes.values()]) / 1000
    assert low == pytest.approx([patient[:, 0].min(), patient[:, 2].min(), -patient[:, 1].max()], abs=1e-6)
    assert high == pytest.approx([patient[:, 0].max(), patient[:, 2].max(), -patient[:, 1].min()], abs=1e-6)
    assert exports.glb(exports.surfaces(made, ("a", "b"))) == exports.glb(meshes)
    assert len(exports.stl({})) == 84


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"pixel_spacing_mm": None}, Reason.MISSING_ATTRIBUTE), ({"slice_thickness_mm": None}, None)],
)
def test_slices_without_a_place_are_no_stack(changes: dict[str, Any], reason: Reason | None) -> None:
    made = stack([np.zeros((ROWS, COLUMNS), np.uint8)] * 2, places([0.0, 2.0], **changes))
    assert (made.reason if isinstance(made, Reject) else None) == reason
    alone = stack([np.zeros((ROWS, COLUMNS), np.uint8)], places([0.0], **changes))
    assert isinstance(alone, Reject)
    assert alone.reason == Reason.MISSING_ATTRIBUTE
    twice = stack([np.zeros((ROWS, COLUMNS), np.uint8)] * 2, places([1.0, 1.0]))
    assert isinstance(twice, Reject)
    assert twice.reason == Reason.SERIES_DUPLICATES


def test_a_scene_without_anything_found_is_valid_and_empty():
    data = exports.glb({})
    # glTF 2.0, 4.4: magic, version, length; the first chunk's length and kind, padded to four bytes
    magic, version, length, chunk, kind = struct.unpack("<4sIII4s", data[:20])
    assert (magic, version, length, chunk, kind) == (b"glTF", 2, len(data), len(data) - 20, b"JSON")
    assert chunk % 4 == 0
    assert json.loads(data[20:]) == {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{}]}
    assert not trimesh.load(io.BytesIO(data), file_type="glb").geometry
