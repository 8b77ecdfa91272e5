"""Phantom head-CT studies as real DICOM files in object storage, each slice with its true lesion mask.

They stand in for patients in the demo and the tests: Hounsfield units, noise, several patients of several slices, some
of them healthy, some with gantry tilt; `phantom` draws the anatomy. The same arguments always give the same bytes.
"""

import functools
import hashlib
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage

from rayseg import storage
from rayseg.data import phantom

_INTERCEPT_HU = -1024
_TILT_DEGREES = 12.0
_TILTED_EVERY = 5  # patients 2, 7, 12, ... are scanned with gantry tilt


@dataclass(frozen=True)
class Studies:
    """What `write_studies` wrote: image objects and masks lie under `images` and `masks`, by the same relative name."""

    images: str  # URI of the folder of images
    masks: str | None  # URI of the folder of masks
    patients: int
    slices: int  # over all patients
    positive_slices: int  # with at least one lesion pixel


def write_studies(
    destination_uri: str,
    patients: int = 24,
    slices: int = 10,
    size: int = 256,
    seed: int = 0,
    masks: bool = True,
    spoiled: bool = False,
) -> Studies:
    """Writes `DEST/images/PATIENT/IM_0001.dcm` and `DEST/masks/PATIENT/IM_0001.png`, one CT series a patient.

    Masks are 8-bit grey: 0 nothing, 1 hemorrhage, 2 infarct. Of every eight patients two have no lesion.

    Args:
        destination_uri: prefix, `file://`, `s3://` or a local path.
        patients: number of patients; patient names and ids contain `seed`, so two seeds never share a patient.
        slices: slices of each patient, 5 mm apart or closer.
        size: rows and columns.
        seed: family of patients.
        masks: False writes images only: an archive to segment.
        spoiled: adds a folder of objects no reader can use: a truncated slice, a text file, an object without pixels.
    """
    images_uri, masks_uri = storage.join(destination_uri, "images"), storage.join(destination_uri, "masks")
    positive = 0
    with ThreadPoolExecutor(4) as writers:
        for index in range(patients):
            head, name = phantom.head(seed, index, slices), _name(seed, index)
            objects: list[tuple[str, bytes]] = []
            for k in range(slices):
                hu, label = phantom.render(head, k, size)
                positive += int(label.any())
                objects.append((storage.join(images_uri, name, f"IM_{k + 1:04d}.dcm"), _ct(head, k, hu)))
                if masks:
                    objects.append((storage.join(masks_uri, name, f"IM_{k + 1:04d}.png"), _png(label)))
            _write(writers, objects)
        if spoiled:
            _write(writers, ((storage.join(images_uri, "spoiled", name), data) for name, data in _spoiled(seed, size)))
    return Studies(images_uri, masks_uri if masks else None, patients, patients * slices, positive)


@functools.lru_cache(maxsize=8)
def slice_bytes(seed: int = 0, size: int = 64) -> bytes:
    """One CT slice (DICOM file) through a hemorrhage: the example input of bundles and tests."""
    head = phantom.head(seed, 0, 1)
    return _ct(head, 0, phantom.render(head, 0, size)[0])


def of_bundle() -> list[bytes]:
    """Slices of several sizes: a bundle's example, and those whose masks it must give again everywhere."""
    return [slice_bytes(seed, size) for seed, size in ((0, 64), (1, 96), (2, 128))]


def _write(writers: ThreadPoolExecutor, objects: Iterable[tuple[str, bytes]]) -> None:
    for _ in writers.map(lambda item: storage.write(*item), objects):
        pass


def _name(seed: int, index: int) -> str:
    return f"phantom-{seed}-{index:03d}"


