"""What is in a DICOM segmentation, and where: its frames, their places, and the images that they name."""

from collections import defaultdict
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from rayseg.dicom.reading import Header
from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.records import Reason, Reject

_MAX_PIXELS = 2**26  # of a frame


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmentation's data set, and where to find what. Arrays have an item a frame."""

    dataset: Dataset
    labels: dict[int, str]  # SegmentLabel by SegmentNumber
    numbers: list[int | None]  # SegmentNumber; None: a label map
    # Own frames that name a source instance, by that and by its frame; under None those that name all of it
    named: dict[str, dict[int | None, set[int]]] = field(repr=False)
    naming_any: dict[str, set[int]] = field(repr=False)  # by source instance: own frames that name it or a frame of it
    instances: frozenset[str] = field(repr=False)  # that it says it is of, in a frame or not
    series: frozenset[str] = field(repr=False)  # likewise
    names: np.ndarray = field(repr=False)  # int64, how many instances the frame names
    placed: np.ndarray = field(repr=False)  # bool, whether the frame says where it lies
    # float64 (frames, 4, 4): (column, row, slice) to millimetres, where the next slice is as far off as the next frame
    affines: np.ndarray = field(repr=False)

    def naming(self, header: Header) -> tuple[set[int], set[int]]:
        """The frames that name the slice, and those that name other frames of its instance only."""
        naming_any = self.naming_any.get(header.sop_instance_uid, set())
        if header.frame is None:
            return naming_any, set()
        by_frame = self.named[header.sop_instance_uid] if naming_any else {}
        naming = by_frame.get(header.frame, set()) | by_frame.get(None, set())
        return naming, naming_any - naming

    def concerns(self, header: Header) -> bool:
        """Whether it names the slice's instance or series, or nothing at all."""
        names_nothing = not self.instances and not self.series
        return names_nothing or header.sop_instance_uid in self.instances or header.series_instance_uid in self.series

    def comparable(self, header: Header, naming: set[int]) -> np.ndarray:
        """The frames whose place can be compared with the slice's, int64.

        Those that name the slice can in any frame of reference: copies of series come with new ones.
        """
        comparable = self.placed.copy()
        if planes.corners_mm(header.geometry) is None:
            comparable[:] = False
        elif self.is_elsewhere(header):
            comparable &= np.isin(np.arange(len(comparable)), list(naming))
        return np.flatnonzero(comparable)

    def is_elsewhere(self, header: Header) -> bool:
        """Whether it is in another frame of reference than the slice."""
        return len({header.frame_of_reference_uid, self.dataset.get("FrameOfReferenceUID")} - {None, ""}) > 1

    def shares_space(self, header: Header) -> bool:
        """Whether both say to be in the same one."""
        return bool(header.frame_of_reference_uid) and not self.is_elsewhere(header)


def read(data: bytes) -> Segmentation | Reject:
    """Raises what pydicom does on bad bytes."""
    dataset = pydicom.dcmread(BytesIO(data), force=True)
    kind = dataset.get("SegmentationType")
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        return Reject(Reason.UNSUPPORTED_PIXELS, "mask: SegmentationType")
    if dataset.Rows * dataset.Columns > _MAX_PIXELS:
        return Reject(Reason.TOO_LARGE, f"mask of {dataset.Rows} x {dataset.Columns} pixels")
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    named: dict[str, dict[int | None, set[int]]] = defaultdict(lambda: defaultdict(set))
    naming_any: dict[str, set[int]] = defaultdict(set)
    numbers: list[int | None] = []
    names, places = [], []
    for index, groups in enumerate(dataset.get("PerFrameFunctionalGroupsSequence") or []):
        if kind == "LABELMAP":
            numbers.append(None)
        else:
            identification = groups.get("SegmentIdentificationSequence") or shared.get("SegmentIdentificationSequence")
            numbers.append(int(identification[0].ReferencedSegmentNumber))
        derivations = groups.get("DerivationImageSequence") or shared.get("DerivationImageSequence") or []
        sources = [source for derivation in derivations for source in derivation.get("SourceImageSequence") or []]
        for source in sources:
            of_source = source.get("ReferencedFrameNumber") or []
            of_frames = [of_source] if isinstance(of_source, int) else of_source
            instance = str(source.ReferencedSOPInstanceUID)
            naming_any[instance].add(index)
            numbers_of_frames: list[int | None] = [int(one) - 1 for one in of_frames]
            for frame in numbers_of_frames or [None]:
                named[instance][frame].add(index)
        names.append(len({str(source.ReferencedSOPInstanceUID) for source in sources}))
        places.append(_geometry(dataset, groups, shared))
    placed = np.array([planes.corners_mm(place) is not None for place in places], bool)
    if not named and not placed.any():
        return Reject(Reason.MISSING_ATTRIBUTE, "mask: no frame names a source image or tells where it lies")
    listed = dataset.get("ReferencedSeriesSequence") or []
    instances = {
        str(instance.ReferencedSOPInstanceUID)
        for series in listed
        for instance in series.get("ReferencedInstanceSequence") or []
    }
    return Segmentation(
        dataset,
        {int(segment.SegmentNumber): str(segment.SegmentLabel) for segment in dataset.get("SegmentSequence") or []},
        numbers,
        {instance: dict(by_frame) for instance, by_frame in named.items()},
        dict(naming_any),
        frozenset(instances | named.keys()),
        frozenset(str(series.SeriesInstanceUID) for series in listed if series.get("SeriesInstanceUID")),
        np.array(names, np.int64),
        placed,
        _affines(places, placed),
    )


