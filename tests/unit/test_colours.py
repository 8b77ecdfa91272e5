"""Colours, palettes, look-up tables, bitmaps and overlay bits: expected values by hand or from pydicom."""

import shutil
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import pack_bits
from pydicom.tag import Tag

from rayseg.data.preprocess import Preprocess
from rayseg.dicom.pixels import luminance
from rayseg.dicom.reading import Slice, read_slice, read_slices
from rayseg.records import Reason, Reject

Enhanced = Callable[..., Dataset]
AsFile = Callable[..., bytes]
COLOURS_HWC = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 255], [7, 7, 7], [10, 200, 30]]], np.uint8)
LUMINANCE_HW = [[76, 150, 29], [255, 7, 124]]  # 0.299 R + 0.587 G + 0.114 B
SINGLE_BIT = uid.MultiFrameSingleBitSecondaryCaptureImageStorage
RAMP_NHW = np.arange(40 * 48, dtype=np.uint16).reshape(1, 40, 48)


@pytest.fixture
def secondary(enhanced: Enhanced) -> Callable[..., Dataset]:
    """A secondary capture of one or more frames of `words`; keyword None leaves an attribute out."""

    def make(words_NHW: np.ndarray, **attributes: Any) -> Dataset:
        absent = dict.fromkeys(("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"))
        return enhanced(
            words_NHW, **{"SOPClassUID": uid.SecondaryCaptureImageStorage, "Modality": "OT", **absent, **attributes}
        )

    return make


def of_colours(secondary: Callable[..., Dataset], words: np.ndarray, photometric: str, **attributes: Any) -> Dataset:
    """`words` (frames, rows, columns, 3), or as PlanarConfiguration 1 says."""
    planar = attributes.get("PlanarConfiguration", 0)
    plane = words[:, 0] if planar else words[..., 0]
    dataset = secondary(
        plane,
        **{"SamplesPerPixel": 3, "PhotometricInterpretation": photometric, "PlanarConfiguration": 0, **attributes},
    )
    dataset.PixelData = words.tobytes() + b"\0" * (words.nbytes % 2)
    return dataset


def stored_of(data: bytes, frame: int | None = None) -> np.ndarray:
    result = read_slice(data, frame)
    assert isinstance(result, Slice), result
    return result.stored


