"""Near-duplicates among prepared images: one picture under two names, be it re-encoded, scaled or brightened a little.

A fingerprint is the signs of the picture's low frequencies (a perceptual hash by discrete cosine transform, after
Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, with signs in place of a median).
Where two pictures differ in few of its bits they are one: of 575 bits, JPEG of quality 75, a gamma of 0.9 or another
clipping change up to 13, noise of three grey values up to 18, JPEG of quality 30 up to 30. Slices of different
patients differ in 59 or more (2,032 MR slices in 41 groups) or 33 (phantom heads in the bone window, which shows little
but ellipses). Mirrored, rotated or shifted copies are not found.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

MOST_BITS = 20  # that near-duplicates differ in

_GRID = 64  # pixels of the scaled picture, each side
_FREQUENCIES = 24  # each way; without the mean, and with one bit of filling: 576
_BITS = _FREQUENCIES**2
_LEAST_DEVIATION = 16.0  # grey values; air, or a table and little else, is alike for everyone and has no fingerprint


class Pair(NamedTuple):
    """Two rows, by index, whose pictures differ in `bits` of the fingerprint."""

    first: int
    second: int
    bits: int


def fingerprint(image_HWC: np.ndarray) -> bytes | None:
    """The fingerprint (72 bytes) of a uint8 picture, its channels averaged; None where there is nothing to tell."""
    grey = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC.mean(axis=-1).round().astype(np.uint8)
    picture = cv2.resize(grey, (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    if cv2.meanStdDev(picture)[1][0, 0] < _LEAST_DEVIATION:
        return None
    signs = cv2.dct(picture.astype(np.float32))[:_FREQUENCIES, :_FREQUENCIES].ravel() > 0
    signs[0] = False  # the mean
    return np.packbits(signs).tobytes()


def near_duplicates(fingerprints: Sequence[bytes | None], parts: Sequence[str]) -> list[Pair]:
    """Pairs of rows in different parts whose fingerprints differ in at most MOST_BITS bits; all of them are found.

    The bits are cut into MOST_BITS + 1 bands, so two near-duplicates are equal in at least one, and only rows with an
    equal band are compared: far fewer than all pairs, as the bits of a band come from all frequencies. Of equal
    fingerprints one row a part stands for all.

    Args:
        fingerprints: of each row; rows with None are not compared.
        parts: the split of each row.
    """
    names = sorted(set(parts))
    firsts: dict[tuple[bytes, str], int] = {}
    for index, (print_, part) in enumerate(zip(fingerprints, parts, strict=True)):
        if print_ is not None:
            firsts.setdefault((print_, part), index)
    if not firsts:
        return []
    rows = np.fromiter(firsts.values(), np.int64, len(firsts))
    part_of = np.array([names.index(part) for _, part in firsts], np.int8)
    packed = np.frombuffer(b"".join(print_ for print_, _ in firsts), np.uint8).reshape(len(rows), -1)
    words = packed.view(np.uint64)
    mixed = np.unpackbits(packed, axis=1)[:, np.random.default_rng(0).permutation(_BITS)]
    found: dict[tuple[int, int], int] = {}
    for band in np.array_split(mixed, MOST_BITS + 1, axis=1):
        values = band.astype(np.int64) @ (1 << np.arange(band.shape[1], dtype=np.int64))
        order = np.argsort(values, kind="stable")
        values, step = values[order], 0
        here = np.arange(len(order))  # those that have an equal one `step` places on
        while len(here):
            step += 1
            here = here[here + step < len(order)]
            here = here[values[here] == values[here + step]]
            a, b = order[here], order[here + step]
            apart = part_of[a] != part_of[b]
            a, b = a[apart], b[apart]
            bits = np.bitwise_count(words[a] ^ words[b]).sum(axis=1, dtype=np.int64)
            near = bits <= MOST_BITS
            for one, other, count in zip(rows[a[near]], rows[b[near]], bits[near], strict=True):
                found[min(one, other), max(one, other)] = int(count)
    return [Pair(int(first), int(second), bits) for (first, second), bits in sorted(found.items())]
