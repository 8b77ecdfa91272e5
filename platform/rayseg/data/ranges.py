"""Ranges: pieces of an object's bytes by few requests, side by side."""

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rayseg import storage
from rayseg.retry import tried

_GAP_BYTES = 2**15  # that are read for nothing rather than asking once more


def read(uri: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """Bytes [first, end) of the object at `uri`, for each range; ranges come in ascending order.

    Those that are close to each other come with one request. Of a store several are made at a time.

    Raises:
        FileNotFoundError: no such object.
        OSError: the store kept failing, or the object is shorter.
    """
    files, path = storage.filesystem(uri)
    pieces = _together(ranges)

    def call() -> list[bytes]:
        with files.open_input_file(path) as file:

            def one(piece: tuple[int, int]) -> bytes:
                data: bytes = file.read_at(piece[1] - piece[0], piece[0])
                if len(data) < piece[1] - piece[0]:
                    raise OSError("reading a range: the object ends before it")
                return data

            if len(pieces) == 1 or not uri.startswith("s3://"):
                return [one(piece) for piece in pieces]
            with ThreadPoolExecutor(min(storage.THREADS, len(pieces)), thread_name_prefix="rayseg-read") as pool:
                return list(pool.map(one, pieces))

    data = [memoryview(piece) for piece in tried(call)]
    begins = [first for first, _ in pieces]
    made = []
    for first, end in ranges:
        number = bisect_right(begins, first) - 1
        made.append(data[number][first - begins[number] : end - begins[number]])
    return made


def _together(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges with those joined that are close."""
    pieces: list[tuple[int, int]] = []
    for first, end in ranges:
        if pieces and first - pieces[-1][1] <= _GAP_BYTES:
            pieces[-1] = pieces[-1][0], max(pieces[-1][1], end)
        else:
            pieces.append((first, end))
    return pieces
