"""Mask files of each kind become the classes of one slice; bytes that are no mask become a reason."""

import io
import zlib
from typing import Any

import numpy as np
import pydicom
import pytest
from jpeg_ls import encode_array as jpeg_ls
from openjpeg.utils import encode_array as jpeg_2000
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from rayseg.data.labels import Labels
from rayseg.data.masks import Mask, truth
from rayseg.data.preprocess import Preprocess
from rayseg.records import Reason, Reject
from tests.unit import test_contours, test_mask_places, test_segments
from tests.unit.structures import structure_set

VALUES = np.array([[0, 1, 2], [127, 128, 255]], np.uint8)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def values_of(data: bytes, **options: Any) -> np.ndarray:
    layers = Mask(data).layers(**options)
    assert not isinstance(layers, Reject), layers
    (layer,) = layers
    return layer.values


def dicom(values: np.ndarray, sop_class: str = SecondaryCaptureImageStorage, **attributes: Any) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["mask"])
    dataset.Rows, dataset.Columns = values.shape[:2]
    dataset.SamplesPerPixel = values.shape[2] if values.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if values.ndim == 3 else "MONOCHROME2"
    if values.ndim == 3:
        dataset.PlanarConfiguration = 0
    bits = values.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP"])
def test_grey_values_are_kept(file_format: str) -> None:
    values = values_of(encoded(Image.fromarray(VALUES), file_format))
    assert values.dtype == np.uint8
    assert np.array_equal(values, VALUES)


def test_a_bilevel_mask_is_0_and_255() -> None:
    assert np.array_equal(values_of(encoded(Image.fromarray(VALUES > 100))), (VALUES > 100) * 255)


def test_a_16_bit_mask_keeps_its_values() -> None:
    # 256 would wrap to 0 in 8 bits.
    deep = np.array([[0, 7, 256, 65535]], np.uint16)
    assert values_of(encoded(Image.fromarray(deep))).tolist() == [[0, 7, 256, 65535]]


def test_transparency_does_not_count() -> None:
    colours = np.array([[[0, 0, 0, 255], [255, 0, 0, 255], [0, 0, 9, 0]]], np.uint8)
    values = values_of(encoded(Image.fromarray(colours)))
    assert values.tolist() == [[[0, 0, 0], [255, 0, 0], [0, 0, 9]]]
    assert np.array_equal(Labels().apply(values), [[0, 1, 1]])


def test_a_palette_counts_by_the_colours_it_shows_or_by_its_indices() -> None:
    image = Image.fromarray(np.array([[5, 6]], np.uint8), "L").convert("P")
    image.putdata([5, 6])
    image.putpalette([0, 0, 0] * 6 + [200, 10, 10])  # index 5 shows black, index 6 red
    data = encoded(image)
    assert values_of(data).tolist() == [[[0, 0, 0], [200, 10, 10]]]
    assert truth([(data, None)], (1, 2), Labels()).tolist() == [[0, 1]]  # type: ignore[union-attr]
    by_value = Labels(("a", "b"), values={5: "a", 6: "b"})
    assert truth([(data, None)], (1, 2), by_value).tolist() == [[1, 2]]  # type: ignore[union-attr]


def test_jpeg_noise_goes_by_the_threshold_before_or_after_nearest_resizing() -> None:
    rr, cc = np.mgrid[:64, :64]
    exact = (((rr - 30) ** 2 + (cc - 35) ** 2 < 15**2) * 255).astype(np.uint8)
    data = encoded(Image.fromarray(exact), "JPEG", quality=75)
    noisy = values_of(data)
    assert len(np.unique(noisy)) > 2  # the noise is there
    classes = truth([(data, None)], (64, 64), Labels(threshold=127))
    assert isinstance(classes, np.ndarray)
    assert np.array_equal(classes, exact // 255)
    assert np.count_nonzero(truth([(data, None)], (64, 64), Labels())) > np.count_nonzero(classes) + 100
    # What the network sees is what thresholding after the resize gives.
    for size in ((48, 48), (25, 40), (128, 128)):
        preprocess = Preprocess(size=size, mask_filter="nearest")
        assert np.array_equal(preprocess.apply_mask(classes), preprocess.apply_mask(noisy) > 127)


def test_a_signed_dicom_mask_is_its_stored_values() -> None:
    values = np.where(VALUES > 100, 32767, -32768).astype(np.int16)
    classes = truth([(dicom(values), None)], (2, 3), Labels(threshold=127))
    assert np.array_equal(classes, VALUES > 100)
    # What is about showing an image does not count: padding, inversion, rescaling.
    shown = dicom(
        values, CTImageStorage, PixelPaddingValue=-32768, PhotometricInterpretation="MONOCHROME1",
        RescaleSlope="2", RescaleIntercept="-70000",
    )  # fmt: skip
    assert np.array_equal(truth([(shown, None)], (2, 3), Labels(threshold=127)), VALUES > 100)


def test_a_dicom_mask_of_values_and_of_colours() -> None:
    labels = Labels(("a", "b"), values={1: "a", 2: "b", 127: "a", 128: "a", 255: "b"})
    assert np.array_equal(truth([(dicom(VALUES), None)], (2, 3), labels), [[0, 1, 2], [1, 1, 2]])
    colours = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0]]], np.uint8)
    labels = Labels(("red", "green"), colors={"#ff0000": "red", "#00ff00": "green"})
    assert np.array_equal(truth([(dicom(colours), None)], (1, 3), labels), [[0, 1, 2]])


