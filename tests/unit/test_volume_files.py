"""NRRD and MetaImage volumes, and all three formats by one interface: SimpleITK and pynrrd write, SimpleITK judges."""

import gzip
import io
import itertools
import zlib
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest
import SimpleITK

from rayseg.data import manifest
from rayseg.dicom import volumes
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Slice, read_slice, read_slices
from rayseg.dicom.voxels import Volume
from rayseg.records import Reason, Reject
from serving.upload import Limits, Series, read

SHAPE = (5, 4, 3)
VALUES = np.random.default_rng(7).integers(0, 200, SHAPE).astype(np.int16)
SPACING, ORIGIN = (0.5, 0.75, 4.0), (1.0, -2.0, 3.0)


def volume_of(data: bytes) -> Volume:
    volume = volumes.read_volume(data)
    assert isinstance(volume, Volume), volume
    return volume


def values_of(data: bytes, number: int = 0) -> np.ndarray:
    """(slices, rows, columns)"""
    found = volumes.image(data, number)
    assert not isinstance(found, Reject), found
    stored, slope, intercept = found
    return stored * slope + intercept


def judged(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine as SimpleITK has them once the axes run to the left, back and head."""
    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image), affine


def agrees(path: Path, atol: float = 1e-4) -> None:
    data = path.read_bytes()
    values, affine = judged(path)
    assert np.array_equal(values_of(data), values)
    assert np.allclose(volume_of(data).affine, affine, atol=atol)
    assert np.array_equal(volumes.labels(data), values)


DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_simpleitk_writes_is_read_as_it_reads_it(
    tmp_path: Path, suffix: str, compressed: bool, dtype: str
) -> None:
    seed = [DTYPES.index(dtype), compressed, len(suffix)]
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(np.eye(3) + 0.15 * random.normal(size=(3, 3)))
    turn = turn * np.sign(np.diag(turn)) @ np.eye(3)[random.permutation(3)] @ np.diag(random.choice([-1, 1], 3))
    image = SimpleITK.GetImageFromArray(VALUES.clip(0, 127).T.astype(dtype))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(turn.ravel())
    path = tmp_path / f"x{suffix}"
    SimpleITK.WriteImage(image, str(path), compressed)
    agrees(path)
    data = path.read_bytes()
    assert volumes.is_volume(data[:600])
    assert volume_of(data).placed


def nrrd_file(values: np.ndarray = VALUES, **fields: Any) -> bytes:
    """As pynrrd writes it; a field of None is left out."""
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag(SPACING),
        "space origin": ORIGIN,
        "encoding": "raw",
    } | {name.replace("_", " "): value for name, value in fields.items()}
    stream = io.BytesIO()
    nrrd.write(stream, values, {name: value for name, value in header.items() if value is not None})
    return stream.getvalue()


@pytest.mark.parametrize("encoding", ["raw", "gzip", "text"])
@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (1, 1, 1)),
        ("LPS", (1, 1, 1)),
        ("right-anterior-superior", (-1, -1, 1)),
        ("RAS", (-1, -1, 1)),
        ("left-anterior-superior", (1, -1, 1)),
        ("LAS", (1, -1, 1)),
    ],
)
def test_the_space_of_an_nrrd_says_which_way_its_axes_run(
    tmp_path: Path, space: str, signs: tuple[int, int, int], encoding: str
) -> None:
    data = nrrd_file(space=space, encoding=encoding)
    volume = volume_of(data)
    assert volume.placed
    # By hand: the axis is turned where it runs the other way, and its last value is the first then.
    last = [SPACING[axis] * (SHAPE[axis] - 1) for axis in range(3)]
    corners = [min(sign * ORIGIN[axis], sign * (ORIGIN[axis] + last[axis])) for axis, sign in enumerate(signs)]
    assert volume.place(0)["image_position_mm"] == pytest.approx(corners)
    flips = tuple(slice(None, None, sign) for sign in signs)
    assert np.array_equal(values_of(data), VALUES[flips].T)
    if len(space) > 3 and encoding != "text":  # ITK does not know the letters
        (tmp_path / "x.nrrd").write_bytes(data)
        agrees(tmp_path / "x.nrrd")


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "float32", "float64", "int64"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_both_byte_orders_of_an_nrrd(tmp_path: Path, dtype: str, encoding: str) -> None:
    for order in "<>":
        data = nrrd_file(VALUES.astype(np.dtype(dtype).newbyteorder(order)), encoding=encoding)
        assert (b"endian: big" if order == ">" else b"endian: little") in data
        (tmp_path / "x.nrrd").write_bytes(data)
        agrees(tmp_path / "x.nrrd")


def test_skipped_lines_and_bytes_of_an_nrrd() -> None:
    head, _, content = nrrd_file().partition(b"\n\n")
    assert np.array_equal(values_of(head + b"\nline skip: 2\nbyte skip: 3\n\na\nb\nxyz" + content), VALUES.T)
    assert np.array_equal(values_of(head + b"\nbyte skip: -1\n\nwhatever" + content), VALUES.T)
    zipped = head.replace(b"encoding: raw", b"encoding: gzip") + b"\nbyte skip: 3\n\n" + gzip.compress(b"xyz" + content)
    assert np.array_equal(values_of(zipped), VALUES.T)
    assert np.array_equal(values_of(head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + content), VALUES.T)


@pytest.mark.parametrize(("unit", "in_mm"), [("mm", 1), ("um", 1e-3), ("µm", 1e-3), ("cm", 10), ("m", 1000)])
def test_the_units_of_an_nrrd(unit: str, in_mm: float) -> None:
    head, _, content = nrrd_file().partition(b"\n\n")
    data = head + f'\nspace units: "{unit}" "{unit}" "{unit}"\n\n'.encode() + content
    volume = volume_of(data)
    expected = np.diag([*SPACING, 1.0])
    expected[:3, 3] = ORIGIN
    expected[:3] *= in_mm
    assert np.allclose(volume.affine, expected, rtol=1e-9)


def test_units_that_are_not_known_are_refused() -> None:
    head, _, content = nrrd_file().partition(b"\n\n")
    found = volumes.read_volume(head + b'\nspace units: "inch" "inch" "inch"\n\n' + content)
    assert isinstance(found, Reject)
    assert "space units" in found.detail


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("encoding", ["raw", "gzip", "text"])
def test_a_volume_of_several_in_an_nrrd_is_chosen_wherever_their_axis_stands(place: int, encoding: str) -> None:
    series = np.stack([VALUES + 1000 * number for number in range(4)], axis=place)
    directions = np.insert(np.diag(SPACING), place, np.nan, axis=0)
    data = nrrd_file(series, encoding=encoding, space_directions=directions)
    refused = volumes.read_volume(data)
    assert isinstance(refused, Reject)
    assert refused.reason == Reason.UNSUPPORTED_MULTIFRAME
    for number in (0, 3):
        assert np.array_equal(values_of(data, number), VALUES.T + 1000 * number)
        slices = list(read_slices(data, [number * SHAPE[2] + index for index in range(SHAPE[2])]))
        assert [one.values()[1, 2] for one in slices if isinstance(one, Slice)] == [
            VALUES[2, 1, index] + 1000 * number for index in range(SHAPE[2])
        ]


def test_a_segmentation_of_slicer_is_read_where_it_is_one_label_map() -> None:
    segments = {"Segment0_LabelValue": "1", "Segment0_Layer": "0", "Segment1_LabelValue": "2", "Segment1_Layer": "0"}
    marks = (VALUES % 3).astype(np.uint8)
    assert np.array_equal(volumes.labels(nrrd_file(marks, encoding="gzip", **segments)), marks.T)
    directions = np.insert(np.diag(SPACING), 0, np.nan, axis=0)
    one = nrrd_file(marks[np.newaxis], space_directions=directions, kinds=["list", "domain", "domain", "domain"])
    assert np.array_equal(volumes.labels(one), marks.T)
    several = nrrd_file(np.stack([marks, marks]), space_directions=directions)
    found = volumes.labels(several)
    assert isinstance(found, Reject)
    assert (found.reason, "layers" in found.detail) == (Reason.UNSUPPORTED_MULTIFRAME, True)


def test_without_a_space_an_nrrd_has_spacings_and_no_place() -> None:
    without = {"space": None, "space_directions": None, "space_origin": None}
    volume = volume_of(nrrd_file(**without, spacings=SPACING))
    assert not volume.placed
    assert volume.place(0)["pixel_spacing_mm"] == (0.75, 0.5)
    assert volume.place(0)["slice_thickness_mm"] == 4
    assert not volume_of(nrrd_file(space=None, space_dimension=3)).placed
    assert not volume_of(nrrd_file(space_origin=None)).placed
    assert not volume_of(nrrd_file(space="scanner-xyz")).placed


def metaimage(head: str, content: bytes) -> bytes:
    return f"{head}\nElementDataFile = LOCAL\n".encode() + content


PLAIN = "ObjectType = Image\nNDims = 3\nDimSize = 5 4 3\nElementSpacing = 0.5 0.75 4\nOffset = 1 -2 3"
TURNED = "TransformMatrix = 0 1 0 -1 0 0 0 0 1"  # the first axis runs to the back, the second to the right


@pytest.mark.parametrize(
    ("head", "content"),
    [
        ("ElementType = MET_SHORT\nBinaryDataByteOrderMSB = True", VALUES.astype(">i2").tobytes("F")),
        ("ElementType = MET_SHORT\nElementByteOrderMSB = True", VALUES.astype(">i2").tobytes("F")),
        ("ElementType = MET_DOUBLE\nBinaryData = True", VALUES.astype("<f8").tobytes("F")),
        ("ElementType = MET_LONG", VALUES.astype("<i4").tobytes("F")),
        ("ElementType = MET_ULONG_LONG", VALUES.astype("<u8").tobytes("F")),
        ("ElementType = MET_UCHAR\nBinaryData = False", " ".join([*map(str, VALUES.ravel("F")), ""]).encode()),
        (
            "ElementType = MET_USHORT\nCompressedData = True\nBinaryDataByteOrderMSB = True",
            zlib.compress(VALUES.astype(">u2").tobytes("F")),
        ),
        ("AnatomicalOrientation = LPI\nElementType = MET_INT", VALUES.astype("<i4").tobytes("F")),
    ],
)
@pytest.mark.parametrize("turn", ["TransformMatrix = 1 0 0 0 1 0 0 0 1", TURNED, "Rotation = 0 1 0 -1 0 0 0 0 1"])
def test_what_a_metaimage_says_is_read_as_itk_does(tmp_path: Path, head: str, content: bytes, turn: str) -> None:
    if "CompressedData" in head:
        head += f"\nCompressedDataSize = {len(content)}"  # ITK wants it
    data = metaimage(f"{PLAIN}\n{turn}\n{head}", content)
    (tmp_path / "x.mha").write_bytes(data)
    agrees(tmp_path / "x.mha")
    assert volume_of(data).placed


def test_channels_and_times_of_a_metaimage_are_volumes(tmp_path: Path) -> None:
    pair = np.stack([VALUES, VALUES + 500])
    colours = metaimage(
        f"{PLAIN}\nElementNumberOfChannels = 2\nElementType = MET_SHORT", pair.astype("<i2").tobytes("F")
    )
    image = SimpleITK.GetImageFromArray(pair.transpose(0, 3, 2, 1).copy(), isVector=False)
    assert image.GetDimension() == 4
    SimpleITK.WriteImage(image, str(tmp_path / "x.mha"))
    for data, number in itertools.product((colours, (tmp_path / "x.mha").read_bytes()), (0, 1)):
        assert isinstance(volumes.read_volume(data), Reject)
        assert np.array_equal(values_of(data, number), VALUES.T + 500 * number)


def test_a_metaimage_without_directions_has_no_place() -> None:
    content = VALUES.astype("<i2").tobytes("F")
    volume = volume_of(metaimage(f"{PLAIN}\nElementType = MET_SHORT", content))
    assert not volume.placed
    assert volume.place(0)["pixel_spacing_mm"] == (0.75, 0.5)


def test_a_single_slice_of_each_format(tmp_path: Path) -> None:
    plane = SimpleITK.GetImageFromArray(VALUES[:, :, 0].T)
    plane.SetSpacing(SPACING[:2])
    for suffix in (".nrrd", ".mha", ".nii.gz"):
        SimpleITK.WriteImage(plane, str(tmp_path / f"x{suffix}"))
        data = (tmp_path / f"x{suffix}").read_bytes()
        found = read_slice(data)
        assert isinstance(found, Slice), found
        assert np.array_equal(found.stored, VALUES[:, :, 0].T)
        assert found.geometry is not None
        assert found.geometry.pixel_spacing_mm == pytest.approx((0.75, 0.5))


def test_headers_whose_values_lie_in_another_file_are_refused_by_name(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(VALUES.T)
    SimpleITK.WriteImage(image, str(tmp_path / "x.mhd"))
    SimpleITK.WriteImage(image, str(tmp_path / "x.nhdr"))
    for name, other in (("x.mhd", ".mha"), ("x.nhdr", "one file")):
        data = (tmp_path / name).read_bytes()
        for found in (volumes.read_volume(data), read_slice(data, 0), volumes.labels(data)):
            assert isinstance(found, Reject)
            assert (found.reason, other in found.detail) == (Reason.UNSUPPORTED_PIXELS, True)


def test_a_header_longer_than_what_is_read_first_is_read_whole(tmp_path: Path) -> None:
    head, _, content = nrrd_file(encoding="gzip").partition(b"\n\n")
    data = head + b"".join(b"\nkey%d:=%s" % (key, b"v" * 90) for key in range(2000)) + b"\n\n" + content
    path = tmp_path / "x.nrrd"
    path.write_bytes(data)
    item = manifest.Item(str(path), "x.nrrd", len(data), [], None)
    rows = manifest.rows(item, data[:65536], Pseudonyms(b"key"))
    assert [row["verdict"] for row in rows] == ["ok"] * SHAPE[2]
    assert rows[2]["image_position_mm"] == (1, -2, 11)


FILES = {
    "NRRD": nrrd_file(),
    "NRRD gzip": nrrd_file(encoding="gzip"),
    "NRRD text": nrrd_file(encoding="text"),
    "MetaImage": metaimage(f"{PLAIN}\n{TURNED}\nElementType = MET_SHORT", VALUES.astype("<i2").tobytes("F")),
    "MetaImage zlib": metaimage(
        f"{PLAIN}\n{TURNED}\nCompressedData = True\nElementType = MET_SHORT",
        zlib.compress(VALUES.astype("<i2").tobytes("F")),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_no_part_of_a_file_and_no_changed_byte_raises(name: str) -> None:
    data = FILES[name]
    random = np.random.default_rng(11)
    for end in range(len(data) - 12):  # without the check sum, a last number without its last digit
        found = read_slice(data[:end], 0)
        assert isinstance(found, Reject)
        assert found.reason != Reason.INTERNAL
    for _ in range(600):
        changed = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            changed[place] = random.integers(0, 256)
        found = read_slice(bytes(changed), 0)
        assert isinstance(found, Slice) or found.reason != Reason.INTERNAL


@pytest.mark.parametrize("name", ["NRRD gzip", "MetaImage zlib"])
def test_values_that_do_not_fit_their_check_sum_are_refused(name: str) -> None:
    data = bytearray(FILES[name])
    refused = 0
    for place in range(len(data) - 60, len(data) - 9):
        changed = data.copy()
        changed[place] ^= 4
        found = read_slice(bytes(changed), 0)
        assert isinstance(found, Reject), place
        refused += found.reason in (Reason.TRUNCATED, Reason.CORRUPT)
    assert refused == 51


@pytest.mark.parametrize("name", FILES)
def test_an_upload_may_be_any_volume(name: str) -> None:
    series = read(FILES[name], "application/octet-stream", Limits())
    assert isinstance(series, Series)
    slices = [one for one in series.slices(color=False) if isinstance(one, Slice)]
    assert np.array_equal([one.stored for one in slices], values_of(FILES[name]))
    small = read(FILES[name], "application/octet-stream", Limits(inflated_bytes=VALUES.nbytes - 1))
    assert isinstance(small, Reject)
    assert small.reason == Reason.TOO_LARGE
    several = nrrd_file(np.stack([VALUES] * 2, -1), space_directions=np.vstack([np.diag(SPACING), [np.nan] * 3]))
    refused = read(several, "application/octet-stream", Limits())
    assert isinstance(refused, Reject)
    assert refused.reason == Reason.UNSUPPORTED_MULTIFRAME
