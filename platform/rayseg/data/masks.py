"""Masks: the bytes of image files, volumes, DICOM images and segmentations to the class indices of one slice."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydicom import uid

from rayseg.data.labels import Labels
from rayseg.dicom import contours, image_files, segments, volumes
from rayseg.dicom.parsing import Parsed, parse, silence_libraries
from rayseg.dicom.reading import Header, read_stored
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
    masks: Sequence[tuple[bytes, str | None]],
    shape: tuple[int, int],
    labels: Labels,
    header: Header | None = None,
    frame: int | None = None,
    geometry: Geometry | None = None,
    missing_mask: MissingMask = "empty",
) -> np.ndarray | Reject:
    """The classes of a slice from its masks; all background where it has none.

    Args:
        masks: bytes of each, and the `{label}` of its path.
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
    for data, source in masks:
        layers = read_mask(data, source, labels.by_value, header, frame, geometry, missing_mask)
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


def read_mask(
    data: bytes,
    source: str | None = None,
    by_value: bool = False,
    header: Header | None = None,
    frame: int | None = None,
    geometry: Geometry | None = None,
    missing_mask: MissingMask = "empty",
) -> list[Layer] | Reject:
    """The layers of a mask: one, or as many as a segmentation has segments in the slice.

    Args:
        data: an image file (PNG, JPEG, TIFF, BMP), a volume (NIfTI, NRRD, MetaImage), a DICOM image or segmentation.
        source: the `{label}` of its path.
        by_value: whether stored numbers are wanted (indices of a palette, 0 and 1 of one bit, those of segments), and
            not what they show.
        header: of the slice, for a segmentation.
        frame: of the slice, in an object of several.
        geometry: of the slice, for a label volume, where there is no header.
        missing_mask: what a slice is that the mask of its series has no plane of: NO_MASK, or without foreground.

    Returns:
        The layers, none where a mask of the slice has nothing in it; NO_MASK where it is of other images.
    """
    if not data:
        return Reject(Reason.EMPTY_OBJECT, "mask")
    silence_libraries()
    if image_files.is_mask(data):
        if frame is not None:
            return Reject(Reason.MASK_MISMATCH, "one mask image for an object of several frames")
        return _of_image(data, source, by_value)
    if volumes.is_volume(data):
        return _of_volume(data, source, frame, header, geometry, missing_mask)
    parsed = _parsed(data)
    if isinstance(parsed, Reject):
        return Reject(Reason.NOT_AN_IMAGE if parsed.reason == Reason.NOT_DICOM else parsed.reason, "mask")
    try:
        sop_class = str(parsed.dataset.get("SOPClassUID", ""))
        if sop_class == contours.SOP_CLASS or sop_class in segments.SOP_CLASSES:
            return _of_segmentation(parsed.data, sop_class, by_value, header, missing_mask)
        return _of_dicom(parsed, source, by_value, frame)
    except Exception as error:  # pydicom's decoders raise a dozen types on bad bytes
        return Reject(Reason.DECODE_FAILED, f"mask: {type(error).__name__}")


@lru_cache(maxsize=2)  # one segmentation is the mask of all slices of a series
def _parsed(data: bytes) -> Parsed | Reject:
    return parse(data)


def _of_image(data: bytes, source: str | None, by_value: bool) -> list[Layer] | Reject:
    """Transparency is left out; bilevel images give 0 and 255, or 0 and 1 where values are wanted."""
    decoded = image_files.decode_mask(data, _MAX_PIXELS, by_value)
    if isinstance(decoded, Reject):
        return Reject(decoded.reason, f"mask: {decoded.detail}")
    values, lossy = decoded
    return [Layer(values, source, lossy)]


def _of_dicom(parsed: Parsed, source: str | None, by_value: bool, frame: int | None) -> list[Layer] | Reject:
    """Stored values: neither rescaled nor inverted nor padded, which all are about showing an image."""
    values = read_stored(parsed, frame, shown=not by_value)
    if isinstance(values, Reject):
        reason = Reason.MASK_MISMATCH if values.reason == Reason.UNSUPPORTED_MULTIFRAME else values.reason
        return Reject(reason, f"mask: {values.detail}" if values.detail else "mask")
    return [Layer(values, source, parsed.transfer_syntax_uid in _LOSSY)]


def _of_volume(
    data: bytes,
    source: str | None,
    frame: int | None,
    header: Header | None,
    geometry: Geometry | None,
    missing_mask: MissingMask,
) -> list[Layer] | Reject:
    """The part of a label volume that lies upon the slice; the one of the same number where the slice has no place."""
    values, volume = volumes.labels(data), volumes.read_volume(data)
    if isinstance(values, Reject):
        return values
    assert not isinstance(volume, Reject)
    image = header.geometry if header else geometry
    if image is None or planes.corners_mm(image) is None:
        if frame is None or frame >= len(values):
            return Reject(Reason.MASK_MISMATCH, f"a mask volume of {len(values)} slices, for an image without a place")
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
    data: bytes, sop_class: str, by_value: bool, header: Header | None, missing_mask: MissingMask
) -> list[Layer] | Reject:
    if header is None:
        return Reject(Reason.NO_MASK, "a DICOM segmentation refers to DICOM instances, and the image is none")
    of_slice = contours.of_slice if sop_class == contours.SOP_CLASS else segments.of_slice
    found = of_slice(data, header, missing_mask)
    if isinstance(found, Reject):
        return found
    return [
        Layer(np.where(inside, np.int32(number), 0) if by_value else inside, label, has_shades=False)
        for number, label, inside in found
    ]
