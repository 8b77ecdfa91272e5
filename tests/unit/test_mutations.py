"""Ten thousand spoiled objects of many syntaxes: nothing crashes, raises, hangs or is told of an identity."""

import io
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from rayseg.dicom.reading import Header, Slice, read_headers, read_slices
from rayseg.dicom.segmentation import encode
from rayseg.records import Reason, Reject

MUTATIONS = 10_000
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
WORDS_NHW = np.arange(3 * 36 * 40, dtype=np.uint16).reshape(3, 36, 40) // 2
SECRET = "SECRET^PERSON"
# What is worth to be written over a length, a number or a marker.
ODD = [b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"]
ODD += [b"\xff\xd9", b"\xff\xda", b"\xff\x4f\xff\x51", b"\xe0\x7f\x10\x00", b"SQ", b"UN", b"-1", b"1e9", b"nan", b"\\"]


def jpeg(frame_HW: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame_HW).save(stream, "JPEG", **options)
    return stream.getvalue()


def bases(enhanced: Callable[..., Dataset], as_file: Callable[..., bytes]) -> list[bytes]:
    """An object of three frames in every syntax that can be made here, a classic, a palette and a colour one."""
    plain = [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    ]
    coded = [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [as_file(enhanced(WORDS_NHW, PatientName=SECRET, PatientID=SECRET), syntax) for syntax in plain + coded]
        lone = {"SharedFunctionalGroupsSequence": None, "PerFrameFunctionalGroupsSequence": None}
        classic = {**lone, "SOPClassUID": uid.MRImageStorage, "PatientID": SECRET, "NumberOfFrames": None}
        place = {"ImagePositionPatient": [1, 2, 3], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        made += [as_file(enhanced(WORDS_NHW[:1], **classic, **place), syntax) for syntax in (plain[1], *coded)]
        palette = enhanced(WORDS_NHW[:1].astype(np.uint8), **classic, PhotometricInterpretation="PALETTE COLOR")
        for colour in ("Red", "Green", "Blue"):
            setattr(palette, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 8])
            setattr(palette, f"{colour}PaletteColorLookupTableData", bytes(range(256)))
        made.append(as_file(palette))
        for options in ({}, {"progressive": True}):
            colour_HWC = np.stack([WORDS_NHW[0].astype(np.uint8)] * 3, -1)
            dataset = enhanced(WORDS_NHW[:1].astype(np.uint8), **classic, SamplesPerPixel=3, PlanarConfiguration=0)
            dataset.PhotometricInterpretation = "YBR_FULL_422"
            dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
            dataset.PixelData = encapsulate([jpeg(colour_HWC, **options)])
            dataset["PixelData"].is_undefined_length = True
            made.append(as_file(dataset))
    made += [(BUNDLED / name).read_bytes() for name in ("JPGExtended.dcm", "SC_rgb_jpeg_gdcm.dcm")]
    return made


def mutated(data: bytes, chance: random.Random) -> bytes:
    spoiled = bytearray(data)
    pixels = max(data.rfind(b"\xe0\x7f\x10\x00"), data.rfind(b"\x7f\xe0\x00\x10"), 400)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        # Half of them in the header, many of the others at the start of the pixel data.
        least, most = chance.choice(((132, pixels), (132, pixels), (pixels, pixels + 200), (pixels, len(data))))
        at = chance.randrange(min(least, len(data) - 1), max(min(most, len(data)), least + 1))
        piece = chance.choice(ODD) if chance.random() < 0.4 else chance.randbytes(chance.choice((1, 1, 2, 4)))
        spoiled[at : at + (len(piece) if chance.random() < 0.8 else 0)] = piece
    if chance.random() < 0.1:
        del spoiled[chance.randrange(len(spoiled)) :]
    return bytes(spoiled)


@pytest.mark.timeout(240)
def test_no_mutation_crashes_or_raises(
    enhanced: Callable[..., Dataset], as_file: Callable[..., bytes], recwarn: pytest.WarningsRecorder
) -> None:
    chance = random.Random(1)
    objects = bases(enhanced, as_file)
    reasons: dict[Reason | None, int] = {}
    told, segmentations = [], 0
    for number in range(MUTATIONS):
        data = mutated(objects[number % len(objects)], chance)
        headers = read_headers(data, len(data))
        assert isinstance(headers, Reject) or all(isinstance(header, Header) for header in headers)
        # A reject of the header is checked against a frame that may be there, too.
        for found in read_slices(data, [headers[-1].frame if isinstance(headers, list) else number % 2 or None]):
            reason = None if isinstance(found, Slice) else found.reason
            reasons[reason] = reasons.get(reason, 0) + 1
            assert reason != Reason.INTERNAL, (number, found)
            if isinstance(found, Slice):
                assert found.stored.dtype in (np.uint8, np.int16, np.uint16, np.int32)
                assert found.stored.ndim == 2
                if isinstance(headers, list):
                    assert found.header == headers[-1]
                if number % 20 == 0 and found.header is not None:
                    mask_HW = np.zeros(found.stored.shape, np.uint8)
                    encoded = encode([data], [mask_HW], ("lesion",), "m", "1", "0", frames=[found.header.frame])
                    segmentations += isinstance(encoded, bytes)
                    told.append(str(encoded) if isinstance(encoded, Reject) else "")
            told.append(repr(found.header) if isinstance(found, Slice) else str(found))
        assert not isinstance(headers, Reject) or headers.reason != Reason.INTERNAL, (number, headers)
    # The mutations reach everything: whole slices, and each kind of fault.
    assert reasons[None] > MUTATIONS / 4
    faults = (Reason.TRUNCATED, Reason.DECODE_FAILED, Reason.CORRUPT, Reason.MISSING_ATTRIBUTE)
    assert all(reasons.get(fault, 0) > 20 for fault in faults), reasons
    assert segmentations > 20
    told += [str(warning.message) for warning in recwarn]
    assert not any("SECRET" in text for text in told)
