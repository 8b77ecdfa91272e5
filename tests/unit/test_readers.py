"""Segmentations as other readers see them: dcmqi into ITK volumes, and highdicom's volumes, in patient coordinates.

Of volumes with orthogonal axes and even steps, as ITK has no others. What these and other readers make of tilted stacks
and uneven steps is in docs/reference/interoperability.md.
"""

import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rayseg.dicom.segmentation import Kind, encode
from tests.unit.test_corner_voxel import rotation
from tests.unit.test_segmentation import LABELS, TILTED, assert_valid, source

SPACING_MM = (0.5, 0.75)  # as `source` has it: between rows, between columns
ROWS, COLUMNS = 12, 10
NEAR = 0.02  # of a voxel: positions and orientations are decimals of six digits


def by_dcmqi(data: bytes) -> list[SimpleITK.Image]:
    """A volume for all segments, or one for each."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "seg.dcm").write_bytes(data)
        reader = Path(sys.executable).with_name("segimage2itkimage")
        names = ["--inputDICOM", f"{folder}/seg.dcm", "--outputDirectory", folder]
        done = subprocess.run([reader, *names], check=True, capture_output=True, text=True, timeout=60)
        assert "absent" not in done.stderr  # of an attribute that it asks for
        return [SimpleITK.ReadImage(path) for path in sorted(Path(folder).glob("*.nrrd"))]


@settings(max_examples=15, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    origin_mm=st.tuples(*[st.floats(-300, 300)] * 3),
    step_mm=st.floats(0.6, 9),
    thick=st.floats(0.3, 2),
    there=st.lists(st.booleans(), min_size=0, max_size=4),  # slices between the first and the last; False is a gap
    seed=st.integers(0, 999),
    kind=st.sampled_from(["BINARY", "LABELMAP"]),
)
def test_every_voxel_lies_where_it_was(
    angles: tuple[float, float, float],
    origin_mm: tuple[float, float, float],
    step_mm: float,
    thick: float,
    there: list[bool],
    seed: int,
    kind: Kind,
) -> None:
    # To six digits, as scanners write them: VNL, below ITK, fails at cosines such as 1e-259.
    axes, chance = np.round(rotation(angles), 6), np.random.default_rng(seed)
    # Two slices side by side tell the step, and most are.
    places = [0, 1, *(number for number, one in enumerate(there, start=2) if one)]
    assume(np.mean(np.diff(places) == 1) >= 0.5)
    positions_mm = [np.round(origin_mm, 3) + axes[:, 2] * place * step_mm for place in places]
    masks = [chance.choice(3, (ROWS, COLUMNS), p=[0.8, 0.1, 0.1]).astype(np.uint8) for _ in places]
    mixed = chance.permutation(len(places))
    orientation = [*axes[:, 0], *axes[:, 1]]
    thickness = {"SliceThickness": f"{step_mm * thick:.6g}"}
    sources = [source(int(k), list(positions_mm[k]), orientation, **thickness) for k in mixed]
    data = encode(sources, [masks[k] for k in mixed], LABELS, "rayseg", "3", "0", kind)
    assert isinstance(data, bytes), data

    # PS3.3 C.7.6.2.1.1: along a row by the column's index and the spacing between columns, down a column likewise.
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    along_mm = axes[:, 0] * SPACING_MM[1] * columns[..., None] + axes[:, 1] * SPACING_MM[0] * rows[..., None]
    points_mm = np.concatenate([(position_mm + along_mm).reshape(-1, 3) for position_mm in positions_mm])
    labels = np.concatenate([mask.ravel() for mask in masks])

    images = by_dcmqi(data)
    assert len(images) == (2 if kind == "BINARY" else 1)
    found = np.zeros_like(labels)
    for image in images:
        to_index = np.linalg.inv(
            np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
        )  # as ITK defines it
        indices = (points_mm - image.GetOrigin()) @ to_index.T
        np.testing.assert_allclose(indices, np.rint(indices), atol=NEAR)
        voxels_SHW = SimpleITK.GetArrayFromImage(image)
        column, row, number = np.rint(indices).astype(int).T
        values = voxels_SHW[number, row, column]
        found = np.where(values > 0, values, found)
        assert np.count_nonzero(voxels_SHW) == np.count_nonzero(values)  # and none elsewhere
    np.testing.assert_array_equal(found, labels)

    volume = highdicom.seg.segread(BytesIO(data)).get_volume(combine_segments=True, allow_missing_positions=True)
    indices = volume.map_reference_to_indices(points_mm)
    np.testing.assert_allclose(indices, np.rint(indices), atol=NEAR)
    np.testing.assert_array_equal(volume.array[tuple(np.rint(indices).astype(int).T)], labels)
    assert np.count_nonzero(volume.array) == np.count_nonzero(labels)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize(
    ("steps_mm", "distance_mm"),
    [
        ([0, 4, 8, 12], 4.0),
        ([0, 2.5, 5, 10, 12.5], 2.5),
        ([0, 4, 8, 20, 24], 4.0),  # two are missing
        ([0, 0.6, 1.3, 1.9, 2.5], 0.625),  # of one decimal
        ([0, 3], 3.0),
        ([0, 4, 8, 15, 22], None),
        ([0, 4, 8, 9, 13], None),
        ([0, 4, 10, 14, 20], None),  # on a grid of 2 mm, which no two neighbours are apart
        ([0], None),
    ],
)
def test_the_distance_is_told_where_there_is_one(
    steps_mm: list[float], distance_mm: float | None, kind: Kind, tmp_path: Path
) -> None:
    """As SpacingBetweenSlices; SliceThickness is another, and no reader is to take it for that."""
    sources = [source(n, [0, 0, z], TILTED, SliceThickness="7") for n, z in enumerate(steps_mm)]
    empty = [np.zeros((ROWS, COLUMNS), np.uint8)] * len(sources)
    data = encode(sources, empty, LABELS, "rayseg", "3", "0", kind)
    assert isinstance(data, bytes)
    measures = pydicom.dcmread(BytesIO(data)).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    # Along the normal of the planes, which lean by 20 degrees (PS3.3 C.7.6.16.2.1).
    leaning = np.cos(np.radians(20))
    assert measures.get("SpacingBetweenSlices") == (distance_mm and pytest.approx(distance_mm * leaning, abs=1e-6))
    assert measures.SliceThickness == 7
    assert_valid(data, tmp_path / "seg.dcm")


def test_dcmqi_makes_an_upright_volume_of_one_tilt_and_none_of_the_other() -> None:
    """Which is why `nifti-upright` is there. A slice is moved by 5 mm x tan 20 degrees against the one before."""
    volumes = []
    for way in (1, -1):
        orientation = [1, 0, 0, 0, TILTED[4], way * TILTED[5]]
        sources = [source(number, [-60, 10, 5 * number], orientation) for number in range(4)]
        data = encode(sources, [np.ones((ROWS, COLUMNS), np.uint8)] * 4, LABELS, "rayseg", "3", "0", "LABELMAP")
        assert isinstance(data, bytes)
        volumes.append(by_dcmqi(data))
    (upright,) = volumes[0] or volumes[1]
    assert not (volumes[0] and volumes[1])
    last_mm = np.array(upright.TransformIndexToPhysicalPoint((0, 0, 3)))
    nearest_mm = np.abs(last_mm[1:] - [10, 15]).max()
    assert nearest_mm > 4
