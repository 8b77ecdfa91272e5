"""A marked voxel of a series in any orientation comes back from the segmentation at the same patient coordinates."""

from collections.abc import Callable
from io import BytesIO

import highdicom
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import Dataset

from rayseg.dicom.reading import Header, Slice, read_headers, read_slices
from rayseg.dicom.segmentation import Kind, encode
from rayseg.dicom.series import verdict

ROWS, COLUMNS = 6, 9
SPACING_MM = (0.5, 0.75)  # as the builder has it


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    """About z, x and z again: any orientation."""
    a, b, c = angles
    about_z = [np.array([[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]]) for t in (a, c)]
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return about_z[0] @ about_x @ about_z[1]


@settings(max_examples=40, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    origin_mm=st.tuples(*[st.floats(-300, 300)] * 3),
    steps_mm=st.lists(st.floats(0.5, 9), min_size=1, max_size=4),  # gaps and uneven steps
    tilt=st.floats(-0.4, 0.4),
    grouping=st.sampled_from(["single images", "one object", "two objects"]),
    corner=st.tuples(st.sampled_from([0, ROWS - 1]), st.sampled_from([0, COLUMNS - 1])),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["BINARY", "LABELMAP"]),
)
def test_marked_voxel_comes_back_at_its_place(
    enhanced: Callable[..., Dataset],
    as_file: Callable[..., bytes],
    angles: tuple[float, float, float],
    origin_mm: tuple[float, float, float],
    steps_mm: list[float],
    tilt: float,
    grouping: str,
    corner: tuple[int, int],
    seed: int,
    kind: Kind,
) -> None:
    axes = rotation(angles)
    heights_mm = np.cumsum([0.0, *steps_mm])
    positions_mm = [np.array(origin_mm) + axes @ [0, tilt * height, height] for height in heights_mm]
    chance = np.random.default_rng(seed)
    marked = int(chance.integers(len(positions_mm)))
    words = np.zeros((len(positions_mm), ROWS, COLUMNS), np.uint16)
    words[marked][corner] = 1000
    # PS3.3 C.7.6.2.1.1: along a row by the column's index and the spacing between columns, down a column likewise.
    expected_mm = positions_mm[marked] + axes[:, 0] * SPACING_MM[1] * corner[1] + axes[:, 1] * SPACING_MM[0] * corner[0]

    orientation = (*axes[:, 0], *axes[:, 1])
    mixed = chance.permutation(len(positions_mm))
    size = {"single images": 1, "one object": len(mixed), "two objects": (len(mixed) + 1) // 2}[grouping]
    blobs = []
    for number, part in enumerate(mixed[start : start + size] for start in range(0, len(mixed), size)):
        made = enhanced(words[part], [positions_mm[k] for k in part], orientation, SOPInstanceUID=f"1.2.3.4.{number}")
        if grouping == "single images":
            classic(made)
        blobs.append(as_file(made))

    slices: list[tuple[bytes, Slice]] = []
    for blob in blobs:
        headers = read_headers(blob, len(blob))
        assert isinstance(headers, list), headers
        found = read_slices(blob, [header.frame for header in headers])
        slices += [(blob, one) for one in found if isinstance(one, Slice)]
    assert len(slices) == len(positions_mm)
    ordered = verdict([one.header for _, one in slices if isinstance(one.header, Header)])
    assert ordered.verdict == "ok", ordered
    stack = [slices[index] for index in ordered.order]
    assert [int(one.stored.max() > 0) for _, one in stack].index(1) == marked  # in the order along the normal
    data = encode(
        [blob for blob, _ in stack],
        [(one.stored > 500).astype(np.uint8) for _, one in stack],
        ("lesion",),
        "model",
        "1",
        "0",
        kind,
        frames=[one.header.frame if one.header else None for _, one in stack],
    )
    assert isinstance(data, bytes), data
    np.testing.assert_allclose(places_mm(data), [expected_mm], atol=1e-4)


def classic(dataset: Dataset) -> None:
    """Makes an enhanced object of one frame a classic CT."""
    groups, shared = dataset.PerFrameFunctionalGroupsSequence[0], dataset.SharedFunctionalGroupsSequence[0]
    dataset.ImagePositionPatient = groups.PlanePositionSequence[0].ImagePositionPatient
    dataset.ImageOrientationPatient = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    dataset.PixelSpacing = shared.PixelMeasuresSequence[0].PixelSpacing
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.SOPClassUID = uid.CTImageStorage
    del dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence, dataset.NumberOfFrames


def places_mm(segmentation: bytes) -> np.ndarray:
    """Patient coordinates of every foreground pixel, by highdicom."""
    read = highdicom.seg.segread(BytesIO(segmentation))
    shared = read.SharedFunctionalGroupsSequence[0]
    frames = read.pixel_array.reshape(-1, ROWS, COLUMNS)
    found = []
    for frame, groups in zip(frames, read.PerFrameFunctionalGroupsSequence, strict=True):
        indices = np.argwhere(frame > 0)[:, ::-1]  # column, row
        if len(indices):
            to_patient = highdicom.spatial.PixelToReferenceTransformer(
                image_position=groups.PlanePositionSequence[0].ImagePositionPatient,
                image_orientation=shared.PlaneOrientationSequence[0].ImageOrientationPatient,
                pixel_spacing=shared.PixelMeasuresSequence[0].PixelSpacing,
            )
            found.append(to_patient(indices))
    return np.concatenate(found)
