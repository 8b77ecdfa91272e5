"""The pictures of a long series, compressed: a mask is background for the most part."""

import zlib
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

_FAST = 1


class Packed(Sequence[np.ndarray]):
    """A sequence of uint8 arrays that makes each anew when it is asked for it."""

    def __init__(self, arrays: Iterable[np.ndarray] = ()) -> None:
        self._packed: list[tuple[bytes, tuple[int, ...]]] = []
        for array in arrays:
            self.append(array)

    def append(self, array: np.ndarray) -> None:
        """Takes an array of any shape."""
        assert array.dtype == np.uint8
        self._packed.append((zlib.compress(array.tobytes(), _FAST), array.shape))

    @classmethod
    def of_cells(cls, cells: Iterable[tuple[bytes, tuple[int, ...]]]) -> "Packed":
        """Of what `cells` gives."""
        packed = cls()
        packed._packed.extend(cells)
        return packed

    @property
    def cells(self) -> Sequence[tuple[bytes, tuple[int, ...]]]:
        """Each array's bytes (C order, zlib), and its shape."""
        return tuple(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, place: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        data, shape = self._packed[place]
        return np.frombuffer(zlib.decompress(data), np.uint8).reshape(shape)
