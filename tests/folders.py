"""Raw folders as strangers have them, one for each layout: written below FOLDER/source."""

import gzip
import io
import struct
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from PIL import Image
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from rayseg import storage
from rayseg.data import synthetic
from tests.unit.structures import structure_set

SIDE, PATIENTS, SLICES = 32, 6, 2


def stroke(folder: str) -> None:
    synthetic.write_studies(f"{folder}/made", patients=PATIENTS, slices=SLICES, size=SIDE, seed=3)
    for number, path in enumerate(sorted(Path(folder, "made/images").rglob("*.dcm"))):
        kind = ("hemorrhagic", "ischemic")[number % 2]
        storage.write(f"{folder}/source/{kind}/DICOM/{number}.dcm", path.read_bytes())
        storage.write(f"{folder}/source/{kind}/PNG/{number}.png", encoded(disc(number) * 255, "PNG"))


def bleeds(folder: str) -> None:
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0]], np.uint8)
    for number in range(PATIENTS * SLICES):
        name = f"{number // SLICES:03d}{number % SLICES:03d}.png"
        storage.write(f"{folder}/source/images/{name}", encoded(picture(number), "PNG"))
        storage.write(f"{folder}/source/masks/{name}", encoded(colours[disc(number) * (1 + number % 5)], "PNG"))


def jpegs(folder: str) -> None:
    for number in range(PATIENTS * SLICES):
        path = f"{folder}/source/{number // SLICES:03d}/brain/{number % SLICES}"
        storage.write(f"{path}.jpg", encoded(picture(number), "JPEG"))
        if number % SLICES:
            storage.write(f"{path}_HGE_Seg.jpg", encoded(disc(number) * 255, "JPEG"))


def tifs(folder: str) -> None:
    for number in range(PATIENTS * SLICES):
        path = f"{folder}/source/patient{number // SLICES}/{number % SLICES}"
        colour = np.stack([picture(3 * number + channel) for channel in range(3)], axis=-1)
        storage.write(f"{path}.tif", encoded(colour, "TIFF"))
        storage.write(f"{path}_mask.tif", encoded(disc(number) * 255, "TIFF"))


def pictures(folder: str) -> None:
    groups = ["file,group"]
    for number in range(PATIENTS * SLICES):
        name = f"{number:04d}.png"
        storage.write(f"{folder}/source/images/{name}", encoded(picture(number), "PNG"))
        storage.write(f"{folder}/source/masks/{name}", encoded(disc(number) * 255, "PNG"))
        groups.append(f"{name},{number // SLICES}")
    storage.write(f"{folder}/source/groups.csv", "\n".join(groups).encode())


def scans(folder: str) -> None:
    """Other names than ours: `scans/`, `truth/NAME_mask.png` and a CSV."""
    groups = ["file,group"]
    for number in range(PATIENTS * SLICES):
        storage.write(f"{folder}/source/scans/k{number:02d}.png", encoded(picture(number), "PNG"))
        storage.write(f"{folder}/source/truth/k{number:02d}_mask.png", encoded(disc(number) * 255, "PNG"))
        groups.append(f"k{number:02d}.png,{number // SLICES}")
    storage.write(f"{folder}/source/who.csv", "\n".join(groups).encode())


def heads(folder: str) -> None:
    """Words before the names, other endings, masks of a palette."""
    for number in range(PATIENTS * SLICES):
        name = f"P{number // SLICES}-{number % SLICES}"
        storage.write(f"{folder}/source/all/img_{name}.jpg", encoded(picture(number), "JPEG"))
        storage.write(f"{folder}/source/all/mask_{name}.png", encoded(disc(number) * (1 + number % 2), "PNG"))


def deep(folder: str) -> None:
    """Of 8 and 16 bits, PNG and TIFF, without any word of patients."""
    for number in range(PATIENTS * SLICES):
        values = picture(number).astype(np.uint16) * 16 + 100 if number % 2 else picture(number)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF" if number % 3 else "PNG")
        storage.write(f"{folder}/source/images/{number:03d}.{'tif' if number % 3 else 'png'}", buffer.getvalue())
        storage.write(f"{folder}/source/masks/{number:03d}.png", encoded(disc(number) * 255, "PNG"))


def windows(folder: str) -> None:
    """As `jpegs`, with another window in a folder beside."""
    jpegs(folder)
    for number in range(PATIENTS * SLICES):
        path = f"{folder}/source/{number // SLICES:03d}/bone/{number % SLICES}.jpg"
        storage.write(path, encoded(picture(100 + number), "JPEG"))


def ischemia(folder: str) -> None:
    for number in range(PATIENTS * SLICES):
        name = f"Ischemic_{number // SLICES}_{10 + number}.png"
        green = np.stack([disc(number) * 0, disc(number) * 255, disc(number) * 0], axis=-1)
        storage.write(f"{folder}/source/images/{name}", encoded(np.stack([picture(number)] * 3, axis=-1), "PNG"))
        storage.write(f"{folder}/source/masks/{name}", encoded(green, "PNG"))


def series(folder: str) -> list[list[bytes]]:
    """Phantom series without names of files: some bytes a slice."""
    synthetic.write_studies(f"{folder}/made", patients=PATIENTS, slices=SLICES, size=SIDE, seed=3)
    paths = sorted(Path(folder, "made/images").rglob("*.dcm"))
    every = [path.read_bytes() for path in paths]
    return [every[first : first + SLICES] for first in range(0, len(every), SLICES)]


