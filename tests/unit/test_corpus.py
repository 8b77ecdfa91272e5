"""Every real, odd and broken file at hand ends as slices or a reason; the slices hold what pydicom decodes."""

import csv
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder

from rayseg.dicom.reading import Header, Slice, read_headers, read_slice, read_slices
from rayseg.records import Reason, Reject

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
FILES = sorted(Path(path) for path in get_testdata_files("**/*") if Path(path).is_file())
BITS_601 = np.array([0.299, 0.587, 0.114])


def slices_of(data: bytes) -> list[Slice] | Reject:
    """What the catalog and then the readers make of an object; one reason if any."""
    headers = read_headers(data, len(data))
    if isinstance(headers, Reject):
        assert read_slice(data) == headers or headers.reason == Reason.TRUNCATED
        return headers
    frames = [header.frame for header in headers]
    assert frames == ([None] if len(frames) == 1 else list(range(len(frames))))
    found = list(read_slices(data, frames))
    for one, header in zip(found, headers, strict=True):
        if isinstance(one, Reject):
            return one
        assert one.header == header
        assert one.stored.dtype in (np.uint8, np.int16, np.uint16, np.int32)
        assert one.stored.shape == (header.geometry.rows, header.geometry.columns)
        assert np.isfinite(one.values()).all()
    return [one for one in found if isinstance(one, Slice)]


def decoded(path: Path) -> tuple[Dataset, np.ndarray] | None:
    """The data set and, by pydicom's own choice of decoder, its stored values (frames, rows, columns[, 3]) as they are.

    Colours are converted to RGB unless they are stored as luminance and colour differences. None where pydicom cannot.
    """
    dataset = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    try:
        raw = dataset.get("PhotometricInterpretation") in ("YBR_FULL", "YBR_FULL_422")
        values, _ = get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset, raw=raw)
    except Exception:
        return None
    return dataset, values if int(dataset.get("NumberOfFrames") or 1) > 1 else values[np.newaxis]


def expected_grey(dataset: Dataset, stored: np.ndarray) -> tuple[np.ndarray, float]:
    """Grey stored values as float64, and the tolerance that rounding a luminance needs."""
    photometric = dataset.PhotometricInterpretation
    if photometric.startswith("YBR_FULL"):
        return stored[..., 0].astype(np.float64), 0.0
    if stored.ndim == 4:
        return stored @ BITS_601, 0.501
    if photometric == "PALETTE COLOR":
        if dataset.original_encoding[1] is False:
            for colour in ("Red", "Green", "Blue"):  # pydicom takes a plain palette's words as little endian ones
                element = dataset.get_item(f"{colour}PaletteColorLookupTableData")
                if element is not None:
                    swapped = np.frombuffer(element.value, ">u2").astype("<u2").tobytes()
                    setattr(dataset, f"{colour}PaletteColorLookupTableData", swapped)
        return apply_color_lut(stored, dataset)[..., :3] @ BITS_601, 0.501
    if "ModalityLUTSequence" in dataset:
        return apply_modality_lut(stored, dataset).astype(np.float64), 0.0
    if photometric == "MONOCHROME1":
        stored = -1.0 - stored if dataset.PixelRepresentation else 2.0**dataset.BitsStored - 1 - stored
    return stored.astype(np.float64), 0.0


def expected_rescale(dataset: Dataset, frame: int) -> tuple[float, float]:
    if "ModalityLUTSequence" in dataset:
        return 1.0, 0.0
    places = [dataset]
    for sequence, place in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        if sequence in dataset:
            places += dataset[sequence][place].get("PixelValueTransformationSequence", [])
    found = [place for place in places if "RescaleSlope" in place]
    return (float(found[0].RescaleSlope), float(found[0].RescaleIntercept)) if found else (1.0, 0.0)


def assert_as_pydicom(path: Path, slices: list[Slice], dataset: Dataset, stored: np.ndarray) -> None:
    counts = np.ones(stored.shape[:3], bool)  # pixels of the padding value hold another one by design
    if "PixelPaddingValue" in dataset:
        low = dataset.PixelPaddingValue
        high = dataset.get("PixelPaddingRangeLimit", low)
        counts = (stored < min(low, high)) | (stored > max(low, high))
    grey, tolerance = expected_grey(dataset, stored)
    if dataset.file_meta.TransferSyntaxUID in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        tolerance += 2  # decoders may round differently (ITU-T T.83)
    assert len(slices) == len(grey)
    for frame, one in enumerate(slices):
        np.testing.assert_allclose(
            one.stored[counts[frame]], grey[frame][counts[frame]], rtol=0, atol=tolerance, err_msg=path.name
        )
        assert (one.rescale_slope, one.rescale_intercept) == expected_rescale(dataset, frame)


