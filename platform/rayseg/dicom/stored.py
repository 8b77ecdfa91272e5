"""The values of an image's frames as they are stored: what a mask's pixels say."""

from functools import cached_property

import numpy as np

from rayseg.dicom import pixels, tables
from rayseg.dicom.parsing import Elements, Parsed
from rayseg.dicom.reading import inspect, pixel_data
from rayseg.records import Reason, Reject


class Stored:
    """The values of an image as they are stored, whatever object it is of: the object is inspected once.

    Neither rescaled nor inverted nor padded, which all are about showing an image.
    """

    def __init__(self, parsed: Parsed) -> None:
        self._parsed, self._elements = parsed, Elements(parsed.dataset)
        self._image = inspect(parsed, self._elements)
        self.transfer_syntax_uid = parsed.transfer_syntax_uid

    @cached_property
    def _pixels(self) -> pixels.PixelData:
        assert not isinstance(self._image, Reject)
        return pixel_data(self._image)

    def values(self, frame: int | None, shown: bool = False) -> np.ndarray | Reject:
        """Those of one frame.

        Args:
            frame: of an object of several.
            shown: whether the colours of a palette are wanted, and 0 and 255 of one bit; else indices, and 0 and 1.

        Returns:
            (rows, columns) uint8, int16, uint16 or int32, or (rows, columns, 3) red, green, blue. May be read-only.
        """
        image = self._image
        if isinstance(image, Reject):
            return image
        if (frame is None and image.frames > 1) or (frame is not None and frame >= image.frames):
            return Reject(Reason.UNSUPPORTED_MULTIFRAME, f"NumberOfFrames {image.frames}")
        values = self._pixels.stored(frame or 0)
        if isinstance(values, Reject) or not shown:
            return values
        of_object = image.layout
        if of_object.photometric_interpretation == "PALETTE COLOR":
            assert of_object.table is not None
            bits = (len(of_object.table) - 1).bit_length()
            palette = tables.colours(self._parsed.dataset, self._elements, bits, of_object.signed)
            if isinstance(palette, Reject):
                return palette
            return np.take(palette, values.astype(np.int32) - of_object.table_first, axis=0, mode="clip")
        is_bit = of_object.bits_stored == 1 and values.dtype == np.uint8 and int(values.max()) <= 1
        return values * np.uint8(255) if is_bit else values