def test_a_dicom_mask_is_read_as_its_codestream_has_it() -> None:
    """Planes of colours, precision, and colour differences, whatever the data set says of them."""
    colours = np.zeros((40, 37, 3), np.uint8)
    colours[3:9, 4:12] = 255, 0, 0
    colours[12:, 2:15] = 0, 255, 0
    expected = (colours[..., 0] > 0) + 2 * (colours[..., 1] > 0)
    labels = Labels(("red", "green"), colors={"#ff0000": "red", "#00ff00": "green"})
    for syntax, frame, photometric in (
        (JPEG2000Lossless, jpeg_2000(colours, photometric_interpretation=1, use_mct=True), "YBR_RCT"),
        (JPEGLSLossless, jpeg_ls(colours, interleave_mode=1), "RGB"),
    ):
        for planar in (0, 1):
            data = compressed(colours, syntax, frame, PhotometricInterpretation=photometric, PlanarConfiguration=planar)
            assert np.array_equal(truth([(data, None)], (40, 37), labels), expected)
    data = dicom(np.ascontiguousarray(np.moveaxis(colours, -1, 0)).reshape(colours.shape), PlanarConfiguration=1)
    assert np.array_equal(truth([(data, None)], (40, 37), labels), expected)
    deep = expected.astype(np.uint16)
    data = compressed(deep, JPEGLSLossless, jpeg_ls(expected.astype(np.uint8)), PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(values_of(data), expected)


def compressed(values: np.ndarray, syntax: str, frame: bytes, **attributes: Any) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(values, **attributes)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def test_a_mask_of_several_frames_is_that_of_the_frame() -> None:
    frames = np.stack([VALUES, VALUES[::-1]])
    data = dicom(VALUES, NumberOfFrames="2", PixelData=frames.tobytes())
    for frame in range(2):
        assert np.array_equal(truth([(data, None)], (2, 3), Labels(threshold=127), None, frame), frames[frame] > 127)
    for mask, frame in ((data, None), (data, 2), (encoded(Image.fromarray(VALUES)), 0)):
        refused = truth([(mask, None)], (2, 3), Labels(), None, frame)
        assert isinstance(refused, Reject)
        assert refused.reason == Reason.MASK_MISMATCH


def test_of_several_masks_the_later_class_wins_whatever_their_order() -> None:
    labels = Labels(("a", "b"), sources={"x": "a", "y": "b"})
    left, middle = np.array([[9, 9, 0]], np.uint8), np.array([[0, 9, 0]], np.uint8)
    masks = [(encoded(Image.fromarray(left)), "x"), (encoded(Image.fromarray(middle)), "y")]
    assert np.array_equal(truth(masks, (1, 3), labels), [[1, 2, 0]])
    assert np.array_equal(truth(masks[::-1], (1, 3), labels), [[1, 2, 0]])
    assert np.array_equal(truth([], (1, 3), labels), [[0, 0, 0]])


def test_bytes_that_are_no_mask_are_rejected() -> None:
    good = encoded(Image.fromarray(np.tile(VALUES, (50, 50))))
    for data, reason in [
        (b"", Reason.EMPTY_OBJECT),
        (b"not an image", Reason.NOT_AN_IMAGE),
        (good[: len(good) // 2], Reason.NOT_AN_IMAGE),
        (encoded(Image.fromarray(VALUES.astype(np.float32) / 2), "TIFF"), Reason.UNSUPPORTED_PIXELS),
        (dicom(VALUES)[:-20], Reason.TRUNCATED),
        (dicom(VALUES)[:-2], Reason.TRUNCATED),
        (dicom(VALUES, PixelData=None), Reason.TRUNCATED),
    ]:
        mask = Mask(data).layers()
        assert isinstance(mask, Reject)
        assert mask.reason == reason
    mismatch = truth([(encoded(Image.fromarray(VALUES)), None)], (3, 2), Labels())
    assert mismatch == Reject(Reason.MASK_MISMATCH, "mask (2, 3), image (3, 2)")


@pytest.mark.parametrize("side", [9_000, 20_000])  # over our limit, over Pillow's
def test_a_declared_size_over_the_limit_is_refused_before_decoding(side: int) -> None:
    huge = bytearray(encoded(Image.fromarray(VALUES)))
    huge[16:24] = side.to_bytes(4) + side.to_bytes(4)  # width and height in the PNG's IHDR
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4)
    mask = Mask(bytes(huge)).layers()
    assert isinstance(mask, Reject)
    assert mask.reason == Reason.TOO_LARGE
    many = Mask(dicom(VALUES, Rows=9_000, Columns=9_000)).layers()
    assert isinstance(many, Reject)
    assert many.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_a_threshold_of_greys_says_nothing_of_segments(kind: str) -> None:
    planes = test_segments.PLANES
    data = test_segments.other_maker(kind, planes if kind != "LABELMAP" else test_segments.EXPECTED.astype(np.uint8))
    either = {"Bleed": "lesion", "Stroke": "lesion"}
    for labels in (Labels(threshold=127), Labels(threshold=127, sources=either)):
        for number in (1, 2):
            classes = test_segments.classes_of(data, number, labels)
            assert np.array_equal(classes, planes[number].any(axis=-1))


def test_a_threshold_of_greys_says_nothing_of_contours() -> None:
    square = test_contours.drawn([(1.5, 2.5), (1.5, 6.5), (4.5, 6.5), (4.5, 2.5)], 1)
    data = structure_set(test_contours.SOURCES, {"Liver": [square]})
    inside = np.zeros(test_contours.SHAPE)
    inside[2:5, 3:7] = 1
    classes = truth([(data, None)], test_contours.SHAPE, Labels(threshold=127), test_contours.HEADERS[1])
    assert np.array_equal(classes, inside)


def test_numbers_of_volumes_and_segments_are_no_colours() -> None:
    labels = Labels(colors={"#ffffff": "lesion"})
    volume = test_mask_places.stored(
        (0, 1, 2), (False,) * 3, test_mask_places.MASK.transpose(2, 1, 0), test_mask_places.affine_lps()
    )
    shape = test_mask_places.MASK.shape[1:]
    segments = test_segments.other_maker("BINARY", test_segments.PLANES)
    for found in (
        truth([(volume, None)], shape, labels, test_mask_places.HEADERS[1]),
        truth([(segments, None)], test_segments.EXPECTED.shape[1:], labels, test_segments.header(1)),
    ):
        assert isinstance(found, Reject)
        assert found.reason == Reason.MASK_VALUES
        assert "labels.colors" in found.detail


def test_a_dicom_image_with_a_palette_counts_by_the_colours_it_shows_or_by_its_indices() -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    tables: dict[str, Any] = {}
    for channel, entries in {"Red": [0, 255, 0], "Green": [0, 0, 0], "Blue": [0, 0, 255]}.items():
        tables[f"{channel}PaletteColorLookupTableDescriptor"] = [3, 0, 8]
        tables[f"{channel}PaletteColorLookupTableData"] = bytes([*entries, 0])
    data = dicom(indices, PhotometricInterpretation="PALETTE COLOR", **tables)
    for labels in (Labels(("a", "b")), Labels(("a", "b"), colors={"#ff0000": "a", "#0000ff": "b"})):
        assert np.array_equal(truth([(data, None)], indices.shape, labels), indices)
    assert np.array_equal(truth([(data, None)], indices.shape, Labels(threshold=127)), indices > 0)


def test_a_dicom_image_of_one_bit_is_black_and_white_or_0_and_1() -> None:
    bits = np.array([[0, 1, 1], [1, 1, 0]], np.uint8)
    data = dicom(bits, BitsStored=1, HighBit=0)
    for labels in (Labels(threshold=127), Labels(colors={"#ffffff": "lesion"}), Labels(values={1: "lesion"})):
        assert np.array_equal(truth([(data, None)], bits.shape, labels), bits)