def dicom_masks(folder: str) -> None:
    for patient, slices in enumerate(series(folder)):
        for number, data in enumerate(slices):
            storage.write(f"{folder}/source/p{patient}/image/{number}.dcm", data)
            mask = pydicom.dcmread(io.BytesIO(data))
            mask.PixelData = (disc(number).astype("<u2") * 100).tobytes()
            mask.PixelRepresentation = 0
            buffer = io.BytesIO()
            mask.save_as(buffer)
            storage.write(f"{folder}/source/p{patient}/mask/{number}.dcm", buffer.getvalue())


def segmentations(folder: str) -> None:
    """Slices without a suffix, a SEG for each series."""
    for patient, slices in enumerate(series(folder)):
        for number, data in enumerate(slices):
            storage.write(f"{folder}/source/p{patient}/ct/1.2.{patient}.{number}", data)
        label = ("Hemorrhage", "Infarct")[patient % 2]
        described = highdicom.seg.SegmentDescription(
            1, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, "MANUAL"
        )
        sources = [pydicom.dcmread(io.BytesIO(data)) for data in slices]
        planes = np.stack([disc(number) for number in range(len(slices))])
        seg = highdicom.seg.Segmentation(
            sources, planes, "BINARY", [described], generate_uid(), 5, generate_uid(), 1, "who", "what", "1", "2"
        )
        buffer = io.BytesIO()
        seg.save_as(buffer)
        storage.write(f"{folder}/source/p{patient}/seg.dcm", buffer.getvalue())


def structures(folder: str) -> None:
    """An RTSTRUCT for each series."""
    for patient, slices in enumerate(series(folder)):
        contours = []
        sources = [pydicom.dcmread(io.BytesIO(data)) for data in slices]
        for number, data in enumerate(slices):
            storage.write(f"{folder}/source/p{patient}/ct/{number}.dcm", data)
            first = np.array(sources[number].ImagePositionPatient, float)
            spacing = float(sources[number].PixelSpacing[0])
            along = np.array(sources[number].ImageOrientationPatient, float).reshape(2, 3)
            square = np.array([[5, 5], [20, 5], [20, 20], [5, 20]]) * spacing
            contours.append(("CLOSED_PLANAR", first + square @ along, str(sources[number].SOPInstanceUID)))
        space = str(sources[0].FrameOfReferenceUID)
        storage.write(f"{folder}/source/p{patient}/rt.dcm", structure_set(sources, {"Tumour": contours}, space))


def label_volumes(folder: str) -> None:
    """Series of DICOM, and a label volume for each."""
    for patient, slices in enumerate(series(folder)):
        headers = [pydicom.dcmread(io.BytesIO(data)) for data in slices]
        for number, data in enumerate(slices):
            storage.write(f"{folder}/source/p{patient}/ct/{number}.dcm", data)
        along = np.array(headers[0].ImageOrientationPatient, float).reshape(2, 3)
        spacing = [float(one) for one in headers[0].PixelSpacing]
        positions = np.array([one.ImagePositionPatient for one in headers], float)
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1] = along[0] * spacing[1], along[1] * spacing[0]
        affine[:3, 2], affine[:3, 3] = positions[1] - positions[0], positions[0]
        values = np.stack([disc(number) * (1 + number % 2) for number in range(len(slices))], axis=-1)
        label = nifti(values.transpose(1, 0, 2), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
        storage.write(f"{folder}/source/p{patient}/label.nii.gz", label)


def volumes(folder: str) -> None:
    """`{patient}/ct.nii.gz` and `{patient}/label.nii.gz`, labels 1, 2 and 4."""
    for patient in range(PATIENTS):
        image, label = volume(patient)
        storage.write(f"{folder}/source/p{patient}/ct.nii.gz", image)
        storage.write(f"{folder}/source/p{patient}/label.nii.gz", label)


def nnunet(folder: str) -> None:
    """`imagesTr/case_001_0000.nii.gz` and `labelsTr/case_001.nii.gz`; `imagesTs` has no labels."""
    for patient in range(PATIENTS):
        image, label = volume(patient)
        storage.write(f"{folder}/source/imagesTr/case_{patient:03d}_0000.nii.gz", image)
        storage.write(f"{folder}/source/labelsTr/case_{patient:03d}.nii.gz", label)
    storage.write(f"{folder}/source/imagesTs/case_100_0000.nii.gz", volume(100)[0])
    storage.write(f"{folder}/source/dataset.json", b"{}")


def volume(seed: int) -> tuple[bytes, bytes]:
    """An image of 32 x 32 x 2 and its labels."""
    random = np.random.default_rng(seed)
    image = random.integers(-1000, 1000, (SIDE, SIDE, SLICES), np.int16)
    label = np.stack([disc(number) * np.uint8((1, 2, 4)[(seed + number) % 3]) for number in range(SLICES)], axis=-1)
    return nifti(image, np.diag([-1.0, -1, 5, 1])), nifti(label, np.diag([-1.0, -1, 5, 1]))


def nifti(values: np.ndarray, affine: np.ndarray) -> bytes:
    """A .nii.gz by the fields of nifti1.h, the affine as sform."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *values.shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, {"uint8": 2, "int16": 4}[values.dtype.name], values.dtype.itemsize * 8)
    struct.pack_into("<f", header, 108, 352)
    struct.pack_into("<2h", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, *affine[:3].ravel())
    header[344:348] = b"n+1\0"
    return gzip.compress(bytes(header) + values.tobytes(order="F"))


def disc(number: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return ((rows - 10 - number) ** 2 + (columns - 16) ** 2 < 36).astype(np.uint8)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), np.uint8)


def encoded(values: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()
