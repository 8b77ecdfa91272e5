"""Hand-made runs over an archive: CT series as files, a manifest of them, and ledgers with DICOM segmentations.

Pixels are 1 x 2 mm and slices 5 mm apart, so that a pixel stands for 10 mm3, and a hundred of them for 1 mL.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from rayseg import storage
from rayseg.dicom import segmentation
from rayseg.dicom.segmentation import Kind
from rayseg.inference import ledger
from rayseg.records import MANIFEST

SLICES, SIZE = 4, 64
PROFILES: dict[Kind, str] = {"BINARY": "seg", "LABELMAP": "seg-labelmap"}


def ct(series: int, number: int) -> bytes:
    """A slice of a ramp from left to right, with a file's header."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    values = {
        "SOPClassUID": uid.CTImageStorage, "SOPInstanceUID": f"1.2.3.{series}.{number}",
        "StudyInstanceUID": f"1.2.{series}", "SeriesInstanceUID": f"1.2.3.{series}",
        "FrameOfReferenceUID": f"1.2.4.{series}", "PatientID": f"P{series}", "PatientName": "A^B", "Modality": "CT",
        "InstanceNumber": number + 1, "Rows": SIZE, "Columns": SIZE, "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": 0, "RescaleSlope": "1", "RescaleIntercept": "0", "PixelSpacing": ["1", "2"],
        "SliceThickness": "5", "ImagePositionPatient": ["0", "0", str(5 * number)],
        "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
    }  # fmt: skip
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = np.tile(np.arange(SIZE, dtype="<u2") * 10, (SIZE, 1)).tobytes()
    dataset["PixelData"].VR = "OW"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def write_archive(folder: Path, series: int) -> str:
    """The files and their manifest, whose URI is given back; the key of series 3 is `series-3`."""
    rows = []
    for one in range(series):
        for number in range(SLICES):
            path = folder / "archive" / f"{one}-{number}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(ct(one, number))
            rows.append(
                {"uri": str(path), "verdict": "ok", "kind": "dicom", "series_key": f"series-{one}",
                 "patient_key": f"patient-{one}", "image_position_mm": [0.0, 0.0, 5.0 * number]}
            )  # fmt: skip
    manifest = str(folder / "manifest.parquet")
    storage.write_table(manifest, pa.Table.from_pylist(rows, schema=MANIFEST))
    return manifest


def empty() -> np.ndarray:
    """Label maps of a series, (slices, rows, columns), without foreground."""
    return np.zeros((SLICES, SIZE, SIZE), np.uint8)


def squares(*corners: tuple[int, int, int], side: int = 10, label: int = 1) -> np.ndarray:
    """Squares of 10 x 10 pixels, 1 mL each, with their first pixel at (slice, row, column)."""
    masks = empty()
    for number, row, column in corners:
        masks[number, row : row + side, column : column + side] = label
    return masks


def seg(
    series: int,
    masks: np.ndarray,
    labels: tuple[str, ...] = ("lesion",),
    kind: Kind = "BINARY",
    slices: Sequence[int] = range(SLICES),
) -> bytes:
    encoded = segmentation.encode(
        [ct(series, number) for number in slices], [masks[at] for at in slices], labels, "m", "1", "0" * 64, kind=kind
    )
    assert isinstance(encoded, bytes)
    return encoded


def file(path: Path, data: bytes, profile: str = "seg") -> dict[str, Any]:
    """The file, written, as a ledger's row names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"profile": profile, "uri": str(path), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def row(series_key: str, version: str = "1", **values: Any) -> dict[str, Any]:
    """Of a ledger."""
    base = {
        "series_key": series_key, "patient_key": series_key.replace("series", "patient"), "verdict": "segmented",
        "reason": None, "model_name": "brain", "model_version": version, "model_digest": f"digest-{version}",
        "config_digest": "c0ffee" * 8, "slices": SLICES, "rejected_slices": 0, "foreground_pixels": 0,
        "input_digest": f"input of {series_key}", "outputs": [], "seconds": 2.0,
    }  # fmt: skip
    return base | values


def write_run(
    output: Path, found: Mapping[int, np.ndarray], version: str = "1", kind: Kind = "BINARY", **values: Any
) -> list[dict[str, Any]]:
    """Writes the segmentation of each series and the ledger of all; gives its rows back."""
    rows = []
    for series, masks in found.items():
        written = file(output / f"v{version}" / f"series-{series}.dcm", seg(series, masks, kind=kind), PROFILES[kind])
        pixels = int(np.count_nonzero(masks))
        rows.append(row(f"series-{series}", version, outputs=[written], foreground_pixels=pixels, **values))
    ledger.append(str(output), rows, [])
    return rows
