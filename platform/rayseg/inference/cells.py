"""Cells of the table that MLflow hands to a model: bytes of an object, or their base64, by the form of the request.

`mlflow models serve` decodes the base64 of `dataframe_split` and `dataframe_records` by the model's signature. That of
`inputs` and `instances` it hands over as bytes of the text, that of CSV as text (MLflow 3.17); Parquet holds bytes.
"""

import base64
import binascii
import re
from typing import Any

from rayseg.records import Reason, Reject

# No object that can be read is of these bytes alone: DICOM, PNG, TIFF, JPEG and gzip all begin with others.
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]+=*\s*")


def read(cell: Any) -> bytes | Reject:
    """The bytes of a cell's object, or why there are none."""
    if isinstance(cell, str):
        cell = cell.encode()
        if cell.strip() and not _BASE64.fullmatch(cell):
            return Reject(Reason.NOT_DICOM, "text that is not base64")
    if cell is None or (isinstance(cell, float) and cell != cell):  # pandas' empty cell is NaN
        return Reject(Reason.EMPTY_OBJECT, "an empty cell")
    if not isinstance(cell, bytes | bytearray | memoryview):
        return Reject(Reason.NOT_DICOM, f"bytes or their base64 expected, got {type(cell).__name__}")
    blob = bytes(cell)
    if not _BASE64.fullmatch(blob):
        return blob
    try:
        return base64.b64decode(blob)
    except binascii.Error:
        return Reject(Reason.NOT_DICOM, "base64 that is cut short")
