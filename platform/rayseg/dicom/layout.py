"""The pixel data's layout as the data set tells it (PS3.5 section 8), where it is one that we decode."""

import numpy as np
from pydicom import uid

from rayseg.dicom import pixels, tables
from rayseg.dicom.parsing import Elements, Parsed
from rayseg.dicom.pixels import OF_CODESTREAMS, OF_WORDS, Layout
from rayseg.records import Reason, Reject


def read(parsed: Parsed, elements: Elements) -> Layout | Reject:
    """Takes the data set at its word; bits and signs are checked only where the frames do not say them themselves."""
    syntax = parsed.transfer_syntax_uid
    if syntax not in OF_WORDS and syntax not in OF_CODESTREAMS:
        name = uid.UID(syntax).name  # the UID itself where it is not registered: that could be anything
        return Reject(Reason.UNSUPPORTED_TRANSFER_SYNTAX, name if name != syntax else "not a registered one")
    samples = elements.integer("SamplesPerPixel", 1)
    photometric = elements.text("PhotometricInterpretation") or ("MONOCHROME2" if samples == 1 else "RGB")
    if samples not in (1, 3):
        return Reject(Reason.UNSUPPORTED_PIXELS, "SamplesPerPixel")
    if photometric not in (pixels.GREY if samples == 1 else pixels.COLOUR):
        return Reject(Reason.UNSUPPORTED_PIXELS, "PhotometricInterpretation")
    allocated = elements.integer("BitsAllocated", 0)
    stored = elements.integer("BitsStored", allocated)
    signed = elements.integer("PixelRepresentation", 0) == 1
    high = elements.integer("HighBit", stored - 1)
    if syntax in OF_CODESTREAMS:
        stored = stored if 1 <= stored <= allocated <= 32 else 1
        signed = signed and samples == 1
    else:
        refusal = _refusal(samples, allocated, stored, signed)
        if refusal is None and photometric == "YBR_FULL_422" and syntax != uid.RLELossless:
            halves = allocated == 8 and elements.integer("Columns", 0) % 2 == 0
            refusal = None if halves else Reject(Reason.UNSUPPORTED_PIXELS, "PhotometricInterpretation")
        if refusal is not None:
            return refusal
    # A codestream may be of more bits than are told.
    of_table = allocated if syntax in OF_CODESTREAMS and stored <= allocated <= 16 else stored
    table: np.ndarray | Reject | None = None
    if photometric == "PALETTE COLOR":
        table = tables.palette(parsed.dataset, elements, of_table, signed)
    elif samples == 1 and elements.has("ModalityLUTSequence"):
        table = tables.modality(parsed.dataset, of_table, signed)
    if isinstance(table, Reject):
        return table
    value = elements.integer("PixelPaddingValue", None) if photometric.startswith("MONOCHROME") else None
    padding = None if value is None else (value, elements.integer("PixelPaddingRangeLimit", value))
    return Layout(
        transfer_syntax_uid=syntax,
        rows=elements.integer("Rows", 0),
        columns=elements.integer("Columns", 0),
        samples=samples,
        photometric_interpretation=photometric,
        planar=elements.integer("PlanarConfiguration", 0) == 1,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high if stored - 1 <= high < allocated else stored - 1,
        signed=signed,
        padding=padding,
        words_swapped=parsed.pixel_vr == "OW",
        table=table,
        table_first=-(2 ** (of_table - 1)) if signed else 0,
    )


def _refusal(samples: int, allocated: int, stored: int, signed: bool) -> Reject | None:
    """Why words are not decoded, or None."""
    if allocated < 1:
        return Reject(Reason.MISSING_ATTRIBUTE, "BitsAllocated")
    if allocated not in ((1, 8, 16, 32) if samples == 1 else (8, 16, 32)):
        return Reject(Reason.UNSUPPORTED_PIXELS, "BitsAllocated")
    if not 1 <= stored <= allocated:
        return Reject(Reason.UNSUPPORTED_PIXELS, "BitsStored")
    if signed and (samples > 1 or allocated == 1):
        return Reject(Reason.UNSUPPORTED_PIXELS, "PixelRepresentation")
    return None
