"""Image files of many kinds, for images and masks: by hand-written encoders, tifffile as writer, cv2 as judge."""

import io
import struct
import zlib
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from rayseg.data.labels import Labels
from rayseg.data.manifest import Item, rows
from rayseg.data.masks import Mask, truth
from rayseg.dicom import image_files
from rayseg.dicom.pseudonyms import Pseudonyms
from rayseg.dicom.reading import Slice, read_slice
from rayseg.records import Reason, Reject

CHANCE = np.random.default_rng(5)
DEEP = CHANCE.integers(0, 65536, (13, 19), np.uint16)
CLASSES = np.zeros((13, 19), np.uint16)
CLASSES[2:5, 3:9], CLASSES[7:12, 1:4] = 1, 2
COLOURS_HWC = CHANCE.integers(0, 256, (13, 19, 3), np.uint8)
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
GREY, RGB, INDEXED, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    values: np.ndarray, colour_type: int, bits: int, before: bytes = b"", after: bytes = b"", interlaced: bool = False
) -> bytes:
    """Samples (rows, columns[, channels]) as PNG of any kind, with other chunks before and after the pixels."""
    rows_, columns = values.shape[:2]

    def line(row: np.ndarray) -> bytes:
        samples = row.reshape(-1)
        if bits == 16:
            return b"\0" + samples.astype(">u2").tobytes()
        shifts = np.arange(bits - 1, -1, -1)
        return b"\0" + np.packbits(((samples[:, np.newaxis] >> shifts) & 1).astype(np.uint8)).tobytes()

    parts = [values[r::dr, c::dc] for r, c, dr, dc in ADAM7] if interlaced else [values]
    pixels = zlib.compress(b"".join(line(row) for part in parts if part.size for row in part))
    head = struct.pack(">IIBBBBB", columns, rows_, bits, colour_type, 0, 0, int(interlaced))
    data = chunk(b"IDAT", pixels[:30]) + chunk(b"IDAT", pixels[30:])  # any number of chunks
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + data + after + chunk(b"IEND", b"")


def tiff(values: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def retagged(data: bytes, **values: int) -> bytes:
    """A TIFF with other values in its first page's tags."""
    changed = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for name, value in values.items():
            tag = file.pages[0].tags[name]
            order = "little" if file.byteorder == "<" else "big"
            changed[tag.valueoffset : tag.valueoffset + tag.valuebytecount] = value.to_bytes(tag.valuebytecount, order)
    return bytes(changed)


def stored(data: bytes, color: bool = False) -> np.ndarray:
    found = read_slice(data, color=color)
    assert isinstance(found, Slice), found
    return found.stored


def mask(data: bytes, by_value: bool = False) -> np.ndarray:
    found = Mask(data).layers(by_value=by_value)
    assert not isinstance(found, Reject), found
    return found[0].values


def reason(data: bytes) -> Reason | None:
    found = read_slice(data)
    return found.reason if isinstance(found, Reject) else None


def with_alpha(values: np.ndarray, channels: int) -> np.ndarray:
    return np.dstack([*[values] * channels, CHANCE.integers(0, np.iinfo(values.dtype).max, values.shape)])


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("values", "colour_type"),
    [
        (DEEP, GREY),
        (with_alpha(DEEP, 1), GREY_ALPHA),
        (np.dstack([DEEP] * 3), RGB),
        (with_alpha(DEEP, 3), RGBA),
    ],
)
def test_png_of_16_bits_keeps_every_value(values: np.ndarray, colour_type: int, interlaced: bool):
    data = png(values, colour_type, 16, interlaced=interlaced)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), -1).reshape(13, 19, -1)[..., 0], DEEP)
    assert stored(data).dtype == np.uint16
    assert np.array_equal(stored(data), DEEP)
    assert np.array_equal(mask(data).reshape(13, 19, -1)[..., 0], DEEP)


