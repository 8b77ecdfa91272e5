"""Look-up tables from stored values: palettes to colours or their luminance, and modality LUTs to grey values."""

import struct

import numpy as np
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from rayseg.dicom.parsing import Elements, sequence_item
from rayseg.dicom.pixels import luminance
from rayseg.records import Reason, Reject

_COLOURS = ("Red", "Green", "Blue")
_MAX_BITS = 16  # of stored values: a table of 65,536 entries


def palette(dataset: Dataset, elements: Elements, bits_stored: int, signed: bool) -> np.ndarray | Reject:
    """The luminance of each stored value's colour, uint8 or uint16; see `colours`."""
    table = colours(dataset, elements, bits_stored, signed)
    return table if isinstance(table, Reject) else luminance(table)


def colours(dataset: Dataset, elements: Elements, bits_stored: int, signed: bool) -> np.ndarray | Reject:
    """Each stored value's colour (PS3.3 C.7.6.3.1.5, segmented tables C.7.9.2): uint8 or uint16 (values, 3)."""
    for colour in _COLOURS:
        name = f"{colour}PaletteColorLookupTable"
        if not elements.has(f"{name}Descriptor"):
            return Reject(Reason.MISSING_ATTRIBUTE, f"{name}Descriptor")
        if not (elements.has(f"{name}Data") or elements.has(f"Segmented{name}Data")):
            return Reject(Reason.MISSING_ATTRIBUTE, f"{name}Data")
    values = _all_values(bits_stored, signed)
    if isinstance(values, Reject):
        return values
    if not all(elements.has(f"{colour}PaletteColorLookupTableData") for colour in _COLOURS):
        return _of_segments(dataset, values, signed)
    tables = []
    for colour in _COLOURS:
        name = f"{colour}PaletteColorLookupTable"
        table = _table(dataset, f"{name}Descriptor", f"{name}Data", values, signed)
        if table is None:
            return Reject(Reason.UNSUPPORTED_PIXELS, f"{name}Data has fewer entries than {name}Descriptor says")
        tables.append(table)
    return np.stack(tables, axis=-1)


def _of_segments(dataset: Dataset, values: np.ndarray, signed: bool) -> np.ndarray | Reject:
    """A palette of segmented tables."""
    described = _described(dataset, "RedPaletteColorLookupTableDescriptor", signed)
    if described is None:
        return Reject(Reason.UNSUPPORTED_PIXELS, "RedPaletteColorLookupTableDescriptor")
    entries, first, bits = described
    if bits == 8 and entries > 2**8:  # pydicom counts the entries in a byte
        return Reject(Reason.UNSUPPORTED_PIXELS, "RedPaletteColorLookupTableDescriptor: entries of 8 bits in segments")
    try:
        return apply_color_lut(np.clip(values, first, first + entries - 1), dataset)[..., :3]
    except Exception as error:
        return Reject(Reason.UNSUPPORTED_PIXELS, f"SegmentedRedPaletteColorLookupTableData: {type(error).__name__}")


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
    for keyword in ("LUTDescriptor", "LUTData"):
        if keyword not in item:
            return Reject(Reason.UNSUPPORTED_PIXELS, f"ModalityLUTSequence: {keyword}")
    table = _table(item, "LUTDescriptor", "LUTData", values, signed)
    if table is None:
        return Reject(
            Reason.UNSUPPORTED_PIXELS, "ModalityLUTSequence: LUTData has fewer entries than LUTDescriptor says"
        )
    return table.astype(np.uint16) if table.dtype == np.uint8 else table


def _table(item: Dataset, descriptor: str, data: str, values: np.ndarray, signed: bool) -> np.ndarray | None:
    """What a table makes of these stored values: uint8, uint16, or int16 where its data are of VR SS.

    Values before the first entry become what it is, those after the last one what that is. None where the table is
    shorter than its descriptor says.
    """
    described, element = _described(item, descriptor, signed), _element(item, data)
    if described is None or element is None:
        return None
    entries, first, bits = described
    # "in a format equivalent to 8 bits allocated when the number of bits for each entry is 8" (C.11.1.1.1 and
    # C.7.6.3.1.6); some write a word for each, so the length decides.
    if bits == 8 and len(element.value) < 2 * entries:
        table = np.frombuffer(element.value, np.uint8)
        if element.VR != "OB" and not element.is_little_endian:
            table = table[: len(table) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1)
    else:
        order, kind = "<" if element.is_little_endian else ">", "i" if element.VR == "SS" else "u"
        table = np.frombuffer(element.value[: len(element.value) // 2 * 2], f"{order}{kind}2")
        table = table.astype(table.dtype.newbyteorder("="))
    return None if len(table) < entries else table[np.clip(values - first, 0, entries - 1)]


def _described(item: Dataset, keyword: str, signed: bool) -> tuple[int, int, int] | None:
    """Entries, the stored value of the first one, and bits of an entry."""
    if keyword not in item:
        return None
    element = item.get_item(keyword)
    if isinstance(element, RawDataElement):
        if len(element.value or b"") != 6:
            return None
        entries, first, bits = struct.unpack(f"{'<' if element.is_little_endian else '>'}3H", element.value)
    else:  # pydicom was asked for it already
        entries, first, bits = (int(value) % 2**16 for value in element.value)
    is_negative = first >= 2**15 and (signed or element.VR == "SS")
    return entries or 2**16, first - 2**16 if is_negative else first, bits


def _element(item: Dataset, keyword: str) -> RawDataElement | None:
    """The element with its bytes as they are stored, which pydicom has until it is asked for the value."""
    element = item.get_item(keyword) if keyword in item else None
    return element if isinstance(element, RawDataElement) and element.value else None


def _all_values(bits_stored: int, signed: bool) -> np.ndarray | Reject:
    if bits_stored > _MAX_BITS:
        return Reject(Reason.UNSUPPORTED_PIXELS, "BitsStored: too many for a look-up table")
    smallest = -(2 ** (bits_stored - 1)) if signed else 0
    return np.arange(smallest, smallest + 2**bits_stored, dtype=np.int32)
