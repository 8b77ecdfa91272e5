"""DICOM segmentations of any maker as labels: what their segments have in the plane of one slice.

A frame is of the slice upon whose pixels it lies, by its plane position and orientation (PS3.3 A.51.5), whichever
images it names. Turned, mirrored or cropped, `geometry.placement` says which pixel is which. Names count where there is
no place: the image or the frame has none.
"""

from collections import defaultdict

import numpy as np
from pydicom import uid

from rayseg.dicom.reading import Header
from rayseg.dicom.segment_index import Segmentation
from rayseg.dicom.segment_pixels import read_frame
from rayseg.geometry import planes
from rayseg.geometry.placement import Placement, is_alike, placement
from rayseg.records import MissingMask, Reason, Reject

SOP_CLASSES = (str(uid.SegmentationStorage), "1.2.840.10008.5.1.4.1.1.66.7")  # the other: Label Map Segmentation


def of_slice(
    segmentation: Segmentation, header: Header, missing_mask: MissingMask = "empty"
) -> list[tuple[int, str, np.ndarray]] | Reject:
    """The segments in the plane of a slice, in the order of their numbers.

    A fractional segment is where its value is at least half of the largest possible one.

    Args:
        segmentation: BINARY, FRACTIONAL or LABELMAP.
        header: of the slice.
        missing_mask: what a slice is that the object neither lists nor has a frame of, where it names the slice's
            series or lies on the same grid in the same frame of reference: NO_MASK, or without foreground.

    Returns:
        SegmentNumber, SegmentLabel and bool (rows, columns) of each segment with a frame there; NO_MASK where the
        object is not of the slice's series; MASK_MISMATCH where its frames lie on other planes or pixels.
    """
    frames = _frames(segmentation, header)
    if isinstance(frames, Reject):
        return frames
    if not frames:
        reject = _without_frames(segmentation, header, missing_mask)
        if reject is not None:
            return reject
    inside: dict[int, np.ndarray] = {}
    for index, where in frames:
        values = read_frame(segmentation.dataset, index)
        if isinstance(values, Reject):
            return values
        if where is not None:
            values = where.take(values[np.newaxis])
        number = segmentation.numbers[index]
        if number is None:
            segments = {int(value): values == value for value in np.unique(values) if value}
        else:
            least = 1
            if segmentation.dataset.SegmentationType == "FRACTIONAL":
                least = max(1, -(-int(segmentation.dataset.MaximumFractionalValue) // 2))
            segments = {number: values >= least}
        for segment, plane in segments.items():
            inside[segment] = inside[segment] | plane if segment in inside else plane
    return [(number, segmentation.labels.get(number, ""), inside[number]) for number in sorted(inside)]


def _frames(segmentation: Segmentation, header: Header) -> list[tuple[int, Placement | None]] | Reject:
    """The frames of a slice, each with its place there, None where it is the slice's by its name alone."""
    naming, of_other_frames = segmentation.naming(header)
    comparable = segmentation.comparable(header, naming)
    by_place = _upon(segmentation, header, comparable, naming, of_other_frames)
    if isinstance(by_place, Reject):
        return by_place
    by_name = sorted(naming - set(comparable.tolist()))
    positions: dict[int | None, set[tuple[float, ...]]] = defaultdict(set)
    for index in by_name:
        if segmentation.placed[index]:
            positions[segmentation.numbers[index]].add(tuple(segmentation.affines[index, :3, 3].tolist()))
    if any(len(several) > 1 for several in positions.values()):
        return Reject(Reason.MASK_MISMATCH, "several frames of one segment name the image, which has no place")
    return [*by_place, *((index, None) for index in by_name)]


def _upon(
    segmentation: Segmentation, header: Header, comparable: np.ndarray, naming: set[int], of_other_frames: set[int]
) -> list[tuple[int, Placement | None]] | Reject:
    """The frames that lie upon the slice's pixels."""
    if not len(comparable):
        return []
    corners_mm = planes.corners_mm(header.geometry)
    assert corners_mm is not None
    tolerance_mm = planes.tolerance_mm(header.geometry)
    affines = segmentation.affines[comparable]
    distances_mm = np.linalg.norm(affines[:, :3, 2], axis=1)  # of planes
    # Of the slice's corners from the planes of the frames, (frames, 3)
    normals = affines[:, :3, 2] / distances_mm[:, np.newaxis]
    offsets_mm = np.einsum("fcx,fx->fc", corners_mm - affines[:, np.newaxis, :3, 3], normals)
    least_mm = np.where(np.ptp(np.sign(offsets_mm), axis=1) > 0, 0.0, np.abs(offsets_mm).min(axis=1))
    is_parallel = np.ptp(offsets_mm, axis=1) <= 2 * tolerance_mm
    thickness_mm = header.geometry.slice_thickness_mm or 0.0
    places: dict[bytes, Placement | Reject | None] = {}
    upon: list[tuple[int, Placement | None]] = []
    shape = (int(segmentation.dataset.Columns), int(segmentation.dataset.Rows), 1)
    # Planes farther off than half the way to the next frame are no concern of the slice's: `placement` would say None.
    for at in np.flatnonzero(least_mm <= 0.55 * distances_mm + tolerance_mm):
        index, affine = int(comparable[at]), affines[at]
        if index in of_other_frames:
            continue
        key = affine.tobytes()
        if key not in places:
            places[key] = placement(affine, shape, header.geometry)
        where = places[key]
        if isinstance(where, Placement):
            upon.append((index, where))
            continue
        is_beside = bool(is_parallel[at] and least_mm[at] > tolerance_mm)
        of_others = segmentation.names[index] > 0 and index not in naming
        if isinstance(where, Reject) and segmentation.concerns(header) and not (is_beside and of_others):
            return where
    named = np.flatnonzero(np.isin(comparable, [index for index in naming if segmentation.names[index] == 1]))
    far_mm = least_mm[named] - np.maximum(distances_mm[named], thickness_mm) / 2
    if len(named) and (far_mm > tolerance_mm).any():
        return Reject(Reason.MASK_MISMATCH, f"a frame that names the image lies {least_mm[named].max():.3g} mm from it")
    return upon


def _without_frames(segmentation: Segmentation, header: Header, missing_mask: MissingMask) -> Reject | None:
    """Why a slice that no frame is of has no mask; None where it has one without foreground."""
    is_listed = header.sop_instance_uid in segmentation.instances
    is_of_series = header.series_instance_uid in segmentation.series or is_listed
    naming, _ = segmentation.naming(header)
    has_place = planes.corners_mm(header.geometry) is not None
    comparable = segmentation.comparable(header, naming)
    is_silent = segmentation.placed & (segmentation.names == 0)  # such frames are of an image by their place alone
    if is_of_series and is_silent.any() and (not has_place or segmentation.is_elsewhere(header)):
        where = "in another frame of reference" if has_place else "while the image has no place"
        return Reject(Reason.MASK_MISMATCH, f"frames name no image and lie {where}")
    grids = {affine[:3, :3].tobytes(): affine for affine in segmentation.affines[comparable]}
    alike = has_place and any(is_alike(affine, header.geometry) for affine in grids.values())
    shares_space = segmentation.shares_space(header)
    if grids and not alike and segmentation.concerns(header) and (is_of_series or shares_space):
        return Reject(Reason.MASK_MISMATCH, "all frames have another spacing or orientation than the image")
    if is_listed:
        return None
    if not is_of_series and not (shares_space and alike):
        return Reject(Reason.NO_MASK, "the segmentation does not refer to the image")
    return None if missing_mask == "empty" else Reject(Reason.NO_MASK, "the segmentation has no frame of the image")
