"""What MLflow's forms of requests hand over, back to the bytes that were sent."""

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseg.data.synthetic import slice_bytes
from rayseg.inference import cells
from rayseg.records import Reason, Reject

DICOM = slice_bytes(0, 64)
TEXT = base64.b64encode(DICOM)


@pytest.mark.parametrize(
    "cell",
    [DICOM, bytearray(DICOM), TEXT, np.bytes_(TEXT), TEXT.decode(), base64.encodebytes(DICOM).decode()],
    ids=["bytes", "bytearray", "base64 as bytes", "of numpy", "as text", "in lines"],
)
def test_bytes_and_base64_are_the_object(cell: Any) -> None:
    assert cells.read(cell) == DICOM


@given(st.binary(min_size=1))
def test_what_is_encoded_comes_back(blob: bytes) -> None:
    assert cells.read(base64.b64encode(blob).decode()) == blob


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, Reason.EMPTY_OBJECT),
        (float("nan"), Reason.EMPTY_OBJECT),
        (5, Reason.NOT_DICOM),
        (["AAAA"], Reason.NOT_DICOM),
        ("slice.dcm?", Reason.NOT_DICOM),
        ("AAA", Reason.NOT_DICOM),
        ("\u00e4", Reason.NOT_DICOM),
    ],
)
def test_what_is_neither_has_a_reason(cell: Any, reason: Reason) -> None:
    answer = cells.read(cell)
    assert isinstance(answer, Reject)
    assert answer.reason == reason
    assert answer.detail
    assert "slice" not in answer.detail, "what was sent is not told"
