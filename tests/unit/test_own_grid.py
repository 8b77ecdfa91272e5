"""The mask of a NIfTI volume lies on the volume's own voxels, by readers that share no code with us."""

import gzip
import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import trimesh
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage

from rayseg.inference.predictor import Predictor
from tests import bundles
from tests.unit.unread_archives import cataloged, segmented, task, written

SIDE, SLICES = 64, 7


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """It finds what is above 47, of pictures of 64 x 64 exactly."""
    return Predictor.load(bundles.write_bundle(tmp_path_factory.mktemp("model") / "bundle", 150))


def upright(dtype: str = "<i2") -> nib.Nifti1Image:
    """A box of 10 x 8 x 3 voxels of 100 on ground of 5, in an oblique patient: right, front, head."""
    values = np.full((SIDE, SIDE, SLICES), 5, dtype)
    values[40:50, 6:14, 3:6] = 100
    turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [0.9, 1.1, 4.0], [-31.0, 17.0, -5.0]
    return nib.Nifti1Image(values, affine)


def stored(codes: str, form: type = nib.Nifti1Image, **header: Any) -> nib.Nifti1Image:
    """The same scan with its axes stored this way, as LPS or SAR."""
    image = upright()
    made = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(codes)))
    made = form(np.asarray(made.dataobj), made.affine)
    made.header.set_xyzt_units("mm", "sec")
    made.set_sform(made.affine, code=header.get("sform", 2))
    made.set_qform(made.affine, code=header.get("qform", 1))
    return made


def mask_of(folder: Path, data: bytes, predictor: Predictor, name: str = "a.nii") -> tuple[bytes, dict[str, Any]]:
    (row,) = segmented(cataloged(folder, {name: data}), task(folder, ("nifti", "stl")), predictor)
    assert (row["verdict"], row["not_made"]) == ("segmented", [])
    return written(row)["nifti"][0], row


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PSR", "SAR", "ILP"])
@pytest.mark.parametrize("form", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxel_i_j_k_of_the_mask_is_that_of_the_image(
    tmp_path: Path, predictor: Predictor, codes: str, form: type
) -> None:
    image = stored(codes, form)
    data = gzip.compress(image.to_bytes())
    made, row = mask_of(tmp_path, data, predictor, "a.nii.gz")
    mask = form.from_bytes(gzip.decompress(made))  # type: ignore[attr-defined]
    assert mask.get_data_dtype() == np.uint8
    assert np.array_equal(mask.get_fdata(), image.get_fdata() > 47)
    assert np.array_equal(mask.affine, image.affine)
    for name in ("sform_code", "qform_code", "xyzt_units", "pixdim", "quatern_b", "qoffset_x", "srow_x"):
        assert np.array_equal(mask.header[name], image.header[name]), name
    assert (mask.dataobj.slope, mask.dataobj.inter, float(mask.header["cal_max"])) == (1, 0, 1)
    # In millimetres: the box's middle lies where it was put.
    x, y, z = (upright().affine @ [44.5, 9.5, 4, 1])[:3]
    surface = trimesh.load(io.BytesIO(written(row)["stl"][0]), file_type="stl")
    np.testing.assert_allclose(surface.centroid, [-x, -y, z], atol=1e-3)
    assert row["volume_ml"] == pytest.approx(240 * 0.9 * 1.1 * 4 / 1000, rel=1e-5)
    assert mask_of(tmp_path, data, predictor, "a.nii.gz")[0] == made
    if form is nib.Nifti2Image:
        return  # ITK reads no NIfTI-2
    for path, content in ((tmp_path / "image.nii.gz", data), (tmp_path / "mask.nii.gz", made)):
        path.write_bytes(content)
    one, other = (SimpleITK.ReadImage(str(tmp_path / name)) for name in ("image.nii.gz", "mask.nii.gz"))
    assert other.GetSize() == one.GetSize()
    np.testing.assert_allclose(other.GetDirection(), one.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(other.GetOrigin(), one.GetOrigin(), atol=1e-4)
    shape = SimpleITK.LabelShapeStatisticsImageFilter()
    shape.Execute(other)
    np.testing.assert_allclose(shape.GetCentroid(1), [-x, -y, z], atol=1e-3)


@pytest.mark.parametrize("codes", [(0, 1), (1, 0), (3, 4)])
def test_codes_are_kept(tmp_path: Path, predictor: Predictor, codes: tuple[int, int]) -> None:
    image = stored("SAR", sform=codes[0], qform=codes[1])
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(mask_of(tmp_path, image.to_bytes(), predictor)[0]))
    assert (int(mask.header["sform_code"]), int(mask.header["qform_code"])) == codes
    np.testing.assert_array_equal(mask.affine, nib.Nifti1Image.from_bytes(image.to_bytes()).affine)
    assert np.array_equal(mask.get_fdata(), image.get_fdata() > 47)


def test_a_header_of_the_other_byte_order(tmp_path: Path, predictor: Predictor) -> None:
    little = upright()
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    header.set_data_shape(little.shape)
    header.set_sform(little.affine, code=1)
    header.set_slope_inter(1, 0)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    data = header.binaryblock + bytes(4) + np.asarray(little.dataobj).astype(">i2").tobytes(order="F")
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(mask_of(tmp_path, data, predictor)[0]))
    assert np.array_equal(mask.get_fdata(), little.get_fdata() > 47)
    np.testing.assert_allclose(mask.affine, little.affine, rtol=1e-6)


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, SIDE, 1), (SIDE, SIDE, SLICES, 1)])
def test_the_shape_is_the_images(tmp_path: Path, predictor: Predictor, shape: tuple[int, ...]) -> None:
    values = np.full(shape, 5, np.int16)
    values[20:30, 40:45] = 100
    image = nib.Nifti1Image(values, np.diag([-1.0, 1, 2, 1]))
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(mask_of(tmp_path, image.to_bytes(), predictor)[0]))
    assert mask.shape == shape
    assert np.array_equal(mask.get_fdata(), values > 47)
    assert np.array_equal(mask.affine, image.affine)