@pytest.mark.parametrize(
    ("planar", "syntax"),  # RLE is always planar
    [(0, None), (1, None), (0, uid.ExplicitVRBigEndian), (1, uid.ExplicitVRBigEndian), (0, uid.RLELossless)],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_become_their_luminance(
    secondary: Callable[..., Dataset], as_file: AsFile, planar: int, dtype: type, syntax: str | None
) -> None:
    frames = np.stack([COLOURS_HWC, COLOURS_HWC[::-1]]).astype(dtype)
    words = np.moveaxis(frames, -1, 1) if planar else frames
    data = as_file(of_colours(secondary, np.ascontiguousarray(words), "RGB", PlanarConfiguration=planar), syntax)
    assert stored_of(data, 0).tolist() == LUMINANCE_HW
    assert stored_of(data, 1).tolist() == LUMINANCE_HW[::-1]
    assert stored_of(data, 0).dtype == dtype


def test_equal_channels_keep_every_value(secondary: Callable[..., Dataset], as_file: AsFile) -> None:
    for dtype in (np.uint8, np.uint16):
        grey = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(1, -1, 256)
        data = as_file(of_colours(secondary, np.stack([grey] * 3, axis=-1), "RGB"))
        assert np.array_equal(stored_of(data), grey[0])


@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422"])
def test_the_luminance_of_ybr_is_its_first_component(
    secondary: Callable[..., Dataset], as_file: AsFile, photometric: str
) -> None:
    luma = np.random.default_rng(1).integers(0, 256, (1, 4, 6), np.uint8)
    chroma = np.full_like(luma, 128)
    words = np.stack([luma, chroma, chroma], axis=-1)
    dataset = of_colours(secondary, words, photometric)
    if photometric == "YBR_FULL_422":  # Y Y Cb Cr for two pixels
        pairs = luma.reshape(-1, 2)
        dataset.PixelData = np.concatenate([pairs, np.full_like(pairs, 90)], axis=1).tobytes()
    assert np.array_equal(stored_of(as_file(dataset)), luma[0])


@pytest.mark.parametrize(
    ("photometric", "changes", "detail"),
    [
        ("YBR_PARTIAL_422", {}, "PhotometricInterpretation"),
        ("CMYK", {}, "PhotometricInterpretation"),
        ("MONOCHROME2", {}, "PhotometricInterpretation"),
        ("RGB", {"PixelRepresentation": 1}, "PixelRepresentation"),
        ("RGB", {"SamplesPerPixel": 4}, "SamplesPerPixel"),
    ],
)
def test_other_colours_are_rejected_by_name(
    secondary: Callable[..., Dataset], as_file: AsFile, photometric: str, changes: dict[str, Any], detail: str
) -> None:
    data = as_file(of_colours(secondary, COLOURS_HWC[np.newaxis], photometric, **changes))
    assert read_slice(data) == Reject(Reason.UNSUPPORTED_PIXELS, detail)


def with_palette(dataset: Dataset, first: int, entries: np.ndarray, segmented: bool = False) -> Dataset:
    """A palette of `entries` (n, 3) from the stored value `first` on."""
    bits = entries.dtype.itemsize * 8
    for channel, colour in enumerate(("Red", "Green", "Blue")):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [len(entries), first, bits])
        data = entries[:, channel]
        if segmented:  # one discrete segment: opcode 0, length, values
            data = np.concatenate([np.array([0, len(entries)], data.dtype), data])
        setattr(dataset, f"{'Segmented' if segmented else ''}{colour}PaletteColorLookupTableData", data.tobytes())
    return dataset


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_palettes(secondary: Callable[..., Dataset], as_file: AsFile, dtype: type, segmented: bool) -> None:
    """Values before the first entry show as it does, values behind the last one as that."""
    entries = COLOURS_HWC.reshape(-1, 3).astype(dtype)
    words = np.array([[[0, 10, 11, 12], [13, 14, 15, 255]]], np.uint8)
    dataset = with_palette(secondary(words, PhotometricInterpretation="PALETTE COLOR"), 10, entries, segmented)
    grey = [76, 150, 29, 255, 7, 124]
    stored = stored_of(as_file(dataset))
    assert stored.tolist() == [[grey[0], grey[0], grey[1], grey[2]], [grey[3], grey[4], grey[5], grey[5]]]
    assert stored.dtype == dtype


def test_modality_look_up_table(secondary: Callable[..., Dataset], as_file: AsFile) -> None:
    """Instead of slope and intercept; MONOCHROME1 turns over what comes out of it."""
    table = Dataset()
    table.LUTDescriptor = [3, 65536 - 1, 16]  # the first value is -1
    table["LUTDescriptor"].VR = "SS"
    table.LUTDescriptor = [3, -1, 16]
    table.ModalityLUTType = "US"
    table.LUTData = [1000, 50, 7]
    table["LUTData"].VR = "US"
    words = np.array([[[-5, -1, 0, 1, 9]]], np.int16)
    for photometric, expected in (
        ("MONOCHROME2", [1000, 1000, 50, 7, 7]),
        ("MONOCHROME1", [65535 - value for value in (1000, 1000, 50, 7, 7)]),
    ):
        dataset = secondary(words, ModalityLUTSequence=[table], PhotometricInterpretation=photometric)
        result = read_slice(as_file(dataset))
        assert isinstance(result, Slice)
        assert result.stored.tolist() == [expected]
        assert (result.rescale_slope, result.rescale_intercept) == (1.0, 0.0)
    del table.LUTData
    found = read_slice(as_file(secondary(words, ModalityLUTSequence=[table])))
    assert isinstance(found, Reject)
    assert found.detail.startswith("ModalityLUTSequence")


