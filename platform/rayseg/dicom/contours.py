"""Contours of an RT structure set (RTSTRUCT) as labels: the pixels whose centres lie inside, in the plane of one slice.

Closed planar contours count. Of several of one ROI in a plane, one within another is a hole, and one within the hole an
island again; those that overlap are joined, but for CLOSEDPLANAR_XOR (PS3.3 C.8.8.6.3). A contour that goes in and out
by the same way (keyhole) needs no other one. Points mark no region and are left out.
"""

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset
from skimage.measure import grid_points_in_poly

from rayseg.dicom.reading import Header
from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.records import MissingMask, Reason, Reject

SOP_CLASS = str(uid.RTStructureSetStorage)
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_OPEN = ("OPEN_PLANAR", "OPEN_NONPLANAR")
_STEPS = 64  # of a pixel: contours through centres are written in decimals, and would pass beside them


@dataclass(frozen=True, eq=False)
class Structures:
    """Contours one after the other. Arrays have an item a contour, but for `points_mm`."""

    names: dict[int, str]  # ROIName by ROINumber
    numbers: np.ndarray = field(repr=False)  # int64, ROINumber
    kinds: np.ndarray = field(repr=False)  # str, ContourGeometricType
    spaces: np.ndarray = field(repr=False)  # str, FrameOfReferenceUID; empty where none is said
    instances: list[frozenset[str]] = field(repr=False)  # that the contour names
    points_mm: np.ndarray = field(repr=False)  # float64 (points, 3) of all contours
    starts: np.ndarray = field(repr=False)  # int64, of the contour's first point in `points_mm`
    listed: frozenset[str] = field(repr=False)  # instances that it says it is of
    series: frozenset[str] = field(repr=False)  # likewise
    said_spaces: frozenset[str] = field(repr=False)  # frames of reference

    def refers_to(self, header: Header) -> bool:
        """Whether it names the slice's series, or the slice."""
        return header.series_instance_uid in self.series or header.sop_instance_uid in self.listed

    def points_of(self, index: int) -> np.ndarray:
        """The contour's points, float64 (points, 3)."""
        end = self.starts[index + 1] if index + 1 < len(self.starts) else len(self.points_mm)
        return self.points_mm[self.starts[index] : end]

    def offsets_mm(self, header: Header) -> tuple[np.ndarray, np.ndarray]:
        """How far along the normal of the slice's plane contours reach: the least and the most, float64 (contours,)."""
        assert header.geometry.image_orientation is not None
        assert header.geometry.image_position_mm is not None
        from_plane_mm = planes.along_mm(
            self.points_mm - header.geometry.image_position_mm, header.geometry.image_orientation
        )
        return np.minimum.reduceat(from_plane_mm, self.starts), np.maximum.reduceat(from_plane_mm, self.starts)


def of_slice(
    structures: Structures, header: Header, missing_mask: MissingMask = "empty"
) -> list[tuple[int, str, np.ndarray]] | Reject:
    """The ROIs in the plane of a slice, in the order of their numbers.

    Args:
        structures: of an RT structure set.
        header: of the slice.
        missing_mask: what a slice without a contour is where the object names no series at all: NO_MASK, or without
            foreground. A slice of a series that it names is without foreground.

    Returns:
        ROINumber, ROIName and bool (rows, columns) of each ROI with a contour there; NO_MASK where the object is of
        other images; MASK_MISMATCH where contours cross the slice's plane or lie between planes, or have no inside.
    """
    if planes.corners_mm(header.geometry) is None:
        return Reject(Reason.MASK_MISMATCH, "contours, while the image has no place")
    indexes = _in_plane(structures, header) if len(structures.starts) else []
    if isinstance(indexes, Reject):
        return indexes
    if not indexes and not structures.refers_to(header):
        is_near = (
            not structures.series and not structures.listed and header.frame_of_reference_uid in structures.said_spaces
        )
        if not is_near or missing_mask == "reject":
            return Reject(Reason.NO_MASK, "the structure set does not refer to the image")
    inside: dict[int, np.ndarray] = {}
    for number in sorted({int(structures.numbers[index]) for index in indexes}):
        of_roi = [index for index in indexes if structures.numbers[index] == number]
        inside[number] = _region(
            [(structures.kinds[index], structures.points_of(index)) for index in of_roi], header.geometry
        )
    return [(number, structures.names.get(number, ""), inside[number]) for number in inside]


def _in_plane(structures: Structures, header: Header) -> list[int] | Reject:
    """The closed contours in the slice's plane."""
    tolerance_mm = planes.tolerance_mm(header.geometry)
    names = np.array([header.sop_instance_uid in instances for instances in structures.instances])
    names_others = np.array([bool(instances) for instances in structures.instances]) & ~names
    space = header.frame_of_reference_uid
    comparable = (
        names | (structures.spaces == space) | (structures.spaces == "") if space else np.ones(len(names), bool)
    )
    comparable &= structures.kinds != "POINT"
    least_mm, most_mm = structures.offsets_mm(header)
    within = (least_mm >= -tolerance_mm) & (most_mm <= tolerance_mm)
    touches = (least_mm <= tolerance_mm) & (most_mm >= -tolerance_mm)
    closed = np.isin(structures.kinds, _CLOSED)
    if not structures.refers_to(header) and (structures.series or structures.listed):
        return np.flatnonzero(comparable & within & closed).tolist()
    open_ones = structures.kinds[comparable & touches & ~closed]
    if len(open_ones):
        kind = next((one for one in open_ones if one in _OPEN), "ContourGeometricType")
        return Reject(Reason.MASK_MISMATCH, f"{kind}: a contour without an inside")
    if (comparable & touches & ~within).any():
        return Reject(Reason.MASK_MISMATCH, "a contour crosses the image's plane")
    away_mm = np.where(touches, 0.0, np.minimum(np.abs(least_mm), np.abs(most_mm)))
    thickness_mm = header.geometry.slice_thickness_mm or 0.0
    near_mm = min(thickness_mm, _distance_mm((least_mm + most_mm)[comparable] / 2)) / 2
    beside = comparable & ~touches & ~names_others & (away_mm < near_mm)
    alone = np.array([len(instances) == 1 for instances in structures.instances])
    beside |= comparable & ~touches & names & alone & (away_mm > thickness_mm / 2)
    if beside.any():
        return Reject(Reason.MASK_MISMATCH, f"a contour lies {away_mm[beside].max():.3g} mm beside the image's plane")
    return np.flatnonzero(comparable & within).tolist()


