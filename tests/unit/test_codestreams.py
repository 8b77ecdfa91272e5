"""Codestreams against data sets that say otherwise: GDCM (SimpleITK) and DCMTK judge, or what was encoded."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from jpeg_ls import encode_array as jpeg_ls
from openjpeg.utils import encode_array as jpeg_2000
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate

from rayseg.dicom import codestreams
from rayseg.dicom.codestreams import Codestream
from rayseg.dicom.reading import Slice, read_slice
from rayseg.records import Reason, Reject
from tests.unit.lossless_jpeg import encode as lossless_jpeg
from tests.unit.test_reading import data_set

ROWS, COLUMNS = 40, 53  # odd
Y, X = np.mgrid[:ROWS, :COLUMNS]
GREY_HW = ((np.sin(X / 7) + np.cos(Y / 9) + 2) * 60).astype(np.uint8)
RGB_HWC = np.stack([GREY_HW, 255 - GREY_HW, GREY_HW // 2], axis=-1)
LUMA_HW = RGB_HWC @ [0.299, 0.587, 0.114]
BITS_12_HW = GREY_HW.astype(np.uint16) * 16 + 5  # up to 3845
SIGNED_HW = BITS_12_HW.astype(np.int16) - 2048


def file_of(frame: bytes | bytearray, syntax: str, words: np.ndarray = GREY_HW, **attributes: Any) -> bytes:
    """An object that holds the frame and says of it what it would of `words`."""
    colours = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    described = {"RescaleIntercept": 0, **(colours if words.ndim == 3 else {}), **attributes}
    dataset = data_set(words if words.ndim == 2 else words[..., 0], **described)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def stored_of(data: bytes) -> np.ndarray:
    found = read_slice(data)
    assert isinstance(found, Slice), found
    return found.stored


def refused(data: bytes) -> Reject:
    found = read_slice(data)
    assert isinstance(found, Reject), found
    return found


def by_itk(data: bytes, folder: Path) -> np.ndarray:
    (folder / "judged.dcm").write_bytes(data)
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "judged.dcm")))[0]


def jpeg(colour: str, subsampling: int = 0) -> bytes:
    """Colours as DCT with what `colour` says of them in the codestream."""
    if colour in ("adobe rgb", "ids rgb"):
        data = imagecodecs.jpeg8_encode(RGB_HWC, level=97, outcolorspace="RGB")
    else:
        stream = io.BytesIO()
        Image.fromarray(RGB_HWC).save(stream, "JPEG", quality=97, subsampling=subsampling)
        data = stream.getvalue()
    if colour in ("ids rgb", "silent ybr"):  # without APP14 or APP0, which is first
        data = data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]
    return data


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize(
    ("colour", "subsampling"),
    [("adobe rgb", 0), ("ids rgb", 0), ("jfif", 0), ("jfif", 1), ("jfif", 2), ("silent ybr", 2)],
)
def test_colours_of_a_jpeg_are_those_of_its_codestream(
    colour: str, subsampling: int, photometric: str, planar: int
) -> None:
    frame = jpeg(colour, subsampling)
    data = file_of(
        frame, uid.JPEGBaseline8Bit, RGB_HWC, PhotometricInterpretation=photometric, PlanarConfiguration=planar
    )
    np.testing.assert_allclose(stored_of(data), LUMA_HW, atol=4)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_where_a_jpeg_does_not_tell_its_colours_the_data_set_does(photometric: str) -> None:
    data = file_of(jpeg("silent ybr"), uid.JPEGBaseline8Bit, RGB_HWC, PhotometricInterpretation=photometric)
    ybr_HWC = np.asarray(Image.fromarray(RGB_HWC).convert("YCbCr"))
    expected = LUMA_HW if photometric == "YBR_FULL" else ybr_HWC @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(stored_of(data), expected, atol=4)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize(
    ("syntax", "frame"),
    [
        (uid.JPEG2000Lossless, jpeg_2000(RGB_HWC, photometric_interpretation=1, use_mct=True)),
        (uid.JPEG2000Lossless, jpeg_2000(RGB_HWC, photometric_interpretation=1, use_mct=False)),
        (uid.JPEG2000, imagecodecs.jpeg2k_encode(RGB_HWC, codecformat="JP2", reversible=True, level=0)),
        (uid.HTJ2KLossless, imagecodecs.htj2k_encode(RGB_HWC, reversible=True)),
        (uid.JPEGLSLossless, jpeg_ls(np.ascontiguousarray(np.moveaxis(RGB_HWC, -1, 0)), interleave_mode=0)),
        (uid.JPEGLSLossless, jpeg_ls(RGB_HWC, interleave_mode=1)),
        (uid.JPEGLSLossless, jpeg_ls(RGB_HWC, interleave_mode=2)),
        (uid.JPEGLossless, lossless_jpeg(RGB_HWC, 8, predictor=4)),
        (uid.JPEGLosslessSV1, lossless_jpeg(RGB_HWC, 8, ids=b"RGB")),
    ],
    ids=["mct", "no mct", "jp2", "htj2k", "ls planes", "ls lines", "ls pixels", "lossless", "lossless ids"],
)
def test_planes_are_as_the_codestream_has_them(syntax: str, frame: bytes, planar: int) -> None:
    data = file_of(frame, syntax, RGB_HWC, PlanarConfiguration=planar)
    np.testing.assert_allclose(stored_of(data), LUMA_HW, atol=0.501)


def test_a_component_transformation_is_what_the_codestream_has() -> None:
    for photometric in ("RGB", "YBR_RCT", "YBR_ICT", "YBR_FULL"):
        frame = jpeg_2000(RGB_HWC, photometric_interpretation=1, use_mct=True)
        data = file_of(frame, uid.JPEG2000Lossless, RGB_HWC, PhotometricInterpretation=photometric)
        np.testing.assert_allclose(stored_of(data), LUMA_HW, atol=0.501)
    for photometric in ("RGB", "YBR_RCT", "YBR_ICT"):
        frame = jpeg_2000(RGB_HWC, photometric_interpretation=1, use_mct=False)
        data = file_of(frame, uid.JPEG2000Lossless, RGB_HWC, PhotometricInterpretation=photometric)
        np.testing.assert_allclose(stored_of(data), LUMA_HW, atol=0.501)
    # Luminance and differences, which nothing but the data set tells.
    ybr_HWC = np.asarray(Image.fromarray(RGB_HWC).convert("YCbCr"))
    for syntax, frame in (
        (uid.JPEG2000Lossless, jpeg_2000(ybr_HWC, photometric_interpretation=3, use_mct=False)),
        (uid.JPEGLSLossless, jpeg_ls(np.ascontiguousarray(ybr_HWC), interleave_mode=2)),
        (uid.JPEGLosslessSV1, lossless_jpeg(ybr_HWC, 8)),
    ):
        data = file_of(frame, syntax, ybr_HWC, PhotometricInterpretation="YBR_FULL")
        assert np.array_equal(stored_of(data), ybr_HWC[..., 0])


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize(
    ("syntax", "frame", "expected"),
    [
        (uid.JPEGLosslessSV1, lossless_jpeg(GREY_HW, 8), GREY_HW),
        (uid.JPEGLosslessSV1, lossless_jpeg(BITS_12_HW, 12), BITS_12_HW),
        (uid.JPEGLosslessSV1, lossless_jpeg(BITS_12_HW, 16), BITS_12_HW),
        (uid.JPEGLSLossless, jpeg_ls(GREY_HW), GREY_HW),
        (uid.JPEGLSLossless, jpeg_ls(BITS_12_HW), BITS_12_HW),
        (uid.JPEG2000Lossless, jpeg_2000(BITS_12_HW, photometric_interpretation=2, bits_stored=12), BITS_12_HW),
        (uid.JPEG2000Lossless, jpeg_2000(BITS_12_HW, photometric_interpretation=2), BITS_12_HW),
        (uid.JPEG2000Lossless, jpeg_2000(SIGNED_HW, photometric_interpretation=2, bits_stored=12), SIGNED_HW),
        (uid.HTJ2KLossless, imagecodecs.htj2k_encode(SIGNED_HW, reversible=True), SIGNED_HW),
    ],
)
def test_precision_and_sign_are_those_of_the_codestream(
    syntax: str, frame: bytes, expected: np.ndarray, bits: int
) -> None:
    for allocated in {8, 16} if bits == 8 else {16}:
        data = file_of(frame, syntax, BitsAllocated=allocated, BitsStored=bits, HighBit=bits - 1)
        assert np.array_equal(stored_of(data), expected), allocated


def test_inversion_is_of_the_wider_of_both() -> None:
    frame = lossless_jpeg(GREY_HW, 8)
    for stored, allocated in ((8, 8), (8, 16), (12, 16), (16, 16)):
        attributes = {"BitsAllocated": allocated, "BitsStored": stored, "PhotometricInterpretation": "MONOCHROME1"}
        found = stored_of(file_of(frame, uid.JPEGLosslessSV1, **attributes))
        assert np.array_equal(found, 2**stored - 1 - GREY_HW.astype(int))


@pytest.mark.parametrize("stored", [12, 16])
@pytest.mark.parametrize(
    ("syntax", "frame"),
    [
        (uid.JPEGLosslessSV1, lossless_jpeg(SIGNED_HW.view(np.uint16) & 0xFFF, 12)),
        (uid.JPEGLosslessSV1, lossless_jpeg(SIGNED_HW.view(np.uint16), 16)),
        (uid.JPEGLSLossless, jpeg_ls(SIGNED_HW.view(np.uint16) & 0xFFF)),
        (uid.JPEGLSLossless, jpeg_ls(SIGNED_HW.view(np.uint16))),
        (uid.JPEG2000Lossless, jpeg_2000(SIGNED_HW.view(np.uint16) & 0xFFF, photometric_interpretation=2)),
        (
            uid.JPEG2000Lossless,
            jpeg_2000(SIGNED_HW.view(np.uint16) & 0xFFF, photometric_interpretation=2, bits_stored=12),
        ),
    ],
)
def test_twos_complements_are_read_as_gdcm_does(syntax: str, frame: bytes, stored: int, tmp_path: Path) -> None:
    data = file_of(frame, syntax, SIGNED_HW, BitsStored=stored, HighBit=stored - 1)
    assert np.array_equal(stored_of(data), by_itk(data, tmp_path))


def of_low_bits() -> Iterator[tuple[str, np.ndarray, bytes, int]]:
    chance = np.random.default_rng(3)
    for bits in (8, 9, 10, 12, 14, 15, 16):
        values = chance.integers(0, 2**bits, (12, 17)).astype(np.uint8 if bits == 8 else np.uint16)
        for predictor in range(1, 8):
            yield f"{bits} bits {predictor}", values, lossless_jpeg(values, bits, predictor=predictor), bits
            if predictor < 5 or bits == 8:
                frame = lossless_jpeg(values, bits, predictor=predictor, low_bits=True)
                yield f"{bits} bits {predictor} low", values, frame, bits
            frame = lossless_jpeg(values, bits, predictor=predictor, restart_rows=5)
            yield f"{bits} bits {predictor} restarts", values, frame, bits
            kept = values >> 3 << 3
            yield (
                f"{bits} bits {predictor} points",
                kept,
                lossless_jpeg(kept, bits, predictor=predictor, transform=3),
                bits,
            )
    colours = chance.integers(0, 256, (9, 11, 3)).astype(np.uint8)
    yield "colours", colours, lossless_jpeg(colours, 8, predictor=6, low_bits=True), 8


def test_lossless_jpeg_of_every_kind(tmp_path: Path) -> None:
    for name, values, frame, bits in of_low_bits():
        data = file_of(frame, uid.JPEGLossless, values, BitsStored=bits, HighBit=bits - 1)
        if values.ndim == 3:
            np.testing.assert_allclose(stored_of(data), values @ [0.299, 0.587, 0.114], atol=0.501, err_msg=name)
        else:
            np.testing.assert_array_equal(stored_of(data), values, err_msg=name)


def test_low_bits_under_a_halved_prediction_are_refused_where_they_show() -> None:
    values = np.random.default_rng(1).integers(0, 4096, (20, 20)).astype(np.uint16)
    for predictor in (5, 6, 7):
        frame = lossless_jpeg(values, 12, predictor=predictor, low_bits=True)
        found = refused(file_of(frame, uid.JPEGLossless, values, BitsStored=12, HighBit=11))
        assert found.reason == Reason.UNSUPPORTED_PIXELS


def test_dcmtk_agrees_on_low_bits(tmp_path: Path) -> None:
    import pydicom

    values = np.random.default_rng(2).integers(0, 256, (30, 31)).astype(np.uint8)
    data = file_of(lossless_jpeg(values, 8, low_bits=True), uid.JPEGLosslessSV1, values)
    (tmp_path / "a.dcm").write_bytes(data)
    try:
        subprocess.run(["dcmdjpeg", tmp_path / "a.dcm", tmp_path / "b.dcm"], check=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("dcmtk is not on this machine")
    expected = np.frombuffer(pydicom.dcmread(tmp_path / "b.dcm").PixelData, np.uint8)[: values.size]
    assert np.array_equal(stored_of(data), expected.reshape(values.shape))


def test_an_odd_scan_header_of_a_sequential_jpeg_is_not_looked_at() -> None:
    """The first and last coefficient and the approximations, which are fixed there (ITU-T T.81 B.2.3)."""
    frame = imagecodecs.jpeg8_encode(BITS_12_HW, level=98, bitspersample=12)
    at = frame.index(b"\xff\xda") + 7
    assert frame[at : at + 3] == b"\0\x3f\0"
    expected = imagecodecs.jpeg8_decode(frame)
    for odd in (b"\0\0\0", b"\1\x3f\0", b"\0\x3f\x11", b"\0\x05\x10"):
        data = file_of(frame[:at] + odd + frame[at + 3 :], uid.JPEGExtended12Bit, BITS_12_HW, BitsStored=12)
        assert np.array_equal(stored_of(data), expected)
    np.testing.assert_allclose(expected, BITS_12_HW, atol=60)


def test_segments_may_hold_what_looks_like_markers() -> None:
    bait = b"\xff\xd8\xff\xc3\0\x0b\x08\0\1\0\1\1\1\x11\0\xff\xda\xff\xd9\xff\x4f\xff\x51" * 9
    segments = b"".join(bytes([0xFF, kind]) + (len(bait) + 2).to_bytes(2, "big") + bait for kind in (0xE5, 0xFE))
    frame = lossless_jpeg(GREY_HW, 8, segments=segments + b"\xff\xff\xff")
    assert np.array_equal(stored_of(file_of(frame, uid.JPEGLosslessSV1)), GREY_HW)
    frame = jpeg("jfif")
    frame = frame[:2] + segments + frame[2:]
    np.testing.assert_allclose(stored_of(file_of(frame, uid.JPEGBaseline8Bit, RGB_HWC)), LUMA_HW, atol=4)


def test_the_kind_is_told_by_the_first_bytes_alone() -> None:
    frame = bytes(jpeg_ls(GREY_HW))
    inside = frame[:-2] + b"\xff\x4f\xff\x51" + struct_of_size() + frame[-2:]
    found = codestreams.read(inside)
    assert isinstance(found, Codestream)
    assert (found.kind, found.rows, found.columns) == ("JPEG-LS", ROWS, COLUMNS)
    # A syntax that names another kind of codestream.
    for syntax in (uid.JPEGLossless, uid.JPEG2000):
        assert np.array_equal(stored_of(file_of(frame, syntax)), GREY_HW)


def struct_of_size() -> bytes:
    return b"\0\x29\0\0" + (9).to_bytes(4, "big") * 8 + b"\0\1\7\1\1"


@pytest.mark.parametrize(
    "frame",
    [jpeg_ls(GREY_HW), jpeg_ls(RGB_HWC, interleave_mode=1), jpeg_ls(BITS_12_HW)],
    ids=["grey", "colours", "12 bits"],
)
def test_jpeg_ls_with_odd_ends(frame: bytearray) -> None:
    whole = bytes(frame)
    words = {1: GREY_HW, 2: BITS_12_HW, 3: RGB_HWC}[3 if whole[11] == 3 else 2 if whole[6] == 12 else 1]
    expected = stored_of(file_of(whole, uid.JPEGLSLossless, words))
    body, end = whole[:-2], whole[-2:]
    for odd in (body + b"\0" + end, body + b"\x55" + end, body + b"\0\0" + end, whole + b"\0\0\0"):
        assert np.array_equal(stored_of(file_of(odd, uid.JPEGLSLossless, words)), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 99), st.sampled_from(["JPEG-LS", "JPEG", "lossless JPEG", "12 bits"]))
def test_a_cut_codestream_is_no_image(cut: int, seed: int, kind: str) -> None:
    values = np.random.default_rng(seed).integers(0, 200, (ROWS, COLUMNS)).astype(np.uint8)
    frame, syntax = {
        "JPEG-LS": lambda: (bytes(jpeg_ls(values)), uid.JPEGLSLossless),
        "JPEG": lambda: (imagecodecs.jpeg8_encode(values, level=95), uid.JPEGBaseline8Bit),
        "lossless JPEG": lambda: (imagecodecs.jpeg8_encode(values, lossless=True), uid.JPEGLosslessSV1),
        "12 bits": lambda: (
            imagecodecs.jpeg8_encode(values.astype(np.uint16) * 9, bitspersample=12),
            uid.JPEGExtended12Bit,
        ),
    }[kind]()
    attributes = {"BitsAllocated": 16, "BitsStored": 12} if kind == "12 bits" else {}
    whole = stored_of(file_of(frame, syntax, **attributes))
    found = read_slice(file_of(frame[:-2][:-cut], syntax, **attributes))
    # A last byte or two of fill bits may be missing.
    assert isinstance(found, Reject) or (cut < 3 and np.array_equal(found.stored, whole))


def test_jpeg_ls_without_end_marker_is_not_decoded() -> None:
    for frame in (jpeg_ls(GREY_HW), jpeg_ls(RGB_HWC, interleave_mode=1)):
        words = RGB_HWC if frame[11] == 3 else GREY_HW
        for cut in (2, 4, 30):
            found = refused(file_of(bytes(frame)[:-cut], uid.JPEGLSLossless, words))
            assert found == Reject(Reason.DECODE_FAILED, "JPEG-LS: the codestream has no end marker")


def test_white_stays_white_in_htj2k_that_is_not_reversible() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[16:48, 16:48] = 255
    frame = imagecodecs.htj2k_encode(image, reversible=False, level=0.01)
    np.testing.assert_allclose(stored_of(file_of(frame, uid.HTJ2K, image)).astype(int), image, atol=5)


def test_a_whole_jpeg_without_end_marker_is_read() -> None:
    for frame, syntax in ((jpeg("jfif"), uid.JPEGBaseline8Bit), (lossless_jpeg(RGB_HWC, 8), uid.JPEGLosslessSV1)):
        expected = stored_of(file_of(frame, syntax, RGB_HWC))
        assert np.array_equal(stored_of(file_of(frame[:-2], syntax, RGB_HWC)), expected)


@pytest.mark.parametrize(
    ("frame", "syntax", "words", "detail"),
    [
        (jpeg("jfif"), uid.JPEGBaseline8Bit, GREY_HW, "PixelData: the codestream has not SamplesPerPixel"),
        (lossless_jpeg(GREY_HW, 8), uid.JPEGLossless, RGB_HWC, "PixelData: the codestream has not SamplesPerPixel"),
        (b"text" * 50, uid.JPEG2000, GREY_HW, "PixelData: no image header"),
        (jpeg_2000(GREY_HW[1:], photometric_interpretation=2), uid.JPEG2000, GREY_HW, "PixelData: the codestream has"),
        (
            jpeg_2000(RGB_HWC.astype(np.int8), photometric_interpretation=1),
            uid.JPEG2000,
            RGB_HWC,
            "PixelData: the codestream has colours with a sign",
        ),
    ],
)
def test_what_the_codestream_cannot_be_is_told(frame: bytes, syntax: str, words: np.ndarray, detail: str) -> None:
    assert refused(file_of(frame, syntax, words)).detail.startswith(detail)


def test_nothing_under_the_gpl_is_needed() -> None:
    """Every syntax in a process that can import neither pylibjpeg-libjpeg nor GDCM."""
    program = """
import sys
import importlib.metadata
all_of = importlib.metadata.entry_points
def entry_points(**named):
    return [one for one in all_of(**named) if not one.value.startswith("libjpeg")]
importlib.metadata.entry_points = entry_points
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("libjpeg", "_libjpeg", "gdcm", "_gdcm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from rayseg.benchmark import inputs
from rayseg.dicom.reading import Slice, read_slice
for syntax in inputs.SYNTAXES:
    assert isinstance(read_slice(inputs.ct_slice(syntax)), Slice), syntax
assert not [name for name in sys.modules if name.split(".")[0] in ("libjpeg", "_libjpeg", "gdcm", "_gdcm")]
"""
    path = os.pathsep.join(("platform", ".", os.environ.get("PYTHONPATH", "")))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
