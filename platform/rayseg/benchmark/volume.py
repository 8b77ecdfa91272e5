"""Volumes: what they cost beside what one would else take."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rayseg.benchmark import walk
from rayseg.benchmark.data import figure

_SHAPE, _SPACING_MM, _NETWORK_MM = (300, 512, 512), (1.5, 0.7, 0.7), 1.0
_NETWORK_SHAPE = (450, 358, 358)
_SIDE_BY_SIDE = 0.01  # of the range of values: how far apart results may lie on the mean
# A series there and back, each way in a process of its own, so that the peak of memory is its own. It ends with a mask
# of each slice. The slices lie in a file: scipy and scikit-image take an array, and ours one slice at a time. Memory is
# what the process had at most, less what it had after its imports (VmHWM: ru_maxrss begins with its parent's).
_RESAMPLE = """
import json, sys, time
import numpy as np
way, file, looks = sys.argv[1:4]
shape, spacing_mm, network_mm, network_shape, threads = map(json.loads, sys.argv[4:])
def mib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":")) / 1024
def read():
    return np.fromfile(file, np.int16).reshape(shape)
def scipy():
    volume = read()
    there = ndimage.zoom(volume, [new / old for new, old in zip(network_shape, shape)], np.float32, 1, "nearest",
                         grid_mode=True)
    del volume
    back = ndimage.zoom(there, [old / new for new, old in zip(network_shape, shape)], np.float32, 1, "nearest",
                        grid_mode=True)
    return there, back > 500, back[::30]
def skimage():
    there = resize(read(), network_shape, 1, "edge", preserve_range=True)
    back = resize(there, shape, 1, "edge", preserve_range=True)
    return there, back > 500, back[::30]
def rayseg():
    lies = [Geometry(*shape[1:], tuple(spacing_mm[1:]), image_position_mm=(0.0, 0.0, number * spacing_mm[0]),
                     image_orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0)) for number in range(shape[0])]
    def slices():
        pixels = shape[1] * shape[2]
        for number in range(shape[0]):
            stored = np.fromfile(file, np.int16, pixels, offset=2 * pixels * number).reshape(shape[1:])
            yield Slice(stored, 1.0, 0.0, None, lies[number])
    grid = VolumePreprocess((network_mm,) * 3, (64, 64, 64)).grid(lies)
    there = np.empty(grid.shape, np.float16)
    for depth, plane in enumerate(grid.image(slices(), Levels(-np.inf, np.inf, 0.0, 1.0), threads)):
        there[depth] = plane
    mask, kept = np.empty(shape, bool), []
    slabs = (cv2.add(plane, 0.0, dtype=cv2.CV_32F)[np.newaxis, np.newaxis] for plane in there)
    for number, (plane,) in enumerate(grid.restore(slabs, threads)):
        np.greater(plane, 500, out=mask[number])
        if number % 30 == 0:
            kept.append(plane)
    return there, mask, np.stack(kept)
if way == "scipy":
    from scipy import ndimage
elif way == "skimage":
    from skimage.transform import resize
else:
    import cv2
    from rayseg.data.intensity import Levels
    from rayseg.data.volume import VolumePreprocess
    from rayseg.dicom.reading import Slice
    from rayseg.geometry.grid import Geometry
before = mib("VmRSS")
began, began_cpu = time.perf_counter(), time.process_time()
there, mask, back = {"scipy": scipy, "skimage": skimage}.get(way, rayseg)()
took = time.perf_counter() - began, time.process_time() - began_cpu, mib("VmHWM") - before
np.savez(looks, there=there[::45].astype(np.float32), back=back.astype(np.float32), mask=mask[::30])
print(json.dumps(took))
"""
_WAYS = {"rayseg": True, "rayseg.one_thread": False, "scipy": False, "skimage": False}


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """All figures of the suite; `folder` is for its files."""
    return _resampling(folder, repeats) | walk.measure(folder, repeats)


def _resampling(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds, those of CPU and MiB of 512x512x300 of 0.7x0.7x1.5 mm to 1 mm and back, and how much more others take.

    Others are `scipy.ndimage.zoom`, linear, and `skimage.transform.resize`, linear with its anti-aliasing. Results are
    equal within interpolation, else this fails. `rayseg` uses all cores, as the others cannot.
    """
    file = folder / "volume"
    _smooth().tofile(file)
    measured: dict[str, list[tuple[float, float, float]]] = {way: [] for way in _WAYS}
    for repeat in range(repeats):
        for way, with_threads in _WAYS.items():
            looks = folder / f"{way}-{repeat}.npz"
            given = (_SHAPE, _SPACING_MM, _NETWORK_MM, _NETWORK_SHAPE, (os.cpu_count() or 2) if with_threads else 1)
            arguments = way, str(file), str(looks), *map(json.dumps, given)
            done = subprocess.run([sys.executable, "-c", _RESAMPLE, *arguments], stdout=subprocess.PIPE, check=True)
            measured[way].append(json.loads(done.stdout.splitlines()[-1]))
    for way in ("scipy", "skimage"):
        _compare(folder / "rayseg-0.npz", folder / f"{way}-0.npz")
    figures: dict[str, Any] = {}
    for number, name in enumerate(("s", "cpu_s", "mib")):
        values = {way: [of_repeat[number] for of_repeat in of_way] for way, of_way in measured.items()}
        figures |= {f"resample_{name}.{way}": figure(of_way) for way, of_way in values.items()}
        for other in ("scipy", "skimage"):
            pairs = zip(values[other], values["rayseg"], strict=True)
            figures[f"resample_{name}_vs.{other}"] = figure([theirs / ours for theirs, ours in pairs])
    return figures


def _smooth() -> np.ndarray:
    """int16 values within +-1000 that change little from one sample to the next, and not alike along any two axes."""
    depth, rows, columns = (np.arange(count) * mm for count, mm in zip(_SHAPE, _SPACING_MM, strict=True))
    waves = [np.sin(rows[:, np.newaxis] / 31 + columns / 47 + mm / 23) for mm in depth]
    return np.rint(1000 * np.stack(waves)).astype(np.int16)


def _compare(ours: Path, theirs: Path) -> None:
    with np.load(ours) as one, np.load(theirs) as other:
        for name in one.files:
            off = np.abs(one[name].astype(np.float64) - other[name]).mean()
            most = _SIDE_BY_SIDE * (1 if name == "mask" else 2000)
            assert off < most, f"{theirs.stem}: {name} lies {off:.3g} apart on the mean, over {most:g}"
