"""A stack of masks in other formats: NIfTI volumes, and surfaces as STL and glTF. Equal stacks give equal bytes."""

import gzip
import struct
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import trimesh
from scipy import ndimage
from skimage.measure import marching_cubes

from rayseg.geometry.stack import Stack
from rayseg.records import Reject

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# glTF is in metres with Y up and the viewer on +Z: left stays right in the picture, as radiologists look at a patient.
_LPS_MM_TO_GLTF = np.array([[0.001, 0, 0, 0], [0, 0, 0.001, 0], [0, -0.001, 0, 0], [0, 0, 0, 1]])
_COLOURS = np.array(  # of the classes: Okabe and Ito's, which are told apart by the colour-blind
    [[213, 94, 0], [0, 114, 178], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233], [240, 228, 66]],
    np.uint8,
)


def colour(number: int) -> np.ndarray:
    """Red, green and blue, uint8 (3,), of the class of this number, from 1."""
    rgb: np.ndarray = _COLOURS[(number - 1) % len(_COLOURS)]
    return rgb


def nifti(stack: Stack, labels: Sequence[str]) -> bytes | Reject:
    """The label maps as a gzipped NIfTI-1 volume, uint8 (columns, rows, slices), in the source's frame.

    The affine is of the source's own grid, sheared where it is tilted: sform says so, and qform where a quaternion can,
    within the stack's tolerance; both in scanner coordinates. Without a qform ITK refuses what is sheared, and with one
    would read it in the wrong place. UNEVEN_SLICES where slices do not lie at even distances: the format cannot say so.
    """
    affine = stack.affine_lps()
    if isinstance(affine, Reject):
        return affine
    image = nib.Nifti1Image(stack.masks.transpose(2, 1, 0), None)
    image.header.set_xyzt_units("mm")
    set_place(image.header, affine, stack.tolerance_mm)
    image.header["descrip"] = f"rayseg, research only: {', '.join(labels)}".encode("ascii", "replace")[:79]
    return gzip.compress(image.to_bytes(), mtime=0)


def set_place(header: nib.Nifti1Header, affine_lps: np.ndarray, tolerance_mm: float) -> None:
    """Where the grid of a header that has its shape lies: see `nifti`; `affine_lps` is of its voxels, to LPS, mm."""
    header.set_qform(_LPS_TO_RAS @ affine_lps, code="scanner")  # first: sets pixdim, too
    header.set_sform(_LPS_TO_RAS @ affine_lps, code="scanner")
    if _is_sheared(header, tolerance_mm):
        header["qform_code"] = 0


def nifti_warning(stack: Stack) -> str | None:
    """What users of `nifti` should know of this stack; None where it is nothing."""
    affine = stack.affine_lps()
    if isinstance(affine, Reject):
        return None
    header = nib.Nifti1Image(stack.masks.transpose(2, 1, 0), _LPS_TO_RAS @ affine).header
    if not _is_sheared(header, stack.tolerance_mm):
        return None
    return "nifti: tilted, as only sform_code says (qform_code is 0): ITK refuses it, and reads nifti-upright"


def _is_sheared(header: nib.Nifti1Header, tolerance_mm: float) -> bool:
    """Whether the grid of the sform has corners that lie elsewhere by the qform, whose axes are at right angles."""
    last = np.array(header.get_data_shape()) - 1
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * (*last, 1)
    off_mm = corners @ (header.get_sform() - header.get_qform()).T
    return bool(np.linalg.norm(off_mm[:, :3], axis=1).max() > tolerance_mm)


def surfaces(stack: Stack, labels: Sequence[str]) -> dict[str, trimesh.Trimesh]:
    """The surface of each class that has any voxel, by name, in patient millimetres (LPS), normals outward.

    Marching cubes (Lewiner et al. 2003) through the middle between foreground and background.
    """
    meshes = {}
    for number, name in enumerate(labels, start=1):
        inside_SHW = stack.masks == number
        where = ndimage.find_objects(inside_SHW.astype(np.uint8))
        if not where:
            continue
        # Only the box around it, with a layer of background: what touches the border is closed, too.
        corner = np.array([extent.start for extent in where[0]])
        padded = np.pad(inside_SHW[where[0]], 1).astype(np.float32)
        vertices, faces, _, _ = marching_cubes(padded, 0.5)
        points_mm, rgba = stack.points_mm(vertices - 1 + corner), [*colour(number).tolist(), 255]
        mesh = trimesh.Trimesh(points_mm, faces, vertex_colors=[rgba] * len(vertices), process=False)
        if mesh.volume < 0:
            mesh.invert()
        meshes[name] = mesh
    return meshes


def stl(meshes: dict[str, trimesh.Trimesh]) -> bytes:
    """All surfaces in one binary STL, in patient millimetres (LPS); without any triangle where there is none."""
    whole = trimesh.util.concatenate(list(meshes.values())) if meshes else trimesh.Trimesh()
    data: bytes = trimesh.exchange.stl.export_stl(whole)
    return data


def glb(meshes: dict[str, trimesh.Trimesh]) -> bytes:
    """A glTF 2.0 scene with a node a class, in metres as the format wants it, Y up; without any where there is none."""
    if not meshes:  # the library writes no empty scene
        content = b'{"asset":{"version":"2.0"},"scene":0,"scenes":[{}]}'
        content += b" " * (-len(content) % 4)
        return struct.pack("<4sIII4s", b"glTF", 2, 20 + len(content), len(content), b"JSON") + content
    scene = trimesh.Scene()
    for name, mesh in meshes.items():
        scene.add_geometry(mesh, node_name=name, geom_name=name, transform=_LPS_MM_TO_GLTF)
    options: dict[str, Any] = {"file_type": "glb", "include_normals": True}
    data: bytes = scene.export(**options)
    return data
