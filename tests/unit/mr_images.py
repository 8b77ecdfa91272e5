"""Single MR images for tests that put them together to series."""

import itertools
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from rayseg.dicom.reading import Header, read_headers

# Makers' b-values and directions stand in blocks that a creator reserves: (group, creator).
SIEMENS, GE = (0x0019, "SIEMENS MR HEADER"), (0x0043, "GEMS_PARM_01")
PHILIPS, UIH = (0x2001, "Philips Imaging DD 001"), (0x0065, "Image Private Header")

_numbers = itertools.count(1)


def image(
    z_mm: float = 0.0,
    *,
    private: Iterable[tuple[tuple[int, str], int, str, Any]] = (),
    value: int = 0,
    syntax: str = uid.ExplicitVRLittleEndian,
    **attributes: Any,
) -> bytes:
    """An image of 8x8 equal pixels at a height, with an SOP Instance UID and InstanceNumber of its own.

    Args:
        z_mm: of its position.
        private: block, element, VR and value of each private element.
        value: of all pixels.
        syntax: uncompressed.
        attributes: by keyword; None leaves one out.
    """
    number = next(_numbers)
    values = {
        "SOPClassUID": uid.MRImageStorage,
        "SOPInstanceUID": f"1.2.840.99.{number}",
        "StudyInstanceUID": "1.2.840.1",
        "SeriesInstanceUID": "1.2.840.1.1",
        "FrameOfReferenceUID": "1.2.840.1.2",
        "PatientID": "P-3",
        "PatientName": "A^B",
        "StudyDate": "20200101",
        "StudyTime": "101010",
        "Modality": "MR",
        "Manufacturer": "SIEMENS",
        "SeriesNumber": 7,
        "ProtocolName": "head",
        "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
        "InstanceNumber": number,
        "ImagePositionPatient": [-4.0, -4.0, z_mm],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1, 1],
        "SliceThickness": 5,
        "Rows": 8,
        "Columns": 8,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        **attributes,
    }
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    for keyword, content in values.items():
        if content is not None:
            setattr(dataset, keyword, content)
    for (group, creator), element, vr, content in private:
        dataset.private_block(group, creator, create=True).add_new(element, vr, content)
    pixels = np.full((values["Rows"], values["Columns"]), value, ">u2" if syntax == uid.ExplicitVRBigEndian else "<u2")
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def headers(files: Sequence[bytes]) -> list[Header]:
    """The headers of all of them, a frame each."""
    read = [read_headers(data, len(data)) for data in files]
    assert all(isinstance(one, list) for one in read), read
    return [header for one in read for header in one]