def look_up_table(vr: str, data: bytes, entries: int, first: int = 0, bits: int = 16, little: bool = True) -> Dataset:
    """An item whose LUTData has these bytes, in a byte order of its own."""
    item = Dataset()
    order = "little" if little else "big"
    descriptor = b"".join((number & 0xFFFF).to_bytes(2, order) for number in (entries, first, bits))
    item[0x00283002] = RawDataElement(Tag(0x00283002), "SS" if first < 0 else "US", 6, descriptor, 0, False, little)
    item[0x00283006] = RawDataElement(Tag(0x00283006), vr, len(data), data, 0, False, little)
    return item


TABLE = (np.arange(40) * 5 + 3).astype(np.uint16)  # up to 198


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
@pytest.mark.parametrize("entries", [40, 39])
@pytest.mark.parametrize(
    ("vr", "bits", "wide"),
    [
        ("OW", 16, True),
        ("US", 16, True),
        ("OW", 12, True),
        ("OW", 8, False),
        ("OB", 8, False),
        ("OW", 8, True),
        ("US", 8, True),
    ],
)
def test_modality_tables_of_every_form(
    secondary: Callable[..., Dataset], as_file: AsFile, syntax: str, entries: int, vr: str, bits: int, wide: bool
) -> None:
    """8-bit entries lie two a word, of which the first is the low byte; or some write a word for each."""
    little = syntax != uid.ExplicitVRBigEndian
    data = (
        TABLE[:entries].astype("<u2" if little else ">u2").tobytes() if wide else TABLE[:entries].astype("u1").tobytes()
    )
    data += b"\0" * (len(data) % 2)
    if not wide and vr == "OW" and not little:
        data = np.frombuffer(data, "<u2").astype(">u2").tobytes()
    words = np.arange(48, dtype=np.uint8).reshape(1, 6, 8)
    item = look_up_table(vr, data, entries, 0, bits, little)
    result = read_slice(as_file(secondary(words, ModalityLUTSequence=[item], RescaleSlope=3), syntax))
    assert isinstance(result, Slice), result
    assert result.stored.tolist() == TABLE[np.clip(words[0], 0, entries - 1)].tolist()
    assert (result.rescale_slope, result.rescale_intercept) == (1.0, 0.0)


def test_modality_tables_with_signs_and_of_full_length(secondary: Callable[..., Dataset], as_file: AsFile) -> None:
    negative = np.array([-1000, -5, 7], "<i2")
    words = np.array([[[-5, -2, -1, 0, 9]]], np.int16)
    item = look_up_table("SS", negative.tobytes(), 3, -2)
    stored = stored_of(as_file(secondary(words, ModalityLUTSequence=[item])))
    assert stored.tolist() == [[-1000, -1000, -5, 7, 7]]
    item = look_up_table("SS", negative.tobytes(), 3, -2)
    inverted = secondary(words, ModalityLUTSequence=[item], PhotometricInterpretation="MONOCHROME1")
    assert stored_of(as_file(inverted)).tolist() == [[999, 999, 4, -8, -8]]
    whole = np.arange(2**16, dtype="<u2")[::-1]  # 65,536 entries, which the descriptor calls 0
    words = np.array([[[0, 1, 65535]]], np.uint16)
    stored = stored_of(as_file(secondary(words, ModalityLUTSequence=[look_up_table("OW", whole.tobytes(), 0)])))
    assert stored.tolist() == [[65535, 65534, 0]]
    short = look_up_table("OW", whole.tobytes()[:20], 11)
    found = read_slice(as_file(secondary(words, ModalityLUTSequence=[short])))
    assert isinstance(found, Reject)
    assert found.detail.startswith("ModalityLUTSequence")