@pytest.mark.parametrize("colour_type", [GREY, GREY_ALPHA, RGB, RGBA])
def test_labels_in_16_bits_are_no_background(colour_type: int):
    opaque = np.full_like(CLASSES, 65535)
    layers = [CLASSES] * (1 if colour_type in (GREY, GREY_ALPHA) else 3)
    layers += [opaque] if colour_type in (GREY_ALPHA, RGBA) else []
    data = png(np.dstack(layers), colour_type, 16)
    assert np.array_equal(truth([(data, None)], CLASSES.shape, Labels(("a", "b"))), CLASSES)
    assert np.array_equal(truth([(data, None)], CLASSES.shape, Labels()), CLASSES > 0)


def test_colours_of_16_bits_are_their_luminance_or_the_nearest_of_8_bits():
    deep_HWC = CHANCE.integers(0, 65536, (13, 19, 3), np.uint16)
    for data in (
        png(deep_HWC, RGB, 16),
        tiff(deep_HWC, photometric="rgb"),
        tiff(deep_HWC.astype(">u2"), photometric="rgb"),
    ):
        exact = deep_HWC @ np.array([0.299, 0.587, 0.114])
        assert np.abs(stored(data) - exact).max() <= 0.5 + 1e-6
        assert np.abs(stored(data, color=True) - deep_HWC / 257).max() <= 0.5
    red = png(np.dstack([CLASSES * 32_767, CLASSES * 0, CLASSES * 0]), RGB, 16)
    labels = Labels(("half", "full"), colors={"#7f0000": "half", "#ff0000": "full"})
    assert np.array_equal(truth([(red, None)], CLASSES.shape, labels), CLASSES)
    # Of one set with colours that are grey in one of its images: the scale is the others'.
    assert stored(png(np.dstack([DEEP] * 3), RGB, 16), color=True).max() <= 255


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits(bits: int, interlaced: bool):
    values = CHANCE.integers(0, 2**bits, (13, 19), np.uint8)
    data = png(values, GREY, bits, interlaced=interlaced)
    assert np.array_equal(stored(data), values * (255 // (2**bits - 1)))  # as the standard spreads them
    assert np.array_equal(mask(data), values * (255 // (2**bits - 1)))
    assert np.array_equal(mask(data, by_value=True), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_give_indices_or_colours(bits: int):
    entries = min(2**bits, 200)
    palette = CHANCE.integers(0, 256, (entries, 3), np.uint8)
    values = CHANCE.integers(0, entries, (13, 19), np.uint8)
    transparent = chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", bytes(entries))
    for interlaced in (False, True):
        data = png(values, INDEXED, bits, before=transparent, interlaced=interlaced)
        assert np.array_equal(mask(data, by_value=True), values)
        assert np.array_equal(mask(data), palette[values])
        assert np.array_equal(stored(data, color=True), palette[values])
    outside = png(values, INDEXED, bits, before=chunk(b"PLTE", palette[: entries - 1].tobytes()))
    assert values.max() == entries - 1
    assert reason(outside) == Reason.UNSUPPORTED_PIXELS


def test_what_is_beside_the_pixels_of_a_png_does_not_count():
    seven = struct.pack(">H", 7)
    for before in (
        chunk(b"tRNS", seven),
        chunk(b"gAMA", struct.pack(">I", 10_000)),
        chunk(b"sBIT", b"\5"),
        chunk(b"bKGD", seven),
    ):
        assert np.array_equal(stored(png(CLASSES + 6, GREY, 16, before=before)), CLASSES + 6)
    moving = png(CLASSES, GREY, 16, before=chunk(b"acTL", struct.pack(">II", 2, 0)))
    assert reason(moving) == Reason.UNSUPPORTED_MULTIFRAME


def exif(orientation: int, order: str = "<") -> bytes:
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def jpeg_with_exif(data: bytes, block: bytes) -> bytes:
    body = b"Exif\0\0" + block
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_formats_are_turned_upright(orientation: int):
    """The judge is cv2, which turns JPEG; its values are what PNG and TIFF of the same pixels must show."""
    smooth = np.add.outer(np.arange(24) * 3, np.arange(40) * 2).astype(np.uint8)
    plain = saved(Image.fromarray(smooth), "JPEG", quality=95)
    pixels = cv2.imdecode(np.frombuffer(plain, np.uint8), cv2.IMREAD_UNCHANGED)
    turned = jpeg_with_exif(plain, exif(orientation))
    expected = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert (expected.shape == (40, 24)) == (orientation >= 5)
    files = [turned, jpeg_with_exif(plain, exif(orientation, ">"))]
    files += [png(pixels, GREY, 8, **{place: chunk(b"eXIf", exif(orientation))}) for place in ("before", "after")]
    files += [png(pixels, GREY, 8, before=chunk(b"eXIf", exif(orientation, ">")))]
    tag = [(274, "H", 1, orientation, True)]
    files += [tiff(pixels, extratags=tag), tiff(pixels, extratags=tag, byteorder=">", bigtiff=True, tile=(16, 16))]
    for data in files:
        assert np.array_equal(stored(data), expected)
        assert np.array_equal(mask(data), expected)
        assert image_files.size(data) == expected.shape
        (row,) = rows(Item("x.png", "x.png", len(data), [], None), data, Pseudonyms(b"key"))
        assert (row["rows"], row["columns"]) == expected.shape


def test_a_spoiled_orientation_is_none():
    for block in (b"", b"II*\0", exif(0), exif(9), exif(6)[:-10], exif(6).replace(b"\x12\x01", b"\x13\x01"), bytes(40)):
        assert np.array_equal(stored(png(CLASSES, GREY, 16, before=chunk(b"eXIf", block))), CLASSES)


def test_jpeg_of_all_colours():
    smooth_HWC = cv2.resize(COLOURS_HWC, (64, 48), interpolation=cv2.INTER_CUBIC)
    grey = saved(Image.fromarray(smooth_HWC[..., 0]), "JPEG")
    assert np.array_equal(stored(grey), cv2.imdecode(np.frombuffer(grey, np.uint8), -1))
    for options in ({}, {"progressive": True}, {"keep_rgb": True}, {"subsampling": 0}):
        data = saved(Image.fromarray(smooth_HWC), "JPEG", **options)
        assert np.array_equal(stored(data, color=True), cv2.imdecode(np.frombuffer(data, np.uint8), -1)[..., ::-1])
    inks = Image.fromarray(smooth_HWC).convert("CMYK")
    data = saved(inks, "JPEG", quality=100, subsampling=0)
    assert np.abs(stored(data, color=True).astype(int) - smooth_HWC).max() < 12
    inverted = 255 - np.asarray(inks)
    data = imagecodecs.jpeg8_encode(inverted, colorspace="CMYK", outcolorspace="YCCK", level=100, subsampling="444")
    judged = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert np.abs(stored(data, color=True).astype(int) - judged).max() < 3
    twelve = imagecodecs.jpeg8_encode(np.arange(4096, dtype=np.uint16).reshape(64, 64), bitspersample=12, level=100)
    assert np.abs(stored(twelve).astype(int) - np.arange(4096).reshape(64, 64)).max() < 20
    lossless = imagecodecs.jpeg8_encode(DEEP, lossless=True, bitspersample=16)
    assert np.array_equal(stored(lossless), DEEP)
    for data, lossy in ((grey, True), (lossless, False)):
        (layer,) = Mask(data).layers()  # type: ignore[misc]
        assert layer.lossy == lossy


@pytest.mark.parametrize("part", [0.3, 0.7, 0.99])
def test_a_jpeg_that_ends_early_is_refused(part: float):
    """Decoders fill up with grey."""
    for options in ({}, {"progressive": True}):
        data = jpeg_with_exif(saved(Image.fromarray(COLOURS_HWC), "JPEG", **options), exif(1) + b"\xff\xd9")
        assert reason(data) is None
        assert reason(data[: int(len(data) * part)]) == Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"])
def test_tiff_of_every_number(dtype: str, byteorder: Any, bigtiff: bool):
    values = (CHANCE.random((13, 19)) * 200 - (100 if dtype[0] != "u" else 0)).astype(dtype)
    for options in ({}, {"compression": "deflate", "predictor": True}, {"compression": "lzw", "tile": (16, 16)}):
        if dtype in ("f2", "u8", "i8") and options.get("predictor"):  # not written so
            continue
        data = tiff(values, byteorder=byteorder, bigtiff=bigtiff, **options)
        assert image_files.is_image(data)
        assert np.array_equal(stored(data), values.astype("f4"))
        assert stored(data).dtype in (np.uint8, np.int16, np.uint16, np.int32, np.float32)
        whole = tiff(np.rint(values), byteorder=byteorder, bigtiff=bigtiff, **options)
        assert np.array_equal(mask(whole, by_value=True), np.rint(values).astype(int))
    if dtype[0] == "f":
        detail = f"mask: {values.dtype.newbyteorder('=').name} with other than whole numbers"
        assert Mask(data).layers() == Reject(Reason.UNSUPPORTED_PIXELS, detail)


def test_values_beyond_32_bits_with_sign_are_refused_and_not_wrapped():
    for dtype, value in (("u4", 2**31), ("u4", 2**32 - 1), ("u8", 2**63), ("i8", -(2**31) - 1), ("i8", 2**40)):
        data = tiff(np.full((4, 5), value, dtype))
        assert reason(data) == Reason.UNSUPPORTED_PIXELS
        assert isinstance(Mask(data).layers(), Reject)
    assert stored(tiff(np.full((4, 5), 2**31 - 1, "u4"))).max() == 2**31 - 1


def test_what_is_not_finite_is_the_smallest_value():
    values = np.array([[np.nan, -2.5, np.inf, 7.25, -np.inf]], "f4")
    assert stored(tiff(values)).tolist() == [[-2.5, -2.5, -2.5, 7.25, -2.5]]
    assert reason(tiff(np.full((2, 2), np.nan, "f8"))) == Reason.UNSUPPORTED_PIXELS
    assert isinstance(Mask(tiff(np.array([[np.nan, 1]], "f4"))).layers(), Reject)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 14, 20, 24, 31])
def test_tiff_of_every_number_of_bits(bits: int):
    values = CHANCE.integers(0, 2**bits, (13, 19)).astype("u1" if bits < 9 else "u2" if bits < 17 else "u4")
    data = tiff(values.astype(bool) if bits == 1 else values, bitspersample=bits, photometric="minisblack")
    shown = np.rint(values * (255 / (2**bits - 1)) - 0.4999) if bits < 8 else values
    assert np.array_equal(stored(data), shown)
    assert np.array_equal(mask(data, by_value=True), values)
    white = tiff(values.astype(bool) if bits == 1 else values, bitspersample=bits, photometric="miniswhite")
    turned = 2**bits - 1 - values.astype(int)
    assert np.array_equal(stored(white), np.rint(turned * (255 / (2**bits - 1)) - 0.4999) if bits < 8 else turned)


def test_white_as_zero():
    for dtype, most in (("u1", 255), ("u2", 65535), ("i1", -1), ("i2", -1)):
        values = (np.arange(40).reshape(5, 8) - (20 if dtype[0] == "i" else 0)).astype(dtype)
        assert np.array_equal(stored(tiff(values, photometric="miniswhite")), most - values.astype(int))
    # A mask's numbers could be meant either way: it is refused but where the writer is known.
    found = Mask(tiff(CLASSES, photometric="miniswhite")).layers()
    assert isinstance(found, Reject)
    assert "white as zero" in found.detail
    where = CLASSES > 0
    assert np.array_equal(mask(tiff(where)), where * 255)  # tifffile calls truth values so
    for compression in ("group3", "group4", "tiff_ccitt"):  # of faxes Pillow, too, and turns them over
        assert np.array_equal(mask(saved(Image.fromarray(where), "TIFF", compression=compression)), where * 255)
    assert np.array_equal(mask(saved(Image.fromarray(where), "TIFF")), where * 255)


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 32)}, {"rowsperstrip": 5}])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd", "lzma"])
def test_tiff_in_strips_tiles_and_planes(compression: str | None, layout: dict[str, Any]):
    assert np.array_equal(stored(tiff(DEEP, compression=compression, **layout)), DEEP)
    for planar, values in (("contig", COLOURS_HWC), ("separate", np.moveaxis(COLOURS_HWC, -1, 0))):
        data = tiff(values, photometric="rgb", planarconfig=planar, compression=compression, **layout)
        assert np.array_equal(stored(data, color=True), COLOURS_HWC)
        assert np.array_equal(mask(data), COLOURS_HWC)


