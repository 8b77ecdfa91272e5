"""Look-up tables from stored values to grey ones: palettes, as the luminance of their colours, and modality LUTs."""

import struct

import numpy as np
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from rayseg.dicom.parsing import Elements, sequence_item
from rayseg.dicom.pixels import luminance
from rayseg.records import Reason, Reject

_MAX_BITS = 16  # of stored values: a table of 65,536 entries


def palette(dataset: Dataset, elements: Elements, bits_stored: int, signed: bool) -> np.ndarray | Reject:
    """The luminance of each stored value's colour (PS3.3 C.7.6.3.1.5, segmented tables C.7.9.2): uint8 or uint16."""
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTable"
        if not elements.has(f"{name}Descriptor"):
            return Reject(Reason.MISSING_ATTRIBUTE, f"{name}Descriptor")
        if not (elements.has(f"{name}Data") or elements.has(f"Segmented{name}Data")):
            return Reject(Reason.MISSING_ATTRIBUTE, f"{name}Data")
    values = _all_values(bits_stored, signed)
    if isinstance(values, Reject):
        return values
    try:
        colours = apply_color_lut(values, dataset)[..., :3]
    except Exception as error:
        return Reject(Reason.UNSUPPORTED_PIXELS, f"RedPaletteColorLookupTableData: {type(error).__name__}")
    if colours.itemsize == 2 and _is_big_endian(dataset):
        colours = colours.byteswap()  # pydicom takes the words as little endian ones
    return luminance(colours)


def modality(dataset: Dataset, bits_stored: int, signed: bool) -> np.ndarray | Reject | None:
    """What ModalityLUTSequence makes of each stored value (PS3.3 C.11.1): uint16, or int16 where it is of VR SS.

    None where there is no such sequence, or nothing in it.
    """
    (item,) = sequence_item(dataset, "ModalityLUTSequence") or [Dataset()]
    if not len(item):
        return None
    values = _all_values(bits_stored, signed)
    if isinstance(values, Reject):
        return values
    described = _element(item, "LUTDescriptor")
    if described is None or len(described.value) != 6:
        return Reject(Reason.UNSUPPORTED_PIXELS, "ModalityLUTSequence: LUTDescriptor")
    order = "<" if described.is_little_endian else ">"
    entries, first, bits = struct.unpack(f"{order}3H", described.value)
    entries = entries or 2**16
    data = _element(item, "LUTData")
    if data is None:
        return Reject(Reason.UNSUPPORTED_PIXELS, "ModalityLUTSequence: LUTData")
    # "in a format equivalent to 8 bits allocated when the number of bits for each entry is 8" (C.11.1.1.1); some write
    # a word for each, so the length decides.
    if bits == 8 and len(data.value) < 2 * entries:
        table = np.frombuffer(data.value, np.uint8)
        if data.VR != "OB" and not data.is_little_endian:
            table = table[: len(table) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1)
    else:
        table = np.frombuffer(data.value[: len(data.value) // 2 * 2], f"{order}{'i' if data.VR == 'SS' else 'u'}2")
    if len(table) < entries:
        return Reject(
            Reason.UNSUPPORTED_PIXELS, "ModalityLUTSequence: LUTData has fewer entries than LUTDescriptor says"
        )
    first_value = first - 2**16 if first >= 2**15 and (signed or described.VR == "SS") else first
    table = table[:entries].astype(np.int16 if table.dtype.kind == "i" else np.uint16)
    return table[np.clip(values - first_value, 0, entries - 1)]


def _element(item: Dataset, keyword: str) -> RawDataElement | None:
    """The element with its bytes as they are stored, which pydicom has until it is asked for the value."""
    element = item.get_item(keyword) if keyword in item else None
    return element if isinstance(element, RawDataElement) and element.value else None


def _all_values(bits_stored: int, signed: bool) -> np.ndarray | Reject:
    if bits_stored > _MAX_BITS:
        return Reject(Reason.UNSUPPORTED_PIXELS, "BitsStored: too many for a look-up table")
    smallest = -(2 ** (bits_stored - 1)) if signed else 0
    return np.arange(smallest, smallest + 2**bits_stored, dtype=np.int32)


def _is_big_endian(dataset: Dataset) -> bool:
    return dataset.original_encoding[1] is False
