"""What a long series takes: `python -m tests.volume_memory SLICES CHANNELS GRID_MM PATCH LIMIT_BYTES` prints JSON.

A CT of 512x512 pixels of 0.8 mm, a slice each millimetre, made up slice by slice; the network is three products.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np

from rayseg.data.intensity import Intensity
from rayseg.data.labels import Labels
from rayseg.data.volume import VolumePreprocess
from rayseg.dicom.reading import Slice
from rayseg.geometry.grid import Geometry
from rayseg.inference.predictor import _greatest_memory_mb
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.models.engine import Compiled, Network
from rayseg.records import Reject
from rayseg.tracking.bundle import Bundle

SIDE = 512


def slices(count: int) -> Iterator[Slice]:
    """Noise that moves from slice to slice, each with an array of its own."""
    noise = np.random.default_rng(0).integers(-500, 900, (SIDE, SIDE)).astype(np.int16)
    for number in range(count):
        place = Geometry(SIDE, SIDE, (0.8, 0.8), 1.0, (0.0, 0.0, float(number)), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
        yield Slice(np.roll(noise, number, axis=0), 1.0, 0.0, None, place)


def main(count: int, channels: int, grid_mm: float, patch: int, limit_bytes: int) -> None:
    """Segments the series, where the process may not have more memory of its own than `limit_bytes`."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    def network(image_NDHWC: np.ndarray) -> np.ndarray:
        made = np.empty((*image_NDHWC.shape[:4], channels), np.float32)
        made[...] = 1 / channels
        made[..., 1] += image_NDHWC[..., 0]
        return made

    spacing_mm = (max(grid_mm, 1.0), grid_mm, grid_mm)
    intensity = Intensity("ct", low=-1000.0, high=1000.0, mean=0.0, deviation=1000.0)
    preprocess = VolumePreprocess(spacing_mm, (patch, patch, patch), intensity, step=1.0)
    labels = Labels(tuple(f"class {number}" for number in range(1, channels)))
    bundle = Bundle(Network(b"", b""), preprocess, labels, 0.5, "", b"")
    predictor = VolumePredictor([bundle], [Compiled(network, None, "numpy")], threads=2)
    began, found = time.monotonic(), 0
    for _, judged in predictor.judge_series(slices(count)):
        assert not isinstance(judged, Reject), judged
        found += int(judged.mask.any())
    told = {"slices": found, "memory_mb": _greatest_memory_mb(), "seconds": time.monotonic() - began}
    print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
