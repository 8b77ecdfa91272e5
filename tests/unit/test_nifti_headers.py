"""What NIfTI headers say beside the plain case: units, odd quaternions, extensions, several volumes, refusals."""

import gzip
import itertools
import struct
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK

from rayseg.data import manifest
from rayseg.data.layouts import Layout
from rayseg.dicom import nifti
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Slice, read_slice, read_slices
from rayseg.dicom.voxels import Volume
from rayseg.records import Reason, Reject

VALUES = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
AFFINE = np.array([[-0.5, 0, 0, 10], [0, -0.75, 0, 20], [0, 0, 4, -30], [0, 0, 0, 1]])
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
PSEUDONYMS = Pseudonyms(b"key")


def volume_of(data: bytes) -> Volume:
    volume = nifti.read_volume(data)
    assert isinstance(volume, Volume), volume
    return volume


def by_nibabel(data: bytes) -> np.ndarray:
    """The affine to LPS, by `nibabel.load`, which mends headers as it says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.nii")
        path.write_bytes(data)
        return TO_LPS @ nibabel.load(path).affine


def by_itk(data: bytes) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.nii")
        path.write_bytes(data)
        image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


def only(form: str, affine: np.ndarray = AFFINE) -> nibabel.Nifti1Image:
    """A volume whose place is said by one of the two forms, or by none."""
    image = nibabel.Nifti1Image(VALUES, affine)
    image.set_sform(affine if form == "sform" else None, code=1 if form == "sform" else 0)
    image.set_qform(affine if form == "qform" else None, code=1 if form == "qform" else 0)
    return image


@pytest.mark.parametrize("form", ["sform", "qform"])
@pytest.mark.parametrize("time", ["unknown", "sec", "msec", "hz"])
@pytest.mark.parametrize(("unit", "in_mm"), [("unknown", 1.0), ("mm", 1.0), ("micron", 1e-3), ("meter", 1e3)])
def test_places_are_in_millimetres_whatever_the_file_counts_in(unit: str, in_mm: float, time: str, form: str) -> None:
    image = only(form)
    image.header.set_xyzt_units(unit, time)
    data = image.to_bytes()
    expected = TO_LPS @ AFFINE
    expected[:3] *= in_mm
    assert np.allclose(volume_of(data).affine, expected, rtol=1e-6)
    assert np.allclose(by_itk(data), expected, rtol=1e-5)


def test_a_place_by_neither_form_is_known_as_a_guess_whose_distances_are_right() -> None:
    image = only("none")
    image.header.set_xyzt_units("micron")
    data = bytearray(image.to_bytes())
    struct.pack_into("<3f", data, 80, 500, 750, 4000)
    volume = volume_of(bytes(data))
    assert not volume.placed
    assert volume.place(0)["pixel_spacing_mm"] == pytest.approx((0.75, 0.5))
    assert volume.place(0)["slice_thickness_mm"] == pytest.approx(4)
    assert volume_of(only("sform").to_bytes()).placed
    assert volume_of(only("qform").to_bytes()).placed


def test_of_two_forms_that_differ_the_sform_is_taken() -> None:
    other = np.diag([-1.0, -1, 2, 1])
    image = nibabel.Nifti1Image(VALUES, AFFINE)
    for sform_code in (1, 2, 4):
        image.set_sform(other, code=sform_code)
        image.set_qform(AFFINE, code=1)
        assert np.allclose(volume_of(image.to_bytes()).affine, by_nibabel(image.to_bytes()))
        assert volume_of(image.to_bytes()).place(0)["slice_thickness_mm"] == 2


@pytest.mark.parametrize(
    ("offset", "value"),
    [(76, 0.0), (76, np.nan), (76, 2.0), (76, -1.0), (80, -0.5), (84, -0.75), (88, -4.0), (88, 0.0), (84, 0.0)],
)
def test_spacings_and_handedness_that_should_not_occur_are_read_as_nibabel_mends_them(
    offset: int, value: float
) -> None:
    data = bytearray(only("qform").to_bytes())
    struct.pack_into("<f", data, offset, value)
    expected = by_nibabel(bytes(data))
    volume = volume_of(bytes(data))
    if value == -1.0:  # the third axis runs to the feet: turned, the first slice is the last
        assert expected[2, 2] == -4
        assert volume.place(0)["image_position_mm"] == pytest.approx((expected @ (0, 0, 2, 1))[:3])
    else:
        assert np.allclose(volume.affine, expected)


def test_a_quaternion_that_is_too_long_by_rounding_is_one() -> None:
    data = bytearray(only("qform").to_bytes())
    assert struct.unpack_from("<3f", data, 256) == (0, 0, 1)
    struct.pack_into("<3f", data, 256, 0, 0, 1.0005)
    assert np.allclose(volume_of(bytes(data)).affine, by_itk(bytes(data)), atol=1e-5)


@pytest.mark.parametrize("form", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("sizes", [(24,), (5000, 8), (70_000,), (18 * 2**20,)])
@pytest.mark.parametrize("compressed", [False, True])
def test_header_extensions_are_passed_over(form: Any, sizes: tuple[int, ...], compressed: bool) -> None:
    image = form(VALUES, AFFINE)
    for size in sizes:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(4, b"<AFNI_attributes>" + b"x" * size))
    data = image.to_bytes()
    data = gzip.compress(data, 1) if compressed else data
    assert np.array_equal(read_all(data), VALUES.transpose(2, 1, 0))
    beginning = data[:65536]
    assert nifti.is_nifti(beginning)
    assert np.array_equal(volume_of(beginning).affine, volume_of(data).affine)
    rows = rows_of(data, beginning=beginning)
    assert [row["verdict"] for row in rows] == ["ok"] * 3


def read_all(data: bytes) -> np.ndarray:
    volume = volume_of(data)
    found = list(read_slices(data, range(volume.slices)))
    assert all(isinstance(one, Slice) for one in found), found
    return np.stack([one.values() for one in found if isinstance(one, Slice)])


def rows_of(data: bytes, number: int | None = None, beginning: bytes | None = None) -> list[dict[str, Any]]:
    item = manifest.Item("memory://a.nii.gz", "a.nii.gz", len(data), [], None)
    return manifest.rows(item, data if beginning is None else beginning, PSEUDONYMS, number)


@pytest.mark.parametrize("pieces", [2, 7, 300])
def test_several_gzip_members_are_one_file(pieces: int) -> None:
    """As bgzip writes them, which ends in an empty one, and as files are when they are put one behind the other."""
    values = np.random.default_rng(2).integers(0, 4000, (40, 30, 20), np.int16)
    whole = nibabel.Nifti1Image(values, AFFINE).to_bytes()
    ends = np.linspace(0, len(whole), pieces + 1).astype(int)
    members = [gzip.compress(whole[a:b]) for a, b in itertools.pairwise(ends)]
    assert np.array_equal(read_all(b"".join([*members, gzip.compress(b"")])), values.transpose(2, 1, 0))
    # The header's first bytes alone in the first member
    assert np.array_equal(read_all(gzip.compress(whole[:100]) + gzip.compress(whole[100:])), values.transpose(2, 1, 0))
    cut = read_slice(b"".join(members[:-1]), 0)
    assert isinstance(cut, Reject)
    assert cut.reason == Reason.TRUNCATED


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 3, 6), (5, 4, 3, 1, 6), (5, 4, 3, 2, 3), (5, 4, 1, 6)])
def test_the_layout_chooses_a_volume_of_a_file_of_several(shape: tuple[int, ...], compressed: bool) -> None:
    values = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    data = nibabel.Nifti1Image(values, AFFINE).to_bytes()
    data = gzip.compress(data) if compressed else data
    volumes = values.reshape(*shape[:3], -1, order="F")
    assert volumes.shape[3] == 6
    for number in (0, 4, 5):
        rows = rows_of(data, number, data[:65536])
        assert [row["verdict"] for row in rows] == ["ok"] * shape[2]
        found = list(read_slices(data, [row["frame"] for row in rows]))
        for index, (one, row) in enumerate(zip(found, rows, strict=True)):
            assert isinstance(one, Slice)
            assert np.array_equal(one.stored, volumes[:, :, index, number].T)
            assert one.geometry is not None
            assert one.geometry.image_position_mm == row["image_position_mm"]
            assert row["image_position_mm"] == pytest.approx((-10, -20, -30 + 4 * index))
    assert len({rows_of(data, number)[0]["series_key"] for number in range(6)}) == 6
    (refused,) = rows_of(data)
    assert refused["reason"] == Reason.UNSUPPORTED_MULTIFRAME
    assert "layout.volume" in refused["detail"]
    (beyond,) = rows_of(data, 6)
    assert beyond["reason"] == Reason.MISSING_ATTRIBUTE
    assert "6" in beyond["detail"]


def test_a_file_of_one_volume_has_number_0() -> None:
    data = nibabel.Nifti1Image(VALUES, AFFINE).to_bytes()
    keys = ("frame", "series_key", "image_position_mm", "verdict")
    assert [[row[key] for key in keys] for row in rows_of(data, 0)] == [
        [row[key] for key in keys] for row in rows_of(data)
    ]
    assert rows_of(data, 1)[0]["reason"] == Reason.MISSING_ATTRIBUTE
    with pytest.raises(ValueError, match=r"layout\.volume"):
        Layout(volume=-1)


def test_what_has_no_grey_values_or_lies_in_another_file_is_refused_by_name(tmp_path: Path) -> None:
    def of(dtype: Any) -> bytes:
        return nibabel.Nifti1Image(np.zeros((5, 4, 3), dtype), AFFINE).to_bytes()

    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgba = np.dtype([*rgb.descr, ("A", "u1")])
    cases = {of(rgb): "RGB", of(rgba): "RGBA", of(np.complex64): "complex64", of(np.complex128): "complex128"}
    nibabel.Nifti1Pair(VALUES, AFFINE).to_filename(tmp_path / "pair.img")
    cases[(tmp_path / "pair.hdr").read_bytes()] = ".hdr"
    nibabel.Nifti2Pair(VALUES, AFFINE).to_filename(tmp_path / "two.img")
    cases[gzip.compress((tmp_path / "two.hdr").read_bytes())] = ".hdr"
    nibabel.AnalyzeImage(VALUES, AFFINE).to_filename(tmp_path / "old.img")
    cases[(tmp_path / "old.hdr").read_bytes()] = "ANALYZE"
    for data, name in cases.items():
        found = read_slice(data, 0)
        assert isinstance(found, Reject)
        assert (found.reason, name in found.detail) == (Reason.UNSUPPORTED_PIXELS, True), found
        assert rows_of(data)[0]["detail"] == found.detail


@pytest.mark.parametrize("dim", [(2, 5, 4, 1), (3, 5, 4, 1), (4, 5, 4, 1, 0), (7, 5, 4, 1, 1, 1, 0, 1)])
def test_a_single_slice_needs_no_number(dim: tuple[int, ...]) -> None:
    data = bytearray(nibabel.Nifti1Image(VALUES[:, :, :1], AFFINE).to_bytes())
    struct.pack_into(f"<{len(dim)}h", data, 40, *dim)
    for number in (None, 0):
        found = read_slice(bytes(data), number)
        assert isinstance(found, Slice)
        assert np.array_equal(found.stored, VALUES[:, :, 0].T)
    assert [row["frame"] for row in rows_of(bytes(data))] == [0]
