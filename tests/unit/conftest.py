"""Builders of DICOM objects that several unit tests share."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset


def item(**values: Any) -> list[Dataset]:
    """A sequence of one item."""
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return [dataset]


def build_enhanced(
    words_NHW: np.ndarray,
    positions_mm: Sequence[Sequence[float]] | None = None,
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    intercepts: Sequence[float] | None = None,
    **attributes: Any,
) -> Dataset:
    """An enhanced CT of one frame a position; without positions, frames one millimetre apart along z.

    Every frame has its own RescaleIntercept, 10 times its number by default, and the slope 2.
    """
    frames = len(words_NHW)
    if positions_mm is None:
        positions_mm = [(0, 0, number) for number in range(frames)]
    values = {
        "SOPClassUID": uid.EnhancedCTImageStorage,
        "SOPInstanceUID": "1.2.3.4.9",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "FrameOfReferenceUID": "1.2.3.5",
        "PatientID": "P-17",
        "Modality": "CT",
        "InstanceNumber": 1,
        "NumberOfFrames": frames,
        "Rows": words_NHW.shape[1],
        "Columns": words_NHW.shape[2],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": words_NHW.dtype.itemsize * 8,
        "BitsStored": words_NHW.dtype.itemsize * 8,
        "HighBit": words_NHW.dtype.itemsize * 8 - 1,
        "PixelRepresentation": int(words_NHW.dtype.kind == "i"),
        "SharedFunctionalGroupsSequence": item(
            PlaneOrientationSequence=item(ImageOrientationPatient=[f"{value:.10f}" for value in orientation]),
            PixelMeasuresSequence=item(PixelSpacing=["0.5", "0.75"], SliceThickness="1"),
        ),
        "PerFrameFunctionalGroupsSequence": [
            item(
                PlanePositionSequence=item(ImagePositionPatient=[f"{value:.9f}"[:16] for value in position_mm]),
                PixelValueTransformationSequence=item(
                    RescaleIntercept=10 * number if intercepts is None else intercepts[number],
                    RescaleSlope=2,
                    RescaleType="HU",
                ),
            )[0]
            for number, position_mm in enumerate(positions_mm)
        ],
        **attributes,
    }
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.PixelData = words_NHW.tobytes() + b"\0" * (words_NHW.nbytes % 2)
    dataset["PixelData"].VR = "OW" if values["BitsAllocated"] > 8 else "OB"
    return dataset


def to_bytes(dataset: Dataset, syntax: str | None = None) -> bytes:
    """The bytes of a file; compressed where the syntax is, with pixel words swapped where it is big endian."""
    if syntax is not None and uid.UID(syntax).is_encapsulated:
        dataset.compress(syntax, generate_instance_uid=False)
    elif syntax is not None:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == uid.ExplicitVRBigEndian and dataset.BitsAllocated > 8:
            dataset.PixelData = np.frombuffer(dataset.PixelData, f"u{dataset.BitsAllocated // 8}").byteswap().tobytes()
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


@pytest.fixture(scope="session")
def enhanced() -> Callable[..., Dataset]:
    return build_enhanced


@pytest.fixture(scope="session")
def as_file() -> Callable[..., bytes]:
    return to_bytes
