"""What other software makes of the files of one series: where it puts a lesion's voxels, against where they are.

    RAYSEG_PSEUDONYM_KEY=any PYTHONPATH=platform:. python -m tests.interoperability

writes the table of files in docs/reference/interoperability.md anew; tests compare it with what they see.
"""

import gzip
import importlib.metadata
import io
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import SimpleITK
import trimesh

from rayseg.geometry.grid import Geometry
from rayseg.inference.outputs import Segmented, files
from rayseg.tracking.version import ModelVersion
from tests.unit.test_segmentation import source

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "interoperability.md"
PROFILES = ("seg", "seg-labelmap", "seg-fractional", "report", "nifti", "nifti-upright", "stl", "glb")
ROWS, COLUMNS, SLICES = 24, 32, 8
SPACING_MM, STEP_MM = (0.8, 0.5), 3.0  # between rows, between columns; between slices, which are 2 mm thick
NEAR_MM = 0.05  # decimals of six digits
HALF_A_PIXEL_MM = float(np.hypot(*SPACING_MM)) / 2
TILT = np.tan(np.radians(15))

# For a stack: the directions of rows and columns, how far each slice lies along the normal, and how far down its own
# columns for each millimetre of that.
_UPRIGHT, _OBLIQUE = np.eye(3), np.array([[0.96, 0.0, 0.28], [0.168, 0.8, -0.576], [-0.224, 0.6, 0.768]]).T
_EVEN = [STEP_MM * number for number in range(SLICES)]
STACKS: dict[str, tuple[np.ndarray, list[float], float]] = {
    "plain": (_UPRIGHT, _EVEN, 0.0),
    "tilted forward": (_UPRIGHT, _EVEN, TILT),
    "tilted backward": (_UPRIGHT, _EVEN, -TILT),
    "one missing": (_UPRIGHT, [*_EVEN[:4], *_EVEN[5:]], 0.0),
    "uneven": (_UPRIGHT, [0.0, 3.0, 6.0, 9.0, 14.0, 19.0, 24.0, 29.0], 0.0),
    "oblique": (_OBLIQUE, _EVEN, 0.0),
    "reversed": (_UPRIGHT, _EVEN[::-1], 0.0),
}


class RefusedError(Exception):
    """The reader says that it cannot, or gives nothing."""


@dataclass(frozen=True, eq=False)
class Case:
    """A series of which everything is known."""

    sources: Sequence[pydicom.Dataset]
    masks: Sequence[np.ndarray]
    points_mm: np.ndarray  # (N, 3), the centres of the lesion's voxels in the patient (LPS)
    files: Mapping[str, bytes]  # by profile; those that cannot be made are absent


@cache
def case(stack: str) -> Case:
    """A lesion that looks like no mirror image of itself, in all slices but the first and the last."""
    axes, along_mm, tilt = STACKS[stack]
    row, column, normal = axes.T
    series_uid = f"1.2.3.4.{[*STACKS].index(stack)}"
    sources, masks, points, geometries = [], [], [], []
    for number, distance_mm in enumerate(along_mm):
        position_mm = np.array([-20.0, 35.0, 10.0]) + distance_mm * normal + tilt * distance_mm * column
        changes = {
            "SOPInstanceUID": f"{series_uid}.{number + 1}",
            "SeriesInstanceUID": series_uid,
            "Rows": ROWS,
            "Columns": COLUMNS,
            "PixelSpacing": [*map(str, SPACING_MM)],
            "SliceThickness": "2",
        }
        sources.append(source(number + 1, list(position_mm), [*row, *column], **changes))
        mask = np.zeros((ROWS, COLUMNS), np.uint8)
        if 0 < number < len(along_mm) - 1:
            mask[6 : 9 + number, 8:13] = 1
            mask[6, 8 : 20 - number] = 1
        masks.append(mask)
        geometries.append(
            Geometry(ROWS, COLUMNS, SPACING_MM, 2.0, tuple(map(float, position_mm)), (*map(float, [*row, *column]),))  # type: ignore[arg-type]
        )
        # PS3.3 equation C.7.6.2.1-1, of the decimals that the slice has.
        first = np.array(sources[-1].ImagePositionPatient, float)
        orientation = np.array(sources[-1].ImageOrientationPatient, float)
        where = np.argwhere(mask)
        down, right = where[:, :1] * SPACING_MM[0], where[:, 1:] * SPACING_MM[1]
        points.append(first + right * orientation[:3] + down * orientation[3:])
    order = [*range(len(sources))]
    sure = [(mask * 255)[..., np.newaxis].astype(np.uint8) for mask in masks]
    series = Segmented("s", "dicom", order, [None] * len(order), geometries, masks, [], sources, probabilities=sure)
    made, _ = files(series, PROFILES, ("lesion",), ModelVersion("m", "1", "", "", "d"), {}, "", "")
    return Case(sources, masks, np.concatenate(points), {file.profile: file.data for file in made})


