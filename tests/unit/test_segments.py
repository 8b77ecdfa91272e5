"""Segmentations of our own and of other makers give the labels of the instance that their frames refer to."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from rayseg.data.labels import Labels
from rayseg.data.masks import truth
from rayseg.dicom import segment_index, segments
from rayseg.dicom.reading import Header
from rayseg.dicom.segmentation import encode
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject

ROWS, COLUMNS = 11, 13  # frames of single bits do not end at whole bytes
NAMES = ("hemorrhage", "infarct")


def source(number: int) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"1.2.3.4.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(dataset, keyword, "")
    dataset.StudyDate = dataset.StudyTime = dataset.ReferringPhysicianName = ""
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "CT", 1, number
    dataset.Rows, dataset.Columns = ROWS, COLUMNS
    dataset.PixelSpacing, dataset.SliceThickness = ["1", "1"], "5"
    dataset.ImagePositionPatient = ["0", "0", str(5 * number)]
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    return dataset


SOURCES = [source(number) for number in range(4)]
# Two classes that overlap in slice 1, one of them alone in slice 2, nothing in slices 0 and 3
PLANES = np.zeros((4, ROWS, COLUMNS, 2), bool)
PLANES[1, 2:8, 2:8, 0] = PLANES[1, 5:10, 5:12, 1] = PLANES[2, 1:3, 1:9, 1] = True


def header(number: int) -> Header:
    return Header(
        CTImageStorage, f"1.2.3.4.{number}", "1.2.3.4", "1.2.3", "", None, "CT", "", None, Geometry(ROWS, COLUMNS)
    )


def other_maker(kind: str, planes: np.ndarray, omit_empty_frames: bool = True, **options: object) -> bytes:
    """A segmentation as highdicom makes it, with labels of its own."""
    descriptions = [
        highdicom.seg.SegmentDescription(
            number, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, "MANUAL"
        )
        for number, label in enumerate(("Bleed", "Stroke"), start=1)
    ]
    stream = BytesIO()
    highdicom.seg.Segmentation(
        SOURCES, planes, kind, descriptions, generate_uid(entropy_srcs=["s"]), 5, generate_uid(entropy_srcs=["i"]), 1,
        "someone", "something", "1", "2", omit_empty_frames=omit_empty_frames, **options,
    ).save_as(stream)  # fmt: skip
    return stream.getvalue()


def classes_of(data: bytes, number: int, labels: Labels) -> np.ndarray:
    classes = truth([(data, None)], (ROWS, COLUMNS), labels, header(number))
    assert isinstance(classes, np.ndarray), classes
    return classes


EXPECTED = np.where(PLANES[..., 1], 2, np.where(PLANES[..., 0], 1, 0))  # the later class wins


@pytest.mark.parametrize("omit_empty_frames", [True, False])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_segmentations_of_another_maker(kind: str, omit_empty_frames: bool) -> None:
    planes: np.ndarray = EXPECTED.astype(np.uint8) if kind == "LABELMAP" else PLANES
    if kind == "FRACTIONAL":  # of 255: 0.3 is out, 0.5 is in
        planes = np.where(PLANES, 0.9, 0.3)
        planes[1, 9, 9, 1], planes[1, 9, 10, 1] = 0.5, 0.3
    data = other_maker(
        kind, planes, omit_empty_frames, **({"max_fractional_value": 200} if kind == "FRACTIONAL" else {})
    )
    expected = EXPECTED.copy()
    if kind == "FRACTIONAL":
        expected[1, 9, 10] = 0
    for number in range(4):
        by_number = classes_of(data, number, Labels(NAMES))
        assert np.array_equal(by_number, expected[number])
        by_label = classes_of(data, number, Labels(NAMES, sources={"Bleed": "hemorrhage", "Stroke": "infarct"}))
        assert np.array_equal(by_label, expected[number])
        assert np.array_equal(classes_of(data, number, Labels(("any",))), expected[number] > 0)
        turned = Labels(NAMES, values={1: "infarct", 2: "background"} | {3: "hemorrhage"})
        if kind == "BINARY":
            assert np.array_equal(classes_of(data, number, turned), PLANES[number, ..., 0] * 2)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_our_own_segmentations_come_back(kind: str) -> None:
    data = encode(SOURCES, list(EXPECTED.astype(np.uint8)), NAMES, "m", "1", "d", kind)  # type: ignore[arg-type]
    assert isinstance(data, bytes)
    for number in range(4):
        assert np.array_equal(classes_of(data, number, Labels(NAMES)), EXPECTED[number])


def test_an_image_that_it_does_not_refer_to_has_no_mask() -> None:
    data = other_maker("BINARY", PLANES)
    for other in (replace(header(77), series_instance_uid="1.2.3.77"), None):
        reject = truth([(data, None)], (ROWS, COLUMNS), Labels(NAMES), other)
        assert isinstance(reject, Reject)
        assert reject.reason == Reason.NO_MASK
    # Beside one that does it adds nothing.
    dataset = pydicom.dcmread(BytesIO(data))
    stream = BytesIO()
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID += ".9"
    dataset.ReferencedSeriesSequence[0].SeriesInstanceUID += ".9"
    for instance in dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence:
        instance.ReferencedSOPInstanceUID += ".9"
    dataset.save_as(stream)
    both = truth([(stream.getvalue(), None), (data, None)], (ROWS, COLUMNS), Labels(NAMES), header(1))
    assert np.array_equal(both, EXPECTED[1])


def test_a_segment_that_no_class_is_named_for_is_an_error() -> None:
    data = other_maker("BINARY", PLANES)
    for labels in (Labels(("a",), values={1: "a"}), Labels(("a",), sources={"Bleed": "a"})):
        reject = truth([(data, None)], (ROWS, COLUMNS), labels, header(2))
        assert isinstance(reject, Reject)
        assert reject.reason == Reason.MASK_VALUES


def test_real_segmentations_of_every_encoding_agree(shared_data: Path) -> None:
    folder = shared_data / "dicom-corpus/pydicom-data/data_store/data"
    paths = sorted(folder.glob("liver*.dcm"))
    assert len(paths) == 9  # native, big endian, deflated, JPEG 2000 and RLE of one object, whole bytes a frame and not
    twin = pydicom.dcmread(folder / "liver.dcm")
    expected = twin.pixel_array
    for path in paths:
        segmentation = segment_index.read(path.read_bytes())
        assert isinstance(segmentation, segment_index.Segmentation)
        for index, groups in enumerate(twin.PerFrameFunctionalGroupsSequence):
            instance = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            found = segments.of_slice(segmentation, replace(header(0), sop_instance_uid=instance))
            assert isinstance(found, list), path.name
            ((number, label, inside),) = found
            assert (number, label) == (1, "Liver")
            if "nonbyte" in path.name:  # its right and lower border are cut off, all of them background
                inside = np.pad(inside, ((0, 2), (0, 2)))
            assert np.array_equal(inside, expected[index] > 0), path.name


def test_frames_of_a_multi_frame_source_are_told_apart() -> None:
    dataset = pydicom.dcmread(BytesIO(other_maker("BINARY", PLANES)))
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        source.ReferencedFrameNumber = int(source.ReferencedSOPInstanceUID.rpartition(".")[2]) + 1
        source.ReferencedSOPInstanceUID = "1.2.3.4.0"
    stream = BytesIO()
    dataset.save_as(stream)
    for frame in range(4):
        for one in (header(0), replace(placed(frame), sop_instance_uid="1.2.3.4.0")):
            of_frame = replace(one, frame=frame)
            classes = truth([(stream.getvalue(), None)], (ROWS, COLUMNS), Labels(NAMES), of_frame, frame)
            assert np.array_equal(classes, EXPECTED[frame])
        # At another time in the same place: a frame that names one of them is of that one alone.
        later = replace(placed(frame), sop_instance_uid="1.2.3.4.0", frame=frame + 4)
        classes = truth([(stream.getvalue(), None)], (ROWS, COLUMNS), Labels(NAMES), later, frame + 4)
        assert isinstance(classes, np.ndarray)
        assert not classes.any()


def nameless(data: bytes, listed: bool = False, **frame_of_reference: str) -> bytes:
    """The segmentation without a word on which images its frames are of; `listed`: but on which series."""
    dataset = pydicom.dcmread(BytesIO(data))
    for groups in [*dataset.PerFrameFunctionalGroupsSequence, *dataset.SharedFunctionalGroupsSequence]:
        if "DerivationImageSequence" in groups:
            del groups.DerivationImageSequence
    if not listed:
        del dataset.ReferencedSeriesSequence
    for keyword, value in frame_of_reference.items():
        setattr(dataset, keyword, value)
    stream = BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def placed(number: int, **changes: object) -> Header:
    """The header of a source with its place."""
    values = {
        "pixel_spacing_mm": (1.0, 1.0),
        "image_position_mm": (0.0, 0.0, 5.0 * number),
        "image_orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    } | changes
    geometry = Geometry(ROWS, COLUMNS, **values)  # type: ignore[arg-type]
    return replace(header(number), geometry=geometry, frame_of_reference_uid="1.2.3.5")


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_frames_that_name_no_image_are_of_the_one_they_lie_upon(kind: str) -> None:
    planes = EXPECTED.astype(np.uint8) if kind == "LABELMAP" else PLANES
    whole = nameless(other_maker(kind, planes, omit_empty_frames=False))
    for number in range(4):
        # Named otherwise, as in a copy of the series under new UIDs; a tenth of a pixel is rounding.
        slice = replace(placed(number, image_position_mm=(0.1, 0.0, 5.0 * number)), sop_instance_uid="9.9")
        classes = truth([(whole, None)], (ROWS, COLUMNS), Labels(NAMES), slice)
        assert np.array_equal(classes, EXPECTED[number])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_position_mm": (0.0, 0.0, 7.5)}, Reason.MASK_MISMATCH),  # between two slices
        ({"image_position_mm": (0.5, 0.0, 5.0)}, Reason.MASK_MISMATCH),
        ({"image_orientation": (0.8, 0.6, 0.0, -0.6, 0.8, 0.0)}, Reason.MASK_MISMATCH),
        ({"pixel_spacing_mm": (1.1, 1.0)}, Reason.MASK_MISMATCH),
        ({"image_position_mm": None}, Reason.NO_MASK),
    ],
)
def test_frames_beside_an_image_are_not_its_mask(changes: dict[str, object], reason: Reason) -> None:
    data = nameless(other_maker("BINARY", PLANES, omit_empty_frames=False))
    reject = truth([(data, None)], (ROWS, COLUMNS), Labels(NAMES), placed(1, **changes), missing_mask="reject")
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    elsewhere = nameless(other_maker("BINARY", PLANES), FrameOfReferenceUID="1.2.3.99")
    assert isinstance(truth([(elsewhere, None)], (ROWS, COLUMNS), Labels(NAMES), placed(1)), Reject)


def test_a_listed_image_without_a_frame_is_background_where_the_grid_is_its_own() -> None:
    sparse = nameless(other_maker("BINARY", PLANES), listed=True)  # frames on slices 1 and 2
    for number in range(4):
        classes = truth([(sparse, None)], (ROWS, COLUMNS), Labels(NAMES), placed(number))
        assert np.array_equal(classes, EXPECTED[number])
    silent = [(nameless(other_maker("BINARY", PLANES)), None)]
    unlisted = truth(silent, (ROWS, COLUMNS), Labels(NAMES), placed(0), missing_mask="reject")
    assert isinstance(unlisted, Reject)
    assert unlisted.reason == Reason.NO_MASK
    empty = truth(silent, (ROWS, COLUMNS), Labels(NAMES), placed(0), missing_mask="empty")
    assert isinstance(empty, np.ndarray)
    assert not empty.any()
    # Of another grid nothing can be said: silence would be a mask of background.
    coarse = truth([(sparse, None)], (ROWS, COLUMNS), Labels(NAMES), placed(0, pixel_spacing_mm=(0.5, 0.5)))
    assert isinstance(coarse, Reject)
    assert coarse.reason == Reason.MASK_MISMATCH


def named(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    return item


def regridded(kind: str, grid: np.ndarray, planes: np.ndarray, names: str | None = None, **attributes: object) -> bytes:
    """PLANES on another grid, (column, row, slice) to millimetres.

    Frames name all images, or the one of their number, or as highdicom has it: the one in their plane.
    """
    spacing_mm = np.linalg.norm(grid[:3, :3], axis=0)
    row, column = grid[:3, 0] / spacing_mm[0], grid[:3, 1] / spacing_mm[1]
    positions = [(grid @ (0, 0, number, 1))[:3].tolist() for number in range(len(planes))]
    data = other_maker(
        kind,
        planes,
        omit_empty_frames=False,
        plane_positions=[highdicom.PlanePositionSequence("PATIENT", position) for position in positions],
        plane_orientation=highdicom.PlaneOrientationSequence("PATIENT", [*row, *column]),
        pixel_measures=highdicom.PixelMeasuresSequence(spacing_mm[[1, 0]].tolist(), spacing_mm[2], spacing_mm[2]),
    )
    dataset = pydicom.dcmread(BytesIO(data))
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    for number, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        if names is not None:
            of_frame = SOURCES if names == "all" else [SOURCES[number % len(planes)]]
            derivation = Dataset()
            derivation.SourceImageSequence = [named(source) for source in of_frame]
            groups.DerivationImageSequence = [derivation]
    stream = BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


GRID = np.diag([1.0, 1.0, 5.0, 1.0])  # of the sources
SWAPPED = GRID[:, [1, 0, 2, 3]]
KINDS = ["BINARY", "FRACTIONAL", "LABELMAP"]


def of_kind(kind: str) -> np.ndarray:
    return EXPECTED.astype(np.uint8) if kind == "LABELMAP" else PLANES * (1.0 if kind == "FRACTIONAL" else True)


def shifted(grid: np.ndarray, *voxels: float) -> np.ndarray:
    moved = grid.copy()
    moved[:3, 3] = (grid @ (*voxels, 1))[:3]
    return moved


@pytest.mark.parametrize("names", [None, "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_where_its_plane_is_whichever_image_it_names(kind: str, names: str | None) -> None:
    planes = of_kind(kind)
    grids = [
        (shifted(GRID, 12, 0, 0) @ np.diag([-1.0, 1, 1, 1]), planes[:, :, ::-1]),  # mirrored
        (shifted(GRID, 0, 10, 3) @ np.diag([1.0, -1, -1, 1]), planes[::-1, ::-1]),
        (SWAPPED, planes.swapaxes(1, 2)),  # transposed
        (
            shifted(SWAPPED, 10, 0, 0) @ np.diag([-1.0, 1, 1, 1]),
            planes.swapaxes(1, 2)[:, :, ::-1],
        ),  # turned by 90 degrees
        (shifted(GRID, 1, 1, 1), planes[1:3, 1:, 1:]),  # cut
        (shifted(GRID, -2, -3, 0), np.pad(planes, [(0, 0), (3, 0), (2, 4)] + [(0, 0)] * (planes.ndim - 3))),  # more
    ]
    for grid, values in grids:
        data = regridded(kind, grid, np.ascontiguousarray(values), names)
        for number in range(4):
            classes = truth([(data, None)], (ROWS, COLUMNS), Labels(NAMES), placed(number))
            assert isinstance(classes, np.ndarray), classes
            assert np.array_equal(classes, EXPECTED[number])


@pytest.mark.parametrize(
    ("grid", "word"),
    [
        (GRID @ np.diag([0.5, 0.5, 1, 1]), "spacing"),
        (GRID @ np.diag([1.04, 1.04, 1, 1]), "beside"),
        (shifted(GRID, 0.5, 0, 0), "beside"),
        (shifted(GRID, 0, 0, 0.4), "beside a plane"),
        (shifted(GRID, 0, 0, 0.5), "beside a plane"),
        (np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]]), "orientation"),
        (GRID[:, [2, 0, 1, 3]] @ np.diag([1, 1, 2.5, 1]), "spacing"),  # frames across the images
    ],
)
@pytest.mark.parametrize("names", [None, "all"])
def test_a_frame_on_another_grid_is_refused_by_name(grid: np.ndarray, word: str, names: str | None) -> None:
    data = regridded("BINARY", grid, PLANES, names)
    reject = truth([(data, None)], (ROWS, COLUMNS), Labels(NAMES), placed(1))
    assert isinstance(reject, Reject)
    assert reject.reason == Reason.MASK_MISMATCH
    assert word in reject.detail


def test_names_do_not_place_a_frame_that_lies_elsewhere() -> None:
    far = regridded("BINARY", shifted(GRID, 0, 0, 40), PLANES, "own")
    for number in range(4):
        reject = truth([(far, None)], (ROWS, COLUMNS), Labels(NAMES), placed(number))
        assert isinstance(reject, Reject)
        assert reject.reason == Reason.MASK_MISMATCH


def test_in_another_frame_of_reference_frames_are_of_the_images_that_they_name_and_lie_upon() -> None:
    turned = shifted(GRID, 12, 0, 0) @ np.diag([-1.0, 1, 1, 1])
    data = regridded("BINARY", turned, PLANES[:, :, ::-1], FrameOfReferenceUID="1.2.3.99")
    for number in range(4):
        classes = truth([(data, None)], (ROWS, COLUMNS), Labels(NAMES), placed(number))
        assert np.array_equal(classes, EXPECTED[number])
        copy = replace(placed(number), sop_instance_uid="9.9", series_instance_uid="9")
        reject = truth([(data, None)], (ROWS, COLUMNS), Labels(NAMES), copy)
        assert isinstance(reject, Reject)
        assert reject.reason == Reason.NO_MASK


def test_of_images_without_a_place_the_name_counts_unless_it_is_of_several_frames() -> None:
    for number in range(4):
        classes = truth([(other_maker("BINARY", PLANES), None)], (ROWS, COLUMNS), Labels(NAMES), header(number))
        assert np.array_equal(classes, EXPECTED[number])
    reject = truth([(regridded("BINARY", GRID, PLANES, "all"), None)], (ROWS, COLUMNS), Labels(NAMES), header(1))
    assert isinstance(reject, Reject)
    assert reject.reason == Reason.MASK_MISMATCH


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_sparse_segmentation_leaves_out_is_as_the_layout_says(kind: str) -> None:
    dataset = pydicom.dcmread(BytesIO(other_maker(kind, of_kind(kind))))
    (series,) = dataset.ReferencedSeriesSequence
    series.ReferencedInstanceSequence = list(series.ReferencedInstanceSequence)[1:3]  # as dcmqi lists them
    stream = BytesIO()
    dataset.save_as(stream)
    sparse = stream.getvalue()
    for number in range(4):
        for slice in (placed(number), replace(placed(number), sop_instance_uid=f"9.{number}", series_instance_uid="9")):
            empty = truth([(sparse, None)], (ROWS, COLUMNS), Labels(NAMES), slice, missing_mask="empty")
            assert np.array_equal(empty, EXPECTED[number])
            strict = truth([(sparse, None)], (ROWS, COLUMNS), Labels(NAMES), slice, missing_mask="reject")
            assert isinstance(strict, Reject if number in (0, 3) else np.ndarray)
        other = replace(placed(number), sop_instance_uid="9.9", series_instance_uid="9", frame_of_reference_uid="9.1")
        reject = truth([(sparse, None)], (ROWS, COLUMNS), Labels(NAMES), other, missing_mask="empty")
        assert isinstance(reject, Reject)
        assert reject.reason == Reason.NO_MASK
