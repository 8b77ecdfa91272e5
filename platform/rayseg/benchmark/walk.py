"""Inference on volumes: an archive run against the same engine on the same windows in memory."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rayseg.benchmark.data import figure
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout
from rayseg.data.volume import Grid, VolumePreprocess
from rayseg.dicom.reading import Slice, read_slice
from rayseg.geometry.windows import Windows
from rayseg.inference.archive import SegmentConfig, segment
from rayseg.models.engine import Engine, compile_openvino
from rayseg.tracking import bundle, registry, runs

_PATIENTS, _SLICES, _SIZE = 4, 40, 256  # the archive
_ENGINE = Engine("openvino", "float32")
# Saves a network with weights that were never trained; in a process of its own, as TensorFlow takes cores and memory.
_SAVE = """
import sys
from rayseg.data import phantom_volumes
from rayseg.data.intensity import Intensity
from rayseg.data.labels import Labels
from rayseg.data.volume import VolumePreprocess
from rayseg.models.network import build_network, portable
from rayseg.models.presets import NetworkConfig
from rayseg.tracking import bundle
preprocess = VolumePreprocess((4.0, 1.2, 1.2), (16, 64, 64), Intensity("z_score"))
config = NetworkConfig("unet3d-plain", widths=(16, 32, 64), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
                       strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), deep_supervision=0)
model = portable(build_network(config, (*preprocess.patch, 1)))
example, *golden = phantom_volumes.of_bundle(preprocess)
bundle.save(sys.argv[1], model, preprocess, Labels(), 0.5, example, golden)
"""


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """`volume_vs_bare_forward`: voxels a second of a run of the segment job, over those of the engine alone.

    Voxels are those of the network's grid. The run reads DICOM, resamples, averages windows and writes DICOM SEGs; the
    engine alone has the run's windows in memory, as many threads, and nothing else to do. Both load the network.
    """
    cores = os.cpu_count() or 2
    os.environ.setdefault("RAYSEG_PSEUDONYM_KEY", "benchmark")
    tracking_uri, source, manifest = (
        f"sqlite:///{folder}/mlflow.db",
        folder / "archive",
        str(folder / "manifest.parquet"),
    )
    synthetic.write_studies(str(source), patients=_PATIENTS, slices=_SLICES, size=_SIZE, masks=False)
    saved = folder / "bundle"
    subprocess.run([sys.executable, "-c", _SAVE, str(saved)], check=True, capture_output=True)
    run_id = runs.start(tracking_uri, "benchmark", "volumes", {}, {})
    registry.register(tracking_uri, run_id, saved, "volumes", "")
    catalog(CatalogConfig(str(source), manifest, Layout()))
    grids, patches = _windows(saved, source)
    voxels = float(sum(np.prod(grid.shape) for grid in grids))
    run_s, bare_s = [], []
    for repeat in range(repeats):
        began = time.perf_counter()
        result = segment(
            SegmentConfig(
                "models:/volumes/1", tracking_uri, str(folder / f"out-{repeat}"), manifest, engine=_ENGINE,
                cpus_per_actor=cores,
            )
        )  # fmt: skip
        run_s.append(time.perf_counter() - began)
        assert result.segmented == _PATIENTS, result
        bare_s.append(_bare_s(saved, patches, cores))
    return {
        "volume_run_voxels_per_s": figure([voxels / seconds for seconds in run_s]),
        "volume_bare_voxels_per_s": figure([voxels / seconds for seconds in bare_s]),
        "volume_vs_bare_forward": figure([bare / run for bare, run in zip(bare_s, run_s, strict=True)]),
    }


def _windows(saved: Path, source: Path) -> tuple[list[Grid], list[np.ndarray]]:
    """The grids of all series, and all of their windows."""
    preprocess = bundle.load(saved).preprocess
    assert isinstance(preprocess, VolumePreprocess)
    grids: list[Grid] = []
    patches: list[np.ndarray] = []
    for patient in sorted(path for path in (source / "images").iterdir() if path.is_dir()):
        read = [read_slice(path.read_bytes()) for path in sorted(patient.iterdir())]
        slices = [one for one in read if isinstance(one, Slice)]
        grid = preprocess.grid([one.header.geometry for one in slices if one.header])
        assert isinstance(grid, Grid)
        image = grid.image([slices[place] for place in grid.order], preprocess.levels(slices))
        windows = Windows(grid.shape, preprocess.patch, preprocess.step, preprocess.sigma)
        grids.append(grid)
        patches += windows.patches(plane_HW[..., np.newaxis] for plane_HW in image)
    return grids, patches


def _bare_s(saved: Path, patches: list[np.ndarray], threads: int) -> float:
    began = time.perf_counter()
    compiled = compile_openvino(bundle.load(saved).network, _ENGINE.precision, threads)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda patch_DHWC: compiled.exact(patch_DHWC[np.newaxis]), patches):
            pass
    return time.perf_counter() - began