def _affines(places: list[Geometry], placed: np.ndarray) -> np.ndarray:
    """See `Segmentation`; those of frames without a place are zeros."""
    affines = np.zeros((len(places), 4, 4))
    known = [place for place, is_known in zip(places, placed, strict=True) if is_known]
    if known:
        affines[placed] = [_affine(place) for place in known]
        distances_mm = _distances_mm(affines[placed], [place.slice_thickness_mm for place in known])
        affines[placed, :3, 2] *= distances_mm[:, np.newaxis]
    return affines


def _affine(geometry: Geometry) -> np.ndarray:
    """(column, row, slice) to millimetres, float64 (4, 4), slices being a millimetre apart."""
    assert geometry.image_orientation is not None
    assert geometry.pixel_spacing_mm is not None
    assert geometry.image_position_mm is not None
    along_row, along_column = np.array(geometry.image_orientation, float).reshape(2, 3)
    affine = np.eye(4)
    affine[:3, 0] = along_row * geometry.pixel_spacing_mm[1]
    affine[:3, 1] = along_column * geometry.pixel_spacing_mm[0]
    affine[:3, 2] = planes.normal(geometry.image_orientation)
    affine[:3, 3] = geometry.image_position_mm
    return affine


def _distances_mm(affines: np.ndarray, thicknesses_mm: list[float | None]) -> np.ndarray:
    """How far the next frame is from each, float64 (frames,): as said, or less where planes lie closer."""
    apart_mm = np.inf
    if len(affines) and planes.are_parallel(affines[:, :3, 2]):
        along_mm = np.sort(affines[:, :3, 3] @ affines[0, :3, 2])
        apart_mm = np.diff(along_mm).min(initial=np.inf, where=np.diff(along_mm) > planes.SAME_POSITION_MM)
    said_mm = np.array([thickness_mm or np.inf for thickness_mm in thicknesses_mm])
    nearest_mm = np.minimum(said_mm, apart_mm)
    spacings_mm = np.linalg.norm(affines[:, :3, :2], axis=1).min(axis=1)
    return np.where(np.isfinite(nearest_mm), nearest_mm, spacings_mm)


def _geometry(dataset: Dataset, groups: Dataset, shared: Dataset) -> Geometry:
    """Where a frame lies, by its own functional groups or the shared ones (PS3.3 C.7.6.16.2).

    Its thickness is how far the next frame is, where that is said.
    """

    def value(sequence: str, keyword: str) -> Any:
        items = groups.get(sequence) or shared.get(sequence) or [Dataset()]
        return items[0].get(keyword)

    def numbers(sequence: str, keyword: str) -> Any:
        values = value(sequence, keyword)
        return None if not values else tuple(float(one) for one in values)

    distance_mm = value("PixelMeasuresSequence", "SpacingBetweenSlices") or value(
        "PixelMeasuresSequence", "SliceThickness"
    )
    return Geometry(
        rows=dataset.Rows,
        columns=dataset.Columns,
        slice_thickness_mm=abs(float(distance_mm)) if distance_mm else None,
        pixel_spacing_mm=numbers("PixelMeasuresSequence", "PixelSpacing"),
        image_position_mm=numbers("PlanePositionSequence", "ImagePositionPatient"),
        image_orientation=numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
    )