def outcome(read: Callable[[Case, bytes], np.ndarray], stack: str, profile: str) -> str:
    """A cell of the table: `not made`, `refused`, `right`, or by how many millimetres it is wrong."""
    known = case(stack)
    if profile not in known.files:
        return "not made"
    try:
        points_mm = read(known, known.files[profile])
    except RefusedError:
        return "refused"
    if not len(points_mm):
        return "**wrong**: nothing there"
    near_mm = HALF_A_PIXEL_MM if profile == "nifti-upright" else 0.0
    off_mm = max(_farthest_mm(known.points_mm, points_mm), _farthest_mm(points_mm, known.points_mm))
    if off_mm <= near_mm + NEAR_MM and len(points_mm) == len(known.points_mm):
        return "right"
    return f"**wrong**: {off_mm:.0f} mm" if off_mm >= 1 else f"**wrong**: {len(points_mm)} of {len(known.points_mm)}"


def _farthest_mm(ones: np.ndarray, others: np.ndarray) -> float:
    """How far the point of the first that is farthest from all of the others lies from these."""
    return float(np.linalg.norm(ones[:, np.newaxis] - others, axis=-1).min(axis=1).max())


def _of_image(image: SimpleITK.Image) -> np.ndarray:
    array = SimpleITK.GetArrayFromImage(image)
    if array.ndim != 3:
        raise RefusedError
    axes = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    return np.array(image.GetOrigin()) + np.argwhere(array)[:, ::-1] @ axes.T


def _simpleitk(suffix: str) -> Callable[[Case, bytes], np.ndarray]:
    def read(_: Case, data: bytes) -> np.ndarray:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, f"x{suffix}").write_bytes(data)
            try:
                return _of_image(SimpleITK.ReadImage(str(Path(folder, f"x{suffix}"))))
            except RuntimeError:
                raise RefusedError from None

    return read


def _by_program(command: Sequence[str], given: str, results: str) -> Callable[[Case, bytes], np.ndarray]:
    """Of a program that writes volumes into a folder; `IN` and `OUT` in its arguments stand for file and folder."""

    def read(_: Case, data: bytes) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder, given), Path(folder, "out")
            out.mkdir()
            path.write_bytes(data)
            program = str(Path(sys.executable).with_name(command[0]))
            arguments = [part.replace("IN", str(path)).replace("OUT", str(out)) for part in command[1:]]
            done = subprocess.run([program, *arguments], capture_output=True, timeout=120, check=False)
            volumes = sorted(out.glob(results))
            if done.returncode or not volumes:
                raise RefusedError
            try:
                return np.concatenate([_of_image(SimpleITK.ReadImage(str(volume))) for volume in volumes])
            except RuntimeError:
                return np.concatenate([_nibabel(_, volume.read_bytes()) for volume in volumes])

    return read


def _highdicom(_: Case, data: bytes) -> np.ndarray:
    try:
        volume = highdicom.seg.segread(io.BytesIO(data)).get_volume(
            combine_segments=False, allow_missing_positions=True
        )
    except (RuntimeError, ValueError):
        raise RefusedError from None
    return volume.map_indices_to_reference(np.argwhere(volume.array[..., 0]))


def _highdicom_by_slice(known: Case, data: bytes) -> np.ndarray:
    made = highdicom.seg.segread(io.BytesIO(data))
    uids = [one.SOPInstanceUID for one in known.sources]
    frames = made.get_pixels_by_source_instance(uids, rescale_fractional=True)[..., 0]
    return np.concatenate(
        [of_plane(frame, one.ImagePositionPatient, made) for frame, one in zip(frames, known.sources, strict=True)]
    )


