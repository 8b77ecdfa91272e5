"""Chunks: a prepared volume as one object, written plane by plane and read by patch.

The object is an Arrow file. A record batch, compressed by itself (zstd), holds a chunk: a box of float16 image and
uint8 mask as raw bytes, C-ordered; boxes stand along width first, then height, then depth, and are cut off where the
volume ends. The last batch holds no chunk but what is told of the volume: JSON, the sizes of the batches before, and
where the classes are. So a reader who knows that asks for the bytes of the chunks that a patch needs and for nothing
else, and any Arrow library can read the file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from rayseg import storage
from rayseg.data import ranges

_SCHEMA = pa.schema(
    [
        *(("image", pa.binary()), ("mask", pa.binary())),  # of a chunk
        *(("sizes", pa.binary()), ("places", pa.binary()), ("told", pa.string())),  # of the last batch
    ]
)
_CODEC = ("zstd", 1)
_DEEP, _FLAT = (32, 32, 64), (1, 64, 64)  # voxels of a chunk: along width one request gets several at once
_INDICES = 1024  # of volumes that a process keeps


def edges(patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """The size of chunks for patches of a size: no deeper than a patch."""
    return _FLAT if patch[0] == 1 else (min(_DEEP[0], patch[0]), *_DEEP[1:])


class Writer:
    """Writes a volume into a local file; only as many planes are in memory as a chunk is deep."""

    def __init__(self, path: Path, shape: tuple[int, int, int], edges: tuple[int, int, int]) -> None:
        """`shape` is of the volume (D, H, W)."""
        self._shape, self._edges = shape, edges
        self._sink = pa.OSFile(str(path), "wb")
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec(*_CODEC))
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA, options=options)
        self._writer.write_batch(pa.RecordBatch.from_pylist([], schema=_SCHEMA))  # the schema is written with the first
        self._begin = self._sink.tell()
        self._sizes: list[int] = []
        self._planes: list[tuple[np.ndarray, np.ndarray]] = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        self._sink.close()

    def add(self, image_HW: np.ndarray, mask_HW: np.ndarray) -> None:
        """The next plane: float16 and uint8."""
        assert image_HW.dtype == np.float16
        assert mask_HW.dtype == np.uint8
        self._planes.append((image_HW, mask_HW))
        if len(self._planes) == self._edges[0]:
            self._write()

    def finish(self, told: dict[str, Any], places: np.ndarray) -> None:
        """After the last plane: what is told of the volume, and int32 places that go with it."""
        self._write()
        values = {"shape": self._shape, "edges": self._edges, "begin": self._begin, **told}
        self._batch(
            sizes=np.array(self._sizes, np.uint32).tobytes(),
            places=places.astype(np.int32).tobytes(),
            told=json.dumps(values, sort_keys=True),
        )

    def _write(self) -> None:
        if not self._planes:
            return
        image, mask = (np.stack(planes) for planes in zip(*self._planes, strict=True))
        self._planes = []
        for top, left in product(range(0, self._shape[1], self._edges[1]), range(0, self._shape[2], self._edges[2])):
            box = slice(None), slice(top, top + self._edges[1]), slice(left, left + self._edges[2])
            before = self._sink.tell()
            self._batch(image=image[box].tobytes(), mask=mask[box].tobytes())
            self._sizes.append(self._sink.tell() - before)

    def _batch(self, **values: Any) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist([values], schema=_SCHEMA))


@dataclass(frozen=True, eq=False)
class Index:
    """What the last batch of a volume's file tells."""

    shape: tuple[int, int, int]
    edges: tuple[int, int, int]
    ends: np.ndarray  # int64 (chunks + 1,): where the bytes of each chunk begin and end
    places: np.ndarray  # int32
    told: dict[str, Any]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Of the voxels, (D, H, W)."""
        depth, height, width = self.told["spacing_mm"]
        return depth, height, width

    def read(self, uri: str, first: Sequence[int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The box of `size` from voxel `first` on: float16 image and uint8 mask (D, H, W), 0 beyond the volume."""
        image, mask = np.zeros(size, np.float16), np.zeros(size, np.uint8)
        begin = [max(0, low) for low in first]
        end = [min(length, low + count) for length, low, count in zip(self.shape, first, size, strict=True)]
        if any(low >= high for low, high in zip(begin, end, strict=True)):
            return image, mask
        counts = [-(-length // edge) for length, edge in zip(self.shape, self.edges, strict=True)]
        wanted = [range(low // edge, -(-high // edge)) for low, high, edge in zip(begin, end, self.edges, strict=True)]
        boxes = list(product(*wanted))
        numbers = [(box[0] * counts[1] + box[1]) * counts[2] + box[2] for box in boxes]
        spans = [(int(self.ends[number]), int(self.ends[number + 1])) for number in numbers]
        for box, data in zip(boxes, ranges.read(uri, spans), strict=True):
            low = [number * edge for number, edge in zip(box, self.edges, strict=True)]
            shape = [min(edge, length - at) for edge, length, at in zip(self.edges, self.shape, low, strict=True)]
            source, target = [], []
            for axis in range(3):
                start, stop = max(low[axis], begin[axis]), min(low[axis] + shape[axis], end[axis])
                source.append(slice(start - low[axis], stop - low[axis]))
                target.append(slice(start - first[axis], stop - first[axis]))
            batch = pa.ipc.read_record_batch(pa.py_buffer(data), _SCHEMA)
            for made, name in ((image, "image"), (mask, "mask")):
                values = np.frombuffer(batch[name][0].as_buffer(), made.dtype).reshape(shape)
                made[tuple(target)] = values[tuple(source)]
        return image, mask


def read_index(uri: str) -> Index:
    """What the volume's file at `uri` tells; raises ValueError where it is no whole one."""
    try:
        (batch,) = storage.read_batches(uri, [-1])
        told = json.loads(batch["told"][0].as_py())
        sizes = np.frombuffer(batch["sizes"][0].as_py(), np.uint32).astype(np.int64)
        places = np.frombuffer(batch["places"][0].as_py(), np.int32)
        ends = told.pop("begin") + np.concatenate([[0], np.cumsum(sizes)])
        return Index(tuple(told.pop("shape")), tuple(told.pop("edges")), ends, places, told)
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"prepared: {uri} is no whole volume ({type(error).__name__}); prepare again") from None


@lru_cache(maxsize=_INDICES)
def index(uri: str) -> Index:
    """`read_index` once a process: names of volumes' files are of their content."""
    return read_index(uri)