def _uid(*parts: object) -> str:
    """A UID below 2.25, the root for UUIDs, from the hash of `parts` (PS3.5 B.2)."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16])}"


def _png(label: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(label).save(buffer, "PNG")
    return buffer.getvalue()


def _file(header: Dataset) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = header.SOPClassUID
    meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _uid("rayseg")  # ours, not pydicom's: its version would change the bytes
    meta.ImplementationVersionName = "RAYSEG"
    buffer = io.BytesIO()
    FileDataset(buffer, header, preamble=b"\0" * 128, file_meta=meta).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _patient(seed: int, index: int) -> Dataset:
    """Patient, study and equipment modules, alike for all objects of a patient."""
    made = Dataset()
    made.PatientName = f"Phantom^{seed}-{index:03d}"
    made.PatientID = _name(seed, index).upper()
    made.PatientBirthDate = f"{1940 + index % 50}0101"
    made.PatientSex = "FM"[index % 2]
    made.StudyInstanceUID = _uid("study", seed, index)
    made.StudyDate = f"2024{1 + index % 12:02d}15"
    made.StudyTime = "101500"
    made.StudyID = str(index + 1)
    made.AccessionNumber = f"A{seed}-{index:03d}"
    made.ReferringPhysicianName = ""
    made.Manufacturer = "rayseg"
    made.ManufacturerModelName = "phantom"
    return made


def _ct(head: phantom.Head, k: int, hu: np.ndarray) -> bytes:
    """Slice `k` as a CT Image Storage file: uint16, 12 bits stored, HU = stored - 1024."""
    seed, index = head.seed
    rows, columns = hu.shape
    tilt = np.deg2rad(_TILT_DEGREES if index % _TILTED_EVERY == 2 else 0.0)
    spacing_mm = head.field_of_view_mm / columns
    thickness_mm = abs(head.z_mm[1] - head.z_mm[0]) if len(head.z_mm) > 1 else 5.0
    down = np.array([0.0, np.cos(tilt), -np.sin(tilt)])  # direction of increasing row
    middle = np.array([0.0, 0.0, head.z_mm[k]])  # the table moves along z, whatever the tilt
    corner = middle - spacing_mm * (columns - 1) / 2 * np.array([1.0, 0, 0]) - spacing_mm * (rows - 1) / 2 * down

    made = _patient(seed, index)
    made.SpecificCharacterSet = "ISO_IR 100"
    made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.SOPClassUID = CTImageStorage
    made.SOPInstanceUID = _uid("instance", seed, index, len(head.z_mm), k, rows)
    made.SeriesDate = made.ContentDate = made.AcquisitionDate = made.StudyDate
    made.SeriesTime = "101800"
    made.ContentTime = made.AcquisitionTime = f"1020{k % 60:02d}"
    made.Modality = "CT"
    made.SeriesDescription = "Head, phantom"
    made.BodyPartExamined = "HEAD"
    made.PatientPosition = "HFS"
    made.KVP = "120"
    made.GantryDetectorTilt = f"{np.rad2deg(tilt):.1f}"
    made.SeriesInstanceUID = _uid("series", seed, index, len(head.z_mm), rows)
    made.SeriesNumber = "2"
    made.AcquisitionNumber = "1"
    made.InstanceNumber = str(k + 1)
    made.FrameOfReferenceUID = _uid("frame", seed, index)
    made.PositionReferenceIndicator = ""
    made.SliceThickness = f"{thickness_mm:.6g}"
    made.ImagePositionPatient = [f"{value:.6f}" for value in corner]
    made.ImageOrientationPatient = [f"{value:.9f}" for value in (1.0, 0.0, 0.0, *down)]
    made.PixelSpacing = [f"{spacing_mm:.9f}"] * 2
    made.SamplesPerPixel = 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.Rows, made.Columns = rows, columns
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.RescaleIntercept, made.RescaleSlope, made.RescaleType = str(_INTERCEPT_HU), "1", "HU"
    made.WindowCenter, made.WindowWidth = "40", "80"
    stored = np.clip(np.rint(hu) - _INTERCEPT_HU, 0, 4095).astype("<u2")
    made.PixelData = stored.tobytes()
    made["PixelData"].VR = "OW"
    return _file(made)


def _spoiled(seed: int, size: int) -> list[tuple[str, bytes]]:
    whole = slice_bytes(seed, size)
    structures = _patient(seed, 0)
    structures.SOPClassUID = RTStructureSetStorage
    structures.SOPInstanceUID = _uid("structures", seed)
    structures.SeriesInstanceUID = _uid("structures series", seed)
    structures.Modality = "RTSTRUCT"
    structures.SeriesNumber = "3"
    structures.OperatorsName = ""
    structures.FrameOfReferenceUID = _uid("frame", seed, 0)
    structures.PositionReferenceIndicator = ""
    structures.StructureSetLabel = "EMPTY"
    structures.StructureSetDate = structures.StructureSetTime = ""
    return [
        ("IM_0001.dcm", whole[: 2 * len(whole) // 3]),
        ("IM_0002.dcm", b"This is a note that somebody saved with the wrong suffix.\n"),
        ("IM_0003.dcm", _file(structures)),
    ]