def filled_from_below(data: bytes) -> bytes:
    """A TIFF with the tag FillOrder 2 in the place of ResolutionUnit."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages[0].tags["ResolutionUnit"]
    return data[: tag.offset] + struct.pack("<HHIHH", 266, 3, 1, 2, 0) + data[tag.offset + 12 :]


def test_tiff_whose_bytes_begin_with_the_lowest_bit():
    turned = np.array([int(f"{value:08b}"[::-1], 2) for value in range(256)], np.uint8)
    values = DEEP.astype(np.uint8)
    for options in ({}, {"tile": (16, 16)}):
        assert np.array_equal(stored(filled_from_below(tiff(turned[values], **options))), values)
    bits = np.pad(CLASSES > 0, ((0, 0), (0, 5)))
    packed = tiff(turned[np.packbits(bits, axis=1)], photometric="minisblack")
    assert np.array_equal(mask(filled_from_below(retagged(packed, ImageWidth=24, BitsPerSample=1))), bits * 255)


def test_tiff_samples_beyond_colours():
    alpha = np.dstack([COLOURS_HWC, COLOURS_HWC[..., :1]])
    for kind in ("unassalpha", "assocalpha", "unspecified"):
        assert np.array_equal(mask(tiff(alpha, photometric="rgb", extrasamples=[kind])), COLOURS_HWC)
    two = np.ascontiguousarray(COLOURS_HWC[..., :2])
    options: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig"}
    assert np.array_equal(mask(tiff(two, extrasamples=["unassalpha"], **options)), two[..., 0])
    # One class a sample: the first alone would be a part of the mask.
    for values in (two, COLOURS_HWC, np.dstack([COLOURS_HWC] * 2)):
        found = Mask(tiff(values, **options)).layers()
        assert isinstance(found, Reject)
        assert found.detail == f"mask: TIFF: {values.shape[2]} samples a pixel"


def test_tiff_palettes_give_indices_or_colours():
    values, palette = CHANCE.integers(0, 16, (13, 19), np.uint8), CHANCE.integers(0, 256, (256, 3), np.uint8)
    for table in (palette.T.astype("u2") * 257, palette.T.astype("u2") << 8, palette.T.astype("u2")):
        data = tiff(values, photometric="palette", colormap=table)
        assert np.array_equal(mask(data, by_value=True), values)
        assert np.array_equal(mask(data), palette[values])
        assert np.array_equal(stored(data, color=True), palette[values])


def test_tiff_with_jpeg_is_lossy_and_its_colours_are_right():
    smooth_HWC = cv2.resize(COLOURS_HWC, (96, 80), interpolation=cv2.INTER_CUBIC)
    for options in ({}, {"tile": (32, 48)}, {"rowsperstrip": 16}):
        for subsampling in ((2, 2), (2, 1), (1, 1)):
            options |= {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": subsampling}
            data = tiff(smooth_HWC, photometric="rgb", **options)
            assert np.abs(stored(data, color=True).astype(int) - smooth_HWC).mean() < 6
            (layer,) = Mask(data).layers()  # type: ignore[misc]
            assert layer.lossy


def test_reduced_copies_are_no_pages():
    small = DEEP[::2, ::2]
    for parts in (
        [(DEEP, {}), (small, {"subfiletype": 1})],
        [(small, {"subfiletype": 1}), (DEEP, {})],
        [(DEEP, {"subifds": 1}), (small, {"subfiletype": 1})],
        [(DEEP, {"subfiletype": 1})],  # of nothing
    ):
        stream = io.BytesIO()
        with tifffile.TiffWriter(stream) as writer:
            for values, options in parts:
                writer.write(values, **options)
        assert np.array_equal(stored(stream.getvalue()), DEEP)
        assert image_files.size(stream.getvalue()) == DEEP.shape


def imagej_in_one_page() -> bytes:
    """As ImageJ writes stacks beyond 4 GiB: the images stand behind one another, and only the first has a page."""
    data = bytearray(tiff(np.stack([CLASSES] * 4), imagej=True))
    order = "big" if data.startswith(b"MM") else "little"
    page = int.from_bytes(data[4:8], order)
    after = page + 2 + 12 * int.from_bytes(data[page : page + 2], order)
    data[after : after + 4] = bytes(4)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.stack([CLASSES] * 4), photometric="minisblack"),
        tiff(np.stack([CLASSES] * 2), photometric="minisblack", bigtiff=True, byteorder=">"),
        tiff(np.stack([CLASSES] * 4), imagej=True),
        tiff(np.stack([CLASSES] * 4), ome=True, photometric="minisblack", compression="lzw"),
        imagej_in_one_page(),
        tiff(np.stack([CLASSES] * 4), photometric="minisblack", truncate=True),
        tiff(np.zeros((16, 32, 32), "u1"), photometric="minisblack", volumetric=True, tile=(16, 16, 16)),
    ],
    ids=["pages", "big", "imagej", "ome", "imagej in one page", "tifffile in one page", "volume"],
)
def test_several_pages_are_refused_of_masks_too(data: bytes):
    assert reason(data) == Reason.UNSUPPORTED_MULTIFRAME
    found = Mask(data).layers()
    assert isinstance(found, Reject)
    assert found.reason == Reason.UNSUPPORTED_MULTIFRAME


def test_what_is_not_read_is_refused_by_name():
    for data, detail in [
        (tiff(DEEP, compression="lerc"), "TIFF: Compression 34887 LERC"),
        (tiff(DEEP, compression="jpeg2000"), "TIFF: Compression 34712 JPEG2000"),
        (tiff(DEEP.astype("c8")), "TIFF: samples of 64 bits, SampleFormat 6"),
        (tiff(COLOURS_HWC.astype("f4"), photometric="rgb"), "TIFF: 3 samples of 32 bits, SampleFormat 3"),
        (tiff(DEEP.astype("f4"), photometric="miniswhite"), "TIFF: floating point with white as zero"),
        (retagged(tiff(DEEP), PhotometricInterpretation=32803), "TIFF: PhotometricInterpretation 32803"),
        (retagged(tiff(COLOURS_HWC, photometric="rgb"), PhotometricInterpretation=6), "TIFF: YCbCr without JPEG"),
    ]:
        assert read_slice(data) == Reject(Reason.UNSUPPORTED_PIXELS, detail)
        assert Mask(data).layers() == Reject(Reason.UNSUPPORTED_PIXELS, f"mask: {detail}")


def test_cut_tiffs_are_refused():
    for options in ({}, {"compression": "lzw"}, {"compression": "deflate", "rowsperstrip": 4}, {"tile": (16, 16)}):
        data = tiff(DEEP, **options)
        for length in (len(data) - 1, len(data) - 60, len(data) // 2, 100, 6):
            assert reason(data[:length]) in (Reason.TRUNCATED, Reason.NOT_AN_IMAGE)
    two = tiff(np.stack([CLASSES] * 2), photometric="minisblack")
    assert reason(two[: 700 + CLASSES.nbytes // 2]) in (Reason.TRUNCATED, Reason.NOT_AN_IMAGE)
    short = retagged(tiff(DEEP), StripByteCounts=DEEP.nbytes - 2)
    assert reason(short) == Reason.TRUNCATED
    assert reason(retagged(tiff(DEEP, compression="lzw"), StripByteCounts=20)) == Reason.NOT_AN_IMAGE
    assert reason(retagged(tiff(DEEP), StripByteCounts=0)) == Reason.UNSUPPORTED_PIXELS


def test_sizes_are_checked_before_anything_is_decoded():
    wide = jpeg_with_exif(saved(Image.fromarray(COLOURS_HWC), "JPEG"), exif(1))
    at = wide.index(b"\xff\xc0")
    wide = wide[: at + 5] + struct.pack(">HH", 60_000, 60_000) + wide[at + 9 :]
    huge = bytearray(png(CLASSES, GREY, 16))
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(bytes(huge[12:29])))
    for data in (
        wide,
        bytes(huge),
        retagged(tiff(DEEP, compression="deflate"), ImageWidth=60_000, ImageLength=60_000),
        retagged(tiff(DEEP, compression="deflate", tile=(16, 16)), TileWidth=2**16, TileLength=2**16 - 16),
        retagged(
            tiff(DEEP.repeat(100, 0).repeat(100, 1), compression="deflate", tile=(1024, 1024)),
            TileWidth=1,
            TileLength=1,
        ),
    ):
        assert reason(data) == Reason.TOO_LARGE
    jpeg = tiff(DEEP.astype("u1"), compression="jpeg")
    at = jpeg.index(b"\xff\xc0")
    assert reason(jpeg[: at + 5] + struct.pack(">HH", 60_000, 60_000) + jpeg[at + 9 :]) == Reason.NOT_AN_IMAGE


def test_the_size_comes_from_the_beginning_where_that_has_it():
    large = CHANCE.integers(0, 256, (400, 300), np.uint8)
    assert image_files.size(png(large, GREY, 8)[:64]) == (400, 300)
    assert image_files.size(jpeg_with_exif(saved(Image.fromarray(large), "JPEG"), exif(8))[:2000]) == (300, 400)
    assert image_files.size(tiff(large)[:2000]) == (400, 300)
    for data in (png(large, GREY, 8)[:20], saved(Image.fromarray(large), "JPEG")[:20], tiff(large)[:20]):
        assert image_files.size(data) is None
    last = saved(Image.fromarray(large), "TIFF", compression="tiff_lzw")  # the page's tags stand behind its pixels
    at = int.from_bytes(last[4:8], "little")
    assert image_files.size(last[: at - 1] if at > 1000 else last[:8]) is None


def bmp(
    indices: np.ndarray, bits: int, palette: np.ndarray, top_down: bool = False, runs: bytes | None = None
) -> bytes:
    rows_, columns = indices.shape
    lines = []
    for row in indices if top_down else indices[::-1]:
        shifts = np.arange(bits - 1, -1, -1)
        line = np.packbits(((row[:, np.newaxis] >> shifts) & 1).astype(np.uint8)).tobytes()
        lines.append(line + bytes(-len(line) % 4))
    pixels = b"".join(lines) if runs is None else runs
    table = np.hstack([palette[:, ::-1], np.zeros((len(palette), 1), np.uint8)]).tobytes()
    compression = 0 if runs is None else {8: 1, 4: 2}[bits]
    height = -rows_ if top_down else rows_
    sizes = (len(pixels), 0, 0, len(palette), 0)
    head = struct.pack("<IiiHHIIiiII", 40, columns, height, 1, bits, compression, *sizes)
    start = 14 + len(head) + len(table)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + table + pixels


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bmp_masks_give_indices_or_colours(bits: int, top_down: bool):
    palette = CHANCE.integers(0, 256, (2**bits, 3), np.uint8)
    values = CHANCE.integers(0, 2**bits, (13, 19), np.uint8)
    data = bmp(values, bits, palette, top_down)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], palette[values])
    assert np.array_equal(mask(data), palette[values])
    assert np.array_equal(mask(data, by_value=True), values)
    greys = np.repeat(np.linspace(0, 255, 2**bits).astype(np.uint8)[:, np.newaxis], 3, axis=1)
    assert np.array_equal(mask(bmp(values, bits, greys, top_down)), greys[values][..., 0])


def test_bmp_masks_of_colours_and_of_runs():
    for mode in ("RGB", "RGBA"):
        data = saved(Image.fromarray(COLOURS_HWC).convert(mode), "BMP")
        assert np.array_equal(mask(data), COLOURS_HWC)
    palette = CHANCE.integers(0, 256, (16, 3), np.uint8)
    # Five columns: a run, a literal of three (padded), the end of a row; a move over two pixels and a run; the end.
    eight = bytes([2, 7, 0, 3, 1, 2, 3, 0, 0, 0, 0, 2, 2, 0, 3, 5, 0, 1])
    four = bytes([2, 0x77, 0, 3, 0x12, 0x30, 0, 0, 0, 2, 2, 0, 3, 0x56, 0, 1])
    values = np.array([[0, 0, 5, 5, 5], [7, 7, 1, 2, 3]], np.uint8)
    data = bmp(values, 8, palette, runs=eight)
    assert np.array_equal(mask(data, by_value=True), values)
    assert np.array_equal(mask(data), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])
    values[0] = [0, 0, 5, 6, 5]
    assert np.array_equal(mask(bmp(values, 4, palette, runs=four), by_value=True), values)
    for runs in (eight[:9], bytes([9, 7, 0, 1]), b"", bytes([0, 2, 0, 9, 1, 1])):
        found = Mask(bmp(values, 8, palette, runs=runs)).layers()
        assert isinstance(found, Reject)
        assert found.reason == Reason.NOT_AN_IMAGE


def test_spoiled_files_of_every_kind_are_read_or_refused():
    chance = np.random.default_rng(3)
    palette = chunk(b"PLTE", bytes(range(48)))
    jpeg = saved(Image.fromarray(COLOURS_HWC), "JPEG")
    bases = [
        png(CLASSES, GREY, 16), png(CLASSES, INDEXED, 4, before=palette), png(CLASSES, GREY, 2, interlaced=True),
        jpeg, jpeg_with_exif(jpeg, exif(6)),
        tiff(DEEP), tiff(DEEP, tile=(16, 16), compression="lzw", bigtiff=True),
        tiff(CLASSES > 0, compression="packbits"),
        tiff(DEEP.astype("u1"), compression="jpeg"), tiff(np.stack([CLASSES] * 3), photometric="minisblack"),
        saved(Image.fromarray(CLASSES > 0), "TIFF", compression="group4"), tiff(DEEP.astype("f4"), byteorder=">"),
        bmp(CLASSES.astype(np.uint8), 4, np.zeros((16, 3), np.uint8)),
        bmp(CLASSES[:2, :5].astype(np.uint8), 8, np.zeros((9, 3), np.uint8), runs=bytes([5, 1, 0, 0, 5, 2, 0, 1])),
    ]  # fmt: skip
    reasons: dict[Reason | None, int] = {}
    for number in range(6000):
        data = bytearray(bases[number % len(bases)])
        for _ in range(int(chance.integers(1, 4))):
            at = int(chance.integers(4, min(len(data), 400) if chance.random() < 0.7 else len(data)))
            data[at : at + 4] = chance.choice(
                [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\1", chance.bytes(1), chance.bytes(2)]
            )
        if chance.random() < 0.1:
            del data[int(chance.integers(4, len(data))) :]
        found = read_slice(bytes(data))
        code = found.reason if isinstance(found, Reject) else None
        reasons[code] = reasons.get(code, 0) + 1
        assert code != Reason.INTERNAL, (number, found)
        for by_value in (False, True):
            layers = Mask(bytes(data)).layers(by_value=by_value)
            assert isinstance(layers, Reject) or layers[0].values.dtype.kind in "iu"
        size = image_files.size(bytes(data)) if image_files.is_image(bytes(data)) else None
        if isinstance(found, Slice):
            assert size == found.shape
            assert found.stored.dtype in (np.uint8, np.int16, np.uint16, np.int32, np.float32)
    assert reasons[None] > 500
    assert min(reasons.get(one, 0) for one in (Reason.NOT_AN_IMAGE, Reason.TOO_LARGE, Reason.UNSUPPORTED_PIXELS)) > 50