def _pydicom(_: Case, data: bytes) -> np.ndarray:
    made = pydicom.dcmread(io.BytesIO(data))
    frames = made.pixel_array.reshape(-1, made.Rows, made.Columns)
    return np.concatenate(
        [
            of_plane(frame, groups.PlanePositionSequence[0].ImagePositionPatient, made)
            for frame, groups in zip(frames, made.PerFrameFunctionalGroupsSequence, strict=True)
        ]
    )


def of_plane(frame: np.ndarray, position_mm: Sequence[float], made: pydicom.Dataset) -> np.ndarray:
    shared = made.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    spacing_mm = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
    where = np.argwhere(frame)
    along = where[:, 1:] * spacing_mm[1] * cosines[:3] + where[:, :1] * spacing_mm[0] * cosines[3:]
    return np.array(position_mm, float) + along


def _nibabel(_: Case, data: bytes) -> np.ndarray:
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    where = np.argwhere(np.asarray(image.dataobj))
    return nibabel.affines.apply_affine(image.affine, where) * [-1, -1, 1]


def of_surface(known: Case, triangles_mm: np.ndarray) -> np.ndarray:
    """The centres of those voxels of all slices that lie within a surface (triangles, 3, 3) in the patient.

    Those around which it winds: by the solid angles of its triangles (Van Oosterom and Strackee 1983).
    """
    everywhere = np.ones((ROWS, COLUMNS), np.uint8)
    measures = pydicom.dcmread(io.BytesIO(known.files["seg"]))
    points = np.concatenate([of_plane(everywhere, one.ImagePositionPatient, measures) for one in known.sources])
    turns = []
    for some in np.array_split(points, 64):
        a, b, c = np.moveaxis(triangles_mm - some[:, np.newaxis, np.newaxis], 2, 0)
        lengths = [np.linalg.norm(corner, axis=-1) for corner in (a, b, c)]
        pairs = [(a, b, lengths[2]), (b, c, lengths[0]), (c, a, lengths[1])]
        below = np.prod(lengths, axis=0) + sum((one * other).sum(axis=-1) * length for one, other, length in pairs)
        turns.append(np.arctan2((a * np.cross(b, c)).sum(axis=-1), below).sum(axis=1) / (2 * np.pi))
    return points[np.concatenate(turns) > 0.5]


def _stl(known: Case, data: bytes) -> np.ndarray:
    count = struct.unpack_from("<I", data, 80)[0]
    triangles = np.frombuffer(data, [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("more", "<u2")], count, 84)
    return of_surface(known, triangles["corners"].astype(float))


def _glb(known: Case, data: bytes) -> np.ndarray:
    """In metres, Y up, as the format has it: x, z and -y of the patient."""
    mesh = trimesh.load(io.BytesIO(data), file_type="glb").to_geometry()
    x, y, z = 1000 * np.moveaxis(mesh.triangles, 2, 0)
    return of_surface(known, np.stack([x, -z, y], axis=-1))


def _report(known: Case, data: bytes) -> np.ndarray:
    """The lesion's place where the report names the segment that holds it, and its volume."""
    (whole, _) = highdicom.sr.srread(io.BytesIO(data)).content.get_volumetric_roi_measurement_groups()
    return _where_it_says(
        known, str(whole.referenced_segment.referenced_sop_instance_uid), whole.get_measurements()[0].value
    )


def _report_by_dcmtk(known: Case, data: bytes) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.dcm").write_bytes(data)
        told = subprocess.run(
            ["dsrdump", "+Pc", f"{folder}/x.dcm"], capture_output=True, text=True, timeout=60, check=False
        )
    if told.returncode:
        raise RefusedError
    volumes = re.findall(r'"Volume"\)="([\d.]+)"', told.stdout)
    return _where_it_says(known, str(pydicom.dcmread(io.BytesIO(known.files["seg"])).SOPInstanceUID), float(volumes[0]))


