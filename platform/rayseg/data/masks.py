"""Masks: the bytes of image files, volumes, DICOM images and segmentations to the class indices of one slice."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydicom import uid

from rayseg.data.labels import Labels
from rayseg.dicom import contours, image_files, segment_index, segments, volumes
from rayseg.dicom.contours import Structures
from rayseg.dicom.parsing import parse, silence_libraries
from rayseg.dicom.reading import Header
from rayseg.dicom.segment_index import Segmentation
from rayseg.dicom.stored import Stored
from rayseg.dicom.voxels import Volume
from rayseg.geometry import planes
from rayseg.geometry.grid import Geometry
from rayseg.geometry.placement import is_in_line, placement
from rayseg.records import MissingMask, Reason, Reject

_MAX_PIXELS = 2**26  # declared; 8192 x 8192, far above any slice
_LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)


@dataclass(frozen=True, eq=False)
class Layer:
    """What of a mask has one source.

    values: integers (rows, columns) as they are stored, or uint8 or uint16 colours (rows, columns, 3); bool (rows,
        columns) of a segment or ROI whose number is not wanted.
    source: the `{label}` of the path, the SegmentLabel of a segment or the ROIName; None where there is none.
    lossy: whether compression may have moved the values.
    has_shades: whether the values are greys or colours of a picture. Those of volumes, segments and ROIs are not.
    """

    values: np.ndarray
    source: str | None = None
    lossy: bool = False
    has_shades: bool = True


def truth(
    masks: "Sequence[tuple[Mask | bytes, str | None]]",
    shape: tuple[int, int],
    labels: Labels,
    header: Header | None = None,
    frame: int | None = None,
    geometry: Geometry | None = None,
    missing_mask: MissingMask = "empty",
) -> np.ndarray | Reject:
    """The classes of a slice from its masks; all background where it has none.

    Args:
        masks: each, opened or its bytes, and the `{label}` of its path. Who has several slices opens them once.
        shape: rows and columns of the slice.
        labels: the classes.
        header: of the slice, where it is a DICOM object: masks with a place lie where it does.
        frame: of the slice in an object of several; a mask without a place has as many, in the same order.
        geometry: of the slice, where it is one of a volume.
        missing_mask: of the layout: what a slice is that a mask of its series says nothing about. A row of a prepared
            set had a mask by its manifest's layout already, so that both ways are the same for it.

    Returns:
        uint8 (rows, columns), class indices; of overlapping classes the later one.
    """
    classes = np.zeros(shape, np.uint8)
    uncovered = 0
    for mask, source in masks:
        opened = mask if isinstance(mask, Mask) else Mask(mask)
        layers = opened.layers(source, labels.by_value, header, frame, geometry, missing_mask)
        if isinstance(layers, Reject):
            if layers.reason != Reason.NO_MASK:
                return layers
            uncovered += 1
            continue
        for layer in layers:
            if layer.values.shape[:2] != shape:
                return Reject(Reason.MASK_MISMATCH, f"mask {layer.values.shape[:2]}, image {shape}")
            found = labels.apply(layer.values, layer.source, layer.lossy, layer.has_shades)
            if isinstance(found, Reject):
                return found
            np.maximum(classes, found, out=classes)
    if masks and uncovered == len(masks):
        return Reject(Reason.NO_MASK, "no mask that pairs with the image is of it")
    return classes


class Mask:
    """A mask of one slice or of many: parsed and, a volume or a picture, decoded once. For one thread.

    An image file (PNG, JPEG, TIFF, BMP), a volume (NIfTI, NRRD, MetaImage), a DICOM image, segmentation or structure
    set.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._images: dict[bool, tuple[np.ndarray, bool] | Reject] = {}  # by `by_value`

    def layers(
        self,
        source: str | None = None,
        by_value: bool = False,
        header: Header | None = None,
        frame: int | None = None,
        geometry: Geometry | None = None,
        missing_mask: MissingMask = "empty",
    ) -> list[Layer] | Reject:
        """The layers of a slice: one, or as many as a segmentation has segments there.

        Args:
            source: the `{label}` of its path.
            by_value: whether stored numbers are wanted (indices of a palette, 0 and 1 of one bit, those of segments),
                and not what they show.
            header: of the slice, for a segmentation.
            frame: of the slice, in an object of several.
            geometry: of the slice, for a label volume, where there is no header.
            missing_mask: what a slice is that the mask of its series has no plane of: NO_MASK, or without foreground.

        Returns:
            The layers, none where a mask of the slice has nothing in it; NO_MASK where it is of other images.
        """
        if not self._data:
            return Reject(Reason.EMPTY_OBJECT, "mask")
        silence_libraries()
        if self._is_image:
            if frame is not None:
                return Reject(Reason.MASK_MISMATCH, "one mask image for an object of several frames")
            return self._of_image(source, by_value)
        if self._is_volume:
            return self._of_volume(source, frame, header, geometry, missing_mask)
        try:
            opened = self._dicom
            if isinstance(opened, Reject):
                return opened
            if isinstance(opened, Segmentation | Structures):
                return _of_segmentation(opened, by_value, header, missing_mask)
            return self._of_dicom(opened, source, by_value, frame)
        except Exception as error:  # pydicom's decoders raise a dozen types on bad bytes
            return Reject(Reason.DECODE_FAILED, f"mask: {type(error).__name__}")

    @cached_property
    def _is_image(self) -> bool:
        return image_files.is_mask(self._data)

    @cached_property
    def _is_volume(self) -> bool:
        return volumes.is_volume(self._data)

    @cached_property
    def _dicom(self) -> Segmentation | Structures | Stored | Reject:
        parsed = parse(self._data)
        if isinstance(parsed, Reject):
            return Reject(Reason.NOT_AN_IMAGE if parsed.reason == Reason.NOT_DICOM else parsed.reason, "mask")
        try:
            sop_class = str(parsed.dataset.get("SOPClassUID", ""))
            if sop_class == contours.SOP_CLASS:
                return contours.read(parsed.data)
            return segment_index.read(parsed.data) if sop_class in segments.SOP_CLASSES else Stored(parsed)
        except Exception as error:
            return Reject(Reason.DECODE_FAILED, f"mask: {type(error).__name__}")

    @cached_property
    def _volume(self) -> tuple[np.ndarray, Volume] | Reject:
        """The labels, (slices, rows, columns), and where they lie."""
        values, volume = volumes.labels(self._data), volumes.read_volume(self._data)
        if isinstance(values, Reject):
            return values
        assert not isinstance(volume, Reject)
        return values, volume

    def _of_image(self, source: str | None, by_value: bool) -> list[Layer] | Reject:
        """Transparency is left out; bilevel images give 0 and 255, or 0 and 1 where values are wanted."""
        if by_value not in self._images:
            self._images[by_value] = image_files.decode_mask(self._data, _MAX_PIXELS, by_value)
        decoded = self._images[by_value]
        if isinstance(decoded, Reject):
            return Reject(decoded.reason, f"mask: {decoded.detail}")
        values, lossy = decoded
        return [Layer(values, source, lossy)]

    def _of_dicom(self, stored: Stored, source: str | None, by_value: bool, frame: int | None) -> list[Layer] | Reject:
        """Stored values: neither rescaled nor inverted nor padded, which all are about showing an image."""
        values = stored.values(frame, shown=not by_value)
        if isinstance(values, Reject):
            reason = Reason.MASK_MISMATCH if values.reason == Reason.UNSUPPORTED_MULTIFRAME else values.reason
            return Reject(reason, f"mask: {values.detail}" if values.detail else "mask")
        return [Layer(values, source, stored.transfer_syntax_uid in _LOSSY)]

    def _of_volume(
        self,
        source: str | None,
        frame: int | None,
        header: Header | None,
        geometry: Geometry | None,
        missing_mask: MissingMask,
    ) -> list[Layer] | Reject:
        """What lies upon the slice; the slice of the same number where the image's has no place."""
        opened = self._volume
        if isinstance(opened, Reject):
            return opened
        values, volume = opened
        image = header.geometry if header else geometry
        if image is None or planes.corners_mm(image) is None:
            if frame is None or frame >= len(values):
                detail = f"a mask volume of {len(values)} slices, for an image without a place"
                return Reject(Reason.MASK_MISMATCH, detail)
            return [Layer(values[frame], source, has_shades=False)]
        if header is not None and not volume.placed:
            return Reject(Reason.MASK_MISMATCH, f"the mask volume ({volume.kind}) does not say where it lies")
        place = placement(volume.affine, volume.shape, image)
        if isinstance(place, Reject):
            return place
        if place is not None and place.has_pixels(volume.shape):
            return [Layer(place.take(values), source, has_shades=False)]
        if not is_in_line(volume.affine, volume.shape, image):
            return Reject(Reason.MASK_MISMATCH, "the mask volume lies beside the image")
        return [] if missing_mask == "empty" else Reject(Reason.NO_MASK, "the mask volume ends before the image")


def _of_segmentation(
    opened: Segmentation | Structures, by_value: bool, header: Header | None, missing_mask: MissingMask
) -> list[Layer] | Reject:
    if header is None:
        return Reject(Reason.NO_MASK, "a DICOM segmentation refers to DICOM instances, and the image is none")
    if isinstance(opened, Structures):
        found = contours.of_slice(opened, header, missing_mask)
    else:
        found = segments.of_slice(opened, header, missing_mask)
    if isinstance(found, Reject):
        return found
    return [
        Layer(np.where(inside, np.int32(number), 0) if by_value else inside, label, has_shades=False)
        for number, label, inside in found
    ]