def with_uids(data: bytes) -> bytes:
    """The object with the identifying UIDs that some test files lack."""
    dataset = pydicom.dcmread(BytesIO(data), force=True)
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        dataset.setdefault(keyword, "1.2.3")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    stream = BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def compare(paths: list[Path]) -> tuple[int, int]:
    """Compares all that pydicom decodes here, which is no JPEG lossless.

    Returns how many objects, and frames of multi-frame ones, were equal to pydicom's.
    """
    objects = frames = 0
    for path in paths:
        data = path.read_bytes()
        result = slices_of(data)
        if isinstance(result, Reject) and result.reason == Reason.MISSING_ATTRIBUTE and result.detail.endswith("UID"):
            result = slices_of(with_uids(data))
        if isinstance(result, Reject):
            assert result.reason != Reason.INTERNAL, path.name
            continue
        expected = decoded(path)
        if expected is None:
            continue
        assert_as_pydicom(path, result, *expected)
        objects += 1
        frames += len(result) if len(result) > 1 else 0
    return objects, frames


def test_pydicoms_own_files_as_pydicom_decodes_them() -> None:
    assert len(FILES) >= 170
    objects, frames = compare(FILES)
    assert objects >= 77
    assert frames >= 34


def test_corpus_as_pydicom_decodes_it(shared_data: Path) -> None:
    objects, frames = compare(sorted((shared_data / "dicom-corpus").rglob("*.dcm")))
    assert objects >= 69
    assert frames >= 66


def test_corpus_reasons(shared_data: Path) -> None:
    """The reason, or that there is none, follows from what the inventory, made by other means, says of each file."""
    corpus = shared_data / "dicom-corpus"
    with (corpus / "inventory.csv").open() as lines:
        for row in csv.DictReader(lines):
            result = slices_of((corpus / row["path"]).read_bytes())
            name = Path(row["path"]).name
            expected: set[Reason] = set()
            if row["mod"] in ("SEG", "SM") or "Parametric Map" in row["sop"]:
                expected = {Reason.UNSUPPORTED_SOP_CLASS}
            elif "too_short" in name:
                expected = {Reason.TRUNCATED}
            elif row["decode"] == "no pixel data":
                expected = {Reason.NO_PIXELS}
            elif name.startswith(("JLS", "HTJ2K")):
                expected = {Reason.MISSING_ATTRIBUTE}  # no SeriesInstanceUID
            elif row["bits"] == "32/32":
                expected = {Reason.UNSUPPORTED_PIXELS}  # beyond 31 bits
            assert ({result.reason} if isinstance(result, Reject) else set()) == expected, (name, result)
            if isinstance(result, list):
                assert len(result) == int(row["frames"] or 1)


TWINS = [
    ("693_J2KR", "693_UNCR"),
    ("693_J2KI", "693_UNCI"),
    ("MR2_J2KR", "MR2_UNCR"),
    ("OBXXXX1A_rle", "OBXXXX1A"),
    ("OBXXXX1A_expb", "OBXXXX1A"),
    ("OBXXXX1A_rle_2frame", "OBXXXX1A_2frame"),
    ("OBXXXX1A_expb_2frame", "OBXXXX1A_2frame"),
    ("gdcm-US-ALOKA-16_big", "gdcm-US-ALOKA-16"),
    ("emri_small_RLE", "emri_small"),
    ("emri_small_big_endian", "emri_small"),
    ("emri_small_jpeg_2k_lossless", "emri_small"),
    ("emri_small_jpeg_ls_lossless", "emri_small"),
    ("SC_rgb_expb", "SC_rgb"),
    ("SC_rgb_expb_16bit_2frame", "SC_rgb_16bit_2frame"),
    ("SC_rgb_rle_16bit", "SC_rgb_16bit"),
    ("SC_rgb_rle_2frame", "SC_rgb_2frame"),
    ("US1_J2KI", "US1_UNCI"),
    ("JPEG2000", "JPEG2000_UNC"),
    ("color-px", "color-pl"),
]


@pytest.mark.parametrize(("coded", "plain"), TWINS)
def test_twins_hold_the_same_values(shared_data: Path, coded: str, plain: str) -> None:
    folder = shared_data / "dicom-corpus/pydicom-data/data_store/data"
    pair = []
    for name in (coded, plain):
        path = next(path for path in (folder / f"{name}.dcm", BUNDLED / f"{name}.dcm") if path.exists())
        slices = slices_of(path.read_bytes())
        assert isinstance(slices, list)
        pair.append(slices)
    assert len(pair[0]) == len(pair[1])
    for a, b in zip(*pair, strict=True):
        assert (a.rescale_slope, a.rescale_intercept) == (b.rescale_slope, b.rescale_intercept)
        np.testing.assert_array_equal(a.stored, b.stored)


def test_real_enhanced_ct_lies_where_it_says(shared_data: Path) -> None:
    path = shared_data / "dicom-corpus/pydicom-data/data_store/data/eCT_Supplemental.dcm"
    headers = read_headers(path.read_bytes())
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    assert isinstance(headers, list)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for header, groups in zip(headers, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        assert isinstance(header, Header)
        geometry = header.geometry
        assert geometry.image_position_mm == tuple(groups.PlanePositionSequence[0].ImagePositionPatient)
        assert geometry.image_orientation == tuple(shared.PlaneOrientationSequence[0].ImageOrientationPatient)
        assert geometry.pixel_spacing_mm == tuple(shared.PixelMeasuresSequence[0].PixelSpacing)
        assert geometry.slice_thickness_mm == shared.PixelMeasuresSequence[0].SliceThickness