def _where_it_says(known: Case, uid: str, volume_mm3: float) -> np.ndarray:
    """All of the lesion if its volume is that of its voxels by hand; else nothing."""
    made = pydicom.dcmread(io.BytesIO(known.files["seg"]))
    normal = np.cross(*np.reshape(known.sources[0].ImageOrientationPatient, (2, 3)).astype(float))
    along_mm = np.array([np.dot(np.array(one.ImagePositionPatient, float), normal) for one in known.sources])
    order = np.argsort(along_mm)
    middles = (along_mm[order][1:] + along_mm[order][:-1]) / 2
    widths_mm = np.diff(middles)  # the lesion is in neither end
    pixels = np.array([mask.sum() for mask in known.masks])[order][1:-1]
    right = np.isclose(volume_mm3, (pixels * widths_mm).sum() * np.prod(SPACING_MM), rtol=1e-4)
    return known.points_mm if right and uid == made.SOPInstanceUID else np.zeros((0, 3))


def _distribution(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"


def _dcmtk() -> str:
    told = subprocess.run(["dsrdump", "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    version = re.search(r"v([\d.]+)", told)
    return f"dcmtk {version[1]}" if version else "dcmtk"


@dataclass(frozen=True)
class Reader:
    """A reader: what it is called, for which profiles, and where it puts a file's foreground."""

    name: str
    profiles: Sequence[str]
    read: Callable[[Case, bytes], np.ndarray]


def readers() -> list[Reader]:
    """All that are files' readers, in the order of the table."""
    segmentations = ("seg", "seg-labelmap", "seg-fractional")
    niftis = ("nifti", "nifti-upright")
    dcmqi = ["segimage2itkimage", "--inputDICOM", "IN", "--outputDirectory", "OUT"]
    plastimatch = ["plastimatch", "convert", "--input", "IN", "--output-img", "OUT/x.nrrd"]
    dcm2niix = ["dcm2niix", "-o", "OUT", "IN"]
    itk = _distribution("SimpleITK")
    made = [
        Reader(f"{_distribution('highdicom')}, by source image", segmentations, _highdicom_by_slice),
        Reader(f"{_distribution('highdicom')}, as a volume", segmentations[:2], _highdicom),
        Reader(_distribution("pydicom"), segmentations, _pydicom),
        Reader(_distribution("dcmqi"), segmentations, _by_program(dcmqi, "x.dcm", "*.nrrd")),
        Reader(f"{itk} (GDCM)", segmentations, _simpleitk(".dcm")),
        Reader(_distribution("plastimatch"), segmentations, _by_program(plastimatch, "x.dcm", "*.nrrd")),
        Reader(_distribution("dcm2niix"), segmentations, _by_program(dcm2niix, "x.dcm", "*.nii*")),
        Reader(_distribution("highdicom"), ("report",), _report),
        Reader(itk, niftis, _simpleitk(".nii.gz")),
        Reader(_distribution("nibabel"), niftis, _nibabel),
        Reader(_distribution("plastimatch"), niftis, _by_program(plastimatch, "x.nii.gz", "*.nrrd")),
        Reader("its bytes", ("stl",), _stl),
        Reader(_distribution("trimesh"), ("glb",), _glb),
    ]
    if shutil.which("dsrdump"):
        made.insert(8, Reader(_dcmtk(), ("report",), _report_by_dcmtk))
    return made


def rows() -> list[tuple[str, Reader]]:
    """Of the table: profiles with their readers."""
    return [(profile, reader) for profile in PROFILES for reader in readers() if profile in reader.profiles]


def line(profile: str, reader: Reader) -> str:
    """A row in Markdown."""
    cells = [outcome(reader.read, stack, profile) for stack in STACKS]
    return f"| `{profile}` | {reader.name} | {' | '.join(cells)} |"


def written(name: str) -> list[str]:
    """The lines of one of the page's tables, without its head."""
    _, rest = PAGE.read_text().split(f"<!-- {name} -->\n")
    return rest.split("\n\n")[0].splitlines()[2:]


def write(name: str, lines: Sequence[str]) -> None:
    """Puts lines in place of those of a table."""
    before, rest = PAGE.read_text().split(f"<!-- {name} -->\n")
    table, after = rest.split("\n\n", 1)
    head = table.splitlines()[:2]
    PAGE.write_text(f"{before}<!-- {name} -->\n" + "\n".join([*head, *lines]) + "\n\n" + after)


if __name__ == "__main__":
    write("files", [line(*row) for row in rows()])