@pytest.mark.parametrize("number", [0, 2])
def test_of_a_file_of_several_volumes_the_mask_is_of_the_one_chosen(
    tmp_path: Path, predictor: Predictor, number: int
) -> None:
    values = np.full((SIDE, SIDE, SLICES, 3), 5, np.int16)
    for volume in range(3):
        values[10 * volume : 10 * volume + 8, 40:45, 2:4, volume] = 100
    image = nib.Nifti1Image(values, np.diag([0.9, 1.1, 2.0, 1]))
    uri = cataloged(tmp_path, {"a.nii": image.to_bytes()}, number)
    (row,) = segmented(uri, task(tmp_path, ("nifti", "png")), predictor)
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(written(row)["nifti"][0]))
    assert mask.shape == values.shape[:3]
    assert np.array_equal(mask.affine, nib.Nifti1Image.from_bytes(image.to_bytes()).affine)
    assert np.array_equal(mask.get_fdata(), values[..., number] > 47)


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_volumes_of_other_formats_have_a_mask_in_their_place(tmp_path: Path, predictor: Predictor, suffix: str) -> None:
    image = upright()
    nib.save(image, tmp_path / "a.nii")
    plain = SimpleITK.ReadImage(str(tmp_path / "a.nii"))
    for key in plain.GetMetaDataKeys():  # what NIfTI says else
        plain.EraseMetaData(key)
    SimpleITK.WriteImage(plain, str(tmp_path / f"a.{suffix}"))
    made, _ = mask_of(tmp_path, (tmp_path / f"a.{suffix}").read_bytes(), predictor, f"a.{suffix}")
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(made))
    middle = mask.affine @ [*ndimage.center_of_mass(mask.get_fdata()), 1]
    np.testing.assert_allclose(middle, image.affine @ [44.5, 9.5, 4, 1], atol=1e-3)
    assert mask.get_fdata().sum() == 240


@pytest.mark.parametrize("unit", ["mm", "micron"])
def test_slices_of_a_microscope_are_not_at_one_position(tmp_path: Path, predictor: Predictor, unit: str) -> None:
    """Voxels of 4 x 5 x 6 micrometres; the surface is in millimetres."""
    values = np.full((SIDE, SIDE, SLICES), 5, np.int16)
    values[20:30, 40:45, 2:5] = 100
    scale = 1 if unit == "micron" else 1e-3
    image = nib.Nifti1Image(values, np.diag([-4 * scale, -5 * scale, 6 * scale, 1]))
    image.header.set_xyzt_units(unit)
    _, row = mask_of(tmp_path, image.to_bytes(), predictor)
    assert row["volume_ml"] == pytest.approx(150 * 4 * 5 * 6 * 1e-12, rel=1e-5)
    surface = trimesh.load(io.BytesIO(written(row)["stl"][0]), file_type="stl")
    np.testing.assert_allclose(surface.bounds * 1000, [[78, 197.5, 9], [118, 222.5, 27]], atol=0.01)


@pytest.mark.parametrize("form", [nib.Nifti1Image, nib.Nifti2Image])
def test_texts_extensions_and_scale_are_not_taken_over(tmp_path: Path, predictor: Predictor, form: type) -> None:
    image = stored("RAS", form)
    for name in {"db_name", "aux_file", "intent_name", "data_type"} & {*image.header.keys()}:
        image.header[name] = b"DOE^JOHN"[:9]
    image.header["cal_max"] = 77
    image.header.set_slope_inter(2.0, -5.0)
    made = gzip.decompress(mask_of(tmp_path, image.to_bytes(), predictor)[0])
    mask = form.from_bytes(made)  # type: ignore[attr-defined]
    assert b"DOE" not in made
    assert not mask.header.extensions
    assert set(np.unique(np.asarray(mask.dataobj))) == {0, 1}
    assert bytes(mask.header["descrip"]).startswith(b"rayseg, research only: lesion")


def test_real_volumes(tmp_path: Path, shared_data: Path) -> None:
    """What is brighter than a level; resampled to the network's grid and back, so not to the voxel."""
    predictor = Predictor.load(bundles.write_bundle(tmp_path / "bundle", 150))
    for path in sorted((shared_data / "hippocampus-mr" / "images").glob("*.nii.gz"))[:3]:
        image = nib.load(path)
        found, _ = mask_of(tmp_path / path.name, path.read_bytes(), predictor)
        mask = nib.Nifti1Image.from_bytes(gzip.decompress(found))
        assert mask.shape == image.shape
        assert np.array_equal(mask.affine, image.affine)
        inside, expected = mask.get_fdata() > 0, image.get_fdata() > 47
        np.testing.assert_allclose(ndimage.center_of_mass(inside), ndimage.center_of_mass(expected), atol=0.3)
        assert 2 * (inside & expected).sum() / (inside.sum() + expected.sum()) > 0.9