@pytest.mark.parametrize("items", [[], [Dataset()]])
def test_an_empty_modality_table_is_none(
    secondary: Callable[..., Dataset], as_file: AsFile, items: list[Dataset]
) -> None:
    dataset = secondary(RAMP_NHW, ModalityLUTSequence=items, RescaleSlope=2, RescaleIntercept=-9)
    result = read_slice(as_file(dataset))
    assert isinstance(result, Slice), result
    assert (result.rescale_slope, result.rescale_intercept) == (2.0, -9.0)
    assert np.array_equal(result.stored, RAMP_NHW[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_are_neither_rescaled_nor_windowed(
    secondary: Callable[..., Dataset], as_file: AsFile, dtype: type
) -> None:
    full = COLOURS_HWC.astype(dtype) * (257 if dtype is np.uint16 else 1)
    preprocess = Preprocess(size=(2, 3), window=("brain", "bone"), percentiles=None)
    palette = with_palette(
        secondary(np.arange(6, dtype=np.uint8).reshape(1, 2, 3), PhotometricInterpretation="PALETTE COLOR"),
        0,
        full.reshape(-1, 3),
    )
    for dataset in (of_colours(secondary, full[np.newaxis], "RGB"), palette):
        dataset.SOPClassUID, dataset.RescaleSlope, dataset.RescaleIntercept = uid.CTImageStorage, "2", "-1024"
        result = read_slice(as_file(dataset))
        assert isinstance(result, Slice), result
        assert (result.rescale_slope, result.rescale_intercept, result.is_colour) == (1.0, 0.0, True)
        image_HWC = preprocess.apply(result).astype(int)
        assert np.abs(image_HWC - np.array(LUMINANCE_HW)[..., np.newaxis]).max() <= (0 if dtype is np.uint8 else 1)
        del dataset.RescaleIntercept  # which a CT slice that is no colour needs
        assert isinstance(read_slice(as_file(dataset)), Slice)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_bitmaps_whose_frames_begin_within_a_byte(
    secondary: Callable[..., Dataset], as_file: AsFile, syntax: str
) -> None:
    bits = np.random.default_rng(2).integers(0, 2, (7, 5, 3), np.uint8)
    dataset = secondary(bits, BitsAllocated=1, BitsStored=1, HighBit=0)
    dataset.PixelData = pack_bits(bits.reshape(-1))
    data = as_file(dataset, syntax)
    for frame in range(7):
        assert np.array_equal(stored_of(data, frame), bits[frame])


def test_bitmaps_of_the_corpus(shared_data: Path) -> None:
    """Segmentations, relabelled, as pydicom reads them: big endian words, frames within a byte, deflated frames."""
    folder = shared_data / "dicom-corpus/pydicom-data/data_store/data"
    for name, twin in (
        ("liver", "liver"),
        ("liver_expb", "liver_expb"),
        ("liver_nonbyte_aligned", "liver_nonbyte_aligned"),
        ("liver_deflate", "liver"),
        ("liver_nonbyte_aligned_deflate", "liver_nonbyte_aligned"),
    ):
        data = (folder / f"{name}.dcm").read_bytes()
        data = data.replace(uid.SegmentationStorage.encode(), SINGLE_BIT.encode() + b"\0")
        expected = pydicom.dcmread(folder / f"{twin}.dcm").pixel_array
        found = list(read_slices(data, range(3)))
        assert all(isinstance(one, Slice) for one in found), found
        assert np.array_equal(np.stack([one.stored for one in found if isinstance(one, Slice)]), expected), name


def test_deflated_frames_stop_at_their_size(secondary: Callable[..., Dataset], as_file: AsFile) -> None:
    def of_frames(frames: list[bytes]) -> bytes:
        dataset = secondary(np.stack([RAMP_NHW[0]] * len(frames)))
        dataset.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
        dataset.PixelData = encapsulate([frame + b"\0" * (len(frame) % 2) for frame in frames])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        return as_file(dataset).replace(uid.JPEG2000Lossless.encode(), b"1.2.840.10008.1.2.8.1\0")  # unknown to pydicom

    def deflated(data: bytes) -> bytes:
        deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return deflater.compress(data) + deflater.flush()

    data = of_frames([deflated(RAMP_NHW.tobytes()), deflated(bytes(10**7)), deflated(b"short"), b"\xff" * 40])
    assert np.array_equal(stored_of(data, 0), RAMP_NHW[0])
    tracemalloc.start()
    assert not stored_of(data, 1).any()  # of ten megabytes the first few thousand bytes
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    reasons = [one.reason for one in read_slices(data, [2, 3]) if isinstance(one, Reject)]
    assert reasons == [Reason.TRUNCATED, Reason.DECODE_FAILED]


@pytest.mark.parametrize("syntax", [None, uid.ExplicitVRBigEndian, uid.RLELossless])
def test_overlay_bits_are_masked_and_signs_extended(
    secondary: Callable[..., Dataset], as_file: AsFile, syntax: str | None
) -> None:
    """An overlay in bit 12 and 15 of 16 (PS3.5 8.1.2), 12 bits stored; overlay data beside it (6000,3000)."""
    values = np.array([[[-2048, -1, 0, 5, 2047]]], np.int16)
    words = (values & 0x0FFF) | np.int16(0x1000) | np.int16(-0x8000)
    dataset = secondary(words, BitsStored=12, HighBit=11)
    dataset.add_new(0x60000010, "US", 1)
    dataset.add_new(0x60000100, "US", 16)
    dataset.add_new(0x60003000, "OW", b"\xff\xff")
    assert stored_of(as_file(dataset, syntax)).tolist() == values[0].tolist()


@pytest.mark.skipif(shutil.which("dcmj2pnm") is None, reason="no dcmtk: apt-get install dcmtk")
@pytest.mark.parametrize("entries", [300, 201, 4096])
def test_palettes_of_bytes_have_any_number_of_entries(
    tmp_path: Path, secondary: Callable[..., Dataset], as_file: AsFile, entries: int
) -> None:
    """More than 256, and an odd number, which is padded; dcmtk agrees."""
    random = np.random.default_rng(entries)
    palette = random.integers(0, 256, (entries, 3), np.uint8)
    words = random.integers(0, entries + 200, (1, 32, 40)).astype(np.uint16)
    dataset = with_palette(secondary(words, PhotometricInterpretation="PALETTE COLOR"), 0, palette)
    for colour in ("Red", "Green", "Blue"):
        element = dataset[f"{colour}PaletteColorLookupTableData"]
        element.value += b"\0" * (entries % 2)
    data = as_file(dataset)
    (tmp_path / "palette.dcm").write_bytes(data)
    subprocess.run(["dcmj2pnm", "+on", tmp_path / "palette.dcm", tmp_path / "shown.png"], check=True, timeout=60)
    shown = np.asarray(Image.open(tmp_path / "shown.png").convert("RGB"))
    assert np.array_equal(stored_of(data), luminance(shown))


def test_segmented_palettes_of_big_endian_words(secondary: Callable[..., Dataset], as_file: AsFile) -> None:
    """Values beyond the last entry show as it does, whatever fits into an entry."""
    entries = COLOURS_HWC.reshape(-1, 3).astype(np.uint16) * 257
    words = np.array([[[0, 10, 11, 12], [13, 14, 15, 300]]], np.uint16)
    dataset = with_palette(secondary(words, PhotometricInterpretation="PALETTE COLOR"), 10, entries, segmented=True)
    wanted = [[grey * 257 for grey in row] for row in ([76, 76, 150, 29], [255, 7, 124, 124])]
    assert np.abs(stored_of(as_file(dataset)).astype(int) - wanted).max() <= 128  # rounded of 16 bits
    for colour in ("Red", "Green", "Blue"):
        element = dataset[f"Segmented{colour}PaletteColorLookupTableData"]
        element.value = np.frombuffer(element.value, np.uint16).byteswap().tobytes()
    dataset.PixelData = words.byteswap().tobytes()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    assert np.abs(stored_of(as_file(dataset)).astype(int) - wanted).max() <= 128
