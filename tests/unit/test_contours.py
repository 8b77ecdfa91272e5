"""Contours of RT structure sets become the pixels whose centres they hold; plastimatch says the same."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from rayseg.data.labels import Labels
from rayseg.data.masks import truth
from rayseg.dicom.reading import Header
from rayseg.records import MissingMask, Reason, Reject
from tests.unit.structures import Contour, structure_set
from tests.unit.test_mask_places import CORNER_MM, SHAPE, SPACING_MM, STEP_MM, headers, series, turned, written

AXES = turned(0)
SOURCES = series(AXES)
HEADERS = headers(SOURCES)
LABELS = Labels(("liver", "kidney"), sources={"Liver": "liver", "Kidney L": "kidney", "Body": "background"})


def drawn(
    vertices: object, slice: float, kind: str = "CLOSED_PLANAR", names: bool = True, axes: np.ndarray = AXES
) -> Contour:
    """A contour of rows and columns in the plane of a slice, whole ones naming it."""
    rows, columns = np.array(vertices, float).T[..., np.newaxis]
    points_mm = CORNER_MM + slice * axes[:, 2] * STEP_MM
    points_mm = points_mm + columns * axes[:, 0] * SPACING_MM[1] + rows * axes[:, 1] * SPACING_MM[0]
    return kind, points_mm, SOURCES[int(slice)].SOPInstanceUID if names and slice == int(slice) else None


def square(low: float, high: float) -> list[tuple[float, float]]:
    return [(low, low), (low, high), (high, high), (high, low)]


def flower(row: float, column: float, radius: float) -> np.ndarray:
    """Neither convex nor through centres."""
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    far = radius * (1 + 0.35 * np.sin(3 * angles))
    return np.stack([row + far * np.sin(angles), column + far * np.cos(angles)], axis=1)


def read(
    data: bytes, of: list[Header] = HEADERS, labels: Labels = LABELS, missing_mask: MissingMask = "reject"
) -> list[np.ndarray | Reject]:
    return [truth([(data, None)], SHAPE, labels, header, missing_mask=missing_mask) for header in of]


def by_plastimatch(folder: Path, data: bytes, *options: str) -> np.ndarray:
    """The ROI that is first by its name, (slices, rows, columns)."""
    (folder / "set.dcm").write_bytes(data)
    images = written(folder / "images", SOURCES)
    program = Path(sys.executable).with_name("plastimatch")
    files = ["--input", folder / "set.dcm", "--referenced-ct", images, "--output-prefix", folder / "out"]
    subprocess.run(
        [program, "convert", *files, "--prefix-format", "nrrd", *options], check=True, capture_output=True, timeout=60
    )
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(min((folder / "out").glob("*.nrrd")))))


@pytest.mark.parametrize("options", [(), ("--xor-contours",)])
def test_plastimatch_agrees(tmp_path: Path, options: tuple[str, ...]) -> None:
    keyhole = [*square(1.3, 9.6), (1.3, 1.3), (4.2, 4.2), *reversed(square(4.2, 6.7)[1:]), (4.2, 4.2)]
    contours = [
        drawn(flower(5.2, 7.3, 3.1), 0),
        drawn(keyhole, 1),
        drawn(flower(3.1, 4.3, 2.2), 2),
        drawn(flower(8.4, 11.2, 2.4), 2),
        drawn(flower(2.4, 14.6, 3.3), 3),  # reaches beyond the image
    ]
    if options:  # a hole, and an island in it; plastimatch fills both unless told
        contours += [drawn(square(0.4, 10.3), 4), drawn(square(2.3, 8.4), 4), drawn(square(4.2, 6.4), 4)]
    else:
        contours += [drawn(flower(4.3, 5.6, 2.3), 4), drawn(flower(5.3, 8.1, 2.3), 4)]  # these overlap
    data = structure_set(SOURCES, {"Liver": contours})
    expected = by_plastimatch(tmp_path, data, *options)
    assert [int(one.sum() > 9) for one in expected] == [1, 1, 1, 1, 1, 0]
    for found, wanted in zip(read(data), expected, strict=True):
        assert isinstance(found, np.ndarray), found
        assert np.array_equal(found, wanted)


def test_contours_through_centres_hold_these_and_holes_end_beside_their_own() -> None:
    """As programs write them that follow the outermost pixels of a mask."""
    axes = turned(20)
    outer, inner = square(2, 9), square(4, 7)
    data = structure_set(
        SOURCES, {"Liver": [drawn(outer, 1, axes=axes), drawn(inner, 1, axes=axes), drawn(outer, 1, axes=axes)]}
    )
    expected = np.zeros(SHAPE, np.uint8)
    expected[2:10, 2:10], expected[5:7, 5:7] = 1, 0
    found = read(data, headers(series(axes)))[1]
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, expected)


def test_exclusive_contours_leave_out_where_they_overlap() -> None:
    one, other = square(0.5, 6.5), square(3.5, 10.5)
    kind = "CLOSEDPLANAR_XOR"
    data = structure_set(SOURCES, {"Liver": [drawn(one, 2, kind), drawn(other, 2, kind)]})
    expected = np.zeros(SHAPE, np.uint8)
    expected[1:7, 1:7] ^= 1
    expected[4:11, 4:11] ^= 1
    assert np.array_equal(read(data)[2], expected)


def test_regions_are_classes_by_their_names_and_points_are_none() -> None:
    rois = {
        "Body": [drawn(square(0.5, 10.5), number) for number in range(3)],
        "Kidney L": [drawn(square(3.5, 6.5), 1)],
        "Liver": [drawn(square(1.5, 4.5), 1), drawn([(8, 8)], 1, "POINT")],
        "Isocenter": [drawn([(5, 5)], 2, "POINT")],
    }
    data = structure_set(SOURCES, rois)
    expected = np.zeros((6, *SHAPE), np.uint8)
    expected[1, 2:5, 2:5] = 1
    expected[1, 4:7, 4:7] = 2
    for found, wanted in zip(read(data), expected, strict=True):
        assert np.array_equal(found, wanted)
    unnamed = read(structure_set(SOURCES, {"Spleen": [drawn(square(1.5, 4.5), 1)]}))
    assert [getattr(one, "reason", None) for one in unnamed] == [None, Reason.MASK_VALUES, None, None, None, None]


@pytest.mark.parametrize(
    ("contour", "word"),
    [
        (drawn(square(1.5, 4.5), 1.4), "beside"),
        (("CLOSED_PLANAR", drawn(square(1.5, 4.5), 1.4)[1], SOURCES[1].SOPInstanceUID), "beside"),
        (("CLOSED_PLANAR", drawn(square(1.5, 4.5), 4)[1], SOURCES[1].SOPInstanceUID), "beside"),
        (("CLOSED_PLANAR", CORNER_MM + np.array([[1, 1, 2.0], [5, 1, 6], [5, 5, 6], [1, 5, 2]]), None), "crosses"),
        (drawn(square(1.5, 4.5), 1, "OPEN_PLANAR"), "OPEN_PLANAR"),
    ],
)
def test_contours_of_no_slice_or_without_an_inside_are_refused_by_name(contour: Contour, word: str) -> None:
    other = drawn(square(5.5, 9.5), 3)
    found = read(structure_set(SOURCES, {"Liver": [contour, other]}))[1]
    assert isinstance(found, Reject)
    assert found.reason == Reason.MASK_MISMATCH
    assert word in found.detail


def test_slices_of_a_series_that_it_names_are_background_and_others_have_no_mask() -> None:
    rois = {"Liver": [drawn(square(1.5, 4.5), 1, names=False)]}
    foreground = [False, True, False, False, False, False]
    assert [one.any() for one in read(structure_set(SOURCES, rois)) if isinstance(one, np.ndarray)] == foreground
    silent = structure_set(SOURCES, rois, lists=False)
    assert [isinstance(one, np.ndarray) for one in read(silent)] == foreground
    assert [one.any() for one in read(silent, missing_mask="empty") if isinstance(one, np.ndarray)] == foreground
    # Other series: by their place where that is the same, else not at all.
    copies = series(AXES)
    for number, copy in enumerate(copies):
        copy.SeriesInstanceUID, copy.SOPInstanceUID = "1.2.9", f"1.2.9.{number}"
        copy.ImagePositionPatient = [float(value) for value in np.add(copy.ImagePositionPatient, [0, 0, 4])]
    moved = read(structure_set(SOURCES, rois), headers(copies), missing_mask="empty")
    assert [getattr(one, "reason", None) for one in moved] == [None, *[Reason.NO_MASK] * 5]
    elsewhere = structure_set(copies, rois, space="1.2.3.99")
    assert {getattr(one, "reason", None) for one in read(elsewhere, missing_mask="empty")} == {Reason.NO_MASK}