def _distance_mm(along_mm: np.ndarray) -> float:
    """The least distance of planes, infinite where there is one only."""
    steps_mm = np.diff(np.sort(along_mm))
    return float(steps_mm.min(initial=np.inf, where=steps_mm > planes.SAME_POSITION_MM))


def _region(contours: list[tuple[str, np.ndarray]], geometry: Geometry) -> np.ndarray:
    """The pixels of one ROI, bool (rows, columns): whose centres lie inside its contours, or on one of them.

    Points on the path of a contour are part of the ROI (PS3.3 C.8.8.6.3), those of a hole too.
    """
    polygons = {points.tobytes(): (kind, _vertices(points, geometry)) for kind, points in contours}  # no one twice
    inside, upon = np.zeros((2, geometry.rows, geometry.columns), bool)
    for kind, vertices in sorted(polygons.values(), key=lambda one: -_area(one[1])):
        first = np.maximum(np.ceil(vertices.min(axis=0)), 0).astype(int)
        last = np.minimum(np.floor(vertices.max(axis=0)), np.array(inside.shape) - 1).astype(int)
        if len(vertices) < 3 or (last < first).any():
            continue
        kinds = grid_points_in_poly(tuple(last - first + 1), vertices - first, binarize=False)
        box = np.s_[first[0] : last[0] + 1, first[1] : last[1] + 1]
        is_hole = not ((kinds == 1) & ~inside[box] & ~upon[box]).any()
        if is_hole or kind == "CLOSEDPLANAR_XOR":
            inside[box] ^= kinds == 1
        else:
            inside[box] |= kinds == 1
        upon[box] |= kinds > 1
    return inside | upon


def _vertices(points_mm: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Row and column of a contour's points, float64 (points, 2)."""
    assert geometry.image_orientation is not None
    assert geometry.pixel_spacing_mm is not None
    directions = np.array(geometry.image_orientation, float).reshape(2, 3)[::-1]  # along a column, along a row
    vertices = (points_mm - geometry.image_position_mm) @ directions.T / geometry.pixel_spacing_mm
    return np.rint(vertices * _STEPS) / _STEPS


def _area(vertices: np.ndarray) -> float:
    """Of a polygon, by the shoelace formula."""
    rows, columns = vertices.T
    return float(abs(np.dot(rows, np.roll(columns, 1)) - np.dot(columns, np.roll(rows, 1))) / 2)


def read(data: bytes) -> Structures | Reject:
    """An RT structure set; raises what pydicom does on bad bytes."""
    dataset = pydicom.dcmread(BytesIO(data), force=True)
    rois = dataset.get("StructureSetROISequence") or []
    names = {int(roi.ROINumber): str(roi.get("ROIName") or "") for roi in rois}
    spaces = {int(roi.ROINumber): str(roi.get("ReferencedFrameOfReferenceUID") or "") for roi in rois}
    numbers, kinds, instances, points = [], [], [], []
    for roi in dataset.get("ROIContourSequence") or []:
        for contour in roi.get("ContourSequence") or []:
            values = _numbers(contour)
            if not len(values):
                continue
            if len(values) % 3 or not np.isfinite(values).all():
                return Reject(Reason.CORRUPT, "mask: ContourData")
            numbers.append(int(roi.ReferencedROINumber))
            kinds.append(str(contour.get("ContourGeometricType") or ""))
            instances.append(_instances(contour))
            points.append(values.reshape(-1, 3))
    references = dataset.get("ReferencedFrameOfReferenceSequence") or []
    listed = [
        series
        for reference in references
        for study in reference.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    ]
    return Structures(
        names,
        np.array(numbers, np.int64),
        np.array(kinds, str),
        np.array([spaces.get(number, "") for number in numbers], str),
        instances,
        np.concatenate([np.zeros((0, 3)), *points]),
        np.cumsum([0, *(len(one) for one in points)])[:-1],
        frozenset().union(*instances, *(_instances(series) for series in listed)),
        frozenset(str(series.SeriesInstanceUID) for series in listed if series.get("SeriesInstanceUID")),
        frozenset({str(one.get("FrameOfReferenceUID") or "") for one in references} | set(spaces.values())) - {""},
    )


def _numbers(contour: Dataset) -> np.ndarray:
    """ContourData, float64; from its bytes, as pydicom takes a microsecond and more for each number."""
    element: Any = contour.get_item("ContourData")
    value = None if element is None else element.value
    return np.array(value.split(b"\\") if isinstance(value, bytes) else value or [], np.float64)


def _instances(item: Dataset) -> frozenset[str]:
    images: Any = item.get("ContourImageSequence") or []
    return frozenset(str(image.ReferencedSOPInstanceUID) for image in images)
