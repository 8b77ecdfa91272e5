"""An encoder of lossless JPEG (ITU-T T.81 annex H), slow and plain, that writes what other encoders do not."""

import struct
from collections.abc import Sequence

import numpy as np

Text = list[str]


def encode(
    samples: np.ndarray,
    bits: int,
    *,
    predictor: int = 1,
    transform: int = 0,
    restart_rows: int = 0,
    low_bits: bool = False,
    ids: Sequence[int] = (1, 2, 3),
    segments: bytes = b"",
) -> bytes:
    """A codestream of one scan (process 14), its components interleaved.

    Args:
        samples: unsigned (rows, columns) or (rows, columns, components), below 2^bits.
        bits: the precision, 2 to 16.
        predictor: the selection value, table H.1.
        transform: the point transform; so many low bits are lost.
        restart_rows: rows between restart markers; 0 for none.
        low_bits: every other difference is told as that of the other sign with the same low `bits` bits.
        ids: component identifiers.
        segments: that stand before the frame header.
    """
    values_HWC = np.asarray(samples, np.int64).reshape(*samples.shape[:2], -1) >> transform
    rows, columns, components = values_HWC.shape
    start = 1 << (bits - transform - 1)
    intervals: list[Text] = []
    for row in range(rows):
        first = row == 0 or (restart_rows > 0 and row % restart_rows == 0)
        if first:
            intervals.append([])
        for column in range(columns):
            for k in range(components):
                plane = values_HWC[:, :, k]
                difference = int(plane[row, column]) - _predicted(plane, row, column, predictor, first, start)
                if low_bits and (row + column) % 2:
                    difference = _other_sign(difference, bits - transform)
                intervals[-1].append(_code(difference))
    scan = b""
    for number, text in enumerate(intervals):
        scan += (struct.pack(">BB", 0xFF, 0xD0 + (number - 1) % 8) if number else b"") + _packed("".join(text))
    lengths = bytes(4) + bytes([17]) + bytes(11)  # seventeen categories of five bits each: none is all ones
    table = struct.pack(">BBHB", 0xFF, 0xC4, 19 + 17, 0) + lengths + bytes(range(17))
    frame = struct.pack(">BBHBHHB", 0xFF, 0xC3, 8 + 3 * components, bits, rows, columns, components)
    frame += b"".join(bytes([ids[k], 0x11, 0]) for k in range(components))
    restart = struct.pack(">BBHH", 0xFF, 0xDD, 4, restart_rows * columns) if restart_rows else b""
    header = struct.pack(">BBHB", 0xFF, 0xDA, 6 + 2 * components, components)
    header += b"".join(bytes([ids[k], 0]) for k in range(components)) + bytes([predictor, 0, transform])
    return b"\xff\xd8" + segments + table + frame + restart + header + scan + b"\xff\xd9"


def _predicted(plane: np.ndarray, row: int, column: int, predictor: int, first: bool, start: int) -> int:
    """H.1.2.1: the middle value, then along the first row, down the first column, elsewhere by the selection value."""
    if first:
        return int(plane[row, column - 1]) if column else start
    above = int(plane[row - 1, column])
    if not column:
        return above
    left, corner = int(plane[row, column - 1]), int(plane[row - 1, column - 1])
    return (
        left,
        above,
        corner,
        left + above - corner,
        left + ((above - corner) >> 1),
        above + ((left - corner) >> 1),
        (left + above) >> 1,
    )[predictor - 1]


def _other_sign(difference: int, bits: int) -> int:
    other = difference - 2**bits if difference > 0 else difference + 2**bits
    return other if difference and abs(other) < 2**15 else difference


def _code(difference: int) -> str:
    """The category in five bits, then the difference's own (F.1.2.1), modulo 2^16 (H.1.2.1)."""
    difference = (difference + 2**15 - 1) % 2**16 - 2**15 + 1
    size = abs(difference).bit_length()
    if size in (0, 16):
        return f"{size:05b}"
    return f"{size:05b}{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}"


def _packed(text: str) -> bytes:
    text += "1" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
