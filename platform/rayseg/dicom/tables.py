"""Look-up tables from stored values to grey ones: palettes, as the luminance of their colours, and modality LUTs."""

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from rayseg.dicom.parsing import Elements
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


def modality(dataset: Dataset, bits_stored: int, signed: bool) -> np.ndarray | Reject:
    """What ModalityLUTSequence makes of each stored value (PS3.3 C.11.1): uint16."""
    values = _all_values(bits_stored, signed)
    if isinstance(values, Reject):
        return values
    try:
        item = dataset["ModalityLUTSequence"].value[0]
        entries, first, _ = (int(number) & 0xFFFF for number in item.LUTDescriptor)
        table = item.LUTData
        if isinstance(table, bytes):
            table = np.frombuffer(table, ">u2" if _is_big_endian(dataset) else "<u2")
        table = np.asarray(table, np.uint16)[: entries or 2**16]
    except Exception as error:
        return Reject(Reason.UNSUPPORTED_PIXELS, f"ModalityLUTSequence: {type(error).__name__}")
    if not len(table):
        return Reject(Reason.MISSING_ATTRIBUTE, "LUTData")
    first_value = first - 2**16 if signed and first >= 2**15 else first
    return table[np.clip(values - first_value, 0, len(table) - 1)]


def _all_values(bits_stored: int, signed: bool) -> np.ndarray | Reject:
    if bits_stored > _MAX_BITS:
        return Reject(Reason.UNSUPPORTED_PIXELS, "BitsStored: too many for a look-up table")
    smallest = -(2 ** (bits_stored - 1)) if signed else 0
    return np.arange(smallest, smallest + 2**bits_stored, dtype=np.int32)


def _is_big_endian(dataset: Dataset) -> bool:
    return dataset.original_encoding[1] is False
